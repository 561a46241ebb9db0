"""Llama and the families that differ from it by a switch: Mistral, InternLM, Aquila."""

from __future__ import annotations

from typing import Any

from modellink.config.schema import ModelConfig
from modellink.models.families.family import ACTIVATION, ATTENTION_BIAS, Family, add, size_keys
from modellink.models.families.spelling import ROPE, Group, Key, Keys, agree, read_rope, window_group

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
