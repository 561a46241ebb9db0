"""Training throughput that the reference published, in tokens per second and device: facts to compare a run with.

One row per preset and sequence length: nodes x devices per node, then the reference's devices, a newer generation of
them, and the GPU system that it compares itself with; - where nothing was published. Layouts and batch sizes differ.
"""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Throughput:
    """Tokens per second and device of one published run; None where there is no figure."""

    preset: str
    sequence: str
    nodes_x_devices: str
    device: int | None
    newer_device: int | None
    gpu_system: int | None


_ROWS = """
aquila-7b 2K 1x8 2849 - 2874
aquila2-7b 2K 1x8 3323 - 2673
aquila2-34b 4K 2x8 854 - 732
baichuan-7b 4K 1x8 2685 - 2036
baichuan-13b 4K 1x8 1213 - 862
baichuan2-7b 4K 1x8 2664 - 3969
baichuan2-13b 4K 1x8 1754 - 2062
bloom-7b1 2K 1x8 2034 - 2525
bloom-176b 2K 12x8 100 - 107
chatglm3-6b 8K 1x8 4611 - 4543
chatglm3-6b 32K 1x8 2650 - 2887
chatglm3-6b 64K 2x8 1724 - 2097
glm4-9b 8K 1x8 2221 - 2708
glm4-9b 32K 2x8 1482 - 1752
codellama-34b 4K 2x8 902 - 762
internlm-7b 2K 1x8 2776 - 2854
internlm-65b 2K 4x8 341 - 414
internlm2-20b 4K 1x8 1141 - 1348
internlm2-20b 32K 1x8 4982 - 5476
llama-7b 2K 1x8 3600 - 3804
llama-13b 2K 1x8 1895 - 2012
llama-33b 2K 4x8 621 - 776
llama-65b 2K 4x8 348 - 426
llama2-7b 4K 1x8 4733 - 3850
llama2-13b 4K 1x8 2209 - 1920
llama2-34b 4K 2x8 810 - 796
llama2-70b 4K 4x8 441 - 430
llama3-8b 8K 1x8 2400 - 2674
llama3-70b 8K 8x8 353 - 355
llama3.1-8b 8K 1x8 2280 - 2520
llama3.1-8b 128K 4x8 1297 - -
llama3.1-70b 8K 4x8 399 - -
llama3.2-1b 8K 1x8 15408 - 18941
llama3.2-3b 8K 1x8 6290 - 6386
qwen-7b 8K 1x8 2499 - 2867
qwen-14b 2K 1x8 1560 - 1578
qwen-72b 8K 16x8 285 - 345
qwen1.5-0.5b 8K 1x8 23239 - 25306
qwen1.5-1.8b 8K 1x8 12603 - 12181
qwen1.5-4b 8K 1x8 5221 - 5328
qwen1.5-7b 8K 1x8 2951 - 2621
qwen1.5-14b 8K 1x8 1760 - 1702
qwen1.5-32b 8K 4x8 768 - 708
qwen1.5-72b 8K 8x8 339 - 317
qwen1.5-110b 8K 8x8 223 - -
codeqwen1.5-7b 8K 1x8 3146 - 3866
qwen2-0.5b 4K 1x8 28618 - 34859
qwen2-0.5b 32K 1x8 11338 - -
qwen2-1.5b 4K 1x8 15456 - 15603
qwen2-1.5b 32K 1x8 7281 - 8538
qwen2-7b 4K 1x8 4034 - 4241
qwen2-7b 32K 1x8 2040 - 2045
qwen2-57b-a14b 4K 8x8 416 - -
qwen2-72b 4K 4x8 368 - -
qwen2.5-3b 32K 1x8 3704 - 4045
qwen2.5-7b 32K 1x8 2177 - 2501
qwen2.5-14b 32K 2x8 1061 - -
qwen2.5-32b 32K 4x8 407 - -
yi-34b 4K 2x8 855 - 730
mixtral-8x7b 32K 8x8 706 - 837
mixtral-8x22b 32K 8x8 239 254 -
mixtral-8x22b 64K 8x8 - 215 -
mistral-7b 32K 1x8 2900 - 2734
gemma-2b 8K 1x8 7067 - 7602
gemma-7b 8K 1x8 2939 - 2607
gemma2-9b 8K 1x8 1713 - 1595
gemma2-27b 8K 2x8 827 - 800
gpt3-175b 2K 16x8 153 - -
gpt3-15b 2K 1x8 1890 - 1840
gpt4-4x13b 128K 8x8 424 1066 -
gpt4-4x16b 128K 8x8 351 918 -
grok1-8x5b 8K 4x8 1082 - 993
deepseek-v2-60b 8K 4x8 1083 - 1343
deepseek-v2-lite 8K 1x8 2830 - -
minicpm-2b 4K 1x8 7314 - 7953
minicpm-moe-8x2b 4K 1x8 2981 - 3172
"""


def _read(line: str) -> Throughput:
    preset, sequence, layout, *figures = line.split()
    return Throughput(preset, sequence, layout, *(None if text == "-" else int(text) for text in figures))


THROUGHPUT = tuple(_read(line) for line in _ROWS.strip().splitlines())


def throughput_of(preset: str) -> list[Throughput]:
    """The published runs of `preset`, shortest sequence first."""
    return [row for row in THROUGHPUT if row.preset == preset]
