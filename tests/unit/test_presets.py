"""Presets: every published model is there, with its published number of parameters, and `modellink models` shows it."""

from __future__ import annotations

import csv
import json
import re
import shlex
from pathlib import Path
from typing import Any

import pytest
import torch

from modellink.cli import main as cli
from modellink.cli.model_facts import facts, parts
from modellink.cli.models import break_lines, short
from modellink.config.architecture import _matters
from modellink.config.convert_schema import ConvertConfig
from modellink.config.flags import by_name, parse
from modellink.config.load import load_config, load_section
from modellink.config.schema import ModelConfig
from modellink.models.count import count_parameters, layer_parameters, outer_parameters
from modellink.models.decoder import Decoder
from modellink.models.families import FAMILIES
from modellink.models.presets import NOTES, preset, preset_fields, presets
from modellink.models.presets.published import THROUGHPUT, throughput_of

# model and size in the table of published throughput -> preset
MODELS = {
    **{"Aquila 7B": "aquila-7b", "Aquila2 7B": "aquila2-7b", "Aquila2 34B": "aquila2-34b"},
    **{"Baichuan 7B": "baichuan-7b", "Baichuan 13B": "baichuan-13b"},
    **{"Baichuan2 7B": "baichuan2-7b", "Baichuan2 13B": "baichuan2-13b"},
    **{"Bloom 7B1": "bloom-7b1", "Bloom 176B": "bloom-176b", "ChatGLM3 6B": "chatglm3-6b", "GLM4 9B": "glm4-9b"},
    **{"CodeLlama 34B": "codellama-34b", "InternLM 7B": "internlm-7b", "InternLM 65B": "internlm-65b"},
    **{"InternLM2 20B": "internlm2-20b", "Yi 34B": "yi-34b", "Mistral 7B": "mistral-7b"},
    **{"LLaMA 7B": "llama-7b", "LLaMA 13B": "llama-13b", "LLaMA 33B": "llama-33b", "LLaMA 65B": "llama-65b"},
    **{"LLaMA2 7B": "llama2-7b", "LLaMA2 13B": "llama2-13b", "LLaMA2 34B": "llama2-34b", "LLaMA2 70B": "llama2-70b"},
    **{"LLaMA3 8B": "llama3-8b", "LLaMA3 70B": "llama3-70b"},
    **{"LLaMA3.1 8B": "llama3.1-8b", "LLaMA3.1 70B": "llama3.1-70b"},
    **{"LLaMA3.2 1B": "llama3.2-1b", "LLaMA3.2 3B": "llama3.2-3b"},
    **{"Qwen 7B": "qwen-7b", "Qwen 14B": "qwen-14b", "Qwen 72B": "qwen-72b", "CodeQwen1.5 7B": "codeqwen1.5-7b"},
    **{f"Qwen1.5 {size}": f"qwen1.5-{size.lower()}" for size in "0.5B 1.8B 4B 7B 14B 32B 72B 110B".split()},
    **{f"Qwen2 {size}": f"qwen2-{size.lower()}" for size in "0.5B 1.5B 7B 57B-A14B 72B".split()},
    **{f"Qwen2.5 {size}": f"qwen2.5-{size.lower()}" for size in "3B 7B 14B 32B".split()},
    **{"Mixtral 8x7B": "mixtral-8x7b", "Mixtral 8x22B": "mixtral-8x22b"},
    **{"Gemma 2B": "gemma-2b", "Gemma 7B": "gemma-7b", "Gemma2 9B": "gemma2-9b", "Gemma2 27B": "gemma2-27b"},
    **{"GPT3 15B": "gpt3-15b", "GPT3 175B": "gpt3-175b", "GPT4 4x13B": "gpt4-4x13b", "GPT4 4x16B": "gpt4-4x16b"},
    **{"Grok1 8x5B": "grok1-8x5b", "DeepSeek-V2 60B": "deepseek-v2-60b", "DeepSeek-V2-Lite 16B": "deepseek-v2-lite"},
    **{"MiniCPM 2B": "minicpm-2b", "MiniCPM 8x2B": "minicpm-moe-8x2b"},
}

# parameters of the published weights
EXACT = {
    **{"llama-7b": 6_738_415_616, "llama-13b": 13_015_864_320, "llama-33b": 32_528_943_616},
    **{"llama-65b": 65_285_660_672, "llama2-7b": 6_738_415_616, "llama2-13b": 13_015_864_320},
    **{"llama2-34b": 33_743_970_304, "llama2-70b": 68_976_648_192, "codellama-34b": 33_743_970_304},
    **{"llama3-8b": 8_030_261_248, "llama3-70b": 70_553_706_496, "llama3.1-8b": 8_030_261_248},
    **{"llama3.1-70b": 70_553_706_496, "llama3.1-405b": 405_853_388_800, "llama3.2-1b": 1_235_814_400},
    **{"llama3.2-3b": 3_212_749_824, "yi-34b": 34_388_917_248, "mistral-7b": 7_241_732_096},
    **{"mistral-7b-v0.3": 7_248_023_552, "mixtral-8x7b": 46_702_792_704, "mixtral-8x22b": 140_620_634_112},
    **{"phi-3-mini": 3_821_079_552, "olmo2-7b": 7_298_617_344, "qwen-7b": 7_721_324_544},
    **{"qwen-14b": 14_167_290_880, "qwen-72b": 72_287_920_128, "qwen1.5-0.5b": 463_987_712},
    **{"qwen1.5-1.8b": 1_836_828_672, "qwen1.5-4b": 3_950_369_280, "qwen1.5-7b": 7_721_324_544},
    **{"qwen1.5-14b": 14_167_290_880, "qwen1.5-32b": 32_512_218_112, "qwen1.5-72b": 72_287_920_128},
    **{"qwen1.5-110b": 111_209_914_368, "codeqwen1.5-7b": 7_250_284_544, "qwen2-0.5b": 494_032_768},
    **{"qwen2-1.5b": 1_543_714_304, "qwen2-7b": 7_615_616_512, "qwen2-72b": 72_706_203_648},
    **{"qwen2.5-0.5b": 494_032_768, "qwen2.5-1.5b": 1_543_714_304, "qwen2.5-3b": 3_085_938_688},
    **{"qwen2.5-7b": 7_615_616_512, "qwen2.5-14b": 14_770_033_664, "qwen2.5-32b": 32_763_876_352},
    **{"qwen2.5-72b": 72_706_203_648, "qwen3-0.6b": 596_049_920, "qwen3-1.7b": 1_720_574_976},
    **{"qwen3-4b": 4_022_468_096, "qwen3-8b": 8_190_735_360, "qwen3-14b": 14_768_307_200},
    **{"qwen3-32b": 32_762_123_264, "qwen3-30b-a3b": 30_532_122_624, "qwen3-235b-a22b": 235_093_634_560},
    **{"baichuan-7b": 7_000_559_616, "baichuan-13b": 13_264_901_120, "baichuan2-7b": 7_505_973_248},
    **{"baichuan2-13b": 13_896_668_160, "bloom-7b1": 7_069_016_064, "bloom-176b": 176_247_271_424},
    **{"chatglm3-6b": 6_243_584_000, "chatglm3-6b-32k": 6_243_584_000, "glm4-9b": 9_399_951_360},
    **{"glm4-9b-chat": 9_399_951_360, "internlm2-20b": 19_861_149_696, "minicpm-2b": 2_724_880_896},
    **{"gemma-2b": 2_506_172_416, "gemma-7b": 8_537_680_896, "gemma2-2b": 2_614_341_888},
    **{"gemma2-9b": 9_241_705_984, "gemma2-27b": 27_227_128_320, "gemma3-1b": 999_885_952},
    **{"gemma3-4b": 3_880_263_168, "deepseek-v2": 235_741_434_880, "deepseek-v2-lite": 15_706_484_224},
    **{"deepseek-v3": 671_026_419_200, "gpt-oss-20b": 20_914_757_184, "gpt-oss-120b": 116_829_156_672},
}
# billions, where only a rounded size was published
ROUNDED = {
    **{"aquila-7b": 7.3, "aquila2-7b": 7.3, "aquila2-34b": 34, "internlm-7b": 7.3, "qwen2-57b-a14b": 57.4},
    **{"minicpm-moe-8x2b": 13.9, "glm-4.5-air": 106, "glm-4.5": 355, "grok1": 314, "gpt3-175b": 175},
}
# shortened and unpublished models: the sum of their matrices, vectors and embeddings
_DEEPSEEK_ATTENTION = 5120 * 1536 + 1536 + 1536 * 128 * 192 + 5120 * 576 + 512 + 512 * 128 * 256 + 128 * 128 * 5120
_DEEPSEEK_LAYER = _DEEPSEEK_ATTENTION + 162 * 3 * 5120 * 1536 + 160 * 5120 + 2 * 5120
_DEEPSEEK_REST = _DEEPSEEK_ATTENTION + 3 * 5120 * 12288 + 2 * 5120 + 5120 + 2 * 102400 * 5120
_GROK_LAYER = 2 * 6144 * (6144 + 1024) + 8 * 3 * 6144 * 32768 + 8 * 6144 + 4 * 6144
_GPT4_LAYER = 4 * 12288**2 + 4 * 8 * 12288**2 + 4 * 12288 + 2 * 2 * 12288
SUMMED = {
    "internlm-65b": 80 * (4 * 8192 * 8193 + 3 * 8192 * 22016 + 2 * 8192) + 8192 + 2 * 103168 * 8192,
    "gpt3-15b": 8 * (12 * 12288**2 + 13 * 12288) + 2 * 12288 + (50257 + 2048) * 12288,
    "gpt4-4x13b": 8 * (_GPT4_LAYER + 4 * 12288 + 4 * 5 * 12288) + 2 * 12288 + 50257 * 12288,
    "gpt4-4x16b": 10 * _GPT4_LAYER + 2 * 12288 + 50257 * 12288,
    "grok1-8x5b": 12 * _GROK_LAYER + 6144 + 131072 * 6144,
    "deepseek-v2-60b": 15 * _DEEPSEEK_LAYER + _DEEPSEEK_REST,
    "deepseek-v2-100b": 23 * _DEEPSEEK_LAYER + _DEEPSEEK_REST,
}
STATED = (
    *("family", "num_layers", "hidden_size", "num_attention_heads", "num_key_value_heads", "ffn_hidden_size"),
    *("vocab_size", "max_position_embeddings", "normalization", "norm_epsilon", "activation", "gated_mlp"),
    *("qkv_bias", "attention_output_bias", "mlp_bias", "tie_word_embeddings", "position_embedding"),
    *("attention_dropout", "hidden_dropout"),
)


# --- completeness -----------------------------------------------------------------------------------------------------


def test_every_published_model_has_a_preset(shared: Path) -> None:
    with open(shared / "reference" / "published_throughput.csv", newline="", encoding="utf-8") as file:
        rows = list(csv.DictReader(file))
    assert {f"{row['model']} {row['size']}" for row in rows} == set(MODELS)
    assert len(MODELS) == len(set(MODELS.values())) == 67
    assert set(MODELS.values()) <= set(presets)
    columns = ("tokens_per_s_per_device", "tokens_per_s_per_device_newer_hw", "reference_system")
    published = [
        (MODELS[f"{row['model']} {row['size']}"], row["sequence"], row["nodes_x_devices"])
        + tuple(int(row[column]) if row[column] else None for column in columns)
        for row in rows
    ]
    assert published == [tuple(vars(row).values()) for row in THROUGHPUT]
    assert [row.sequence for row in throughput_of("chatglm3-6b")] == ["8K", "32K", "64K"]


@pytest.mark.parametrize("name", presets.names())
def test_a_preset_states_what_changes_numbers(name: str) -> None:
    fields = preset_fields(name)
    assert not [field for field in STATED if field not in fields]
    assert set(fields) <= {field for field in vars(ModelConfig())}
    if fields["position_embedding"] == "rope":
        assert "rope_theta" in fields
    if "num_experts" in fields:
        assert {"router_topk", "router_scoring", "moe_ffn_hidden_size"} <= set(fields)
    assert set(NOTES) <= set(presets)


def test_unknown_names_lead_to_the_nearest(capsys: pytest.CaptureFixture[str]) -> None:
    for argv, word in (
        (["models", "lama2-7b"], "'llama2-7b'"),
        (["models", "--family", "qen2"], "'qwen2'"),
        (["train", "--model", "mixtral-8x7"], "'mixtral-8x7b'"),
    ):
        assert cli.main(argv) == 2
        assert word in capsys.readouterr().err
    assert cli.main(["models", "llama2-7b", "--memory", "0"]) == 2
    assert "--memory 0" in capsys.readouterr().err
    assert cli.main(["models", "llama2-7b", "--family", "llama"]) == 2
    assert "not both" in capsys.readouterr().err


# --- parameters -------------------------------------------------------------------------------------------------------


def test_parameter_counts_are_the_published_ones() -> None:
    counts = {name: count_parameters(preset(name)) for name in presets if not name.startswith("tiny-")}
    assert {name: counts[name] for name in EXACT | SUMMED} == EXACT | SUMMED
    assert {name: counts[name] / 1e9 for name in ROUNDED} == {
        name: pytest.approx(size, rel=0.02) for name, size in ROUNDED.items()
    }
    assert set(counts) == {*EXACT, *ROUNDED, *SUMMED}


def test_active_parameters() -> None:
    for name, billions in (
        ("mixtral-8x7b", 12.9),
        ("mixtral-8x22b", 39.1),
        ("qwen2-57b-a14b", 14.2),
        ("qwen3-30b-a3b", 3.3),
        ("qwen3-235b-a22b", 22),
        ("deepseek-v2", 21),
        ("deepseek-v3", 37),
    ):
        assert count_parameters(preset(name), active=True) / 1e9 == pytest.approx(billions, rel=0.025)


@pytest.mark.parametrize("name", presets.names())
def test_the_decoder_has_the_parameters_of_the_formula(name: str) -> None:
    model = preset(name)
    layers = sorted({0, model.first_k_dense_replace, model.num_layers - 1})  # one of each kind
    with torch.device("meta"):
        decoder = Decoder(model, layers)
    expected = outer_parameters(model) + sum(layer_parameters(model, layer) for layer in layers)
    assert sum(parameter.numel() for parameter in decoder.parameters()) == expected
    whole = outer_parameters(model) + sum(layer_parameters(model, layer) for layer in range(model.num_layers))
    assert count_parameters(model) == whole
    found = parts(model)
    assert sum(total for total, _ in found.values()) == whole
    assert sum(active for _, active in found.values()) == count_parameters(model, active=True)


@pytest.mark.parametrize("name", presets.names())
def test_the_hugging_face_format_of_the_family_can_express_it(name: str) -> None:
    lost = FAMILIES.get(preset(name).family).lost(preset(name))
    assert bool(lost) == name.startswith("gpt4"), lost


# --- the reference's launch lines, a second source --------------------------------------------------------------------

FOLDERS = {
    **{"aquila": "aquila-", "aquila2": "aquila2-", "baichuan": "baichuan-", "baichuan2": "baichuan2-"},
    **{"bloom": "bloom-", "chatglm3": "chatglm3-", "codellama": "codellama-", "deepseek2": "deepseek-v2"},
    **{"deepseek2_lite": "deepseek-v2-lite", "gemma": "gemma-", "gemma2": "gemma2-", "glm4": "glm4-9b"},
    **{"gpt3": "gpt3-", "gpt4": "gpt4-", "grok1": "grok1-", "intern": "internlm-", "internlm2": "internlm2-"},
    **{"llama": "llama-", "llama2": "llama2-", "llama3": "llama3-", "llama31": "llama3.1-", "llama32": "llama3.2-"},
    **{"minicpm": "minicpm-", "mistral": "mistral-7b", "mixtral": "mixtral-", "qwen": "qwen-"},
    **{"qwen15": ("qwen1.5-", "codeqwen1.5-"), "qwen2": "qwen2-", "qwen25": "qwen2.5-", "qwen2_moe": "qwen2-57b"},
    "yi": "yi-",
}
# fields in which training lines differ from the preset; docs/models.md says why the preset has its value
_EPSILON = "norm_epsilon"
DIFFERENT = {
    **dict.fromkeys("llama-7b llama-13b llama-33b llama-65b baichuan-7b baichuan-13b qwen-72b".split(), _EPSILON),
    **{f"qwen1.5-{size}": _EPSILON for size in "0.5b 1.8b 7b 14b 32b 72b 110b".split()},
    **dict.fromkeys(["qwen2-7b", "qwen2-72b", "qwen2-57b-a14b"], f"{_EPSILON} rope_scaling"),
    **{"baichuan2-7b": f"{_EPSILON} normalize_lm_head", "baichuan2-13b": "normalize_lm_head"},
    **{"qwen-7b": f"{_EPSILON} query_log_window rope_scaling", "qwen-14b": f"{_EPSILON} query_log_window rope_scaling"},
    **{"qwen1.5-4b": f"{_EPSILON} rope_theta", "qwen2-0.5b": "rope_scaling"},
    **{"gemma-2b": f"activation {_EPSILON}", "gemma-7b": "activation"},
    **{"gemma2-9b": "attention_logit_softcap", "gemma2-27b": "attention_logit_softcap"},
    **{"glm4-9b": "rope_theta", "llama2-34b": "rope_theta", "mistral-7b": "rope_theta"},
    "internlm2-20b": "rope_original_max_position rope_scaling",
    "grok1-8x5b": "activation attention_logit_softcap router_scoring tie_word_embeddings",
}
# what a line leaves to the tokenizer, the files or the run
UNSAID = set(
    "family vocab_size padded_vocab_size vocab_multiple max_position_embeddings norm_weight_in_fp32 attention_dropout "
    "hidden_dropout init_std moe_grouped_gemm".split()
)


def architecture_of(line: dict[str, Any]) -> ModelConfig:
    """The model that the flags of a launch line describe, whatever its layout."""
    table, argv = by_name("train"), []
    for name, value in line["args"].items():
        flag = table.get(name)
        if flag and any(path.startswith("model.") for path in (flag.path or "", *flag.sets)):
            argv += [name, *(value if isinstance(value, list) else [] if value is True else [value])]
    if "group_limited_greedy" in argv:
        argv += ["--router-groups", "8"]  # the lines mean the number of expert-parallel ranks
    run = "--seq-length 16 --micro-batch-size 1 --train-iters 1 --lr 1 --mock-data --padded-vocab-size 999936".split()
    return load_config([*argv, *run], "train").config.model


def test_training_lines_describe_the_presets(shared: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("RANK", "1")  # warnings are rank 0's
    lines = (shared / "reference" / "launch_args.jsonl").read_text(encoding="utf-8").splitlines()
    found: dict[str, set[str]] = {}
    sizes = (
        "num_layers",
        "hidden_size",
        "ffn_hidden_size",
        "num_attention_heads",
        "num_key_value_heads",
        "num_experts",
    )
    for line in map(json.loads, lines):
        prefix = FOLDERS.get(line["script"].split("/")[-2])
        if line["kind"] not in ("pretrain", "tune") or prefix is None:
            continue
        theirs = architecture_of(line)
        named = [preset(name) for name in presets if name.startswith(prefix)]
        ours = [model for model in named if all(getattr(model, size) == getattr(theirs, size) for size in sizes)]
        if not ours:  # models shortened for a test of speed
            assert re.search(r"llama31_(50|200)b|deepseek2_ptd_8p", line["script"]), line["script"]
            continue
        name = next(name for name in presets if preset(name) == ours[0])
        differing = found.setdefault(name, set())
        for field, value in vars(ours[0]).items():
            if field not in UNSAID and _matters(ours[0], field):
                mine, here = (float(x) if isinstance(x, int | float) else x for x in (value, getattr(theirs, field)))
                if mine != (pytest.approx(here) if isinstance(here, float) else here):
                    differing.add(field)
    assert {name: " ".join(sorted(fields)) for name, fields in found.items() if fields} == DIFFERENT
    assert len(found) >= 55


# --- what is shown ----------------------------------------------------------------------------------------------------


def output_of(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, width: int, *argv: str) -> str:
    monkeypatch.setenv("COLUMNS", str(width))
    assert cli.main(["models", *argv]) == 0
    return capsys.readouterr().out


def test_the_table_fits_the_terminal(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    narrow = output_of(capsys, monkeypatch, 80)
    assert max(map(len, narrow.splitlines())) <= 80
    for name in presets:
        assert re.search(rf"^{re.escape(name)} .*\d\.\d+[BMK] ", narrow, re.MULTILINE)
    assert re.search(r"^mixtral-8x7b +46\.70B +12\.88B +32 +4096 +32/8 +14336 +8/2 +32K", narrow, re.MULTILINE)
    wide = output_of(capsys, monkeypatch, 120)
    assert re.search(r"^llama3-8b .* 128,256$", wide, re.MULTILINE)
    only = output_of(capsys, monkeypatch, 80, "--family", "llama3.1")
    assert "yi-34b" in only and "qwen" not in only


@pytest.mark.parametrize("name", ["llama2-7b", "deepseek-v2-lite", "gemma3-1b", "gpt4-4x16b", "tiny-mixtral"])
def test_one_preset(name: str, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    for width in (80, 120):
        shown = output_of(capsys, monkeypatch, width, name)
        assert max(map(len, shown.splitlines())) <= width
        for word in ("Shape", "Parameters", "Memory and work", "Recipes", f"{count_parameters(preset(name)):,}"):
            assert word in shown
    assert ("Published by the reference" in shown) == bool(throughput_of(name))


def test_figures_of_latent_attention_and_of_training() -> None:
    found = facts("deepseek-v2-lite", 80 * 2**30)
    assert found["cache_bytes_per_token"] == 2 * 27 * 576  # bf16, layers, latent and rotated key
    assert found["full_cache_bytes_per_token"] == 2 * 27 * 16 * (192 + 128)
    dense = facts("llama2-7b", 80 * 2**30)
    assert dense["cache_bytes_per_token"] == dense["full_cache_bytes_per_token"] == 2 * 32 * 2 * 4096
    parameters = dense["parameters"]
    alone, split, *_, sharded = dense["training_bytes"]
    assert alone["total"] == 18 * parameters  # bf16 weights, fp32 gradients, master and two moments
    assert split["total"] == 16 * parameters
    assert sharded["devices"] == 64 and sharded["optimizer"] == 8 * (parameters // 64)
    assert dense["training_flops_per_token"]["full"] == pytest.approx(
        6 * (parameters - 32000 * 4096) + 12 * 32 * 4096 * 4096, rel=1e-4
    )


def test_json(capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["models", "--json"]) == 0
    rows = json.loads(capsys.readouterr().out)
    assert [row["name"] for row in rows] == presets.names()
    assert cli.main(["models", "mixtral-8x7b", "--json"]) == 0
    one = json.loads(capsys.readouterr().out)
    assert one["active_parameters"] == 12_879_925_248 and one["fields"] == preset_fields("mixtral-8x7b")
    assert one["published"][0]["device"] == 706


@pytest.mark.parametrize("name", ["tiny-llama", "llama3.2-1b", "llama2-70b", "qwen3-30b-a3b", "deepseek-v2"])
def test_recipes_are_accepted(name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from modellink.parallel.memory import estimate_memory

    monkeypatch.chdir(tmp_path)
    memory = 80 * 2**30
    trained = 0
    for row in facts(name, memory)["recipes"]:
        if "command" not in row:
            assert "does not fit" in row["title"]
            continue
        # a shell drops a backslash with the end of its line
        words = shlex.split("\n".join(break_lines(row["command"], 76)).replace("\\\n", ""))
        assert words == shlex.split(row["command"])
        start = words.index("modellink")
        verb, argv = words[start + 1], words[start + 2 :]
        if verb == "convert":
            config: ConvertConfig = load_section(argv, "convert")
            assert config.load_dir == f"hf/{name}" and config.save_model_type == "mcore"
        elif verb == "chat":
            assert parse(argv, "chat")
        else:
            nodes = int(words[words.index("--nnodes") + 1]) if "--nnodes" in words else 1
            if words[0] == "torchrun":
                assert nodes * int(words[words.index("--nproc-per-node") + 1]) == row["devices"]
            monkeypatch.setenv("WORLD_SIZE", str(row["devices"]))
            with pytest.raises(SystemExit) as end:
                load_config([*argv, "--print-config"])
            assert end.value.code == 0
            assert estimate_memory(load_config(argv)).total == row["memory"] <= memory
            monkeypatch.delenv("WORLD_SIZE")
            trained += 1
    assert trained


def test_numbers_are_short() -> None:
    assert [short(n) for n in (5, 94_784, 463_987_712, 6_738_415_616, 671_026_419_200)] == [
        *("5", "94.78K", "464.0M", "6.74B", "671.0B")
    ]
