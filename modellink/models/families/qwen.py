"""Qwen: Llama with biases on query, key and value (1.5, 2, 2.5), or with a norm on every query and key head (3)."""

from __future__ import annotations

from modellink.models.families.family import ACTIVATION, ATTENTION_BIAS, Family, add, size_keys
from modellink.models.families.spelling import ROPE, window_group

QWEN2 = add(
    Family(
        name="qwen2",
        covers="Qwen1.5, CodeQwen1.5, Qwen2, Qwen2.5",
        architecture="Qwen2ForCausalLM",
        model_type="qwen2",
        keys=(*size_keys(kv_heads=32), ACTIVATION),
        groups=(ROPE, window_group(4096, "switched")),
        fixed={"qkv_bias": True},
    ),
    *("qwen1.5", "qwen2.5"),
)

QWEN3 = add(
    Family(
        name="qwen3",
        covers="Qwen3 0.6B to 32B (dense)",
        architecture="Qwen3ForCausalLM",
        model_type="qwen3",
        keys=(*size_keys(kv_heads=32, head_dim=128), ACTIVATION, ATTENTION_BIAS),
        groups=(ROPE, window_group(4096, "switched")),
        fixed={"qk_norm": True},
    )
)
