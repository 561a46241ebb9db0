"""Every launch line of the reference: it resolves, or is refused in one sentence that names one of its flags; and what
becomes of the slips in its scripts.
"""

from __future__ import annotations

import collections
import json
import re
from pathlib import Path
from typing import Any

import pytest

from modellink.checkpoint.hf_config import write_config
from modellink.cli import main as cli
from modellink.config.flags import check_statuses, parse
from modellink.config.load import load_config, load_section, set_tokenizer_size
from modellink.config.resolved import ResolvedConfig
from modellink.errors import ModelLinkError
from modellink.models.count import count_parameters
from modellink.models.presets import preset

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
# Flags that are refused, and why; a line without one of them resolves. Values that ask for nothing are not refused.
LATER = {
    "--lora-load": "adapters are not built yet",
    "--lora-target-modules": "adapters are not built yet",
    "--stage": "preference training is not built yet",
    "--is-pairwise-dataset": "preference training is not built yet",
}
IDLE = ("1",)


def argv_of(line: dict[str, Any], without: tuple[str, ...] = ()) -> list[str]:
    argv: list[str] = []
    for flag, value in line["args"].items():
        if flag not in without:
            argv += [flag, *(value if isinstance(value, list) else [] if value is True else [value])]
    return argv


def pairs(argv: list[str]) -> list[tuple[str, str]]:
    """Every word of a command line with the flag it belongs to."""
    found: list[tuple[str, str]] = []
    for word in argv:
        found.append((word if word.startswith("--") else found[-1][0], word))
    return found


def world_of(line: dict[str, Any]) -> int:
    """Processes of the launch; the smallest number that holds the model where the script leaves the nodes open."""
    args = line["args"]
    sizes = [int(args.get(f"--{axis}-parallel-size", 1)) for axis in ("tensor-model", "pipeline-model", "context")]
    model_parallel = sizes[0] * sizes[1] * sizes[2]
    started = (line["nproc_per_node"] or 1) * (line["nnodes"] or 1)
    return started if started % model_parallel == 0 else model_parallel


def later_flags(line: dict[str, Any]) -> tuple[str, ...]:
    """The flags of a line that are refused."""
    return tuple(flag for flag, value in line["args"].items() if flag in LATER and value not in IDLE)


def resolve(line: dict[str, Any], monkeypatch: pytest.MonkeyPatch, without: tuple[str, ...] = ()) -> ResolvedConfig:
    """The configuration of a line of a program that has a model, but for some of its flags."""
    monkeypatch.setenv("WORLD_SIZE", str(world_of(line)))
    monkeypatch.setenv("RANK", "1")  # warnings are rank 0's
    return load_config(argv_of(line, without), PROGRAM[line["program"]])


def outcome(line: dict[str, Any], monkeypatch: pytest.MonkeyPatch) -> str:
    """ "resolved", or the refusal."""
    program = PROGRAM[line["program"]]
    try:
        if program in ("preprocess", "convert"):
            load_section(argv_of(line), program)
        else:
            assert count_parameters(resolve(line, monkeypatch).config.model) > 10**8
    except ModelLinkError as error:
        return str(error)
    return "resolved"


@pytest.fixture(scope="module")
def lines(shared: Path) -> list[dict[str, Any]]:
    text = (shared / "reference" / "launch_args.jsonl").read_text(encoding="utf-8")
    return [json.loads(line) for line in text.splitlines()]


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
            assert set(named) & {*later_flags(line), MISSPELT}, f"{line['script']}: {result}"
        counts[result.partition(" ")[0] if result.startswith("--") else result[:60]] += 1
    print(f"{len(outcomes)} launch lines: {dict(counts.most_common())}")
    assert len(outcomes) == 356
    assert counts["resolved"] >= 330, counts


def test_lines_without_a_refused_flag_all_resolve(outcomes: list[tuple[dict[str, Any], str]]) -> None:
    for line, result in outcomes:
        if PROGRAM[line["program"]] not in ("preprocess", "convert"):
            refused = later_flags(line) or MISSPELT in line["args"]
            assert (result == "resolved") == (not refused), f"{line['script']}: {result}"
    with_a_model = [line for line, _ in outcomes if PROGRAM[line["program"]] not in ("preprocess", "convert")]
    assert {flag for line in with_a_model for flag in later_flags(line)} == set(LATER)


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
    resolved = resolve(next(line for line in lines if line["script"] == script), monkeypatch)
    set_tokenizer_size(resolved, tokenizer_size)
    assert count_parameters(resolved.config.model) == parameters


# --- slips of the scripts ---------------------------------------------------------------------------------------------

WARNED, ACCEPTED = "warned", "accepted"
# what is said of a script -> the number of scripts, the treatment, and what to find: a warning, or field=value
SLIPS: dict[str, tuple[int, str, str]] = {
    "--sequence-parallel with tp=1": (34, WARNED, "--sequence-parallel is switched off: one tensor-parallel rank"),
    "both or neither of --fp16/--bf16": (2, ACCEPTED, "optimizer.dtype=float32"),
    "inference with data-parallel size": (4, ACCEPTED, "model.family=llama"),  # one process decodes, whatever starts
    "a line that no longer belongs to the command: --save": (1, ACCEPTED, "checkpoint.save=None"),
    "undefined variable $MOE_ARGS": (2, ACCEPTED, "model.num_experts=None"),
    "undefined variable $NPUS_PER_NODE": (1, ACCEPTED, "model.num_layers=80"),  # the launcher's to refuse
    "undefined variable $DATA_PATH": (1, ACCEPTED, "evaluate.task_data_path=[]"),
    "a generate script that runs evaluation.py": (1, ACCEPTED, "program=evaluate"),
    "program path tasks/inference/inference.py": (1, ACCEPTED, "program=generate"),
}
# slips that the arguments alone show: script -> the same
UNMARKED: list[tuple[str, int, str, str]] = [
    ("mcore/mixtral/pretrain_mixtral_8x22b_32k", 2, WARNED, "--recompute-method and --recompute-num-layers: no effect"),
    ("mcore/gemma2/pretrain_gemma2_", 2, ACCEPTED, "model.attention_logit_softcap=None"),
    ("examples/mistral/pretrain_mistral_7b_ptd", 1, ACCEPTED, "model.rope_theta=10000.0"),
    ("examples/llama2/pretrain_llama2_34B", 1, ACCEPTED, "model.rope_theta=10000.0"),
    ("mcore/qwen2/pretrain_qwen2_7b", 2, ACCEPTED, "model.norm_epsilon=1e-05"),
    ("mcore/qwen2/pretrain_qwen2_72b", 2, ACCEPTED, "model.norm_epsilon=1e-05"),
    ("examples/llama/pretrain_llama_", 4, ACCEPTED, "model.norm_epsilon=1e-05"),
    ("examples/baichuan/pretrain_baichuan_", 2, ACCEPTED, "model.norm_epsilon=1e-05"),
    ("mcore/grok1/pretrain_grok1_40b", 1, ACCEPTED, "model.activation=silu"),
    ("mcore/grok1/pretrain_grok1_40b", 1, ACCEPTED, "model.attention_logit_softcap=None"),
    ("mcore/baichuan2/pretrain_baichuan2_13b", 1, ACCEPTED, "model.normalize_lm_head=False"),
    ("mcore/deepseek2/pretrain_deepseek2_100b_8k_C", 1, ACCEPTED, "model.router_groups=16"),  # as expert ranks
    ("mcore/deepseek2/pretrain_deepseek2_100b_8k_ptd", 1, ACCEPTED, "model.router_groups=8"),
    ("examples/gemma/pretrain_gemma_2b", 1, ACCEPTED, "model.activation=gelu"),
]


def check_slip(found: list[dict[str, Any]], count: int, treatment: str, wanted: str, patch: pytest.MonkeyPatch) -> None:
    assert len(found) == count
    for line in found:
        resolved = resolve(line, patch, later_flags(line))
        if treatment == WARNED:
            assert [text for text in resolved.warnings if wanted in text], (line["script"], resolved.warnings)
            continue
        path, value = wanted.split("=")
        section, _, field = path.rpartition(".")
        holder = getattr(resolved.config, section) if section else resolved
        assert str(getattr(holder, field)) == value, (line["script"], path)


@pytest.mark.parametrize("slip", SLIPS)
def test_a_slip_of_a_script(slip: str, lines: list[dict[str, Any]], monkeypatch: pytest.MonkeyPatch) -> None:
    found = [line for line in lines if any(slip in text for text in line.get("anomalies", ()))]
    check_slip(found, *SLIPS[slip], monkeypatch)


@pytest.mark.parametrize(
    ("script", "count", "treatment", "wanted"), UNMARKED, ids=[f"{row[0]}-{row[3]}" for row in UNMARKED]
)
def test_a_slip_that_nothing_marks(
    script: str, count: int, treatment: str, wanted: str, lines: list[dict[str, Any]], monkeypatch: pytest.MonkeyPatch
) -> None:
    """An architecture that is not the published one is trained as it is written; the preset is the published one."""
    check_slip([line for line in lines if script in line["script"]], count, treatment, wanted, monkeypatch)


# lines that describe another model than the weights they are for -> those weights, and the flags that would be right
WRONG = {
    "mcore/gemma2/pretrain_gemma2_9b": ("gemma2-9b", "--attn-logit-softcapping 50.0"),
    "examples/mistral/pretrain_mistral_7b": ("mistral-7b-v0.3", "--rotary-base 1000000.0"),
    "examples/llama2/pretrain_llama2_34B": ("llama2-34b", "--rotary-base 1000000.0"),
    "mcore/qwen2/pretrain_qwen2_7b_4K": ("qwen2-7b", "--norm-epsilon 1e-06"),
    "mcore/qwen2/pretrain_qwen2_72b_4K": ("qwen2-72b", "--norm-epsilon 1e-06"),
    "examples/llama/pretrain_llama_7b": ("llama-7b", "--norm-epsilon 1e-06"),
    "examples/baichuan/pretrain_baichuan_ptd_7B": ("baichuan-7b", "--norm-epsilon 1e-06"),
    "mcore/baichuan2/pretrain_baichuan2_13b": ("baichuan2-13b", "--normalize-lm-head"),
    "mcore/gemma/pretrain_gemma_2b": ("gemma-2b", "--activation gelu_tanh"),
    "mcore/grok1/pretrain_grok1": ("grok1-8x5b", "--activation gelu_tanh --attn-logit-softcapping 30.0"),
    "mcore/qwen15/evaluation_codeqwen_7b": ("codeqwen1.5-7b", "--untie-embeddings-and-output-weights"),
    # the script that trains Bloom 176B leaves out this flag; it is not among the lines, so one that has it does without
    "examples/bloom/generate_bloom_176b": ("bloom-176b", "--embed-layernorm"),
}


@pytest.mark.parametrize("script", WRONG)
def test_a_line_that_contradicts_the_weights_is_refused_with_the_fix(
    script: str, lines: list[dict[str, Any]], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    name, fix = WRONG[script]
    (line,) = (line for line in lines if script in line["script"])
    text = json.dumps(write_config(preset(name), {}, "bfloat16"))
    (tmp_path / "config.json").write_text(text)
    (tmp_path / "model.safetensors").touch()
    without = (*later_flags(line), "--load", "--embed-layernorm")
    monkeypatch.setenv("WORLD_SIZE", str(world_of(line)))
    argv, program = [*argv_of(line, without), "--load", str(tmp_path)], PROGRAM[line["program"]]
    with pytest.raises(ModelLinkError) as refusal:
        load_config(argv, program)
    (advice,) = re.findall("To keep these weights, give (.*), or leave out all", str(refusal.value))
    assert fix in advice
    flags, _, needless = advice.partition(" and no flag ")
    kept = [word for flag, word in pairs(argv) if flag != needless]
    assert load_config([*kept, *flags.split()], program).config.model.family == preset(name).family


@pytest.mark.parametrize(
    "flag",
    [
        *("--no-post-layer-norm", "--load-checkpoint-loosely", "--enable-token-rearrange-opt"),
        *("--expert-interval 2", "--moe-train-capacity-factor 1.1", "--noisy-gate-policy RSample"),
        *("--dpo-ftx 0.1",),
    ],
)
def test_a_flag_that_the_reference_only_reads_is_accepted_and_named(flag: str) -> None:
    name, _, _ = flag.partition(" ")
    (warning,) = check_statuses(parse(flag.split(), "train"))
    assert warning.startswith(f"{name}: no effect, ")


def test_flags_of_training_in_a_conversion_are_refused_with_the_right_ones() -> None:
    """The reference's README has one of them; its converter does not take it."""
    for axis in ("tensor", "pipeline", "expert"):
        with pytest.raises(ModelLinkError, match=f"--{axis}-model-parallel-size .*use .*--target-{axis}-parallel-size"):
            load_section([f"--{axis}-model-parallel-size", "2"], "convert")


def test_an_unknown_handler_is_no_other_handler(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "data.jsonl").write_text('{"text": "a"}\n')
    argv = ["--input", str(tmp_path / "data.jsonl"), "--output-prefix", str(tmp_path / "out")]
    argv += ["--tokenizer-type", "NullTokenizer", "--vocab-size", "9", "--handler-name", "AlpacaStyleInstructonHandler"]
    assert cli.guard("preprocess", argv) == 2
    assert "'AlpacaStyleInstructionHandler'" in capsys.readouterr().err
    assert [path.name for path in tmp_path.iterdir()] == ["data.jsonl"]


def test_a_flag_without_effect_is_named(lines: list[dict[str, Any]], monkeypatch: pytest.MonkeyPatch) -> None:
    """--use-mc2, which the reference switches off after reading it: here it needs a sequence that is cut."""
    found = [line for line in lines if "--use-mc2" in line["args"]]
    overlapped = []
    for line in found:
        resolved = resolve(line, monkeypatch, later_flags(line))
        parallel = resolved.config.parallel
        assert parallel.async_tensor_parallel, line["script"]
        warned = any("--use-mc2" in text and "no effect" in text for text in resolved.warnings)
        assert warned != (parallel.sequence_parallel and parallel.tensor_parallel > 1), line["script"]
        overlapped.append(not warned)
    assert (len(found), sum(overlapped)) == (59, 41)


# flags twice in a script: the last wins
TWICE = {
    "--num-layers": "examples/mcore/llama2/chat_llama2_70b_ptd.sh",
    "--log-throughput": "examples/mcore/llama2/tune_llama2_7b_lora_ptd.sh",
    "--overlap-grad-reduce": "examples/mcore/mixtral/pretrain_mixtral_8x22b_64k_ptd_C.sh",
    "--overlap-param-gather": "examples/mcore/mixtral/pretrain_mixtral_8x22b_64k_ptd_C.sh",
    "--seed": "examples/mcore/qwen2_moe/evaluate_qwen2_57b_a14b_ptd.sh",
    "--use-mc2": "examples/mcore/baichuan2/pretrain_baichuan2_13b_ptd.sh",
    "--vocab-size": "examples/mcore/mixtral/tune_mixtral_8x7B_full_ptd.sh",
    "--load-dir": "examples/bloom/ckpt_convert_bloom_hf2legacy.sh",
    "--save-dir": "examples/bloom/ckpt_convert_bloom_hf2legacy.sh",
}


@pytest.mark.parametrize("flag", TWICE)
def test_of_a_flag_given_twice_the_last_wins(flag: str, lines: list[dict[str, Any]]) -> None:
    line = next(line for line in lines if line["script"] == TWICE[flag])
    assert f"duplicate flag {flag}" in line["anomalies"]
    program, last = PROGRAM[line["program"]], line["args"][flag]
    without = argv_of(line, (*later_flags(line), flag))
    once, earlier = ([flag] if last is True else [flag, value] for value in (last, "7"))
    twice, expected = parse([*earlier, *without, *once], program), parse([*without, *once], program)
    assert sorted(twice, key=str) == sorted(expected, key=str)
    given = [item for item in twice if item.spelling == flag]
    assert len(given) == 1 and str(given[0].value) == str(last)


def test_all_marks_of_slips_are_treated(lines: list[dict[str, Any]]) -> None:
    elsewhere = ("unknown flag --", "stray continuation backslash", "duplicate flag", "not resolved", "given no value")
    treated = (*SLIPS, *elsewhere)
    for line in lines:
        for text in line.get("anomalies", ()):
            assert any(slip in text for slip in treated), text
    assert {flag for line in lines for flag in TWICE if f"duplicate flag {flag}" in line.get("anomalies", ())} == set(
        TWICE
    )


def test_a_stray_backslash_is_no_argument(lines: list[dict[str, Any]]) -> None:
    """A backslash that a blank follows hands the program a blank word; comments after one do the same."""
    line = next(line for line in lines if "convert_ckpt_mistral_hf2mcore" in line["script"])
    for word in (" ", "\\", "\t"):
        assert parse([*argv_of(line), word], "convert") == parse(argv_of(line), "convert")
    with pytest.raises(ModelLinkError, match="unexpected argument 'word': every option starts with --"):
        parse([*argv_of(line), "word"], "convert")


def test_a_misspelt_flag(lines: list[dict[str, Any]], monkeypatch: pytest.MonkeyPatch) -> None:
    """Refused with the right spelling; only what the reference takes as an abbreviation is one here."""
    line = next(line for line in lines if MISSPELT in line["args"])
    with pytest.raises(ModelLinkError, match=f"unknown flag {MISSPELT}. Did you mean '{MISSPELT}s'"):
        resolve(line, monkeypatch)
    assert resolve(line, monkeypatch, (MISSPELT,)).config.model.num_layers == 48
    (line,) = (line for line in lines if "--json-key" in line["args"])
    assert load_section(argv_of(line), "preprocess").json_keys == ["completion"]


def test_tasks_left_to_fill_in(
    lines: list[dict[str, Any]], capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    found = [line for line in lines if "your" in (line["args"].get("--task") or ())]
    assert len(found) == 4
    for line in found:
        monkeypatch.setenv("WORLD_SIZE", str(world_of(line)))
        assert cli.guard("evaluate", argv_of(line, later_flags(line))) == 2
        assert "'your'" in capsys.readouterr().err.splitlines()[-1]
