"""Adapters of Megatron's fused, sharded modules against the formula in float64; conversions that merge."""

from __future__ import annotations

import argparse
import json
import zlib
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from adapters import (
    ALPHA,
    FILE,
    LLAMA_LIKE,
    RANK,
    STEP,
    TRACKER,
    expected_state,
    make_factors,
    make_peft,
    module_names,
    random_model,
    refusal,
    write_adapter,
)
from safetensors.torch import load_file
from torch import Tensor

import modellink
from modellink.checkpoint.hf import save_hf
from modellink.checkpoint.lora import AdaptedFolder, Merge, merged, open_adapter
from modellink.checkpoint.megatron import Layout, MegatronFolder, write_megatron
from modellink.cli.convert import run
from modellink.errors import ModelLinkError

LAYOUTS = {
    "one file": Layout("mcore"),
    "mcore": Layout("mcore", 2, 2),
    "mcore interleaved": Layout("mcore", 2, 2, layers_per_chunk=1),
    "mcore uneven": Layout("mcore", 1, 3, (1, 2, 1), vocab_multiple=16),
    "legacy": Layout("legacy", 2, 2),
    "legacy one file": Layout("legacy"),
    "legacy interleaved": Layout("legacy", 1, 2, layers_per_chunk=1),
}


@pytest.mark.parametrize("fields", [{}, {"gated_mlp": False, "activation": "gelu", "qkv_bias": True, "mlp_bias": True}])
@pytest.mark.parametrize("name", LAYOUTS)
def test_fused_sharded_adapters(name: str, fields: dict[str, Any], tmp_path: Path) -> None:
    config, state = random_model(**fields)
    factors = make_factors(config)
    write_adapter(tmp_path / "adapter", config, state, factors, LAYOUTS[name], {"lora_alpha": ALPHA})
    targets = [stem.rpartition(".")[2] for stem in module_names(LAYOUTS[name].dialect).values()]
    adapter = open_adapter(tmp_path / "adapter", rank=RANK, alpha=ALPHA, targets=targets)
    found, exact = dict(merged(state.items(), config, adapter)), expected_state(config, state, factors)
    assert found.keys() == exact.keys()
    for key, value in exact.items():
        torch.testing.assert_close(found[key].double(), value, atol=1e-5, rtol=1e-6)
        changed = key.endswith("proj.weight")
        assert torch.equal(found[key], state[key]) != changed, key
    if LAYOUTS[name].dialect == "mcore":  # the base is there as well
        base = dict(AdaptedFolder(tmp_path / "adapter").tensors(config))
        assert all(torch.equal(base[key][: len(value)], value) for key, value in state.items())
    merge = Merge(config, adapter, torch.bfloat16)
    key = "layers.2.self_attn.k_proj.weight"
    for _ in range(2):  # any tensor, as often as it is asked
        torch.testing.assert_close(merge(key, state[key]).double(), exact[key], atol=1e-5, rtol=2**-8)


def seeded(text: str, *shape: int) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(zlib.crc32(text.encode())))


def add_to_every_shard(folder: Path, adapter: Path) -> None:
    """Change the weights of a step, rank by rank, by factors of its own, which go into the files of `adapter`."""
    for file in sorted((folder / STEP).rglob(FILE)):
        tensor, *others = file.parent.name.removeprefix("mp_rank_").split("_")
        with torch.serialization.safe_globals([argparse.Namespace]):
            content = torch.load(file, weights_only=True)
        model = content["model"]
        factors: dict[str, Tensor] = {}
        for name in [name for name in model if ".linear_" in name and name.endswith(".weight")]:
            whole = "linear_qkv" in name  # the projections into latents are not split
            columns = name.endswith(("linear_proj.weight", "linear_fc2.weight"))
            # each expert-parallel rank has other experts; all else is the same in all of them
            place = f"{name} {others[-1] if 'local_experts' in name else others[0]}"
            a = seeded(place if not columns else f"{place} {tensor}", RANK, model[name].shape[1])
            b = seeded(place if columns or whole else f"{place} {tensor}", model[name].shape[0], RANK)
            stem = name.removesuffix(".weight")
            factors |= {f"{stem}.lora_A.default.weight": a, f"{stem}.lora_B.default.weight": b}
            model[name] = (model[name].double() + ALPHA / RANK * b.double() @ a.double()).float()
        torch.save(content, file)
        kept = {name: model[name] for name in model if name.startswith("embedding.")}
        target = adapter / file.relative_to(folder)
        target.parent.mkdir(parents=True)
        torch.save({"args": content["args"], "model": kept | factors}, target)
    (adapter / TRACKER).write_text("1")


def test_adapters_of_experts_and_latents(tmp_path: Path) -> None:
    latent = {"multi_head_latent_attention": True, "kv_lora_rank": 6, "q_lora_rank": 10, "num_key_value_heads": 4}
    heads = {"qk_rope_head_dim": 4, "qk_nope_head_dim": 8, "v_head_dim": 8, "qk_norm": True}
    experts = {"num_experts": 4, "moe_ffn_hidden_size": 12, "n_shared_experts": 2, "first_k_dense_replace": 1}
    config, state = random_model(
        **latent, **heads, **experts, shared_expert_gate=True, vocab_size=72, padded_vocab_size=72
    )
    write_megatron(tmp_path / "after", state.items(), config, Layout("mcore", 2, 2, expert_parallel=2))
    add_to_every_shard(tmp_path / "after", tmp_path / "adapter")
    found = dict(merged(state.items(), config, open_adapter(tmp_path / "adapter", alpha=ALPHA, rank=RANK)))
    changed = 0
    for name, value in MegatronFolder(tmp_path / "after").tensors(config):
        torch.testing.assert_close(found[name], value, atol=1e-5, rtol=1e-5)
        changed += not torch.equal(value, state[name])
    assert changed == 4 * 5 + 3 + 3 * (3 + 3)


def hf_state(folder: Path, scratch: Path) -> dict[str, Tensor]:
    """The tensors of a checkpoint of any format, as a Hugging Face folder holds them."""
    if not (folder / "config.json").exists():
        modellink.convert(folder, scratch, "hf", family="llama", progress=False)
        folder = scratch
    return load_file(folder / "model.safetensors")


TARGETS: dict[str, dict[str, Any]] = {
    "hf": {},
    "native": {},
    "mcore": {"tensor_parallel": 2, "pipeline_parallel": 2},
    "legacy": {"tensor_parallel": 2, "pipeline_parallel": 2, "layers_per_virtual_stage": 1},
}


@pytest.mark.parametrize("to", TARGETS)
@pytest.mark.parametrize("source", ["hf", "native", "mcore", "legacy", "adapted"])
def test_every_direction(source: str, to: str, tmp_path: Path) -> None:
    """Bases of every format with an adapter of either kind, merged into every format."""
    config, state = random_model()
    factors, dialect = make_factors(config), "legacy" if source == "legacy" else "mcore"
    base = tmp_path / "base"
    layout = Layout(dialect, 2, 2)
    write_adapter(tmp_path / "adapter", config, state, factors, layout, {"lora_alpha": ALPHA})
    if source == "adapted":
        base = tmp_path / "adapter"
    elif source in ("mcore", "legacy"):
        write_megatron(base, state.items(), config, Layout(dialect, 1, 4))
    else:
        save_hf(base, state.items(), config)
        if source == "native":
            modellink.convert(base, tmp_path / "step", "native", progress=False)
            base = tmp_path / "step"
    target = tmp_path / "target"
    modellink.convert(base, target, to, lora_load=tmp_path / "adapter", progress=False, **TARGETS[to])
    report = json.loads((target / "conversion_report.json").read_text())
    assert report["merged"] == [str(tmp_path / "adapter")]
    assert report["verification"]["logits_max_difference"] == 0
    save_hf(tmp_path / "expected", merged(state.items(), config, open_adapter(tmp_path / "adapter")), config)
    found, expected = hf_state(target, tmp_path / "back"), hf_state(tmp_path / "expected", tmp_path)
    assert found.keys() == expected.keys()
    for name, value in expected.items():
        assert torch.equal(found[name], value), name


def test_peft_adapters_of_every_base(tmp_path: Path) -> None:
    """A PEFT folder goes with Megatron's files of its model too, and --params-dtype rounds the sum once."""
    make_peft(transformers.LlamaConfig(**LLAMA_LIKE), {"target_modules": ["q_proj", "up_proj", "down_proj"]}, tmp_path)
    adapter = {"lora_load": tmp_path / "adapter", "lora_r": 4, "lora_alpha": 8, "progress": False}
    modellink.convert(tmp_path / "base", tmp_path / "expected", "hf", **adapter)
    modellink.convert(tmp_path / "base", tmp_path / "mcore", "mcore", 2, 2, progress=False)
    modellink.convert(tmp_path / "mcore", tmp_path / "found", "hf", **adapter)
    modellink.convert(tmp_path / "base", tmp_path / "half", "hf", dtype=torch.bfloat16, **adapter)
    expected, found, half = (load_file(tmp_path / name / "model.safetensors") for name in ("expected", "found", "half"))
    for name, value in expected.items():
        assert torch.equal(found[name], value), name
        assert torch.equal(half[name], value.bfloat16()), name


def test_command_line_of_the_launch_scripts(tmp_path: Path) -> None:
    config, state = random_model()
    write_megatron(tmp_path / "base", state.items(), config, Layout("legacy", 2, 1))
    write_adapter(tmp_path / "adapter", config, state, make_factors(config), Layout("legacy", 2, 2))
    line = ["--model-type", "GPT", "--loader", "megatron", "--saver", "megatron", "--load-dir", str(tmp_path / "base")]
    line += ["--save-model-type", "save_huggingface_llama", "--save-dir", str(tmp_path / "out")]
    sizes = ["--target-tensor-parallel-size", "1", "--target-pipeline-parallel-size", "1"]
    known = ["--lora-r", str(RANK), "--lora-alpha", str(ALPHA), "--lora-target-modules"]
    known += ["query_key_value", "dense", "dense_h_to_4h", "dense_4h_to_h"]
    for lacking in (["--lora-r", "8"], known):
        with pytest.raises(ModelLinkError, match=r"--lora-r.* without --lora-load FOLDER"):
            run([*line, *lacking])
    adapter = ["--lora-load", str(tmp_path / "adapter")]
    with pytest.raises(ModelLinkError, match="lora_alpha, the scale of the adapter: give --lora-alpha"):
        run([*line, *adapter])
    with pytest.raises(ModelLinkError, match="holds LoRA adapters beside its weights: give --lora-load"):
        modellink.convert(tmp_path / "adapter", tmp_path / "out", "hf")
    assert not (tmp_path / "out").exists()
    assert run([*line, *adapter, *known, *sizes]) == 0
    adapter_read = open_adapter(tmp_path / "adapter", alpha=ALPHA)
    save_hf(tmp_path / "expected", merged(state.items(), config, adapter_read), config)
    found, expected = hf_state(tmp_path / "out", tmp_path), hf_state(tmp_path / "expected", tmp_path)
    assert found.keys() == expected.keys()
    assert all(torch.equal(found[name], value) for name, value in expected.items())


def test_adapters_of_megatron_that_do_not_fit_are_refused(tmp_path: Path) -> None:
    config, state = random_model()
    factors = make_factors(config)
    layout, options = Layout("mcore", 2, 1), {"lora_alpha": ALPHA, "lora_r": RANK}
    key = "decoder.layers.1.mlp.linear_fc2.lora_{}.default.weight"

    def written(name: str, change: Any = lambda model, tensor, stage: None, **settings: Any) -> Path:
        write_adapter(tmp_path / name, config, state, factors, layout, settings or options, change)
        return tmp_path / name

    good = written("good")
    assert "--lora-r 4 contradicts" in refusal(config, state, good, rank=4)
    assert "--lora-alpha 16 contradicts" in refusal(config, state, good, alpha=16)
    message = refusal(config, state, good, targets=["linear_qvk"])
    assert "--lora-target-modules linear_qvk" in message and "Did you mean 'linear_qkv'" in message
    assert "also changes 'decoder.layers.0.mlp.linear_fc1'" in refusal(
        config, state, good, targets=["linear_qkv", "linear_proj", "linear_fc2"]
    )
    silent = written("silent", unrelated=1)
    assert "does not say lora_alpha" in refusal(config, state, silent)
    assert "has rank 3, not the 4 of --lora-r" in refusal(config, state, silent, alpha=1, rank=4)
    half = written("half", lambda model, tensor, stage: model.pop(key.format("B")))
    assert "lacks lora_B of 'decoder.layers.1.mlp.linear_fc2'" in refusal(config, state, half)

    def drop(model: dict[str, Any], tensor: int, stage: int) -> None:
        for side in "AB":
            model.pop(key.format(side))

    assert "changes other layers but has no lora_A and lora_B of" in refusal(config, state, written("gap", drop))
    nan = written("nan", lambda model, tensor, stage: model[key.format("A")].fill_(float("nan")))
    assert "holds NaN or infinity" in refusal(config, state, nan)
    mixed = written(
        "mixed", lambda model, tensor, stage: model.update({key.format("B"): model[key.format("B")] + tensor})
    )
    assert "files were mixed up" in refusal(config, state, mixed)
    for fields, sentence in (
        ({"num_layers": 5}, "num_layers 4, but the base has 5"),
        ({"num_attention_heads": 8, "num_key_value_heads": 4, "head_dim": 4}, "num_attention_heads 4, but the base"),
        ({"ffn_hidden_size": 32}, "the adapter belongs to another model"),
    ):
        assert sentence in refusal(*random_model(**fields), good)
    other = state | {"embed_tokens.weight": state["embed_tokens.weight"].flip(0)}
    assert "trained on other weights" in refusal(config, other, good)
    huge = state | {"layers.0.self_attn.o_proj.weight": state["layers.0.self_attn.o_proj.weight"] * float("inf")}
    assert "merged holds NaN or infinity" in refusal(config, huge, good)
    lacking = {name: value for name, value in state.items() if name != "layers.3.mlp.up_proj.weight"}
    assert "'layers.3.mlp.up_proj.weight' that it changes never came" in refusal(config, lacking, good)
    write_megatron(tmp_path / "plain", state.items(), config, layout)
    assert "holds no adapter" in refusal(config, state, tmp_path / "plain")
    (tmp_path / "empty").mkdir()
    assert "holds no adapter" in refusal(config, state, tmp_path / "empty")
