"""How many parameters a configuration has, by formula: no tensor is made and torch is not imported."""

from __future__ import annotations

from modellink.config.schema import ModelConfig


def count_parameters(model: ModelConfig) -> int:
    """Parameters of the whole decoder described by `model`; a tied output matrix is counted once.

    The vocabulary is the padded one when known, else the plain one, else 0 (the embedding is then left out).
    """
    model = model.resolve()
    assert model.num_layers and model.hidden_size and model.num_attention_heads
    assert model.head_dim and model.num_key_value_heads and model.ffn_hidden_size
    hidden, ffn = model.hidden_size, model.ffn_hidden_size
    query, key_value = model.num_attention_heads * model.head_dim, model.num_key_value_heads * model.head_dim
    norm_copies = 1 if model.normalization == "RMSNorm" else 2
    vocab = model.padded_vocab_size or model.vocab_size or 0

    attention = hidden * (query + 2 * key_value) + query * hidden
    attention += (query + 2 * key_value) * model.qkv_bias + hidden * model.attention_output_bias
    normed = query + key_value if model.qk_norm_all_heads else 2 * model.head_dim
    attention += normed * norm_copies * model.qk_norm
    up_copies = 2 if model.gated_mlp else 1
    mlp = (up_copies + 1) * hidden * ffn + (up_copies * ffn + hidden) * model.mlp_bias
    norms = 2 * (model.pre_norm + model.sandwich_norm) * hidden * norm_copies

    total = model.num_layers * (attention + mlp + norms) + hidden * norm_copies
    total += vocab * hidden + hidden * norm_copies * model.embedding_norm
    if model.position_embedding == "learned_absolute":
        total += (model.max_position_embeddings or 0) * hidden
    if not model.tie_word_embeddings:
        total += vocab * hidden
    return total + vocab * model.lm_head_bias
