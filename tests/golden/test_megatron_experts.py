"""Experts and latent attention in Megatron's folders: names, cuts and options to the letter, every layout and way."""

from __future__ import annotations

import argparse
import dataclasses
import fcntl
import os
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

from modellink.checkpoint.hf import expected_shapes
from modellink.checkpoint.megatron import Layout, MegatronFolder, write_megatron
from modellink.checkpoint.megatron_args import read_arguments
from modellink.checkpoint.megatron_files import FileTensor, read_torch_file
from modellink.checkpoint.megatron_names import flattened
from modellink.config.schema import ModelConfig
from modellink.errors import ModelLinkError

STEP, FILE = "iter_0000001", "model_optim_rng.pt"
COMMON = {
    **{"num_layers": 4, "hidden_size": 16, "num_attention_heads": 4, "num_key_value_heads": 2, "vocab_size": 40},
    **{"ffn_hidden_size": 24, "max_position_embeddings": 32, "gated_mlp": True, "activation": "silu"},
    **{"qkv_bias": False, "attention_output_bias": False, "mlp_bias": False, "normalization": "RMSNorm"},
    **{"position_embedding": "rope", "tie_word_embeddings": False, "padded_vocab_size": 40},
}
EXPERTS = {"num_experts": 4, "moe_ffn_hidden_size": 8, "router_topk": 2}
SHARED = EXPERTS | {"n_shared_experts": 2, "first_k_dense_replace": 1, "router_scoring": "softmax"}
LATENT = {
    **{"multi_head_latent_attention": True, "qk_norm": True, "num_key_value_heads": 4, "norm_epsilon": 1e-6},
    **{"q_lora_rank": 12, "kv_lora_rank": 10, "qk_nope_head_dim": 6, "qk_rope_head_dim": 4, "v_head_dim": 5},
}
MODELS: dict[str, dict[str, Any]] = {
    "mixtral": EXPERTS,
    "qwen2 moe": SHARED | {"shared_expert_gate": True, "first_k_dense_replace": 0, "qkv_bias": True},
    "deepseek v2": SHARED
    | LATENT
    | {"routed_scaling_factor": 16.0, "router_groups": 2, "topk_group": 1, "rope_scaling": "yarn"}
    | {"rope_scaling_factor": 40.0, "rope_original_max_position": 16, "rope_mscale": 0.707},
    "deepseek v2 lite": SHARED | LATENT | {"q_lora_rank": None},
    "deepseek v3": SHARED | LATENT | {"router_scoring": "sigmoid", "router_correction_bias": True},
    "plain experts with biases": EXPERTS
    | {"gated_mlp": False, "activation": "gelu", "mlp_bias": True, "qkv_bias": True, "attention_output_bias": True}
    | {"normalization": "LayerNorm", "moe_layer_freq": 2},
}
LAYOUTS = {
    "one file": Layout("mcore"),
    "experts": Layout("mcore", expert_parallel=4),
    "all": Layout("mcore", 2, 2, vocab_multiple=8, expert_parallel=2),
    "uneven": Layout("mcore", 2, 2, (1, 3), expert_parallel=2, grouped_experts=True),
    "interleaved": Layout("mcore", 1, 2, None, 1, expert_parallel=4, grouped_experts=True),
}


def random_model(name: str, **fields: Any) -> tuple[ModelConfig, dict[str, torch.Tensor]]:
    config = ModelConfig(**(COMMON | MODELS[name] | fields)).resolve()
    generator = torch.Generator().manual_seed(3)
    shapes = expected_shapes(config)
    return config, {key: torch.randn(shape, generator=generator).bfloat16() for key, shape in shapes.items()}


def assert_same(found: dict[str, torch.Tensor], wanted: dict[str, torch.Tensor]) -> None:
    assert found.keys() == wanted.keys()
    for name, value in wanted.items():
        value = value[: len(found[name])]
        assert found[name].dtype == value.dtype and torch.equal(found[name], value), name


def read_back(folder: Path, config: ModelConfig) -> dict[str, torch.Tensor]:
    vocabulary = ("embed_tokens.weight", "lm_head.weight")
    return {
        name: tensor[: config.vocab_size] if name in vocabulary else tensor
        for name, tensor in MegatronFolder(folder).tensors(config)
    }


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("name", MODELS)
def test_every_layout_gives_the_model_back(name: str, layout: str, tmp_path: Path) -> None:
    config, state = random_model(name)
    chosen = dataclasses.replace(
        LAYOUTS[layout], grouped_experts=LAYOUTS[layout].grouped_experts and not config.mlp_bias
    )
    write_megatron(tmp_path / "out", state.items(), config, chosen)
    assert_same(read_back(tmp_path / "out", config), state)
    stated = MegatronFolder(tmp_path / "out").config()
    assert dataclasses.replace(stated, padded_vocab_size=40, vocab_multiple=128, family=config.family) == config


def contents(folder: Path, rank: str) -> dict[str, Any]:
    return read_torch_file(folder / STEP / f"mp_rank_{rank}" / FILE)


def model_of(folder: Path, rank: str) -> dict[str, torch.Tensor]:
    flat = flattened(contents(folder, rank)["model"])
    return {name: value.read() for name, value in flat.items() if isinstance(value, FileTensor)}


def half(value: torch.Tensor, rank: int, dim: int = 0) -> torch.Tensor:
    return value.chunk(2, dim)[rank]


def test_names_and_cuts_of_every_part(tmp_path: Path) -> None:
    """One rank of two in each direction, tensor by tensor; the first layer is dense."""
    config, state = random_model("deepseek v2", num_layers=2)
    write_megatron(tmp_path / "out", state.items(), config, Layout("mcore", 2, 1, expert_parallel=2))
    found = model_of(tmp_path / "out", "01_001")
    vocabulary = {"embedding.word_embeddings": "embed_tokens", "output_layer": "lm_head"}
    wanted = {f"{theirs}.weight": half(state[f"{ours}.weight"], 1) for theirs, ours in vocabulary.items()}
    wanted["decoder.final_layernorm.weight"] = state["norm.weight"]
    whole = {"q_layernorm": "q_a_layernorm", "k_layernorm": "kv_a_layernorm"}
    rows = {"linear_qb": "q_b_proj", "linear_kvb": "kv_b_proj"}
    for layer in range(2):
        ours, theirs = f"layers.{layer}.", f"decoder.layers.{layer}."
        attention, inner = f"{ours}self_attn.", f"{theirs}self_attention."
        wanted[f"{theirs}input_layernorm.weight"] = state[f"{ours}input_layernorm.weight"]
        wanted[f"{theirs}pre_mlp_layernorm.weight"] = state[f"{ours}post_attention_layernorm.weight"]
        down = (state[f"{attention}q_a_proj.weight"], state[f"{attention}kv_a_proj_with_mqa.weight"])
        wanted[f"{inner}linear_qkv.weight"] = torch.cat(down)
        wanted |= {f"{inner}{key}.weight": state[f"{attention}{name}.weight"] for key, name in whole.items()}
        wanted |= {f"{inner}{key}.weight": half(state[f"{attention}{name}.weight"], 1) for key, name in rows.items()}
        wanted[f"{inner}linear_proj.weight"] = half(state[f"{attention}o_proj.weight"], 1, 1)
    mlps = {"layers.0.mlp.{}.weight": "decoder.layers.0.mlp", "layers.1.mlp.shared_experts.{}.weight": None}
    for ours, theirs in mlps.items():
        theirs = theirs or "decoder.layers.1.mlp.shared_experts"
        gate_up = [half(state[ours.format(name)], 1) for name in ("gate_proj", "up_proj")]
        wanted[f"{theirs}.linear_fc1.weight"] = torch.cat(gate_up)
        wanted[f"{theirs}.linear_fc2.weight"] = half(state[ours.format("down_proj")], 1, 1)
    wanted["decoder.layers.1.mlp.router.weight"] = state["layers.1.mlp.gate.weight"]
    experts = "layers.1.mlp.experts."
    for local, expert in enumerate((2, 3)):
        place = f"decoder.layers.1.mlp.experts.local_experts.{local}."
        gate_up = [half(state[f"{experts}{name}"][expert], 1) for name in ("gate_proj", "up_proj")]
        wanted[f"{place}linear_fc1.weight"] = torch.cat(gate_up)
        wanted[f"{place}linear_fc2.weight"] = half(state[f"{experts}down_proj"][expert], 1, 1)
    assert_same(found, wanted)


def test_dense_layers_are_those_of_the_whole_model(tmp_path: Path) -> None:
    """Two of six layers are dense; in every chunk layers count from 0."""
    config, state = random_model("deepseek v2", num_layers=6, first_k_dense_replace=2)
    write_megatron(tmp_path / "chunks", state.items(), config, Layout("mcore", 1, 3, None, 1))
    write_megatron(tmp_path / "uneven", state.items(), config, Layout("mcore", 1, 2, (1, 5)))
    for stage in range(3):
        for chunk in range(2):
            model = flattened(contents(tmp_path / "chunks", f"00_00{stage}")[f"model{chunk}"])
            layer = 3 * chunk + stage
            assert ("decoder.layers.0.mlp.router.weight" in model) == (layer >= 2)
            assert ("decoder.layers.0.mlp.linear_fc1.weight" in model) == (layer < 2)
            norm = model["decoder.layers.0.input_layernorm.weight"].read()
            assert torch.equal(norm, state[f"layers.{layer}.input_layernorm.weight"])
    routers = [name for name in model_of(tmp_path / "uneven", "00_001") if name.endswith("router.weight")]
    assert routers == [f"decoder.layers.{layer}.mlp.router.weight" for layer in range(1, 5)]


def test_grouped_experts_lie_one_after_the_other_transposed(tmp_path: Path) -> None:
    config, state = random_model("mixtral", num_layers=1)
    layout = Layout("mcore", 2, expert_parallel=2, grouped_experts=True)
    write_megatron(tmp_path / "out", state.items(), config, layout)
    found = model_of(tmp_path / "out", "00_001")
    first, second = (found[f"decoder.layers.0.mlp.experts.weight{number}"] for number in (1, 2))
    assert (first.shape, second.shape) == ((16, 2 * 8), (2 * 4, 16))
    for local, expert in enumerate((2, 3)):
        gate, up, down = (state[f"layers.0.mlp.experts.{name}_proj"][expert] for name in ("gate", "up", "down"))
        assert torch.equal(first.view(2, 16, 8)[local].T, torch.cat((half(gate, 0), half(up, 0))))
        assert torch.equal(second.view(2, 4, 16)[local].T, half(down, 0, 1))
    assert contents(tmp_path / "out", "00_001")["args"].moe_grouped_gemm is True


def test_bias_of_the_choice_and_gate_of_the_shared_experts(tmp_path: Path) -> None:
    for name, ours, theirs in (
        ("deepseek v3", "gate.e_score_correction_bias", "router.expert_bias"),
        ("qwen2 moe", "shared_expert_gate.weight", "shared_expert_gate.weight"),
    ):
        config, state = random_model(name, num_layers=2)
        write_megatron(tmp_path / name, state.items(), config, Layout("mcore"))
        assert torch.equal(
            model_of(tmp_path / name, "00")[f"decoder.layers.1.mlp.{theirs}"], state[f"layers.1.mlp.{ours}"]
        )


@pytest.mark.parametrize(
    ("layout", "ranks"),
    [
        (Layout("mcore", expert_parallel=2), ["00_000", "00_001"]),
        (Layout("mcore", 1, 2), ["00_000", "00_001"]),
        (Layout("mcore", 1, 2, expert_parallel=2), ["00_000_000", "00_000_001", "00_001_000", "00_001_001"]),
    ],
)
def test_folders_of_the_ranks(layout: Layout, ranks: list[str], tmp_path: Path) -> None:
    config, state = random_model("mixtral")
    write_megatron(tmp_path / "out", state.items(), config, layout)
    assert sorted(path.name for path in (tmp_path / "out" / STEP).iterdir()) == [f"mp_rank_{rank}" for rank in ranks]
    sizes = MegatronFolder(tmp_path / "out").sizes
    assert sizes == (1, layout.pipeline_parallel, layout.expert_parallel)


def rewrite(file: Path, change: Any) -> None:
    """Save a file again with torch after `change` of its tensors."""
    content = read_torch_file(file)
    content["args"] = argparse.Namespace(**vars(content["args"]))
    content["model"] = {
        key: value.read().clone() if isinstance(value, FileTensor) else value for key, value in content["model"].items()
    }
    change(content["model"])
    torch.save(content, file)


def test_numbered_experts_of_other_builds_are_read(tmp_path: Path) -> None:
    """One grouped module with a numbered weight per expert, and the gate as a parameter of the shared experts."""
    config, state = random_model("qwen2 moe", num_layers=2)
    write_megatron(tmp_path / "out", state.items(), config, Layout("mcore", 1, 1, expert_parallel=2))

    def change(model: dict[str, Any]) -> None:
        for layer in range(2):
            place = f"decoder.layers.{layer}.mlp."
            model[f"{place}shared_experts.gate_weight"] = model.pop(f"{place}shared_expert_gate.weight")
            for expert in range(2):
                for number in (1, 2):
                    name = f"{place}experts.local_experts.{expert}.linear_fc{number}."
                    model[f"{place}experts.linear_fc{number}.weight{expert}"] = model.pop(f"{name}weight")
                    model[f"{place}experts.linear_fc{number}._extra_state{expert}"] = model.pop(f"{name}_extra_state")

    for path in (tmp_path / "out").rglob(FILE):
        rewrite(path, change)
    assert_same(read_back(tmp_path / "out", config), state)


def test_latents_of_other_builds_are_read(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """The projections into latents apart and whole on every rank, norms fused into those out of them, and a layer that
    predicts a further token."""
    config, state = random_model("deepseek v2", num_layers=2)
    write_megatron(tmp_path / "out", state.items(), config, Layout("mcore", 2, 1))

    def change(model: dict[str, Any]) -> None:
        for layer in range(2):
            place = f"decoder.layers.{layer}.self_attention."
            down = model.pop(f"{place}linear_qkv.weight")
            model[f"{place}linear_q_down_proj.weight"], model[f"{place}linear_kv_down_proj.weight"] = down.split(
                (12, 14)
            )
            for ours, theirs, norm in (
                ("linear_qb", "linear_q_up_proj", "q"),
                ("linear_kvb", "linear_kv_up_proj", "k"),
            ):
                model[f"{place}{theirs}.weight"] = model.pop(f"{place}{ours}.weight")
                model[f"{place}{theirs}.layer_norm_weight"] = model.pop(f"{place}{norm}_layernorm.weight")
        model["mtp.layers.0.enorm.weight"] = torch.zeros(16)

    for path in (tmp_path / "out").rglob(FILE):
        rewrite(path, change)
    assert_same(read_back(tmp_path / "out", config), state)
    assert "1 tensors that predict further tokens are left out" in capsys.readouterr().err


def damage(kind: str, folder: Path) -> None:
    step = folder / STEP
    if kind == "missing rank":
        shutil.rmtree(step / "mp_rank_01_001_001")
    elif kind == "missing experts":
        for path in step.glob("mp_rank_*_001"):
            shutil.rmtree(path)
    elif kind == "foreign copy":
        name = "decoder.layers.0.input_layernorm.weight"
        rewrite(step / "mp_rank_01_000_001" / FILE, lambda model: model[name].add_(1))
    elif kind == "foreign router":
        name = "decoder.layers.0.mlp.router.weight"
        for path in step.glob("mp_rank_01_000_*"):
            rewrite(path / FILE, lambda model: model[name].add_(1))
    elif kind == "foreign latents":
        name = "decoder.layers.0.self_attention.linear_qkv.weight"
        for path in step.glob("mp_rank_01_000_*"):
            rewrite(path / FILE, lambda model: model[name].add_(1))
    elif kind == "two dtypes":
        name = "decoder.layers.0.mlp.experts.local_experts.1.linear_fc1.weight"
        rewrite(step / "mp_rank_01_000_001" / FILE, lambda model: model.update({name: model[name].float()}))
    elif kind == "lost copy":
        name = "decoder.layers.0.input_layernorm.weight"
        rewrite(step / "mp_rank_01_000_001" / FILE, lambda model: model.pop(name))
    elif kind == "lost expert":
        for path in step.rglob(FILE):
            rewrite(path, lambda model: model.pop("decoder.layers.1.mlp.experts.local_experts.1.linear_fc2.weight"))
    elif kind == "not a number":
        name = "decoder.layers.1.mlp.experts.local_experts.1.linear_fc1.weight"
        rewrite(step / "mp_rank_01_001_001" / FILE, lambda model: model[name].fill_(float("inf")))


DAMAGES = {
    "missing rank": r"mp_rank_01_001_001/model_optim_rng.pt is missing: copy the files of every rank",
    "missing experts": r"say expert_model_parallel_size 2, but there are folders for 1",
    "foreign copy": r"expert-parallel ranks disagree about 'decoder.layers.0.input_layernorm.weight'",
    "foreign router": r"tensor-parallel ranks disagree about 'decoder.layers.0.mlp.router.weight'",
    "foreign latents": r"tensor-parallel ranks disagree about 'decoder.layers.0.self_attention.linear_qkv.weight'",
    "two dtypes": r"'decoder.layers.0.mlp.experts.local_experts.{}.linear_fc1.weight' is stored as .* and as ",
    "lost copy": r"'decoder.layers.0.input_layernorm.weight' is in the files of 3 ranks, not of all that share it",
    "lost expert": r"lacks 'decoder.layers.1.mlp.experts.local_experts.[13].linear_fc2.weight' of a model",
    "not a number": r"mp_rank_01_001_001.*'decoder.layers.3.mlp.experts.local_experts.3.linear_fc1.weight' holds NaN",
}


@pytest.mark.parametrize("kind", DAMAGES)
def test_bad_folders_are_refused(kind: str, tmp_path: Path) -> None:
    config, state = random_model("deepseek v2", first_k_dense_replace=0)
    write_megatron(tmp_path / "in", state.items(), config, Layout("mcore", 2, 2, expert_parallel=2))
    damage(kind, tmp_path / "in")
    with pytest.raises(ModelLinkError, match=DAMAGES[kind]):
        dict(MegatronFolder(tmp_path / "in").tensors(config))


@pytest.mark.parametrize(
    ("fields", "layout", "sentence"),
    [
        ({}, Layout("mcore", expert_parallel=3), r"expert parallel size 3 does not divide the experts \(4\)"),
        ({"moe_ffn_hidden_size": 5}, Layout("mcore", 2), r"size 2 does not divide the expert width \(5\)"),
        (
            {"num_experts": None},
            Layout("mcore", expert_parallel=2),
            "needs a model with experts",
        ),
        ({"mlp_bias": True}, Layout("mcore", grouped_experts=True), "grouped experts have no place for biases"),
        ({}, Layout("legacy"), "Megatron-Legacy has no place for 'layers.0.mlp.gate.weight': write Megatron-Core"),
        (
            LATENT | {"num_experts": None},
            Layout("legacy"),
            "Megatron-Legacy has no place for 'layers.0.self_attn.q_a_proj.weight': write Megatron-Core",
        ),
        (
            LATENT | {"q_lora_rank": None, "qkv_bias": True},
            Layout("mcore"),
            "no place for 'layers.0.self_attn.kv_a_proj_with_mqa.bias' without layers.0.self_attn.q_proj.bias",
        ),
    ],
)
def test_layouts_that_do_not_fit_are_refused(
    fields: dict[str, Any], layout: Layout, sentence: str, tmp_path: Path
) -> None:
    config, state = random_model("mixtral", **fields)
    with pytest.raises(ModelLinkError, match=sentence):
        write_megatron(tmp_path / "out", state.items(), config, layout)
    assert not (tmp_path / "out").exists()


def test_what_a_dead_writer_left_is_replaced(tmp_path: Path) -> None:
    config, state = random_model("mixtral", num_layers=1)
    left = tmp_path / "out" / f".{STEP}.tmp-0123abcd"
    (left / "mp_rank_00").mkdir(parents=True)
    handle = os.open(left, os.O_RDONLY)
    fcntl.flock(handle, fcntl.LOCK_EX)
    with pytest.raises(ModelLinkError, match="another conversion is writing"):
        write_megatron(tmp_path / "out", state.items(), config, Layout("mcore"))
    os.close(handle)
    write_megatron(tmp_path / "out", state.items(), config, Layout("mcore"))
    assert sorted(path.name for path in (tmp_path / "out").iterdir()) == [STEP, "latest_checkpointed_iteration.txt"]
    assert_same(read_back(tmp_path / "out", config), state)


BASE = {"num_layers": 4, "hidden_size": 16, "num_attention_heads": 4, "swiglu": True, "add_bias_linear": False}
BASE |= {"ffn_hidden_size": 40, "max_position_embeddings": 64}
REFERENCE = BASE | {
    **{"num_experts": 8, "moe_router_topk": 2, "moe_intermediate_size": 12, "n_shared_experts": 2, "seq_aux": True},
    **{"first_k_dense_replace": 1, "moe_layer_freq": 1, "shared_expert_gate": False, "routed_scaling_factor": 16.0},
    **{"topk_group": 1, "norm_topk_prob": False, "moe_router_load_balancing_type": "group_limited_greedy"},
    **{"expert_model_parallel_size": 4, "moe_grouped_gemm": True, "moe_device_level_aux_loss_coeff": 0.05},
    **{"multi_head_latent_attention": True, "q_lora_rank": 12, "kv_lora_rank": 10, "qk_layernorm": True},
    **{"qk_nope_head_dim": 6, "qk_rope_head_dim": 4, "v_head_dim": 5, "norm_epsilon": 1e-6},
}
OPTIONS: dict[str, tuple[dict[str, Any], dict[str, Any]]] = {
    "reference": (
        REFERENCE,
        {
            **{"num_experts": 8, "router_topk": 2, "moe_ffn_hidden_size": 12, "n_shared_experts": 2},
            **{"first_k_dense_replace": 1, "moe_layer_freq": 1, "router_scoring": "softmax", "router_groups": 4},
            **{"topk_group": 1, "routed_scaling_factor": 16.0, "sequence_aux_loss": True, "head_dim": 10},
            **{"multi_head_latent_attention": True, "q_lora_rank": 12, "kv_lora_rank": 10, "qk_norm": True},
            **{"qk_nope_head_dim": 6, "v_head_dim": 5, "latent_norm_epsilon": 1e-6, "device_aux_loss_coeff": 0.05},
        },
    ),
    "reference, softmax first": (
        REFERENCE | {"moe_router_load_balancing_type": "softmax_topk", "shared_expert_gate": True},
        {"router_scoring": "softmax", "router_groups": 1, "shared_expert_gate": True},
    ),
    "reference, mixtral": (
        BASE | {"num_experts": 8, "moe_router_load_balancing_type": "aux_loss", "moe_aux_loss_coeff": 0.02},
        {"router_scoring": "softmax_selected", "moe_ffn_hidden_size": 40, "aux_loss_coeff": 0.02},
    ),
    "megatron": (
        BASE
        | {
            **{"num_experts": 8, "moe_ffn_hidden_size": 12, "moe_shared_expert_intermediate_size": 24},
            **{"moe_layer_freq": [0, 0, 1, 0], "moe_router_score_function": "sigmoid", "moe_router_topk": 4},
            **{"moe_router_load_balancing_type": ["seq_aux_loss"], "moe_aux_loss_coeff": [0.1]},
            **{"moe_router_num_groups": 4, "moe_router_group_topk": 2, "moe_router_topk_scaling_factor": 2.5},
            **{"moe_router_enable_expert_bias": True, "multi_latent_attention": True, "qk_head_dim": 6},
            **{"qk_pos_emb_head_dim": 4, "v_head_dim": 5, "kv_lora_rank": 10, "q_lora_rank": None},
            **{"rope_type": "yarn", "rotary_scaling_factor": 40, "original_max_position_embeddings": 4096},
            **{"beta_fast": 32, "beta_slow": 1, "mscale": 0.707, "mscale_all_dim": 0.707, "rotary_base": 10000},
        },
        {
            **{"moe_ffn_hidden_size": 12, "n_shared_experts": 2, "first_k_dense_replace": 2, "moe_layer_freq": 2},
            **{"router_scoring": "sigmoid", "norm_topk_prob": True, "router_groups": 4, "topk_group": 2},
            **{"routed_scaling_factor": 2.5, "router_correction_bias": True, "aux_loss_coeff": 0.0},
            **{"multi_head_latent_attention": True, "qk_nope_head_dim": 6, "qk_rope_head_dim": 4},
            **{"rope_scaling": "yarn", "rope_scaling_factor": 40.0, "rope_mscale": 0.707, "q_lora_rank": None},
        },
    ),
    "megatron, dense": (
        BASE | {"moe_layer_freq": 1, "multi_latent_attention": False, "kv_lora_rank": 32, "v_head_dim": 128},
        {"num_experts": None, "kv_lora_rank": None, "v_head_dim": None, "multi_head_latent_attention": False},
    ),
    "gemma2": (
        BASE | {"swiglu": False, "geglu": True, "gelu_tanh": True, "interleave_sliding_window": 7},
        {"gated_mlp": True, "activation": "gelu_tanh", "sliding_window": 7, "window_layers": "even"},
    ),
    "minicpm": (
        BASE | {"scale_depth": 1.4, "dim_model_base": 8, "scale_emb": 12.0},
        {"residual_multiplier": 0.7, "hidden_divisor": 2.0, "embedding_multiplier": 12.0, "activation": "silu"},
    ),
    "glm": (
        BASE | {"use_glm_rope": True, "rotary_percent": 1.0, "rotary_interleaved": False},
        {"position_embedding": "rope", "rope_fraction": 0.5, "rope_interleaved": True},
    ),
}


@pytest.mark.parametrize("name", OPTIONS)
def test_options_of_other_programs(name: str) -> None:
    options, wanted = OPTIONS[name]
    config = read_arguments(options, "here")
    assert {field: getattr(config, field) for field in wanted} == wanted


def test_layers_without_a_rule_are_refused() -> None:
    with pytest.raises(ModelLinkError, match=r"moe_layer_freq \[0, 1, 1, 0\], follow no rule"):
        read_arguments(BASE | {"num_experts": 2, "moe_layer_freq": [0, 1, 1, 0]}, "here")


def test_options_that_are_written(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    config, state = random_model("deepseek v2", num_layers=2)
    write_megatron(tmp_path / "out", state.items(), config, Layout("mcore", 1, 1, expert_parallel=2))
    assert capsys.readouterr().err == ""
    options = vars(contents(tmp_path / "out", "00_000")["args"])
    exact = {
        **{"num_experts": 4, "moe_router_topk": 2, "moe_intermediate_size": 8, "n_shared_experts": 2},
        **{"first_k_dense_replace": 1, "moe_layer_freq": 1, "moe_router_load_balancing_type": "group_limited_greedy"},
        **{"multi_head_latent_attention": True, "q_lora_rank": 12, "kv_lora_rank": 10, "qk_layernorm": True},
        **{"qk_nope_head_dim": 6, "qk_rope_head_dim": 4, "v_head_dim": 5, "kv_channels": 4, "topk_group": 1},
        **{
            "routed_scaling_factor": 16.0,
            "norm_topk_prob": False,
            "moe_grouped_gemm": False,
            "shared_expert_gate": False,
        },
        **{"expert_model_parallel_size": 2, "moe_shared_expert_intermediate_size": 16, "moe_router_num_groups": 2},
    }
    assert {name: options[name] for name in exact} == exact
    write_megatron(tmp_path / "one", state.items(), config, Layout("mcore"))
    assert capsys.readouterr().err.startswith("modellink: warning: no option of Megatron says router_groups:")


def test_memory_is_that_of_the_largest_tensors(tmp_path: Path) -> None:
    """Experts of a layer are 48 MB per projection: the stream holds gate and up, and one expert more."""
    code = f"""
import resource, sys, torch
from pathlib import Path
from modellink.checkpoint.megatron import Layout, MegatronFolder, write_megatron
from modellink.config.schema import ModelConfig
from modellink.checkpoint.hf import expected_shapes
config = ModelConfig(**{COMMON | MODELS["mixtral"]!r} | dict(
    num_layers=2, hidden_size=256, moe_ffn_hidden_size=1536, num_experts=64, first_k_dense_replace=0)).resolve()
def stream():
    for name, shape in expected_shapes(config).items():
        yield name, torch.ones(shape, dtype=torch.bfloat16)
before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
first = Layout("mcore", 2, 2, expert_parallel=2, grouped_experts=True)
write_megatron(Path("a"), stream(), config, first)
write_megatron(Path("b"), MegatronFolder(Path("a")).tensors(config), config, Layout("mcore", expert_parallel=4))
print((resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) / 1024)
"""
    done = subprocess.run([sys.executable, "-c", code], cwd=tmp_path, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert float(done.stdout) < 3.5 * 48 + 40
