"""Gemma: embeddings times sqrt(hidden), norms stored minus one, tanh-gelu; Gemma2: branch norms, soft caps, windows."""

from __future__ import annotations

from typing import Any

from modellink.config.schema import ModelConfig
from modellink.models.families.family import ATTENTION_BIAS, LLAMA_NAMES, Family, add, size_keys
from modellink.models.families.spelling import ACTIVATION_NAMES, ROPE, Group, Key, Keys, agree, window_group


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
        # our post_attention_layernorm is the norm before the MLP in every family
        names=LLAMA_NAMES
        | {
            "layers.{}.attention_output_norm": "model.layers.{}.post_attention_layernorm",
            "layers.{}.post_attention_layernorm": "model.layers.{}.pre_feedforward_layernorm",
            "layers.{}.mlp_output_norm": "model.layers.{}.post_feedforward_layernorm",
        },
    )
)
