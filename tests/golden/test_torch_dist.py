"""Steps of Megatron-Core's distributed checkpointing (torch_dist): those Megatron itself wrote, and every key layout.

megatron_core/*.tar.xz hold what Megatron-Core 0.16.1 saved of one model in several processes on the CPU, as torch_dist
(iter_0000005) and as files of ranks (iter_0000006), and what its own loader then gave one process (state.pt); and of
the model with experts alone what that process computed (logits.pt), as its latent attention needs a GPU.
"""

from __future__ import annotations

import argparse
import os
import pickle
import tarfile
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed.checkpoint as dcp

import modellink
from modellink.checkpoint.hf import expected_shapes
from modellink.checkpoint.megatron import MegatronFolder, find_step
from modellink.checkpoint.megatron_names import cut, find_place
from modellink.config.schema import ModelConfig
from modellink.errors import ModelLinkError
from modellink.models.decoder import Decoder

OWN = Path(__file__).parent / "megatron_core"
SIZES = {
    **{"num_layers": 2, "hidden_size": 8, "num_attention_heads": 4, "vocab_size": 16, "padded_vocab_size": 16},
    **{"ffn_hidden_size": 12, "moe_ffn_hidden_size": 4, "max_position_embeddings": 32, "num_experts": 4},
    **{"gated_mlp": True, "activation": "silu", "normalization": "RMSNorm", "position_embedding": "rope"},
    **{"qkv_bias": False, "attention_output_bias": False, "mlp_bias": False, "tie_word_embeddings": False},
    **{"n_shared_experts": 2, "router_scoring": "softmax", "attention_dropout": 0.0, "hidden_dropout": 0.0},
}
LATENT = SIZES | {
    **{"multi_head_latent_attention": True, "qk_norm": True, "norm_epsilon": 1e-6, "first_k_dense_replace": 1},
    **{"kv_lora_rank": 10, "qk_nope_head_dim": 6, "qk_rope_head_dim": 4, "v_head_dim": 5},
}
MODELS: dict[str, dict[str, Any]] = {
    "experts_tp2_ep2": SIZES | {"num_key_value_heads": 2, "qkv_bias": True, "shared_expert_gate": True},
    "latent_pp2_ep2": LATENT,
    "latent_tp2": LATENT | {"q_lora_rank": 12},
}


def unpacked(name: str, tmp_path: Path) -> Path:
    with tarfile.open(OWN / f"{name}.tar.xz") as archive:
        for member in archive:  # Python before 3.11.4 has no safe extractall
            if member.isfile():
                path = tmp_path / member.name
                assert path.resolve().is_relative_to(tmp_path.resolve())
                path.parent.mkdir(parents=True, exist_ok=True)
                path.write_bytes(archive.extractfile(member).read())
    return tmp_path


def under_megatrons_names(
    tensors: dict[str, torch.Tensor], config: ModelConfig, upstream: bool
) -> dict[str, torch.Tensor]:
    """What a single rank of Megatron holds of the model `tensors`."""
    found = {}
    for canonical in tensors:
        place = find_place(config, canonical, "mcore", upstream)
        row = place.row._replace(cut="whole") if place.row.cut == "either" else place.row
        for expert, name in enumerate(place.names):
            parts = [tensors[ours] if place.experts is None else tensors[ours][expert] for ours in place.ours]
            found[name.replace("shared_expert_gate.weight", "shared_experts.gate_weight")] = cut(
                row, parts, 0, 1, config
            )
    return found


def assert_same(found: dict[str, torch.Tensor], wanted: dict[str, torch.Tensor]) -> None:
    assert found.keys() == wanted.keys()
    for name, value in wanted.items():
        assert found[name].dtype == value.dtype and torch.equal(found[name], value), name


@pytest.mark.parametrize("name", MODELS)
def test_what_megatron_wrote_is_what_megatron_reads(name: str, tmp_path: Path) -> None:
    folder = unpacked(name, tmp_path)
    wanted = torch.load(folder / "state.pt", weights_only=True)
    config = ModelConfig(**MODELS[name]).resolve()
    latent = config.multi_head_latent_attention
    for step in ("iter_0000005", "iter_0000006"):
        files = MegatronFolder(folder / step)
        stated = files.config()
        stated.vocab_multiple, stated.latent_norm_epsilon = config.vocab_multiple, config.latent_norm_epsilon
        stated.family = config.family
        assert stated == config
        assert_same(under_megatrons_names(dict(files.tensors(config)), config, latent), wanted)


@torch.no_grad()
def test_megatrons_logits(tmp_path: Path) -> None:
    folder = unpacked("experts_tp2_ep2", tmp_path)
    files, wanted = MegatronFolder(folder / "iter_0000006"), torch.load(folder / "logits.pt", weights_only=True)
    model = Decoder(files.config()).eval()
    model.load_state_dict(dict(files.tensors(model.config)))
    assert wanted["logits"].std() > 0.1
    torch.testing.assert_close(model(wanted["tokens"]), wanted["logits"], atol=1e-5, rtol=0)


def test_its_tracker_names_the_step_and_it_converts(tmp_path: Path) -> None:
    folder = unpacked("experts_tp2_ep2", tmp_path / "in")
    (folder / "latest_checkpointed_iteration.txt").write_text("5")
    assert find_step(folder) == folder / "iter_0000005"
    config = ModelConfig(**MODELS["experts_tp2_ep2"]).resolve()
    wanted = dict(MegatronFolder(folder).tensors(config))
    for place in (folder, folder / "iter_0000005"):
        modellink.convert(place, tmp_path / "mcore", "mcore", 2, 2, expert_parallel=4)
        assert_same(dict(MegatronFolder(tmp_path / "mcore").tensors(config)), wanted)


def random_model(name: str) -> tuple[ModelConfig, dict[str, torch.Tensor]]:
    config = ModelConfig(**MODELS[name]).resolve()
    generator = torch.Generator().manual_seed(2)
    return config, {key: torch.randn(shape, generator=generator) for key, shape in expected_shapes(config).items()}


def save(step: Path, tensors: dict[str, torch.Tensor], form: str) -> None:
    """A step with the keys of `form`: layers and experts stacked, numbered, or numbered with gated halves apart."""
    keys: dict[str, torch.Tensor] = {}
    for name, value in tensors.items():
        name = name.replace(".local_experts.", ".experts.")
        if form == "halves" and ".linear_fc1.weight" in name:
            keys[f"{name}_w"], keys[f"{name}_v"] = value.chunk(2)
        else:
            keys[name] = value
    if form == "stacked":
        keys = stacked(stacked(keys, "experts.experts."), "decoder.layers.")
    step.mkdir(parents=True)
    others = {"optimizer.state.exp_avg.decoder.final_layernorm.weight": torch.zeros(8), "rng_state": {"seed": 1}}
    dcp.save(keys | others, checkpoint_id=step, no_dist=True)
    args = argparse.Namespace(num_layers=2, hidden_size=8, num_attention_heads=4)
    torch.save({"args": args, "iteration": 5, "checkpoint_version": 3.0}, step / "common.pt")


def stacked(keys: dict[str, torch.Tensor], before: str) -> dict[str, torch.Tensor]:
    """The tensors whose names differ only in the number after `before`, as one."""
    groups: dict[str, list[torch.Tensor]] = {}
    for name, value in keys.items():
        head, found, rest = name.partition(before)
        groups.setdefault(head + found + rest.partition(".")[2] if found else name, []).append(value)
    return {name: torch.stack(values) if before in name else values[0] for name, values in groups.items()}


@pytest.mark.parametrize("form", ["stacked", "numbered", "halves"])
def test_layouts_of_the_keys(form: str, tmp_path: Path) -> None:
    config, state = random_model("experts_tp2_ep2")
    save(tmp_path / "step", under_megatrons_names(state, config, False), form)
    assert_same(dict(MegatronFolder(tmp_path / "step").tensors(config)), state)


class Danger:
    def __init__(self, target: Path) -> None:
        self.target = target

    def __reduce__(self) -> Any:
        return os.mkdir, (str(self.target),)


def damage(kind: str, step: Path) -> None:
    data = next(step.glob("*.distcp"))
    if kind == "missing":
        data.unlink()
    elif kind == "cut short":
        data.write_bytes(data.read_bytes()[:5000])
    elif kind == "overwritten":
        data.write_bytes(bytes(data.stat().st_size))
    elif kind == "index":
        (step / ".metadata").write_bytes(b"\x80\x02nonsense")
    elif kind == "code":
        (step / ".metadata").write_bytes(pickle.dumps(Danger(step / "executed")))
    elif kind == "code in a chunk":
        index = pickle.loads((step / ".metadata").read_bytes())
        torch.save(Danger(step / "executed"), data)
        for info in index.storage_data.values():
            info.offset, info.length = 0, data.stat().st_size
        (step / ".metadata").write_bytes(pickle.dumps(index))
    elif kind in ("elsewhere", "hole"):
        index = pickle.loads((step / ".metadata").read_bytes())
        if kind == "hole":
            index.storage_data = {key: info for key, info in index.storage_data.items() if "lm_head" not in key.fqn}
            index.state_dict_metadata["output_layer.weight"].chunks.pop()
            index.storage_data = {k: v for k, v in index.storage_data.items() if k.fqn != "output_layer.weight"}
        else:
            for info in index.storage_data.values():
                info.relative_path = "../other.distcp"
        (step / ".metadata").write_bytes(pickle.dumps(index))


DAMAGES = {
    "missing": r"__0_0.distcp is missing: copy all files",
    "cut short": r"__0_0.distcp is cut short",
    "overwritten": r"__0_0.distcp is damaged",
    "index": r".metadata is damaged or cut short",
    "code": r".metadata wants to build (posix|nt).mkdir",
    "code in a chunk": r"__0_0.distcp wants to build (posix|nt).mkdir",
    "elsewhere": r".metadata points outside of its folder",
    "hole": r"'output_layer.weight' is not whole",
}


@pytest.mark.parametrize("kind", DAMAGES)
def test_bad_steps_are_refused(kind: str, tmp_path: Path) -> None:
    config, state = random_model("experts_tp2_ep2")
    save(tmp_path / "step", under_megatrons_names(state, config, False), "stacked")
    damage(kind, tmp_path / "step")
    with pytest.raises(ModelLinkError, match=DAMAGES[kind]):
        dict(MegatronFolder(tmp_path / "step").tensors(config))
    assert not (tmp_path / "step" / "executed").exists()
