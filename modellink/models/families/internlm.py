"""InternLM: Llama with biases and a rotary key of its own (1), or with query, key and value in one tensor (2)."""

from __future__ import annotations

from typing import Any

from modellink.config.schema import ModelConfig
from modellink.models.families.family import ACTIVATION, Family, add, size_keys
from modellink.models.families.spelling import ROPE_TYPE, Group, Key, Keys, agree, read_rope, window_group


def _read_rotary(keys: Keys) -> dict[str, Any]:
    """rotary {"base", "type": "origin" | "dynamic", "scaling_factor"}; early files have none and rotate plainly."""
    rotary = dict(keys.take("rotary") or {})
    kind, factor = rotary.pop("type", "origin"), rotary.pop("scaling_factor", 1.0)
    theta = agree(keys, "rotary.base", [keys.take("rope_theta"), rotary.pop("base", None)])
    if kind not in ("origin", "dynamic") or rotary:
        known = "base, type (origin or dynamic) and scaling_factor"
        raise keys.fail("rotary", keys.content["rotary"], f"is not implemented; known: {known}.")
    spelled = {
        "rope_theta": theta,
        "rope_scaling": {"rope_type": "dynamic", "factor": factor} if kind == "dynamic" else None,
        "max_position_embeddings": keys.content["max_position_embeddings"],
    }
    return read_rope(Keys(spelled, keys.where))


def _write_rotary(config: ModelConfig) -> dict[str, Any]:
    dynamic = config.rope_scaling == "dynamic"
    factor = {"scaling_factor": config.rope_scaling_factor} if dynamic else {}
    return {"rotary": {"base": config.rope_theta, "type": "dynamic" if dynamic else "origin", **factor}}


INTERNLM = add(
    Family(
        name="internlm",
        covers="InternLM 7B and 65B (v1)",
        architecture="InternLMForCausalLM",
        model_type="internlm",
        keys=(*size_keys(), ACTIVATION, Key("bias", ("qkv_bias", "attention_output_bias"), True)),
        groups=(Group(_read_rotary, _write_rotary), window_group(None, "none")),
    )
)

_LAYER, _ATTENTION = "model.layers.{}", "model.layers.{}.attention"
INTERNLM2 = add(
    Family(
        name="internlm2",
        covers="InternLM2 and InternLM2.5 1.8B, 7B and 20B",
        architecture="InternLM2ForCausalLM",
        model_type="internlm2",
        keys=(*size_keys(), ACTIVATION, Key("bias", ("qkv_bias", "attention_output_bias"), True)),
        groups=(ROPE_TYPE,),
        names={
            "embed_tokens": "model.tok_embeddings",
            "layers.{}.input_layernorm": f"{_LAYER}.attention_norm",
            "layers.{}.self_attn.q_proj": f"{_ATTENTION}.wqkv",
            "layers.{}.self_attn.k_proj": f"{_ATTENTION}.wqkv",
            "layers.{}.self_attn.v_proj": f"{_ATTENTION}.wqkv",
            "layers.{}.self_attn.o_proj": f"{_ATTENTION}.wo",
            "layers.{}.post_attention_layernorm": f"{_LAYER}.ffn_norm",
            "layers.{}.mlp.gate_proj": f"{_LAYER}.feed_forward.w1",
            "layers.{}.mlp.up_proj": f"{_LAYER}.feed_forward.w3",
            "layers.{}.mlp.down_proj": f"{_LAYER}.feed_forward.w2",
            "norm": "model.norm",
            "lm_head": "output",
        },
        grouped=(".wqkv",),
    )
)
