"""Merging of flags, YAML, presets and folders: who wins, who contradicts whom, and what is derived."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from modellink.config.load import ResolvedConfig, dump_config, load_config, set_tokenizer_size
from modellink.errors import ModelLinkError

SIZES = ["--num-layers", "2", "--hidden-size", "64", "--num-attention-heads", "4"]
LLAMA = [
    *SIZES,
    *(
        "--group-query-attention",
        "--num-query-groups",
        "2",
        "--ffn-hidden-size",
        "96",
        "--max-position-embeddings",
        "512",
    ),
    *("--normalization", "RMSNorm", "--swiglu", "--disable-bias-linear", "--position-embedding-type", "rope"),
    *(
        "--untie-embeddings-and-output-weights",
        "--attention-dropout",
        "0",
        "--hidden-dropout",
        "0",
        "--vocab-size",
        "300",
    ),
]
RUN = ["--seq-length", "64", "--micro-batch-size", "2", "--train-iters", "4", "--lr", "1e-3", "--mock-data"]


@pytest.fixture(autouse=True)
def one_process(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("WORLD_SIZE", "RANK"):
        monkeypatch.delenv(name, raising=False)


@pytest.fixture
def hf(tmp_path: Path) -> Path:
    """A Hugging Face folder without weights: config.json and a tokenizer file."""
    folder = tmp_path / "hf"
    folder.mkdir()
    content = {
        "architectures": ["LlamaForCausalLM"],
        "model_type": "llama",
        "hidden_act": "silu",
        "hidden_size": 64,
        "intermediate_size": 96,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "max_position_embeddings": 512,
        "rms_norm_eps": 1e-06,
        "rope_theta": 10000.0,
        "tie_word_embeddings": False,
        "vocab_size": 300,
    }
    (folder / "config.json").write_text(json.dumps(content), encoding="utf-8")
    (folder / "tokenizer.json").write_text("{}", encoding="utf-8")
    return folder


def error(argv: list[str], program: str = "train") -> str:
    with pytest.raises(ModelLinkError) as caught:
        load_config(argv, program)
    return str(caught.value)


def test_flags_resolve_with_origins() -> None:
    resolved = load_config([*LLAMA, *RUN])
    model = resolved.config.model
    assert (model.num_key_value_heads, model.head_dim, model.padded_vocab_size) == (2, 16, 384)
    assert resolved.config.train.global_batch_size == 2
    assert resolved.config.parallel.zero_stage == 0
    assert resolved.origins["model.num_key_value_heads"] == "flag --num-query-groups"
    assert resolved.origins["model.activation"] == "flag --swiglu"
    assert resolved.origins["model.head_dim"].startswith("derived")
    assert resolved.origins["train.seed"] == "default"


def test_yaml_any_spelling_any_grouping_and_flags_win(tmp_path: Path) -> None:
    path = tmp_path / "run.yaml"
    path.write_text(
        "tensor-model-parallel-size: 1\nmodel: {num_layers: 2, hidden-size: 64, num_attention_heads: 4, swiglu: true}\n"
        "no_save_optim: true\nuse_flash_attn: true\ntokenizer_not_use_fast: true\nseed: 7\nlr: 1e-3\nbf16: false\n"
        "data: {data_path: [0.5, a, 0.5, b]}\nvocab_size: 300\nposition_embedding: rope\ncheckpoint: {load: null}\n",
        encoding="utf-8",
    )
    argv = ["--config", str(path), "--seed", "8", "--seq-length", "64", "--micro-batch-size", "1", "--train-iters", "2"]
    resolved = load_config(argv)
    config = resolved.config
    assert (config.model.gated_mlp, config.train.seed, config.optimizer.lr) == (True, 8, 1e-3)
    assert config.data.data_path == ["0.5", "a", "0.5", "b"]
    assert (config.checkpoint.save_optimizer, config.tokenizer.tokenizer_fast) == (False, False)
    assert resolved.origins["train.seed"] == "flag --seed"
    assert resolved.origins["model.num_layers"] == "run.yaml: num_layers"
    assert any("use_flash_attn" in warning for warning in resolved.warnings)
    assert load_config([*argv, "--activation", "gelu"]).config.model.activation == "gelu"
    assert load_config([*argv, "--geglu"]).config.model.activation == "gelu"


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("num_layer: 2\n", ["run.yaml", "'num_layer'", "num_layers"]),
        ("modle: {num_layers: 2}\n", ["run.yaml", "section 'modle'", "'model'"]),
        ("lr: fast\n", ["run.yaml: lr", "'fast'"]),
        ("bf16: 1\n", ["run.yaml: bf16", "true or false"]),
        ("profile: true\n", ["run.yaml: profile is refused"]),
        ("- a\n", ["must be a mapping"]),
        ("a: [\n", ["is not valid YAML"]),
    ],
)
def test_bad_yaml_names_file_and_key(tmp_path: Path, text: str, words: list[str]) -> None:
    path = tmp_path / "run.yaml"
    path.write_text(text, encoding="utf-8")
    message = error(["--config", str(path)])
    assert all(word in message for word in words), message


def test_missing_yaml() -> None:
    assert "nowhere.yaml cannot be read" in error(["--config", "nowhere.yaml"])


def test_preset() -> None:
    resolved = load_config(["--model", "llama3.2-1b", *RUN])
    assert resolved.config.model.rope_scaling == "llama3"
    assert resolved.origins["model.num_layers"] == "preset llama3.2-1b"
    assert load_config(["--model", "tiny-llama", "--num-layers", "2", *RUN]).config.model.num_layers == 2
    assert "Did you mean 'llama2-7b'" in error(["--model", "llama2_7b", *RUN])


def test_preset_against_flag_is_an_error() -> None:
    message = error(["--model", "tiny-llama", "--num-layers", "3", *RUN])
    assert "num_layers is 3 by flag --num-layers but 2 in preset tiny-llama" in message
    assert "--num-layers 2" in message


def test_hf_folder_gives_architecture_and_tokenizer(hf: Path) -> None:
    resolved = load_config(["--load", str(hf), *RUN])
    model = resolved.config.model
    assert (model.num_layers, model.norm_epsilon, model.gated_mlp, model.vocab_size) == (2, 1e-6, True, 300)
    assert resolved.origins["model.norm_epsilon"] == f"HF folder {hf}"
    assert resolved.config.tokenizer.tokenizer_name_or_path == str(hf)
    assert load_config(["--hf-path", str(hf), "--num-layers", "2"], "generate").config.model.hidden_size == 64


def test_explicit_flags_must_agree_with_the_folder(hf: Path) -> None:
    assert load_config(["--load", str(hf), "--norm-epsilon", "1e-06", *RUN]).config.model.norm_epsilon == 1e-6
    message = error(
        ["--load", str(hf), "--norm-epsilon", "1e-5", "--num-query-groups", "4", "--group-query-attention", *RUN]
    )
    assert f"norm_epsilon is 1e-05 by flag --norm-epsilon but 1e-06 in HF folder {hf}" in message
    assert "num_key_value_heads is 4 by flag --num-query-groups but 2" in message
    assert "--norm-epsilon 1e-06" in message
    message = error(["--load", str(hf), "--sliding-window", "8", *RUN])
    assert "sliding_window is 8 by flag --sliding-window but None" in message and "no flag --sliding-window" in message
    neutral = load_config(["--load", str(hf), "--apply-query-key-layer-scaling", *RUN])
    assert neutral.config.model.query_key_layer_scaling


def test_a_complete_launch_line_means_megatrons_defaults(hf: Path) -> None:
    message = error(["--load", str(hf), *LLAMA, *RUN])
    assert "norm_epsilon is 1e-05 by default, as --norm-epsilon is absent, but 1e-06" in message
    assert "num_layers" not in message
    resolved = load_config(["--load", str(hf), *LLAMA, "--norm-epsilon", "1e-6", *RUN])
    assert resolved.config.model.num_key_value_heads == 2
    # the same line with --hf-path or --use-checkpoint-args takes what it leaves out from the folder
    assert load_config(["--hf-path", str(hf), *LLAMA, *RUN]).config.model.norm_epsilon == 1e-6
    assert load_config(["--load", str(hf), "--use-checkpoint-args", *LLAMA, *RUN]).config.model.norm_epsilon == 1e-6


def test_longest_position_and_dropout_may_differ(hf: Path) -> None:
    argv = ["--load", str(hf), "--max-position-embeddings", "128", "--hidden-dropout", "0.1", *RUN]
    resolved = load_config(argv)
    assert (resolved.config.model.max_position_embeddings, resolved.config.model.hidden_dropout) == (128, 0.1)
    assert any("--max-position-embeddings 128 differs from 512" in warning for warning in resolved.warnings)


def test_native_checkpoint_gives_architecture(tmp_path: Path) -> None:
    first = load_config([*LLAMA, "--norm-epsilon", "3e-6", "--tokenizer-name-or-path", "words", *RUN])
    step = tmp_path / "iter_0000002"
    step.mkdir()
    (tmp_path / "latest_checkpointed_iteration.txt").write_text("2", encoding="utf-8")
    (step / "modellink.yaml").write_text(dump_config(first), encoding="utf-8")
    again = load_config(["--load", str(tmp_path), *RUN])
    assert again.config.model == first.config.model
    assert again.origins["model.norm_epsilon"] == f"checkpoint {step / 'modellink.yaml'}"
    assert again.config.tokenizer == first.config.tokenizer
    assert load_config(["--load", str(step)], "generate").config.model == first.config.model
    (tmp_path / "latest_checkpointed_iteration.txt").write_text("4", encoding="utf-8")  # a step that was lost
    assert load_config(["--load", str(tmp_path), *RUN]).config.model == first.config.model
    assert "num_layers is 3" in error(["--load", str(tmp_path), "--num-layers", "3", *RUN])


def test_folder_without_architecture(tmp_path: Path) -> None:
    assert f"{tmp_path} states no architecture" in error(["--load", str(tmp_path), *RUN])
    assert "not-there is no folder" in error(["--load", str(tmp_path / "not-there"), *RUN])
    assert "--use-checkpoint-args found no architecture" in error(
        ["--load", str(tmp_path), "--use-checkpoint-args", *RUN]
    )
    assert load_config(["--load", str(tmp_path / "not-yet-there"), *LLAMA, *RUN]).config.model.num_layers == 2


def test_dump_is_read_back_equal(tmp_path: Path) -> None:
    first = load_config([*LLAMA, *RUN, "--bf16", "--tokenizer-not-use-fast", "--adam-eps", "1e-8", "--no-save-rng"])
    path = tmp_path / "modellink.yaml"
    path.write_text(dump_config(first), encoding="utf-8")
    again = load_config(["--config", str(path)])
    assert again.config == first.config
    assert "# flag --adam-eps" in path.read_text(encoding="utf-8")


def test_derived_values(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("WORLD_SIZE", "8")
    argv = [*LLAMA, *RUN, "--tensor-model-parallel-size", "2", "--use-distributed-optimizer", "--bf16"]
    argv += ["--recompute-granularity", "full", "--stage", "sft"]
    config = load_config(argv).config
    assert config.train.global_batch_size == 8
    assert config.model.padded_vocab_size == 512
    assert config.optimizer.fp32_grad_accumulation
    assert config.parallel.zero_stage == 1
    assert (config.parallel.recompute_method, config.parallel.recompute_num_layers) == ("uniform", 1)
    assert config.data.instruction_data


def test_sequence_parallel_is_off_at_one_tensor_rank() -> None:
    resolved = load_config([*LLAMA, *RUN, "--sequence-parallel"])
    assert not resolved.config.parallel.sequence_parallel
    assert any("--sequence-parallel is switched off" in warning for warning in resolved.warnings)


def test_print_config_opens_no_data_and_exits_0(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    argv = [
        *LLAMA,
        "--data-path",
        "nowhere",
        "--tokenizer-name-or-path",
        "nowhere",
        "--save",
        "nowhere",
        "--print-config",
    ]
    argv += ["--micro-batch-size", "2", "--tensor-model-parallel-size", "2", "--lr", "1e-3"]
    monkeypatch.setenv("WORLD_SIZE", "8")
    with pytest.raises(SystemExit) as caught:
        load_config(argv)
    out = capsys.readouterr().out
    assert caught.value.code == 0
    assert "# data-parallel size: 4" in out
    assert "# parameters: 127296 " in out
    assert "num_layers: 2" in out and "# flag --num-layers" in out


def test_print_config_without_a_launcher_assumes_the_smallest_world(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        load_config(["--model", "llama2-70b", "--pipeline-model-parallel-size", "4", "--print-config"])
    out = capsys.readouterr().out
    assert "# world size: 4 = tensor 1 x pipeline 4" in out
    assert "# parameters: 68976648192 " in out


def tiny(argv: list[str]) -> ResolvedConfig:
    keep = [text for text in LLAMA if text not in ("--vocab-size", "300")]
    return load_config([*keep, *RUN, "--tokenizer-name-or-path", "x", *argv])


def test_tokenizer_size_pads_the_vocabulary() -> None:
    resolved = tiny(["--make-vocab-size-divisible-by", "10"])
    set_tokenizer_size(resolved, 301)
    assert (resolved.config.model.vocab_size, resolved.config.model.padded_vocab_size) == (301, 310)
    resolved = tiny(["--vocab-size", "300"])
    set_tokenizer_size(resolved, 1000)
    assert resolved.config.model.padded_vocab_size == 1024


def test_tokenizer_larger_than_the_embedding_is_an_error(hf: Path) -> None:
    with pytest.raises(ModelLinkError, match="the tokenizer has 400 ids but the embedding only 384 rows"):
        set_tokenizer_size(load_config(["--load", str(hf), *RUN]), 400)
    with pytest.raises(ModelLinkError, match="flag --padded-vocab-size"):
        set_tokenizer_size(tiny(["--padded-vocab-size", "256"]), 400)
