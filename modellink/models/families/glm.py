"""ChatGLM3 and GLM4: grouped queries, half of each head rotated in pairs, everything fused, and keys of their own.

GLM-4.5 has nothing of these but the half rotation: it is Llama with the experts of DeepSeek-V3.
"""

from __future__ import annotations

from typing import Any

from modellink.config.schema import ModelConfig
from modellink.models.families.experts import chosen, expert_names, shared_names
from modellink.models.families.family import ACTIVATION, LLAMA_NAMES, Family, add, size_keys
from modellink.models.families.spelling import Group, Key, Keys, agree, constant, read_rope, window_group, write_rope


def _read_groups(keys: Keys) -> dict[str, Any]:
    groups = keys.take("multi_query_group_num", 1)
    grouped = keys.take("multi_query_attention", False)
    return {"num_key_value_heads": int(groups if grouped else keys.content["num_attention_heads"])}


def _write_groups(config: ModelConfig) -> dict[str, Any]:
    return {"multi_query_attention": True, "multi_query_group_num": config.num_key_value_heads}


def _read_base(keys: Keys) -> dict[str, Any]:
    """Long-context models state their base as a multiple of 10000."""
    ratio = keys.take("rope_ratio", 1)
    if not isinstance(ratio, int | float) or ratio <= 0:
        raise keys.fail("rope_ratio", ratio, "should be a number above 0.")
    return {"rope_theta": 10000.0 * ratio}


def _write_base(config: ModelConfig) -> dict[str, Any]:
    ratio = config.rope_theta / 10000.0
    return {"rope_ratio": int(ratio) if ratio.is_integer() else ratio}


def _read_vocabulary(keys: Keys) -> dict[str, Any]:
    size = agree(keys, "padded_vocab_size", [keys.take("vocab_size"), keys.take("padded_vocab_size")])
    if not isinstance(size, int):
        raise keys.fail("padded_vocab_size", size, "should be the number of rows of the embedding.")
    return {"vocab_size": size}


_LAYER = "transformer.encoder.layers.{}"
CHATGLM = add(
    Family(
        name="chatglm",
        covers="ChatGLM3 6B, GLM4 9B",
        architecture="ChatGLMModel",
        other_architectures=("ChatGLMForConditionalGeneration",),
        model_type="chatglm",
        keys=(
            Key("num_layers", "num_layers"),
            Key("hidden_size", "hidden_size"),
            Key("num_attention_heads", "num_attention_heads"),
            Key("kv_channels", "head_dim"),
            Key("ffn_hidden_size", "ffn_hidden_size"),
            Key("seq_length", "max_position_embeddings"),
            Key("layernorm_epsilon", "norm_epsilon", 1e-5),
            Key("add_qkv_bias", "qkv_bias", False),
            Key("tie_word_embeddings", "tie_word_embeddings", False),
            Key("attention_dropout", "attention_dropout", 0.0),
            Key("hidden_dropout", "hidden_dropout", 0.0),
        ),
        groups=(
            Group(_read_vocabulary, lambda config: {"padded_vocab_size": config.vocab_size}),
            Group(_read_groups, _write_groups),
            Group(_read_base, _write_base),
            constant("rmsnorm", True),
            constant("post_layer_norm", True),
            constant("original_rope", True),
            constant("add_bias_linear", False),
            constant("apply_residual_connection_post_layernorm", False),
            constant("fp32_residual_connection", False),
            constant("quantization_bit", 0),
        ),
        fixed={"rope_fraction": 0.5, "rope_interleaved": True, "norm_weight_in_fp32": True, "activation": "silu"},
        names={
            "embed_tokens": "transformer.embedding.word_embeddings",
            "layers.{}.input_layernorm": f"{_LAYER}.input_layernorm",
            "layers.{}.self_attn.q_proj": f"{_LAYER}.self_attention.query_key_value",
            "layers.{}.self_attn.k_proj": f"{_LAYER}.self_attention.query_key_value",
            "layers.{}.self_attn.v_proj": f"{_LAYER}.self_attention.query_key_value",
            "layers.{}.self_attn.o_proj": f"{_LAYER}.self_attention.dense",
            "layers.{}.post_attention_layernorm": f"{_LAYER}.post_attention_layernorm",
            "layers.{}.mlp.gate_proj": f"{_LAYER}.mlp.dense_h_to_4h",
            "layers.{}.mlp.up_proj": f"{_LAYER}.mlp.dense_h_to_4h",
            "layers.{}.mlp.down_proj": f"{_LAYER}.mlp.dense_4h_to_h",
            "norm": "transformer.encoder.final_layernorm",
            "lm_head": "transformer.output_layer",
        },
    ),
    *("chatglm3", "glm4"),
)

_MLP = "model.layers.{}.mlp"
GLM4_MOE = add(
    Family(
        name="glm4_moe",
        covers="GLM-4.5, GLM-4.5-Air, GLM-4.6",
        architecture="Glm4MoeForCausalLM",
        model_type="glm4_moe",
        keys=(
            *size_keys(kv_heads=8, epsilon=1e-5),
            ACTIVATION,
            Key("attention_bias", "qkv_bias", False),
            Key("use_qk_norm", "qk_norm", False),
            *chosen(8, 128, "n_routed_experts", "num_local_experts"),
            Key("moe_intermediate_size", "moe_ffn_hidden_size", 1408),
            Key("n_shared_experts", "n_shared_experts", 1),
            Key("first_k_dense_replace", "first_k_dense_replace", 1),
            Key("n_group", "router_groups", 1),
            Key("topk_group", "topk_group", 1),
            Key("norm_topk_prob", "norm_topk_prob", True),
            Key("routed_scaling_factor", "routed_scaling_factor", 1.0),
        ),
        groups=(
            Group(lambda keys: read_rope(keys, default_fraction=0.5), lambda config: write_rope(config, 0.5)),
            window_group(None, "none"),
        ),
        fixed={"router_scoring": "sigmoid", "router_correction_bias": True},
        names=LLAMA_NAMES | expert_names(_MLP) | shared_names(f"{_MLP}.shared_experts"),
        extra_layers=True,
    ),
    *("glm4.5", "glm4.6"),
)
