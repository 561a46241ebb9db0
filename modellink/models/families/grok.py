"""Grok-1 in the two spellings of its ports to PyTorch: branch norms, capped scores, scaled embeddings and logits.

The original code gates with the tanh form of gelu and does not divide the weights of the chosen experts by their sum.
"""

from __future__ import annotations

from typing import Any

from modellink.config.schema import ModelConfig
from modellink.models.families.experts import EXPERT_WIDTH, chosen, expert_names
from modellink.models.families.family import Family, add, size_keys
from modellink.models.families.spelling import ACTIVATION_NAMES, ROPE_TYPE, Group, Key, Keys, renamed


def _read_scale(keys: Keys) -> dict[str, Any]:
    """Scores are multiplied by attn_output_multiplier."""
    factor = keys.take("attn_output_multiplier")
    if not isinstance(factor, int | float) or factor <= 0:
        raise keys.fail("attn_output_multiplier", factor, "should be a number above 0.")
    return {"query_scale": round(factor**-2, 9)}


def _write_scale(config: ModelConfig) -> dict[str, Any]:
    return {"attn_output_multiplier": float(config.query_scale or config.head_dim or 1) ** -0.5}


_KEYS = (
    *renamed(size_keys(kv_heads=8, tied=True, epsilon=1e-5), intermediate_size=None),
    EXPERT_WIDTH,
    Key("max_attn_value", "attention_logit_softcap", 30.0),
    Key("embedding_multiplier_scale", "embedding_multiplier"),
    Key("output_multiplier_scale", "logits_multiplier"),
    # the ports that have no such key write the other form of gelu into their code, which the weights never saw
    Key("hidden_act", "activation", "gelu_pytorch_tanh", ACTIVATION_NAMES),
)
_GROUPS = (ROPE_TYPE, Group(_read_scale, _write_scale))
_FIXED = {"sandwich_norm": True, "router_scoring": "softmax"}
_LAYER, _ATTENTION = "transformer.decoder_layer.{}", "transformer.decoder_layer.{}.multi_head_attention"

GROK = add(
    Family(
        name="grok",
        covers="Grok-1, layers called decoder_layer",
        architecture="GrokForCausalLM",
        model_type="grok",
        keys=(*_KEYS, *chosen(2, 8, "num_local_experts", "num_experts")),
        groups=_GROUPS,
        fixed=_FIXED,
        names={
            "embed_tokens": "transformer.in_out_embed",
            "layers.{}.input_layernorm": f"{_LAYER}.rms_norm",
            "layers.{}.self_attn.q_proj": f"{_ATTENTION}.query",
            "layers.{}.self_attn.k_proj": f"{_ATTENTION}.key",
            "layers.{}.self_attn.v_proj": f"{_ATTENTION}.value",
            "layers.{}.self_attn.o_proj": f"{_ATTENTION}.linear",
            "layers.{}.attention_output_norm": f"{_LAYER}.rms_norm_1",
            "layers.{}.post_attention_layernorm": f"{_LAYER}.rms_norm_2",
            "layers.{}.mlp.gate": f"{_LAYER}.router",
            "layers.{}.mlp.experts.gate_proj": f"{_LAYER}.moe.{{}}.linear.weight",
            "layers.{}.mlp.experts.up_proj": f"{_LAYER}.moe.{{}}.linear_v.weight",
            "layers.{}.mlp.experts.down_proj": f"{_LAYER}.moe.{{}}.linear_1.weight",
            "layers.{}.mlp_output_norm": f"{_LAYER}.rms_norm_3",
            "norm": "transformer.rms_norm",
            "lm_head": "lm_head",
        },
    )
)

GROK1 = add(
    Family(
        name="grok1",
        covers="Grok-1, layers called layers",
        architecture="Grok1ModelForCausalLM",
        other_architectures=("Grok1ForCausalLM",),
        model_type="grok-1",
        keys=(*_KEYS, *chosen(2, 8, "num_experts", "num_local_experts")),
        groups=_GROUPS,
        fixed=_FIXED,
        names={"embed_tokens": "model.embed_tokens", "norm.weight": "model.norm.scale", "lm_head": "lm_head"}
        | {f"layers.{{}}.self_attn.{part}_proj": f"model.layers.{{}}.attn.{part}_proj" for part in "qkvo"}
        | {
            f"layers.{{}}.{ours}.weight": f"model.layers.{{}}.{theirs}_norm.scale"
            for ours, theirs in (
                ("input_layernorm", "pre_attn"),
                ("attention_output_norm", "post_attn"),
                ("post_attention_layernorm", "pre_moe"),
                ("mlp_output_norm", "post_moe"),
            )
        }
        | expert_names("model.layers.{}.moe_block", ("linear", "linear_v", "linear_1")),
    )
)
