"""Qwen: Llama with biases on query, key and value (1, 1.5, 2, 2.5), or with a norm on every query and key head (3).

The first one also stretches its rotation and its queries beyond the trained length, except in training. The sparse
models of generations 1.5 and 2 have shared experts behind a gate, those of generation 3 have none.
"""

from __future__ import annotations

from typing import Any

from modellink.config.schema import ModelConfig
from modellink.models.families.experts import DENSE_LAYERS, chosen, expert_names, shared_names
from modellink.models.families.family import ACTIVATION, ATTENTION_BIAS, LLAMA_NAMES, Family, add, size_keys
from modellink.models.families.spelling import NO_WINDOW, ROPE, Group, Key, Keys, constant, window_group


def _read_width(keys: Keys) -> dict[str, Any]:
    both = keys.take("intermediate_size")  # of gate and up together
    if not isinstance(both, int) or both % 2:
        raise keys.fail("intermediate_size", both, "should be an even number: the widths of gate and up together.")
    return {"ffn_hidden_size": both // 2}


def _read_window(keys: Keys) -> dict[str, Any]:
    trained, longest = keys.take("seq_length", 2048), keys.content.get("max_position_embeddings")
    if not isinstance(trained, int) or not isinstance(longest, int):
        raise keys.fail("seq_length", trained, "and max_position_embeddings should be whole numbers.")
    fields: dict[str, Any] = {}
    if keys.take("use_dynamic_ntk", True):
        fields |= {"rope_scaling": "dynamic_doubling", "rope_original_max_position": trained}
    return fields | ({"query_log_window": trained} if keys.take("use_logn_attn", True) else {})


def _write_window(config: ModelConfig) -> dict[str, Any]:
    stretched = config.rope_scaling == "dynamic_doubling"
    trained = config.rope_original_max_position if stretched else config.query_log_window
    return {
        "seq_length": trained or config.max_position_embeddings,
        "use_dynamic_ntk": stretched,
        "use_logn_attn": config.query_log_window is not None,
    }


_LAYER = "transformer.h.{}"
QWEN = add(
    Family(
        name="qwen",
        covers="Qwen 1.8B to 72B (the first generation)",
        architecture="QWenLMHeadModel",
        model_type="qwen",
        keys=(
            Key("num_hidden_layers", "num_layers"),
            Key("hidden_size", "hidden_size"),
            Key("num_attention_heads", "num_attention_heads"),
            Key("kv_channels", "head_dim", 128),
            Key("vocab_size", "vocab_size"),
            Key("max_position_embeddings", "max_position_embeddings"),
            Key("layer_norm_epsilon", "norm_epsilon", 1e-6),
            Key("rotary_emb_base", "rope_theta", 10000),
            Key("rotary_pct", "rope_fraction", 1.0),
            Key("tie_word_embeddings", "tie_word_embeddings", False),
            Key("attn_dropout_prob", "attention_dropout", 0.0),
            Key("emb_dropout_prob", "hidden_dropout", 0.0),
        ),
        groups=(
            Group(_read_width, lambda config: {"intermediate_size": 2 * (config.ffn_hidden_size or 0)}),
            Group(_read_window, _write_window),
            constant("no_bias", True),
            constant("scale_attn_weights", True),
        ),
        fixed={"qkv_bias": True, "activation": "silu"},
        names={
            "embed_tokens": "transformer.wte",
            "layers.{}.input_layernorm": f"{_LAYER}.ln_1",
            "layers.{}.self_attn.q_proj": f"{_LAYER}.attn.c_attn",
            "layers.{}.self_attn.k_proj": f"{_LAYER}.attn.c_attn",
            "layers.{}.self_attn.v_proj": f"{_LAYER}.attn.c_attn",
            "layers.{}.self_attn.o_proj": f"{_LAYER}.attn.c_proj",
            "layers.{}.post_attention_layernorm": f"{_LAYER}.ln_2",
            "layers.{}.mlp.gate_proj": f"{_LAYER}.mlp.w2",
            "layers.{}.mlp.up_proj": f"{_LAYER}.mlp.w1",
            "layers.{}.mlp.down_proj": f"{_LAYER}.mlp.c_proj",
            "norm": "transformer.ln_f",
            "lm_head": "lm_head",
        },
    ),
    "qwen1",
)

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


def _read_shared(keys: Keys) -> dict[str, Any]:
    shared, width = keys.take("shared_expert_intermediate_size", 5632), keys.content.get("moe_intermediate_size", 1408)
    if not isinstance(shared, int) or not isinstance(width, int) or width < 1 or shared < 1 or shared % width:
        why = f"is not implemented; known: multiples of moe_intermediate_size = {width!r}."
        raise keys.fail("shared_expert_intermediate_size", shared, why)
    return {"n_shared_experts": shared // width}


def _write_shared(config: ModelConfig) -> dict[str, Any]:
    return {"shared_expert_intermediate_size": config.n_shared_experts * (config.moe_ffn_hidden_size or 0)}


_NORMED = Key("norm_topk_prob", "norm_topk_prob", False)
_MLP = "model.layers.{}.mlp"
QWEN2_MOE = add(
    Family(
        name="qwen2_moe",
        covers="Qwen1.5-MoE-A2.7B, Qwen2-57B-A14B",
        architecture="Qwen2MoeForCausalLM",
        model_type="qwen2_moe",
        keys=(
            *size_keys(kv_heads=16),
            ACTIVATION,
            Key("qkv_bias", "qkv_bias", True),
            *chosen(4, 60, "num_experts"),
            Key("moe_intermediate_size", "moe_ffn_hidden_size", 1408),
            _NORMED,
        ),
        groups=(ROPE, NO_WINDOW, DENSE_LAYERS, Group(_read_shared, _write_shared)),
        fixed={"router_scoring": "softmax", "shared_expert_gate": True},
        names=LLAMA_NAMES
        | expert_names(_MLP)
        | shared_names(f"{_MLP}.shared_expert")
        | {"layers.{}.mlp.shared_expert_gate": f"{_MLP}.shared_expert_gate"},
    ),
    "qwen1.5-moe",
)

QWEN3_MOE = add(
    Family(
        name="qwen3_moe",
        covers="Qwen3-30B-A3B, Qwen3-235B-A22B",
        architecture="Qwen3MoeForCausalLM",
        model_type="qwen3_moe",
        keys=(
            *size_keys(kv_heads=4),
            ACTIVATION,
            ATTENTION_BIAS,
            *chosen(8, 128, "num_experts", "num_local_experts"),
            Key("moe_intermediate_size", "moe_ffn_hidden_size", 768),
            _NORMED,
        ),
        groups=(ROPE, NO_WINDOW, DENSE_LAYERS),
        fixed={"router_scoring": "softmax", "qk_norm": True},
        names=LLAMA_NAMES | expert_names(_MLP),
    )
)
