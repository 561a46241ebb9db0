"""Experts and latent attention in Megatron's folders: names, cuts and options to the letter, every layout and way."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any

import pytest
import torch

from modellink.checkpoint.hf import expected_shapes
from modellink.checkpoint.megatron import Layout, MegatronFolder, write_megatron
from modellink.config.schema import ModelConfig

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
