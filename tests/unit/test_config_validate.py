"""Rules between options: each bad combination is one sentence with the values and the flag that fixes it."""

from __future__ import annotations

import pytest

from modellink.config.load import load_config
from modellink.errors import ModelLinkError

MODEL = ["--model", "tiny-llama"]
RUN = ["--seq-length", "64", "--micro-batch-size", "2", "--train-iters", "4", "--lr", "1e-3", "--mock-data"]
GPT = ["--num-layers", "4", "--hidden-size", "64", "--num-attention-heads", "4", "--vocab-size", "512"]
GPT += ["--max-position-embeddings", "64", *RUN]
TP, PP, VPP = (
    "--tensor-model-parallel-size",
    "--pipeline-model-parallel-size",
    "--num-layers-per-virtual-pipeline-stage",
)
SCHEDULE, MANUAL = "--pipeline-schedule", ["--optimized-pipeline", "--manual-mbs"]
ZB = [SCHEDULE, "zero_bubble"]


def error(monkeypatch: pytest.MonkeyPatch, argv: list[str], world: int = 1, program: str = "train") -> str:
    monkeypatch.setenv("WORLD_SIZE", str(world))
    with pytest.raises(ModelLinkError) as caught:
        load_config(argv, program)
    return str(caught.value)


@pytest.mark.parametrize(
    ("argv", "world", "words"),
    [
        ([TP, "3"], 3, ["4 query heads", f"{TP} 3", "divides 4"]),
        ([TP, "4", "--num-key-value-heads", "2"], 4, ["2 key/value heads", f"{TP} 4"]),
        ([TP, "2", "--qk-layernorm", "--qk-norm-all-heads"], 2, [f"{TP} 2", "OLMo-2", "--zero-stage 3"]),
        ([TP, "2", "--ffn-hidden-size", "97"], 2, ["97 MLP columns", "--ffn-hidden-size"]),
        ([TP, "2", "--padded-vocab-size", "513"], 2, ["513 vocabulary rows", "--padded-vocab-size"]),
        (["--num-key-value-heads", "3"], 1, ["--num-attention-heads 4", "--num-key-value-heads 3"]),
        (["--hidden-size", "66"], 1, ["--hidden-size 66", "--num-attention-heads 4", "--kv-channels"]),
        ([PP, "3"], 3, ["4 layers", f"{PP} 3", "--num-layer-list"]),
        ([PP, "2", "--num-layer-list", "1,2"], 2, ["--num-layer-list 1,2", "3 layers", "--num-layers 4"]),
        ([PP, "2", "--num-layer-list", "1,2,1"], 2, ["3 stage(s)", f"{PP} 2"]),
        ([PP, "2", "--num-layer-list", "0,4"], 2, ["--num-layer-list 0,4", "positive"]),
        ([PP, "2", "--num-layer-list", "2,2", VPP, "1"], 2, ["--num-layer-list", VPP, "exclude"]),
        ([VPP, "2"], 1, [f"{VPP} 2 needs {PP} 2"]),
        ([PP, "2", VPP, "3"], 2, [f"{VPP} 3", "2 layers of a stage"]),
        ([PP, "2", VPP, "1", "--global-batch-size", "10"], 2, ["multiple of 2 micro-batches", "not 5"]),
        ([PP, "2", *ZB, "--global-batch-size", "10"], 2, ["multiple of 2 micro-batches", "not 5"]),
        ([PP, "2", *ZB, "--compile"], 2, [*ZB, "--compile"]),
        ([PP, "2", SCHEDULE, "zbv", VPP, "1"], 2, ["zbv", "two chunks", VPP]),
        ([PP, "2", SCHEDULE, "gpipe", VPP, "1"], 2, ["gpipe", "one chunk", VPP]),
        ([PP, "2", SCHEDULE, "zbv", "--num-layers", "6"], 2, ["6 layers", "4 stages"]),
        ([PP, "2", SCHEDULE, "zbv", "--num-layer-list", "2,2"], 2, ["4 positive numbers"]),
        ([PP, "2", SCHEDULE, "dualpipev", "--global-batch-size", "6"], 2, ["at least 4 micro-batches", "not 3"]),
        ([PP, "2", "--fold-mode", "aiao"], 2, ["aiao", VPP]),
        ([PP, "2", "--fold-mode", "lifo"], 2, ["--fold-mode lifo", "fifo"]),
        ([PP, "2", "--optimized-pipeline"], 2, ["--optimized-pipeline", "--manual-mbs"]),
        ([PP, "2", "--manual-mbs", "1,3"], 2, ["--optimized-pipeline", "--manual-mbs"]),
        ([PP, "2", *MANUAL, "1,x"], 2, ["--manual-mbs 1,x", "example-config-1"]),
        ([PP, "2", *MANUAL, "1,3", "--global-batch-size", "8"], 2, ["2 micro-batches of 4 rows", "4 of 8"]),
        ([PP, "2", *MANUAL, "2,2", *ZB], 2, ["--optimized-pipeline", "zero_bubble"]),
        (
            [PP, "2", *ZB, "--rampup-batch-size", "6", "2", "8", "--global-batch-size", "12", "--train-samples", "9"],
            2,
            ["multiple of 2 micro-batches", "not 5"],
        ),
        ([TP, "2"], 3, ["3 process(es)", f"{TP} 2", "--nproc_per_node 2"]),
        (
            ["--global-batch-size", "6"],
            2,
            ["--global-batch-size 6", "--micro-batch-size 2", "2 data-parallel", "multiple of 4"],
        ),
        (["--seq-length", "65"], 1, ["--seq-length 65", "--max-position-embeddings 64"]),
        (
            [TP, "2", "--sequence-parallel", "--seq-length", "63"],
            2,
            ["--seq-length 63", f"{TP} 2", "--sequence-parallel"],
        ),
        (["--bf16", "--fp16"], 1, ["--bf16", "--fp16", "exclude"]),
        (["--reuse-fp32-param"], 1, ["--reuse-fp32-param", "--bf16"]),
        (["--use-distributed-optimizer", "--zero-stage", "0"], 1, ["--zero-stage 0", "--use-distributed-optimizer"]),
        (["--zero-stage", "4"], 1, ["--zero-stage 4", "0, 1, 2, 3"]),
        (["--data-parallel-replicas", "2"], 3, ["--data-parallel-replicas 2", "data-parallel size 3"]),
        (["--context-parallel-size", "3", "--seq-length", "64"], 3, ["3 equal pieces", "--seq-length 64"]),
        (["--context-parallel-size", "8", "--seq-length", "64"], 8, ["exchanges heads among 8", "megatron_cp_algo"]),
        (
            ["--context-parallel-size", "2", "--context-parallel-algo", "megatron_cp_algo", "--seq-length", "64"],
            2,
            ["--context-parallel-size 2", "--attention-dropout 0"],
        ),
        (
            ["--context-parallel-size", "4", "--context-parallel-algo", "hybrid_cp_algo", "--seq-length", "64"],
            4,
            ["--ulysses-degree-in-cp", "not None"],
        ),
        (["--expert-model-parallel-size", "2"], 2, ["--expert-model-parallel-size 2", "the model has none"]),
        (["--expert-model-parallel-size", "2", "--num-experts", "5"], 2, ["does not divide 5 experts"]),
        (["--expert-model-parallel-size", "4", "--num-experts", "8"], 2, ["must divide the 2 data- and context"]),
        (["--recompute-granularity", "selective", "--recompute-method", "block"], 1, ["--recompute-method"]),
        (["--compile", "--tensor-model-parallel-size", "2"], 2, ["--compile", "--tensor-model-parallel-size 2"]),
        (["--min-lr", "1"], 1, ["--min-lr 1.0", "--lr 0.001"]),
        (["--lr-warmup-iters", "2", "--lr-warmup-fraction", "0.1"], 1, ["--lr-warmup-iters", "--lr-warmup-fraction"]),
        (["--lr-warmup-iters", "5"], 1, ["--lr-warmup-iters 5", "4 iterations"]),
        (["--lr-warmup-fraction", "2"], 1, ["--lr-warmup-fraction", "between 0 and 1"]),
        (["--weight-decay-incr-style", "cosine"], 1, ["--start-weight-decay"]),
        (["--train-samples", "8"], 1, ["--train-iters", "--train-samples", "exclude"]),
        (["--rampup-batch-size", "2", "2"], 1, ["three numbers"]),
        (["--rampup-batch-size", "2", "4", "8", "--global-batch-size", "8"], 1, ["--global-batch-size 8", "increment"]),
        (["--rampup-batch-size", "3", "1", "8", "--global-batch-size", "8"], 1, ["multiples of 2"]),
        (["--rampup-batch-size", "2", "2", "8", "--global-batch-size", "8"], 1, ["--train-samples"]),
        (["--hidden-dropout", "1"], 1, ["--hidden-dropout", "below 1"]),
        (["--micro-batch-size", "0"], 1, ["--micro-batch-size", "above 0"]),
        (["--lr", "-1"], 1, ["--lr", "below 0"]),
        (["--sliding-window", "8", "--position-embedding-type", "alibi"], 1, ["ALiBi", "--sliding-window"]),
        (["--window-layers", "1,0", "--sliding-window", "8"], 1, ["--window-layers 1,0", "4 comma-separated"]),
        (
            ["--position-embedding-type", "rope", "--rope-scaling-type", "llama3"],
            1,
            ["--original-max-position-embeddings"],
        ),
        (["--padded-vocab-size", "511"], 1, ["--padded-vocab-size 511", "--vocab-size 512"]),
        (["--data-path", "a", "--train-data-path", "b"], 1, ["--data-path", "--train-data-path"]),
    ],
)
def test_bad_combinations(monkeypatch: pytest.MonkeyPatch, argv: list[str], world: int, words: list[str]) -> None:
    message = error(monkeypatch, [*GPT, *argv], world)
    assert all(word in message for word in words), message
    monkeypatch.setenv("RANK", str(world - 1))
    assert error(monkeypatch, [*GPT, *argv], world) == message, "ranks must agree"


@pytest.mark.parametrize(
    ("left_out", "words"),
    [
        ("--seq-length", ["--seq-length is missing"]),
        ("--micro-batch-size", ["--micro-batch-size is missing"]),
        ("--lr", ["--lr is missing"]),
        ("--train-iters", ["--train-iters or --train-samples"]),
        ("--mock-data", ["--data-path PREFIX", "--mock-data"]),
    ],
)
def test_what_a_run_needs(monkeypatch: pytest.MonkeyPatch, left_out: str, words: list[str]) -> None:
    at = RUN.index(left_out)
    argv = RUN[:at] + RUN[at + (1 if left_out == "--mock-data" else 2) :]
    message = error(monkeypatch, [*MODEL, *argv])
    assert all(word in message for word in words), message
    with pytest.raises(SystemExit):
        load_config([*MODEL, *argv, "--print-config"])


def test_architecture_and_vocabulary_are_needed(monkeypatch: pytest.MonkeyPatch) -> None:
    message = error(monkeypatch, RUN)
    assert all(
        word in message for word in ("--num-layers, --hidden-size, --num-attention-heads", "--model NAME", "--load")
    )
    argv = [text for text in GPT if text not in ("--vocab-size", "512")]
    assert "--tokenizer-name-or-path" in error(monkeypatch, argv)


def test_learned_positions_need_their_number(monkeypatch: pytest.MonkeyPatch) -> None:
    argv = ["--num-layers", "4", "--hidden-size", "64", "--num-attention-heads", "4", "--vocab-size", "512", *RUN]
    assert "--max-position-embeddings" in error(monkeypatch, argv)


@pytest.mark.parametrize(
    ("argv", "words"),
    [
        ([], ["--load"]),
        (["--load", "x", "--hf-chat-template", "--prompt-type", "llama2"], ["--prompt-type", "--hf-chat-template"]),
        (["--load", "x", "--top-p", "1.5"], ["--top-p", "1.5"]),
        (["--load", "x", "--history-turns", "-1"], ["--history-turns", "below 0"]),
    ],
)
def test_decoding(monkeypatch: pytest.MonkeyPatch, argv: list[str], words: list[str]) -> None:
    for program in ("generate", "chat", "evaluate"):
        message = error(monkeypatch, [*MODEL, *argv], program=program)
        assert all(word in message for word in words), message


@pytest.mark.parametrize(
    ("argv", "world"),
    [
        ([TP, "2", PP, "2", VPP, "1", "--global-batch-size", "8", "--sequence-parallel"], 8),
        ([PP, "3", "--num-layer-list", "1,2,1"], 3),
        (["--zero-stage", "3", "--data-parallel-replicas", "2"], 4),
        (["--bf16", "--reuse-fp32-param"], 1),
    ],
)
def test_good_combinations(monkeypatch: pytest.MonkeyPatch, argv: list[str], world: int) -> None:
    monkeypatch.setenv("WORLD_SIZE", str(world))
    assert load_config([*GPT, *argv]).world_size == world


def test_recompute_without_granularity_warns() -> None:
    resolved = load_config([*GPT, "--recompute-method", "uniform"])
    assert any("--recompute-granularity full" in warning for warning in resolved.warnings)
