"""How many parameters a configuration has, by formula: no tensor is made and torch is not imported.

`parts` is the number of pieces that the splittable matrices are cut into (1: whole); norms and the biases of outputs
are whole on each.
"""

from __future__ import annotations

from modellink.config.schema import ModelConfig


def layer_parameters(model: ModelConfig, parts: int = 1) -> int:
    """Parameters of one decoder layer, or of one of its `parts`; sizes in `model` are resolved."""
    D, F = model.hidden_size, model.ffn_hidden_size
    query, key_value = model.num_attention_heads * model.head_dim, model.num_key_value_heads * model.head_dim
    norm = 1 if model.normalization == "RMSNorm" else 2
    ups = 2 if model.gated_mlp else 1
    split = D * (query + 2 * key_value) + query * D + (ups + 1) * D * F
    split += (query + 2 * key_value) * model.qkv_bias + ups * F * model.mlp_bias
    normed = query + key_value if model.qk_norm_all_heads else 2 * model.head_dim
    whole = D * model.attention_output_bias + D * model.mlp_bias + normed * norm * model.qk_norm
    whole += 2 * (model.pre_norm + model.sandwich_norm) * D * norm
    return split // parts + whole


def outer_parameters(model: ModelConfig, parts: int = 1, first: bool = True, last: bool = True) -> int:
    """Parameters outside the layers: those before them (`first`), those after them (`last`), or both.

    The vocabulary is the padded one when known, else the plain one, else 0 (the embedding is then left out).
    """
    D, V = model.hidden_size, model.padded_vocab_size or model.vocab_size or 0
    norm = 1 if model.normalization == "RMSNorm" else 2
    count = 0
    if first:
        count += V * D // parts + D * norm * model.embedding_norm
        count += (model.max_position_embeddings or 0) * D * (model.position_embedding == "learned_absolute")
    if last:
        own_head = not (model.tie_word_embeddings and first)  # a tied pair in two places is two copies
        count += D * norm + V * D // parts * own_head + V // parts * model.lm_head_bias
    return count


def count_parameters(model: ModelConfig) -> int:
    """Parameters of the whole decoder described by `model`; a tied output matrix is counted once."""
    model = model.resolve()
    assert model.num_layers and model.hidden_size and model.num_attention_heads
    assert model.head_dim and model.num_key_value_heads and model.ffn_hidden_size
    return outer_parameters(model) + model.num_layers * layer_parameters(model)
