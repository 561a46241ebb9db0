"""Every launch line of the reference: it resolves, or is refused in one sentence that names one of its flags."""

from __future__ import annotations

import collections
import json
from pathlib import Path
from typing import Any

import pytest

from modellink.config.load import load_config, load_section, set_tokenizer_size
from modellink.errors import ModelLinkError
from modellink.models.count import count_parameters

PROGRAM = {
    "pretrain_gpt.py": "train",
    "trainer.py": "train",
    "inference.py": "generate",
    "evaluation.py": "evaluate",
    "preprocess_data.py": "preprocess",
    "convert_ckpt.py": "convert",
}
# One script misspells a flag; the reference stops at it as well.
MISSPELT = "--use-rotary-position-embedding"
LATER = {
    "--lora-load",
    "--lora-target-modules",
    "--swap-attention",
    "--output-layer-slice-num",
    "--recompute-activation-function",
    "--enable-recompute-layers-per-pp-rank",
    "--stage",
    "--is-pairwise-dataset",
}


@pytest.fixture(scope="module")
def lines(shared: Path) -> list[dict[str, Any]]:
    text = (shared / "reference" / "launch_args.jsonl").read_text(encoding="utf-8")
    return [json.loads(line) for line in text.splitlines()]


def argv_of(line: dict[str, Any]) -> list[str]:
    argv: list[str] = []
    for flag, value in line["args"].items():
        argv.append(flag)
        argv += value if isinstance(value, list) else [] if value is True else [value]
    return argv


def world_of(line: dict[str, Any]) -> int:
    """Processes of the launch; the smallest number that holds the model where the script leaves the nodes open."""
    args = line["args"]
    sizes = [int(args.get(f"--{axis}-parallel-size", 1)) for axis in ("tensor-model", "pipeline-model", "context")]
    model_parallel = sizes[0] * sizes[1] * sizes[2]
    started = (line["nproc_per_node"] or 1) * (line["nnodes"] or 1)
    return started if started % model_parallel == 0 else model_parallel


def outcome(line: dict[str, Any], monkeypatch: pytest.MonkeyPatch) -> str:
    """ "resolved", or the refusal."""
    program = PROGRAM[line["program"]]
    monkeypatch.setenv("WORLD_SIZE", str(world_of(line)))
    monkeypatch.setenv("RANK", "1")  # warnings are rank 0's
    try:
        if program in ("preprocess", "convert"):
            load_section(argv_of(line), program)
        else:
            assert count_parameters(load_config(argv_of(line), program).config.model) > 10**8
    except ModelLinkError as error:
        return str(error)
    return "resolved"


@pytest.fixture(scope="module")
def outcomes(lines: list[dict[str, Any]]) -> list[tuple[dict[str, Any], str]]:
    with pytest.MonkeyPatch.context() as monkeypatch:
        return [(line, outcome(line, monkeypatch)) for line in lines]


def test_every_line_resolves_or_is_refused_by_a_flag_it_has(outcomes: list[tuple[dict[str, Any], str]]) -> None:
    counts: collections.Counter[str] = collections.Counter()
    for line, result in outcomes:
        if result != "resolved":
            named = [flag for flag in line["args"] if f"{flag} " in f"{result} ".replace(".", " ")]
            assert named, f"{line['script']}: {result}"
            assert "not built yet" in result or MISSPELT in result, f"{line['script']}: {result}"
        counts[result.partition(" ")[0] if result.startswith("--") else result[:60]] += 1
    print(f"{len(outcomes)} launch lines: {dict(counts.most_common())}")
    assert len(outcomes) == 356
    assert counts["resolved"] >= 308, counts


def test_dense_lines_without_a_later_feature_all_resolve(outcomes: list[tuple[dict[str, Any], str]]) -> None:
    for line, result in outcomes:
        args = line["args"]
        if PROGRAM[line["program"]] in ("preprocess", "convert"):
            continue
        groups = max(int(args.get(f"--{kind}-parallel-size", 1)) for kind in ("context", "expert-model"))
        later = LATER & set(args) or groups > 1 or MISSPELT in args
        assert (result == "resolved") == (not later), f"{line['script']}: {result}"


@pytest.mark.parametrize(
    ("script", "tokenizer_size", "parameters"),
    [
        ("examples/llama2/pretrain_llama2_7b_ptd.sh", 32000, 6_738_415_616),
        ("examples/mcore/llama3/pretrain_llama3_8b_ptd.sh", 128256, 8_030_261_248),
        ("examples/mcore/qwen2/pretrain_qwen2_7b_4K_ptd.sh", 151_646, 7_615_616_512),
        ("examples/gemma/pretrain_gemma_2b_ptd.sh", 256_000, 2_506_172_416),
    ],
)
def test_published_parameter_counts(
    lines: list[dict[str, Any]], script: str, tokenizer_size: int, parameters: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    line = next(line for line in lines if line["script"] == script)
    monkeypatch.setenv("WORLD_SIZE", str(world_of(line)))
    resolved = load_config(argv_of(line), "train")
    set_tokenizer_size(resolved, tokenizer_size)
    assert count_parameters(resolved.config.model) == parameters
