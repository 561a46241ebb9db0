"""Megatron's checkpoint folders: those its own converter made are read and made again; every direction, every layout,
and what is refused."""

from __future__ import annotations

import argparse
import collections
import dataclasses
import os
import pickle
import shutil
import subprocess
import sys
import zipfile
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

import modellink
from modellink.checkpoint.hf import expected_shapes, load_hf, read_config, read_hf, save_hf
from modellink.checkpoint.megatron import Layout, MegatronFolder, write_megatron
from modellink.checkpoint.megatron_files import FileTensor, read_torch_file
from modellink.checkpoint.megatron_names import flattened
from modellink.config.schema import ModelConfig
from modellink.errors import ModelLinkError
from modellink.models.decoder import Decoder

SOURCES = {
    "tiny32k_tp2pp1": "tiny32k",
    "tiny32k_tp1pp2": "tiny32k",
    "llama2_gqa_tp2pp2": "llama2_gqa",
    "qwen2_tp2pp2": "qwen2",
}
STEP, FILE = "iter_0000001", "model_optim_rng.pt"
ENVIRONMENT = os.environ | {"OMP_NUM_THREADS": "1"}


def hf_state(folder: Path) -> dict[str, torch.Tensor]:
    config = read_config(folder)
    config.padded_vocab_size = config.vocab_size
    return dict(read_hf(folder, config, progress=False))


def assert_same(found: dict[str, torch.Tensor], wanted: dict[str, torch.Tensor]) -> None:
    assert found.keys() == wanted.keys()
    for name, value in wanted.items():
        assert found[name].dtype == value.dtype
        assert torch.equal(found[name].contiguous().view(torch.uint8), value.contiguous().view(torch.uint8)), name


def file_model(file: Path) -> dict[str, Any]:
    """The model of a file, tensors read, flat."""
    models = {key: value for key, value in read_torch_file(file).items() if key.startswith("model")}
    flat = flattened(models["model"] if list(models) == ["model"] else models)
    return {name: value.read() if isinstance(value, FileTensor) else value for name, value in flat.items()}


@pytest.mark.parametrize("name", SOURCES)
def test_megatrons_own_folders_hold_the_source(name: str, shared: Path) -> None:
    source = shared / "megatron" / "hf" / SOURCES[name]
    folder = MegatronFolder(shared / "megatron" / "checkpoints" / name)
    config, wanted = read_config(source), hf_state(source)
    merged = dict(folder.tensors(config))
    rows = {key: merged[key].shape[0] for key in ("embed_tokens.weight", "lm_head.weight")}
    assert set(rows.values()) == {32000}
    for key in rows:
        padding = merged[key][config.vocab_size :]
        assert torch.equal(padding, wanted[key][-1:].expand_as(padding))
        merged[key] = merged[key][: config.vocab_size]
    assert_same(merged, wanted)
    stated = folder.config()
    kept = ("num_layers", "hidden_size", "num_key_value_heads", "head_dim", "ffn_hidden_size", "vocab_size", "family")
    kept += ("qkv_bias", "attention_output_bias", "mlp_bias", "gated_mlp", "activation", "tie_word_embeddings")
    assert [getattr(stated, field) for field in kept] == [getattr(config, field) for field in kept]


@pytest.mark.parametrize("name", ["llama2_gqa_tp2pp2", "qwen2_tp2pp2"])
def test_reference_logits_after_conversion(name: str, shared: Path, tmp_path: Path) -> None:
    """Into a folder with the original model: the result lies beside it and computes what transformers computed."""
    source, target = shared / "megatron" / "hf" / SOURCES[name], tmp_path / "original"
    shutil.copytree(source, target, ignore=shutil.ignore_patterns("*.npz"))
    modellink.convert(shared / "megatron" / "checkpoints" / name, target, to="hf")
    config = read_config(target / "mg2hf")
    model = Decoder(dataclasses.replace(config, padded_vocab_size=config.vocab_size)).eval()
    load_hf(model, target / "mg2hf", progress=False)
    reference = np.load(source / "ref.npz")
    with torch.no_grad():
        logits = model(torch.tensor(reference["input_ids"]))
    torch.testing.assert_close(logits, torch.tensor(reference["logits"]), atol=2e-4, rtol=0)
    assert_same(hf_state(target / "mg2hf"), hf_state(source))


@pytest.mark.parametrize("name", SOURCES)
def test_written_folders_are_megatrons_own(name: str, shared: Path, tmp_path: Path) -> None:
    """Same folders, keys, shapes, values; and torch.load maps the files."""
    theirs = shared / "megatron" / "checkpoints" / name
    tensor, pipeline = int(name[-4]), int(name[-1])
    modellink.convert(
        shared / "megatron" / "hf" / SOURCES[name], tmp_path / "out", "mcore", tensor, pipeline,
        vocab_multiple=32000 // tensor,
    )  # fmt: skip
    folders = (theirs, tmp_path / "out")
    listed = [sorted(str(path.relative_to(root)) for path in (root / STEP).rglob("*")) for root in folders]
    assert listed[0] == listed[1]
    assert (tmp_path / "out" / "latest_checkpointed_iteration.txt").read_bytes() == b"1"
    for file in sorted(theirs.rglob("*.pt")):
        ours = tmp_path / "out" / file.relative_to(theirs)
        wanted, found = file_model(file), file_model(ours)
        assert found.keys() == wanted.keys()
        for key, value in wanted.items():
            assert (found[key] is None) if value is None else torch.equal(found[key], value), key
        with torch.serialization.safe_globals([argparse.Namespace]):
            loaded = torch.load(ours, weights_only=True, mmap=True)
        assert all(torch.equal(loaded["model"][key], value) for key, value in wanted.items() if value is not None)
        mine, original = vars(loaded["args"]), vars(read_torch_file(file)["args"])
        assert (loaded["checkpoint_version"], loaded["iteration"]) == (3.0, 1)
        exact = ("num_layers", "hidden_size", "num_attention_heads", "num_query_groups", "kv_channels", "vocab_size")
        exact += ("ffn_hidden_size", "padded_vocab_size", "swiglu", "add_bias_linear", "normalization", "params_dtype")
        exact += ("tensor_model_parallel_size", "pipeline_model_parallel_size", "position_embedding_type")
        assert {key: mine[key] for key in exact} == {key: original[key] for key in exact}


@pytest.mark.parametrize("name", ["llama2_gqa", "qwen2"])
def test_every_format_in_a_circle(name: str, shared: Path, tmp_path: Path) -> None:
    source = shared / "megatron" / "hf" / name
    steps: list[tuple[str, tuple[int, int]]] = [
        ("mcore", (2, 2)),
        ("native", (1, 1)),
        ("legacy", (2, 1)),
        ("mcore", (1, 2)),
        ("legacy", (2, 2)),
        ("hf", (1, 1)),
    ]
    before = source
    for number, (to, sizes) in enumerate(steps):
        modellink.convert(before, tmp_path / str(number), to, *sizes)
        before = tmp_path / str(number)
    assert_same(hf_state(before), hf_state(source))
    ours, theirs = read_config(before), read_config(source)
    assert ours == theirs


def random_model(**fields: Any) -> tuple[ModelConfig, dict[str, torch.Tensor]]:
    """A small architecture with odd vocabulary and random bf16 weights."""
    sizes = {"num_layers": 8, "hidden_size": 32, "num_attention_heads": 8, "num_key_value_heads": 4, "vocab_size": 77}
    common = {"ffn_hidden_size": 24, "max_position_embeddings": 64, "gated_mlp": True, "activation": "silu"}
    switches = {"qkv_bias": False, "attention_output_bias": False, "mlp_bias": False, "normalization": "RMSNorm"}
    rest = {"position_embedding": "rope", "tie_word_embeddings": False, "padded_vocab_size": 77}
    config = ModelConfig(**(sizes | common | switches | rest | fields)).resolve()
    generator = torch.Generator().manual_seed(7)
    state = {
        name: torch.randn(shape, generator=generator).bfloat16() for name, shape in expected_shapes(config).items()
    }
    return config, state


def read_back(folder: Path, config: ModelConfig) -> dict[str, torch.Tensor]:
    vocabulary = ("embed_tokens.weight", "lm_head.weight")
    return {
        name: tensor[: config.vocab_size] if name in vocabulary else tensor
        for name, tensor in MegatronFolder(folder).tensors(config)
    }


LAYOUTS = {
    "even": (Layout("mcore", 4, 2), [[[0, 1, 2, 3]], [[4, 5, 6, 7]]]),
    "uneven": (Layout("mcore", 1, 3, (1, 5, 2)), [[[0]], [[1, 2, 3, 4, 5]], [[6, 7]]]),
    "interleaved": (Layout("mcore", 2, 2, None, 2), [[[0, 1], [4, 5]], [[2, 3], [6, 7]]]),
    "interleaved legacy": (Layout("legacy", 2, 2, None, 1), [[[0], [2], [4], [6]], [[1], [3], [5], [7]]]),
    "uneven legacy": (Layout("legacy", 2, 2, (3, 5)), [[[0, 1, 2]], [[3, 4, 5, 6, 7]]]),
}


@pytest.mark.parametrize("name", LAYOUTS)
@pytest.mark.parametrize("tied", [False, True])
def test_placement_of_layers(name: str, tied: bool, tmp_path: Path) -> None:
    layout, expected = LAYOUTS[name]
    config, state = random_model(tie_word_embeddings=tied)
    write_megatron(tmp_path / "out", state.items(), config, layout)
    norm = "language_model.encoder.layers.{}.input_norm.weight"
    norm = norm if layout.dialect == "legacy" else "decoder.layers.{}.input_layernorm.weight"
    head = {"legacy": "word_embeddings_for_head.weight", "mcore": "output_layer.weight"}[layout.dialect]
    for stage, chunks in enumerate(expected):
        flat = file_model(tmp_path / "out" / STEP / f"mp_rank_00_{stage:03d}" / FILE)
        for number, layers in enumerate(chunks):
            prefix = f"model{number}." if layout.layers_per_chunk else ""
            for place, layer in enumerate(layers):
                assert torch.equal(flat[prefix + norm.format(place)], state[f"layers.{layer}.input_layernorm.weight"])
            assert prefix + norm.format(len(layers)) not in flat
            last = stage == len(expected) - 1 and number == len(chunks) - 1
            assert (prefix + head in flat) == (last and (tied or layout.dialect == "mcore"))
    assert_same(read_back(tmp_path / "out", config), state)


@pytest.mark.parametrize("dialect", ["mcore", "legacy"])
@pytest.mark.parametrize(
    "fields",
    [
        {"qkv_bias": True, "attention_output_bias": True, "mlp_bias": True, "tie_word_embeddings": True},
        {"gated_mlp": False, "activation": "gelu", "normalization": "LayerNorm", "embedding_norm": True},
        {"position_embedding": "learned_absolute", "num_key_value_heads": 8, "norm_epsilon": 1e-6},
        {"head_dim": 12, "rope_theta": 5e5, "rope_scaling": "llama3", "rope_original_max_position": 32},
    ],
    ids=["biases", "plain mlp", "learned positions", "head size"],
)
def test_architectures(dialect: str, fields: dict[str, Any], tmp_path: Path) -> None:
    config, state = random_model(**fields)
    write_megatron(tmp_path / "out", state.items(), config, Layout(dialect, 2, 2, vocab_multiple=16))
    assert_same(read_back(tmp_path / "out", config), state)
    stated = MegatronFolder(tmp_path / "out").config()
    assert dataclasses.replace(stated, padded_vocab_size=77, vocab_multiple=128) == config


def test_norms_of_the_branches_and_heads(tmp_path: Path) -> None:
    config, state = random_model(qk_norm=True, sandwich_norm=True)
    write_megatron(tmp_path / "out", state.items(), config, Layout("mcore", 4, 1))
    assert_same(read_back(tmp_path / "out", config), state)
    with pytest.raises(ModelLinkError, match=r"Megatron-Legacy has no place for 'layers.0.*write Megatron-Core"):
        write_megatron(tmp_path / "legacy", state.items(), config, Layout("legacy", 4, 1))
    assert not (tmp_path / "legacy").exists()


def rewrite(file: Path, change: Any) -> None:
    """Save a file again with torch after `change` of its content; tensors become real ones."""
    content = read_torch_file(file)
    content["args"] = argparse.Namespace(**vars(content["args"]))
    content["model"] = {
        key: value.read().clone() if isinstance(value, FileTensor) else value for key, value in content["model"].items()
    }
    change(content)
    torch.save(content, file)


def test_fused_norms_and_extension_states_are_read(tmp_path: Path) -> None:
    """The spelling of the Transformer Engine layers, with their byte buffers and an optimizer beside the weights."""
    config, state = random_model(num_layers=2)
    write_megatron(tmp_path / "out", state.items(), config, Layout("mcore", 2, 1))

    def change(content: dict[str, Any]) -> None:
        model = content["model"]
        for layer in range(2):
            place = f"decoder.layers.{layer}."
            fused = place + "self_attention.linear_qkv.layer_norm_weight"
            model[fused] = model.pop(place + "input_layernorm.weight")
            model[place + "mlp.linear_fc1.layer_norm_weight"] = model.pop(place + "pre_mlp_layernorm.weight")
            model[place + "mlp.linear_fc1._extra_state"] = torch.ByteTensor([1, 2])
        content["rng_state"] = [{"np_rng_state": np.random.RandomState(0).get_state(), "torch": torch.get_rng_state()}]
        content["optimizer"] = collections.OrderedDict(state={0: {"exp_avg": torch.zeros(3)}})

    for rank in range(2):
        rewrite(tmp_path / "out" / STEP / f"mp_rank_{rank:02d}" / FILE, change)
    assert_same(read_back(tmp_path / "out", config), state)


class Danger:
    def __init__(self, target: Path) -> None:
        self.target = target

    def __reduce__(self) -> Any:
        return os.mkdir, (str(self.target),)


def damage(kind: str, folder: Path) -> None:
    file = folder / STEP / "mp_rank_01_001" / FILE
    if kind == "missing rank":
        shutil.rmtree(file.parent)
    elif kind == "missing tensor rank":
        for path in (folder / STEP).glob("mp_rank_01*"):
            shutil.rmtree(path)
    elif kind == "cut short":
        file.write_bytes(file.read_bytes()[:-500])
    elif kind == "not a number":
        rewrite(file, lambda content: content["model"]["decoder.final_layernorm.weight"].fill_(float("nan")))
    elif kind == "code":
        rewrite(file, lambda content: content.update(extra=Danger(folder / "executed")))
    elif kind == "bare code":
        with zipfile.ZipFile(file, "w") as archive:
            archive.writestr("a/data.pkl", pickle.dumps(Danger(folder / "executed")))
    elif kind == "foreign rank":
        rewrite(file, lambda content: content["model"]["decoder.final_layernorm.weight"].add_(1))
    elif kind == "wrong sizes":
        for path in (folder / STEP).rglob(FILE):
            rewrite(path, lambda content: vars(content["args"]).update(num_attention_heads=8, num_query_groups=8))
    elif kind == "surplus":
        for path in (folder / STEP).glob(f"mp_rank_*_001/{FILE}"):
            rewrite(path, lambda content: content["model"].update({"decoder.new.weight": torch.zeros(2)}))


DAMAGES = {
    "missing rank": r"mp_rank_01_001/model_optim_rng.pt is missing: copy the files of every rank",
    "missing tensor rank": r"say tensor_model_parallel_size 2, but there are folders for 1",
    "cut short": r"mp_rank_01_001/model_optim_rng.pt is damaged or cut short",
    "not a number": r"mp_rank_01_001.*'decoder.final_layernorm.weight' holds NaN",
    "code": r"mp_rank_01_001.*wants to build (posix|nt).mkdir",
    "bare code": r"mp_rank_01_001.*wants to build (posix|nt).mkdir",
    "foreign rank": r"disagree about 'decoder.final_layernorm.weight'",
    "wrong sizes": r"linear_qkv.weight' has shape \[32, 32\], one of 2 tensor-par.* of this model holds \[48, 32\]",
    "surplus": r"'decoder.new.weight' fits nowhere",
}


@pytest.mark.parametrize("kind", DAMAGES)
def test_bad_folders_are_refused(kind: str, tmp_path: Path) -> None:
    config, state = random_model()
    write_megatron(tmp_path / "in", state.items(), config, Layout("mcore", 2, 2))
    damage(kind, tmp_path / "in")
    for to in ("hf", "native", "legacy"):
        with pytest.raises(ModelLinkError, match=DAMAGES[kind]):
            modellink.convert(tmp_path / "in", tmp_path / "out", to)
        assert not (tmp_path / "out").exists()
    assert not (tmp_path / "in" / "executed").exists()


@pytest.mark.parametrize(
    ("layout", "sentence"),
    [
        (Layout("mcore", 3, 1), "tensor parallel size 3 does not divide the query heads"),
        (Layout("mcore", 8, 1), r"does not divide the key/value heads \(4\)"),
        (Layout("mcore", 1, 3), "8 layers do not divide into 3 pipeline stages"),
        (Layout("mcore", 1, 2, (3, 4)), "3,4 must be 2 numbers of at least 1 that sum to the model's 8 layers"),
        (Layout("mcore", 1, 2, None, 3), "chunks of 3 layers"),
        (Layout("mcore", 1, 2, (4, 4), 2), "exclude each other"),
    ],
)
def test_layouts_that_do_not_fit_are_refused(layout: Layout, sentence: str, tmp_path: Path) -> None:
    config, state = random_model()
    with pytest.raises(ModelLinkError, match=sentence):
        write_megatron(tmp_path / "out", state.items(), config, layout)
    assert not (tmp_path / "out").exists()


def test_what_lies_there_is_kept_until_the_new_step_is_whole(tmp_path: Path) -> None:
    config, state = random_model()
    out = tmp_path / "out"
    write_megatron(out, state.items(), config, Layout("mcore", 2, 1))
    before = {path: path.read_bytes() for path in out.rglob("*") if path.is_file()}
    with pytest.raises(ModelLinkError, match="1 tensors never came, the first is 'norm.weight'"):
        write_megatron(out, ((n, t) for n, t in state.items() if n != "norm.weight"), config, Layout("legacy"))
    assert before == {path: path.read_bytes() for path in out.rglob("*") if path.is_file()}
    write_megatron(out, state.items(), config, Layout("legacy"))
    assert sorted(path.name for path in out.iterdir()) == [STEP, "latest_checkpointed_iteration.txt"]
    assert_same(read_back(out, config), state)
    (out / "iter_0000500").mkdir()
    with pytest.raises(ModelLinkError, match="is not an empty folder"):
        write_megatron(out, state.items(), config, Layout("mcore"))


def test_command_line_of_the_launch_scripts(root: Path, tmp_path: Path) -> None:
    """HF to Megatron-Core, to Megatron-Legacy, and back beside the original, with the flags scripts give."""
    config, state = random_model()
    save_hf(tmp_path / "hf", state.items(), config)
    shutil.copytree(tmp_path / "hf", tmp_path / "original")
    program = [sys.executable, str(root / "convert_ckpt.py"), "--model-type", "GPT"]
    sizes = ["--target-tensor-parallel-size", "2", "--target-pipeline-parallel-size", "2"]
    lines = [
        ["--load-model-type", "hf", "--save-model-type", "mg", "--use-mcore-models", *sizes, "--load-dir", "hf"]
        + ["--num-layer-list", "3,5", "--make-vocab-size-divisible-by", "16", "--save-dir", "mcore"],
        ["--load-model-type", "mg", "--save-model-type", "mg", "--use-mcore-models", "--save-to-legacy", *sizes]
        + ["--num-layers-per-virtual-pipeline-stage", "2", "--load-dir", "mcore", "--save-dir", "legacy"],
        ["--load-model-type", "mg", "--save-model-type", "hf", "--load-from-legacy", "--load-dir", "legacy"]
        + ["--save-dir", "original", "--model-type-hf", "llama2"],
    ]
    for line in lines:
        done = subprocess.run(program + line, cwd=tmp_path, env=ENVIRONMENT, capture_output=True, text=True)
        assert done.returncode == 0, done.stderr
    assert MegatronFolder(tmp_path / "mcore").arguments["padded_vocab_size"] == 96
    assert "model3" not in read_torch_file(tmp_path / "legacy" / STEP / "mp_rank_01_001" / FILE)
    assert "model1" in read_torch_file(tmp_path / "legacy" / STEP / "mp_rank_01_001" / FILE)
    assert_same(hf_state(tmp_path / "original" / "mg2hf"), hf_state(tmp_path / "hf"))
