"""The GPT-3 block under two names: GPT-2 (learned positions, matrices stored transposed) and Bloom (ALiBi)."""

from __future__ import annotations

from typing import Any

from modellink.models.families.family import IGNORED_TENSORS, Family, add
from modellink.models.families.spelling import ACTIVATION_NAMES, Key, constant, ignored

_BLOCK: dict[str, Any] = {
    "normalization": "LayerNorm",
    "gated_mlp": False,
    "qkv_bias": True,
    "attention_output_bias": True,
    "mlp_bias": True,
}
_COMMON_KEYS = (
    Key("vocab_size", "vocab_size"),
    Key("layer_norm_epsilon", "norm_epsilon", 1e-5),
    Key("tie_word_embeddings", "tie_word_embeddings", True),
)

GPT2 = add(
    Family(
        name="gpt2",
        covers="GPT-2, and models of the GPT-3 shape",
        architecture="GPT2LMHeadModel",
        model_type="gpt2",
        keys=(
            *_COMMON_KEYS,
            Key("n_layer", "num_layers", also=("num_hidden_layers",)),
            Key("n_embd", "hidden_size", also=("hidden_size",)),
            Key("n_head", "num_attention_heads", also=("num_attention_heads",)),
            Key("n_inner", "ffn_hidden_size", None),
            Key("n_positions", "max_position_embeddings", also=("max_position_embeddings", "n_ctx")),
            Key("activation_function", "activation", "gelu_new", {"gelu_new": "gelu_tanh"} | ACTIVATION_NAMES),
            Key("attn_pdrop", "attention_dropout", 0.1),
            Key("embd_pdrop", "hidden_dropout", 0.1),
            Key("resid_pdrop", "hidden_dropout", 0.1),
        ),
        groups=(
            constant("scale_attn_weights", True),
            constant("scale_attn_by_inverse_layer_idx", False),
            constant("reorder_and_upcast_attn", False),
        ),
        fixed=_BLOCK | {"position_embedding": "learned_absolute"},
        names={
            "embed_tokens": "transformer.wte",
            "embed_positions": "transformer.wpe",
            "layers.{}.input_layernorm": "transformer.h.{}.ln_1",
            "layers.{}.self_attn.q_proj": "transformer.h.{}.attn.c_attn",
            "layers.{}.self_attn.k_proj": "transformer.h.{}.attn.c_attn",
            "layers.{}.self_attn.v_proj": "transformer.h.{}.attn.c_attn",
            "layers.{}.self_attn.o_proj": "transformer.h.{}.attn.c_proj",
            "layers.{}.post_attention_layernorm": "transformer.h.{}.ln_2",
            "layers.{}.mlp.up_proj": "transformer.h.{}.mlp.c_fc",
            "layers.{}.mlp.down_proj": "transformer.h.{}.mlp.c_proj",
            "norm": "transformer.ln_f",
            "lm_head": "lm_head",
        },
        transposed=(".c_attn", ".c_proj", ".c_fc"),
        prefix="transformer.",
        ignored_tensors=(*IGNORED_TENSORS, ".attn.bias", ".attn.masked_bias"),
    ),
    "gpt3",
)

_LAYER = "transformer.h.{}"
BLOOM = add(
    Family(
        name="bloom",
        covers="Bloom 560M to 176B",
        architecture="BloomForCausalLM",
        model_type="bloom",
        keys=(
            *_COMMON_KEYS,
            Key("n_layer", "num_layers", also=("num_hidden_layers",)),
            Key("hidden_size", "hidden_size", also=("n_embed",)),
            Key("n_head", "num_attention_heads", also=("num_attention_heads",)),
            Key("seq_length", "max_position_embeddings", None),
            Key("attention_dropout", "attention_dropout", 0.0),
            Key("hidden_dropout", "hidden_dropout", 0.0),
        ),
        # the width is four times the hidden size whatever n_inner says
        groups=(constant("apply_residual_connection_post_layernorm", False), ignored("n_inner")),
        fixed=_BLOCK | {"position_embedding": "alibi", "embedding_norm": True, "activation": "gelu_tanh"},
        names={
            "embed_tokens": "transformer.word_embeddings",
            "embed_norm": "transformer.word_embeddings_layernorm",
            "layers.{}.input_layernorm": f"{_LAYER}.input_layernorm",
            "layers.{}.self_attn.q_proj": f"{_LAYER}.self_attention.query_key_value",
            "layers.{}.self_attn.k_proj": f"{_LAYER}.self_attention.query_key_value",
            "layers.{}.self_attn.v_proj": f"{_LAYER}.self_attention.query_key_value",
            "layers.{}.self_attn.o_proj": f"{_LAYER}.self_attention.dense",
            "layers.{}.post_attention_layernorm": f"{_LAYER}.post_attention_layernorm",
            "layers.{}.mlp.up_proj": f"{_LAYER}.mlp.dense_h_to_4h",
            "layers.{}.mlp.down_proj": f"{_LAYER}.mlp.dense_4h_to_h",
            "norm": "transformer.ln_f",
            "lm_head": "lm_head",
        },
        grouped=(".query_key_value",),
        prefix="transformer.",
    )
)
