"""Gemma: embeddings times sqrt(hidden), norms stored minus one, tanh-gelu; Gemma2: branch norms, soft caps, windows.

Gemma-3 has norms on queries and keys in place of the soft caps, and a base of rotation for the layers with a window.
"""

from __future__ import annotations

from typing import Any

from modellink.config.schema import ModelConfig
from modellink.models.families.family import ATTENTION_BIAS, LLAMA_NAMES, Family, add, size_keys
from modellink.models.families.spelling import (
    ACTIVATION_NAMES,
    ROPE,
    Group,
    Key,
    Keys,
    agree,
    read_rope,
    window_group,
    write_rope,
)


def _read_activation(keys: Keys) -> dict[str, Any]:
    """hidden_act "gelu" in early files means the tanh form, which the code always used; hidden_activation is exact."""
    meant = []
    for name in ("hidden_act", "hidden_activation"):
        value = keys.take(name)
        if value is not None and value not in ACTIVATION_NAMES:
            raise keys.fail(name, value, f"is not implemented; known: {', '.join(ACTIVATION_NAMES)}.")
        legacy = name == "hidden_act" and value == "gelu"
        meant.append("gelu_tanh" if legacy else ACTIVATION_NAMES.get(value))
    return {"activation": agree(keys, "hidden_activation", meant) or "gelu_tanh"}


def _write_activation(config: ModelConfig) -> dict[str, Any]:
    name = next(theirs for theirs, ours in ACTIVATION_NAMES.items() if ours == config.activation)
    return {"hidden_act": name, "hidden_activation": name}


ACTIVATION = Group(_read_activation, _write_activation)
FIXED = {"norm_offset": True, "norm_weight_in_fp32": True, "embedding_times_sqrt_hidden": True}

# our post_attention_layernorm is the norm before the MLP in every family
NAMES = LLAMA_NAMES | {
    "layers.{}.attention_output_norm": "model.layers.{}.post_attention_layernorm",
    "layers.{}.post_attention_layernorm": "model.layers.{}.pre_feedforward_layernorm",
    "layers.{}.mlp_output_norm": "model.layers.{}.post_feedforward_layernorm",
}

GEMMA = add(
    Family(
        name="gemma",
        covers="Gemma 2B and 7B",
        architecture="GemmaForCausalLM",
        model_type="gemma",
        keys=(*size_keys(kv_heads=16, head_dim=256, tied=True), ATTENTION_BIAS),
        groups=(ROPE, ACTIVATION, window_group(None, "none")),
        fixed=FIXED,
    )
)

GEMMA2 = add(
    Family(
        name="gemma2",
        covers="Gemma2 2B, 9B and 27B",
        architecture="Gemma2ForCausalLM",
        model_type="gemma2",
        keys=(
            *size_keys(kv_heads=4, head_dim=256, tied=True),
            ATTENTION_BIAS,
            Key("query_pre_attn_scalar", "query_scale", 256),
            Key("attn_logit_softcapping", "attention_logit_softcap", 50.0),
            Key("final_logit_softcapping", "output_logit_softcap", 30.0),
        ),
        groups=(ROPE, ACTIVATION, window_group(4096, "even")),
        fixed=FIXED | {"sandwich_norm": True},
        names=NAMES,
    )
)


def _read_rotations(keys: Keys) -> dict[str, Any]:
    """rope_theta, rope_scaling and rope_local_base_freq, or rope_parameters with an entry for each kind of layer."""
    whole, local = keys.take("rope_parameters") or {}, keys.take("rope_local_base_freq")
    if not isinstance(whole, dict):
        raise keys.fail("rope_parameters", whole, "should be an object.")
    window = dict(whole.get("sliding_attention") or {})
    theta = agree(keys, "rope_local_base_freq", [local, window.pop("rope_theta", None)])
    if window.pop("rope_type", "default") != "default" or any(value is not None for value in window.values()):
        why = "is not implemented: layers with a window are rotated without scaling."
        raise keys.fail("rope_parameters", whole, why)
    spelled = {
        "rope_theta": keys.take("rope_theta"),
        "rope_scaling": keys.take("rope_scaling"),
        "rope_parameters": whole.get("full_attention"),
        "max_position_embeddings": keys.content["max_position_embeddings"],
    }
    if unknown := whole.keys() - {"sliding_attention", "full_attention"}:
        raise keys.fail("rope_parameters", whole, f"has a kind of layer that is not known: {', '.join(unknown)}.")
    return read_rope(Keys(spelled, keys.where), 1e6) | {"rope_theta_window": 10000.0 if theta is None else float(theta)}


def _write_rotations(config: ModelConfig) -> dict[str, Any]:
    window = config.rope_theta if config.rope_theta_window is None else config.rope_theta_window
    return write_rope(config) | {"rope_local_base_freq": window}


GEMMA3 = add(
    Family(
        name="gemma3",
        covers="Gemma-3 270M and 1B; the text part of 4B, 12B and 27B",
        architecture="Gemma3ForCausalLM",
        model_type="gemma3_text",
        keys=(
            *size_keys(kv_heads=4, head_dim=256, tied=True),
            ATTENTION_BIAS,
            Key("hidden_activation", "activation", "gelu_pytorch_tanh", ACTIVATION_NAMES),
            Key("query_pre_attn_scalar", "query_scale", 256),
            Key("final_logit_softcapping", "output_logit_softcap", None),
        ),
        groups=(Group(_read_rotations, _write_rotations), window_group(4096, "periodic")),
        fixed=FIXED | {"sandwich_norm": True, "qk_norm": True},
        names=NAMES,
        assumed={"num_attention_heads": 8, "max_position_embeddings": 131072, "vocab_size": 262208},
        wrappers=("Gemma3ForConditionalGeneration",),
        inner=(
            ("language_model.model.", "model."),
            ("language_model.lm_head.", "lm_head."),
            ("model.language_model.", "model."),
        ),
    )
)
