"""The flag table: complete, one row a flag, and with the quirks of the reference's launch lines."""

from __future__ import annotations

import dataclasses
import re
from pathlib import Path
from typing import Any

import pytest

from modellink.config import flags_doc
from modellink.config.flags import (
    PROGRAM_SECTIONS,
    assignments,
    by_name,
    check_statuses,
    flag_of,
    flags,
    parse,
    section_types,
    spell,
)
from modellink.config.load import load_section
from modellink.errors import ModelLinkError

LLAMA = ["--num-layers", "2", "--hidden-size", "64", "--num-attention-heads", "4"]


def fields(argv: list[str], program: str = "train") -> dict[str, Any]:
    """What the flags set, without the origins."""
    found, _ = assignments(parse(argv, program), lambda path: None)
    return {path: value for path, (value, _) in found.items()}


def test_every_flag_of_the_specification_has_a_status(shared: Path) -> None:
    text = (shared / "reference" / "spec.md").read_text(encoding="utf-8")
    section = text[text.index("## a. ") : text.index("## b. ")]
    known = set().union(*(by_name(program) for program in PROGRAM_SECTIONS))
    missing, total = [], 0
    for token in set(re.findall(r"--[a-zA-Z0-9][\w*-]*", section)):
        # a trailing * stands for a group of flags; --json-key is an abbreviation that preprocess understands
        found = any(n.startswith(token[:-1]) for n in known) if token.endswith("*") else token in known
        if "*-to-tensorboard" in token:
            found = any(re.fullmatch(token.replace("*", ".*"), n) for n in known)
        total += 1
        if not found and token != "--json-key":
            missing.append(token)
    assert not missing
    assert total > 400
    for short in ("--lr-decay-samples", "--lr-warmup-samples", "--lr-warmup-fraction"):
        assert short in known


@pytest.mark.parametrize("program", PROGRAM_SECTIONS)
def test_rows_are_complete(program: str) -> None:
    for flag in flags(program):
        assert flag.status in ("native", "alias", "accepted", "refused")
        assert flag.help, flag.name
        assert (flag.path is not None) == (flag.status == "native")
        assert bool(flag.sets) == (flag.status == "alias")


def test_refusals_say_what_to_use() -> None:
    for program in PROGRAM_SECTIONS:
        for flag in flags(program):
            if flag.status == "refused":
                assert re.search(r"; |: |write|use ", flag.help), f"{flag.name}: {flag.help}"


def test_the_page_is_up_to_date(root: Path) -> None:
    page = (root / "docs" / "flags.md").read_text(encoding="utf-8")
    assert page == flags_doc.page(), "run: python -m modellink.config.flags_doc > docs/flags.md"


@pytest.mark.parametrize(
    ("argv", "path", "value"),
    [
        (["--tokenizer-not-use-fast"], "tokenizer.tokenizer_fast", False),
        (["--no-save-optim"], "checkpoint.save_optimizer", False),
        (["--no-load-rng"], "checkpoint.load_rng", False),
        (["--no-check-for-nan-in-loss-and-grad"], "train.check_for_nan", False),
        (["--untie-embeddings-and-output-weights"], "model.tie_word_embeddings", False),
        (["--num-layer-list", "1,2,3"], "parallel.layers_per_stage", [1, 2, 3]),
        (["--num-layer-list", "1", "2,3"], "parallel.layers_per_stage", [1, 2, 3]),
        (["--data-path", "0.3", "a", "0.7", "b"], "data.data_path", ["0.3", "a", "0.7", "b"]),
        (["--rampup-batch-size", "8", "8", "100"], "train.rampup_batch_size", [8, 8, 100]),
        (["--seed", "1", "--seed", "42"], "train.seed", 42),
        (["--original-max-position-embeddings", "8192.0"], "model.rope_original_max_position", 8192),
        (["--rotary-base", "1e6"], "model.rope_theta", 1e6),
        (["--split", "100,0,0"], "data.split", "100,0,0"),
        (["--lr=1e-4"], "optimizer.lr", 1e-4),
        (["--use-deter-comp"], "train.deterministic", True),
        (["--optimizer", "fused_adam"], "optimizer.optimizer", "adam"),
        (["--reuse-fp32-param"], "optimizer.split_master", True),
        (["--hf-path", "x"], "checkpoint.pretrained_checkpoint", "x"),
        (["--swiglu"], "model.activation", "silu"),
        (["--geglu"], "model.activation", "gelu"),
        (["--gelu-tanh"], "model.gated_mlp", True),
        (["--gelu-tanh", "--geglu"], "model.activation", "gelu_tanh"),
        (["--no-bias-gelu-fusion"], "model.activation", "gelu"),
        (["--use-rotary-position-embeddings"], "model.position_embedding", "rope"),
        (["--use-glm-rope", "--rotary-percent", "0.51"], "model.rope_fraction", 0.5),
        (["--group-query-attention"], "model.num_key_value_heads", 1),
        (["--num-query-groups", "8", "--group-query-attention"], "model.num_key_value_heads", 8),
        (["--kv-head-num", "8"], "model.num_key_value_heads", 8),
        (["--add-qkv-bias", "--disable-bias-linear"], "model.qkv_bias", True),
        (["--add-dense-bias", "--disable-bias-linear"], "model.mlp_bias", False),
        (["--interleave-sliding-window", "64"], "model.window_layers", "even"),
        (["--dim-model-base", "16", "--hidden-size", "64"], "model.hidden_divisor", 4.0),
        (["--scale-depth", "1.4", "--num-layers", "4"], "model.residual_multiplier", 0.7),
        (["--checkpoint-activations", "--checkpoint-num-layers", "3"], "parallel.recompute_num_layers", 3),
        (["--checkpoint-policy", "full"], "parallel.recompute_method", "uniform"),
        (["--checkpoint-policy", "full", "--checkpoint_block_layer", "9"], "parallel.recompute_num_layers", 1),
        (["--checkpoint-policy", "block"], "parallel.recompute_num_layers", 25),
        (["--checkpoint_block_layer", "9", "--checkpoint-policy", "block"], "parallel.recompute_num_layers", 9),
        (["--checkpoint-policy", "custom"], "parallel.recompute_granularity", "operators"),
        (["--recomputation-layer-num", "3", "1"], "parallel.recompute_layers_per_stage", [3, 1]),
        (["--is-instruction-dataset"], "train.stage", "sft"),
        (["--no-sequence-parallel"], "parallel.sequence_parallel", False),
    ],
)
def test_what_a_flag_sets(argv: list[str], path: str, value: Any) -> None:
    assert fields(argv)[path] == pytest.approx(value) if isinstance(value, float) else fields(argv)[path] == value


def test_query_groups_need_group_query_attention() -> None:
    found, warnings = assignments(parse(["--num-query-groups", "8"], "train"), lambda path: None)
    assert not found
    assert warnings == ["--num-query-groups: no effect without --group-query-attention"]


@pytest.mark.parametrize(
    ("argv", "words"),
    [
        (["--sequence-paralel"], ["unknown flag --sequence-paralel", "--sequence-parallel"]),
        (["--tensor_model_parallel_size", "2"], ["Did you mean --tensor-model-parallel-size?"]),
        (["--lr", "fast"], ["--lr", "number", "'fast'"]),
        (["--num-layers", "2.5"], ["--num-layers", "whole number", "'2.5'"]),
        (["--num-layers"], ["--num-layers", "expected one argument"]),
        (["--normalization", "RmsNorm"], ["--normalization", "Did you mean 'RMSNorm'"]),
        (["--num-layer", "2"], ["unknown flag --num-layer"]),
        (["pretrain"], ["unexpected argument 'pretrain'"]),
        (["--stage", "dpo"], ["--stage dpo", "not built yet"]),
        (["--optimizer", "muom"], ["--optimizer", "Did you mean 'muon'"]),
        (["--save-format", "mcore"], ["--save-format mcore", "not built yet"]),
    ],
)
def test_bad_command_lines(argv: list[str], words: list[str]) -> None:
    with pytest.raises(ModelLinkError) as caught:
        parse([*LLAMA, *argv], "train")
    assert all(word in str(caught.value) for word in words), caught.value


@pytest.mark.parametrize(
    "argv",
    [
        ["--lora-target-modules", "dense"],
        ["--enable-high-availability"],
        ["--fp8-format", "hybrid"],
        ["--profile"],
        ["--spec", "a", "b"],
        ["--nnodes", "1"],
    ],
)
def test_refused_when_it_asks_for_something(argv: list[str]) -> None:
    with pytest.raises(ModelLinkError, match=f"{argv[0]} is refused: "):
        check_statuses(parse(argv, "train"))


@pytest.mark.parametrize(
    "argv",
    [
        ["--remote-device", "none"],
        ["--auto-recompute-device-size", "-1"],
        ["--z-loss-weight", "0.0"],
        ["--context-parallel-size", "1"],
        ["--lora-target-modules"],
        ["--stage", "pretrain"],
        ["--local-rank", "0"],
        ["--local_rank=3"],
    ],
)
def test_harmless_values_pass_silently(argv: list[str]) -> None:
    assert check_statuses(parse(argv, "train")) == []


def test_accepted_flags_warn_once_a_reason() -> None:
    given = parse(["--use-flash-attn", "--skip-bias-add", "--lora-r", "8"], "train")
    warnings = check_statuses(given)
    assert len(warnings) == 2
    assert warnings[0].startswith("--use-flash-attn, --skip-bias-add: no effect")
    assert "--lora-r" in warnings[1] and "not built yet" in warnings[1]


def test_abbreviations_hold_in_preprocess_only() -> None:
    config = load_section(["--input", "x", "--output-prefix", "y", "--json-key", "completion"], "preprocess")
    assert config.json_keys == ["completion"]
    with pytest.raises(ModelLinkError, match="unknown flag --num-layer"):
        parse(["--num-layer", "2"], "train")


def test_task_belongs_to_the_program() -> None:
    assert fields(["--task", "greedy", "chat"], "generate")["generate.task"] == ["greedy", "chat"]
    assert fields(["--task", "mmlu"], "evaluate")["evaluate.task"] == ["mmlu"]
    assert fields(["--no-chat-template"], "evaluate")["evaluate.chat_template"] is False
    with pytest.raises(ModelLinkError, match="unknown flag --task"):
        parse(["--task", "mmlu"], "train")


def test_spelling_of_fields() -> None:
    assert flag_of("parallel.tensor_parallel") == "--tensor-model-parallel-size"
    assert flag_of("model.tie_word_embeddings", False) == "--untie-embeddings-and-output-weights"
    assert spell("model.norm_epsilon", 1e-6) == "--norm-epsilon 1e-06"
    assert spell("parallel.layers_per_stage", [1, 3]) == "--num-layer-list 1,3"


def test_every_option_of_a_run_is_read_somewhere(root: Path) -> None:
    """An option that nothing reads would be accepted and do nothing without a word."""
    files = [path for path in (root / "modellink").rglob("*.py") if not path.name.endswith(("schema.py", "_table.py"))]
    text = "\n".join(path.read_text(encoding="utf-8") for path in files)
    unread = [
        f"{section}.{field.name}"
        for program in ("train", "generate", "evaluate", "preprocess")
        for section, cls in section_types(program).items()
        for field in dataclasses.fields(cls)
        if not re.search(rf"\.{field.name}\b|\"{field.name}\"", text)
    ]
    # the command line itself looks for --debug, before options are read
    assert set(unread) <= {"train.debug", "source.debug"}
