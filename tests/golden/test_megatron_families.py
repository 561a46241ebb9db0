"""Every family through Megatron's formats and back to Hugging Face: the same tensors, bit for bit."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

import modellink
from modellink.checkpoint.hf import expected_shapes, read_config, save_hf
from modellink.config.schema import ModelConfig
from modellink.models.families import FAMILIES as ROWS
from modellink.models.families.family import all_families

SIZES = {
    **{"num_layers": 4, "hidden_size": 16, "num_attention_heads": 4, "num_key_value_heads": 2, "vocab_size": 43},
    **{"ffn_hidden_size": 24, "max_position_embeddings": 32, "gated_mlp": True, "activation": "silu"},
    **{"normalization": "RMSNorm", "norm_epsilon": 1e-6, "position_embedding": "rope", "rope_theta": 1e4},
    **{"attention_dropout": 0.0, "hidden_dropout": 0.0, "padded_vocab_size": 43},
    **dict.fromkeys(("qkv_bias", "attention_output_bias", "mlp_bias", "tie_word_embeddings"), False),
}
EXPERTS = {"num_experts": 4, "moe_ffn_hidden_size": 8, "router_topk": 2}
SOFTMAX = EXPERTS | {"router_scoring": "softmax"}
LATENT = {
    **{"multi_head_latent_attention": True, "qk_norm": True, "num_key_value_heads": 4, "n_shared_experts": 2},
    **{"q_lora_rank": 12, "kv_lora_rank": 10, "qk_nope_head_dim": 6, "qk_rope_head_dim": 4, "v_head_dim": 5},
    **{"first_k_dense_replace": 1},
}
SIGMOID = EXPERTS | {"router_scoring": "sigmoid", "router_correction_bias": True, "norm_topk_prob": True}
WHOLE_HEADS = {"num_key_value_heads": 4}
BIASES = dict.fromkeys(("qkv_bias", "attention_output_bias", "mlp_bias"), True)
LAYER_NORM = WHOLE_HEADS | BIASES | {"normalization": "LayerNorm", "gated_mlp": False, "activation": "gelu_tanh"}
SANDWICH = {"sandwich_norm": True, "norm_offset": True, "norm_weight_in_fp32": True, "tie_word_embeddings": True}
# family -> its fields, and whether Megatron-Legacy can hold it
FAMILIES: dict[str, tuple[dict[str, Any], bool]] = {
    "llama": ({}, True),
    "mistral": ({"sliding_window": 9}, True),
    "aquila": ({}, True),
    "internlm": (WHOLE_HEADS | {"qkv_bias": True, "attention_output_bias": True}, True),
    "internlm2": ({}, True),
    "qwen": (WHOLE_HEADS | {"qkv_bias": True}, True),
    "qwen2": ({"qkv_bias": True, "tie_word_embeddings": True}, True),
    "qwen3": ({"qk_norm": True, "head_dim": 8}, False),
    "baichuan": (WHOLE_HEADS | {"normalize_lm_head": True}, True),
    "chatglm": ({"qkv_bias": True, "rope_fraction": 0.5, "rope_interleaved": True}, True),
    "minicpm": ({"residual_multiplier": 0.7, "tie_word_embeddings": True}, True),
    "phi3": ({}, True),
    "olmo2": ({"pre_norm": False, "sandwich_norm": True, "qk_norm": True, "qk_norm_all_heads": True}, False),
    "gemma": ({"activation": "gelu_tanh", "tie_word_embeddings": True}, True),
    "gemma2": (SANDWICH | {"activation": "gelu_tanh", "sliding_window": 9, "window_layers": "even"}, False),
    "gemma3": (SANDWICH | {"activation": "gelu_tanh", "qk_norm": True}, False),
    "bloom": (
        LAYER_NORM
        | {"ffn_hidden_size": 64, "position_embedding": "alibi", "embedding_norm": True, "tie_word_embeddings": True},
        True,
    ),
    "gpt2": (LAYER_NORM | {"position_embedding": "learned_absolute", "tie_word_embeddings": True}, True),
    "mixtral": (EXPERTS, False),
    "grok": (EXPERTS | {"sandwich_norm": True, "tie_word_embeddings": True}, False),
    "grok1": (EXPERTS | {"tie_word_embeddings": True}, False),
    "qwen2_moe": (SOFTMAX | {"n_shared_experts": 2, "shared_expert_gate": True, "qkv_bias": True}, False),
    "qwen3_moe": (SOFTMAX | {"qk_norm": True}, False),
    "deepseek_v2": (SOFTMAX | LATENT | {"router_groups": 2, "topk_group": 1}, False),
    "deepseek_v2 lite": (SOFTMAX | LATENT | {"q_lora_rank": None}, False),
    "deepseek_v3": (SIGMOID | LATENT, False),
    "glm4_moe": (SIGMOID | {"n_shared_experts": 1, "first_k_dense_replace": 1, "rope_fraction": 0.5}, False),
    "gpt_oss": (EXPERTS | BIASES | {"router_bias": True, "attention_sinks": True, "swiglu_limit": 7.0}, False),
}


def test_every_family_is_under_test() -> None:
    assert {row.name for row in all_families()} == {name.split()[0] for name in FAMILIES}


@pytest.mark.parametrize("name", FAMILIES)
def test_the_round(name: str, tmp_path: Path) -> None:
    fields, legacy = FAMILIES[name]
    row = ROWS.get(name.split()[0])
    config = ModelConfig(**(SIZES | {"family": row.name} | row.fixed | fields)).resolve()
    generator = torch.Generator().manual_seed(4)
    shapes = expected_shapes(config)
    state = {key: torch.randn(shape, generator=generator).bfloat16() for key, shape in shapes.items()}
    save_hf(tmp_path / "hf", state.items(), config, extras={"bos_token_id": 7})
    config = read_config(tmp_path / "hf")
    experts = {"expert_parallel": 2} if config.num_experts else {}
    grouped = {"expert_parallel": 4, "grouped_experts": not config.mlp_bias} if config.num_experts else {}
    rounds: list[tuple[str, dict[str, Any]]] = [
        (
            "mcore",
            {"tensor_parallel": 2, "pipeline_parallel": 2, "layers_per_stage": [1, 3], "vocab_multiple": 8, **experts},
        ),
        ("native", {}),
        ("mcore", {"pipeline_parallel": 2, "layers_per_virtual_stage": 1, **grouped}),
        *([("legacy", {"tensor_parallel": 2, "pipeline_parallel": 2})] if legacy else []),
        ("hf", {}),
    ]
    before = tmp_path / "hf"
    for number, (to, options) in enumerate(rounds):
        family = {"family": config.family} if to == "native" else {}
        modellink.convert(before, tmp_path / str(number), to, verify=False, workers=1, **options, **family)
        before = tmp_path / str(number)
    found, wanted = (load_file(folder / "model.safetensors") for folder in (before, tmp_path / "hf"))
    assert found.keys() == wanted.keys()
    for key, value in wanted.items():
        assert found[key].dtype == value.dtype and torch.equal(found[key], value), key
    assert read_config(before) == config
    assert json.loads((before / "config.json").read_text())["bos_token_id"] == 7
