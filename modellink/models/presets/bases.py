"""What the rows of presets share: the Llama block, the GPT-3 block, the five sizes that every decoder has."""

from __future__ import annotations

from typing import Any

Row = dict[str, Any]
Rows = dict[str, Row]

GPT: Row = {
    "family": "gpt2",
    "normalization": "LayerNorm",
    "norm_epsilon": 1e-5,
    "activation": "gelu_tanh",
    "gated_mlp": False,
    "qkv_bias": True,
    "attention_output_bias": True,
    "mlp_bias": True,
    "tie_word_embeddings": True,
    "attention_dropout": 0.0,
    "hidden_dropout": 0.0,
}
LLAMA: Row = {
    "family": "llama",
    "normalization": "RMSNorm",
    "norm_epsilon": 1e-5,
    "activation": "silu",
    "gated_mlp": True,
    "qkv_bias": False,
    "attention_output_bias": False,
    "mlp_bias": False,
    "tie_word_embeddings": False,
    "position_embedding": "rope",
    "attention_dropout": 0.0,
    "hidden_dropout": 0.0,
}
TIED: Row = {"tie_word_embeddings": True}


def sizes(layers: int, hidden: int, heads: int, key_value_heads: int, ffn: int) -> Row:
    """Layers L, width D, query heads H, key/value heads G, MLP width F."""
    return {
        "num_layers": layers,
        "hidden_size": hidden,
        "num_attention_heads": heads,
        "num_key_value_heads": key_value_heads,
        "ffn_hidden_size": ffn,
    }


def tokens(vocabulary: int, positions: int, base: float = 10000.0) -> Row:
    """Rows of the embedding, longest position, base of the rotation."""
    return {"vocab_size": vocabulary, "max_position_embeddings": positions, "rope_theta": base}


def experts(number: int, chosen: int, width: int, scoring: str = "softmax_selected", **more: Any) -> Row:
    """Experts E of width `width`, `chosen` of them for a token, and how they are weighed."""
    row = {"num_experts": number, "router_topk": chosen, "moe_ffn_hidden_size": width, "router_scoring": scoring}
    return row | more


def yarn(factor: float, trained: int, **more: Any) -> Row:
    """YaRN: `trained` positions stretched `factor` times."""
    row = {"rope_scaling": "yarn", "rope_scaling_factor": factor, "rope_original_max_position": trained}
    return row | {f"rope_{name}": value for name, value in more.items()}
