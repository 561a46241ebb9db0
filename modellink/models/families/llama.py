"""Llama and the families that differ from it by switches, fused tensors or experts: Mistral, Mixtral, Aquila, MiniCPM,
Phi-3, OLMo-2.
"""

from __future__ import annotations

from typing import Any

from modellink.config.schema import ModelConfig
from modellink.models.families.experts import EXPERT_WIDTH, chosen, expert_names
from modellink.models.families.family import ACTIVATION, ATTENTION_BIAS, LLAMA_NAMES, Family, add, size_keys
from modellink.models.families.spelling import (
    ROPE,
    ROPE_TYPE,
    Group,
    Key,
    Keys,
    constant,
    read_rope,
    renamed,
    window_group,
    write_rope,
)

LLAMA = add(
    Family(
        name="llama",
        covers="Llama 1, 2, 3, 3.1, 3.2, CodeLlama, Yi",
        architecture="LlamaForCausalLM",
        model_type="llama",
        keys=(*size_keys(), ACTIVATION, ATTENTION_BIAS, Key("mlp_bias", "mlp_bias", False)),
    ),
    *("llama1", "llama2", "llama3", "llama3.1", "llama3.2", "codellama", "yi"),
)

MISTRAL = add(
    Family(
        name="mistral",
        covers="Mistral 7B v0.1, v0.2, v0.3",
        architecture="MistralForCausalLM",
        model_type="mistral",
        keys=(*size_keys(kv_heads=8), ACTIVATION),
        groups=(ROPE, window_group(4096, "all")),
    )
)

MIXTRAL = add(
    Family(
        name="mixtral",
        covers="Mixtral 8x7B and 8x22B",
        architecture="MixtralForCausalLM",
        model_type="mixtral",
        keys=(
            *renamed(size_keys(kv_heads=8, epsilon=1e-5), intermediate_size=None),
            EXPERT_WIDTH,
            ACTIVATION,
            *chosen(2, 8, "num_local_experts"),
            Key("router_jitter_noise", "router_input_jitter", 0.0),
        ),
        groups=(Group(lambda keys: read_rope(keys, 1e6), write_rope), window_group(None, "all")),
        names=LLAMA_NAMES | expert_names("model.layers.{}.block_sparse_moe", ("w1", "w3", "w2")),
    )
)

AQUILA = add(
    Family(
        name="aquila",
        covers="Aquila 7B, Aquila2 7B and 34B",
        architecture="AquilaForCausalLM",
        model_type="aquila",
        keys=(*size_keys(), ACTIVATION),
    ),
    "aquila2",
)


def _write_minicpm(config: ModelConfig) -> dict[str, Any]:
    layers, hidden = config.num_layers or 1, config.hidden_size or 1
    base = hidden / config.hidden_divisor
    return {
        "scale_emb": _short(config.embedding_multiplier),
        # the decimal number that was read, where dividing and multiplying changed its last bit
        "scale_depth": _short(round(config.residual_multiplier * layers**0.5, 12)),
        "dim_model_base": _short(base),
    }


def _short(value: float) -> float | int:
    return int(value) if value == int(value) else value


def _read_minicpm(keys: Keys) -> dict[str, Any]:
    scale, depth, base = (keys.take(name, 1) for name in ("scale_emb", "scale_depth", "dim_model_base"))
    for name, value in (("scale_emb", scale), ("scale_depth", depth), ("dim_model_base", base)):
        if not isinstance(value, int | float) or value <= 0:
            raise keys.fail(name, value, "should be a number above 0.")
    return {
        "embedding_multiplier": float(scale),
        "residual_multiplier": depth / int(keys.content["num_hidden_layers"]) ** 0.5,
        "hidden_divisor": int(keys.content["hidden_size"]) / base,
    }


def _read_sparse(keys: Keys) -> dict[str, Any]:
    experts, chosen_ones = keys.take("num_experts"), keys.take("num_experts_per_tok")
    if not experts:  # a dense model, of which the other key says nothing
        return {}
    for name, value in (("num_experts", experts), ("num_experts_per_tok", chosen_ones)):
        if not isinstance(value, int):
            raise keys.fail(name, value, "should be a whole number.")
    return {"num_experts": experts, "router_topk": chosen_ones}


def _write_sparse(config: ModelConfig) -> dict[str, Any]:
    if not config.num_experts:
        return {}
    return {
        "num_experts": config.num_experts,
        "num_experts_per_tok": config.router_topk,
        "intermediate_size": config.moe_ffn_hidden_size,
    }


MINICPM = add(
    Family(
        name="minicpm",
        covers="MiniCPM 1B and 2B, MiniCPM-MoE 8x2B",
        architecture="MiniCPMForCausalLM",
        model_type="minicpm",
        keys=(*size_keys(tied=True), ACTIVATION, ATTENTION_BIAS),
        groups=(ROPE_TYPE, Group(_read_minicpm, _write_minicpm), Group(_read_sparse, _write_sparse)),
        names=LLAMA_NAMES | expert_names("model.layers.{}.mlp", ("w1", "w3", "w2")),
    ),
    "minicpm-moe",
)

PHI3 = add(
    Family(
        name="phi3",
        covers="Phi-3 mini and medium with 4K positions, Phi-3.5 and Phi-4 without long-context scaling",
        architecture="Phi3ForCausalLM",
        model_type="phi3",
        keys=(
            *renamed(size_keys(epsilon=1e-5), head_dim=None),
            ACTIVATION,
            Key("resid_pdrop", "hidden_dropout", 0.0),
        ),
        groups=(ROPE, window_group(None, "all"), constant("attention_bias", False), constant("embd_pdrop", 0.0)),
        names=LLAMA_NAMES
        | {f"layers.{{}}.self_attn.{part}_proj": "model.layers.{}.self_attn.qkv_proj" for part in "qkv"}
        | {f"layers.{{}}.mlp.{part}_proj": "model.layers.{}.mlp.gate_up_proj" for part in ("gate", "up")},
    )
)

OLMO2 = add(
    Family(
        name="olmo2",
        covers="OLMo-2 1B, 7B, 13B and 32B",
        architecture="Olmo2ForCausalLM",
        model_type="olmo2",
        keys=(*renamed(size_keys(epsilon=1e-5), head_dim=None), ACTIVATION, ATTENTION_BIAS),
        fixed={
            "pre_norm": False,
            "sandwich_norm": True,
            "qk_norm": True,
            "qk_norm_all_heads": True,
            "norm_weight_in_fp32": True,
        },
        names={name: theirs for name, theirs in LLAMA_NAMES.items() if not name.endswith("layernorm")}
        | {
            "layers.{}.attention_output_norm": "model.layers.{}.post_attention_layernorm",
            "layers.{}.mlp_output_norm": "model.layers.{}.post_feedforward_layernorm",
        },
    )
)
