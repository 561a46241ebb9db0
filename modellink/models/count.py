"""How many parameters a configuration has, by formula: no tensor is made and torch is not imported.

`parts` is the number of pieces that the splittable matrices are cut into (1: whole); norms, routers, projections into
a latent and the biases of outputs are whole on each. Sizes in `model` are resolved.
"""

from __future__ import annotations

from modellink.config.schema import ModelConfig


def _norm(model: ModelConfig) -> int:
    return 1 if model.normalization == "RMSNorm" else 2


def attention_parameters(model: ModelConfig, parts: int = 1) -> int:
    """Parameters of one layer's attention, norms on queries, keys and latents included."""
    if model.multi_head_latent_attention:
        return _latent_parameters(model, parts)
    D, H = model.hidden_size, model.num_attention_heads
    query, key_value = H * model.head_dim, model.num_key_value_heads * model.head_dim
    split = D * (query + 2 * key_value) + query * D + (query + 2 * key_value) * model.qkv_bias
    split += H * model.attention_sinks
    normed = query + key_value if model.qk_norm_all_heads else 2 * model.head_dim
    return split // parts + D * model.attention_output_bias + normed * _norm(model) * model.qk_norm


def _latent_parameters(model: ModelConfig, parts: int) -> int:
    D, H, rank = model.hidden_size, model.num_attention_heads, model.q_lora_rank
    query, latent = H * model.head_dim, model.kv_lora_rank + model.qk_rope_head_dim
    split = (D if rank is None else rank) * query + model.kv_lora_rank * H * (model.qk_nope_head_dim + model.v_head_dim)
    split += H * model.v_head_dim * D + H * model.attention_sinks
    whole = latent * (D + model.qkv_bias) + model.kv_lora_rank * model.qk_norm + D * model.attention_output_bias
    return split // parts + whole + (rank or 0) * (D + model.qkv_bias + model.qk_norm)


def mlp_parameters(model: ModelConfig, layer: int, parts: int = 1, experts: int | None = None) -> int:
    """Parameters of the MLP, or of the router and `experts` of the experts (default: all), of `layer`."""
    D, ups = model.hidden_size, 2 if model.gated_mlp else 1

    def mlp(width: int) -> int:
        return ((ups + 1) * D * width + ups * width * model.mlp_bias) // parts + D * model.mlp_bias

    if not model.layer_has_experts(layer):
        return mlp(model.ffn_hidden_size)
    width = model.moe_ffn_hidden_size
    count = model.num_experts * (D + model.router_bias + model.router_correction_bias)
    count += (model.num_experts if experts is None else experts) * mlp(width)
    if model.n_shared_experts:
        count += mlp(model.n_shared_experts * width) + D * model.shared_expert_gate_dimension * model.shared_expert_gate
    return count


def layer_parameters(model: ModelConfig, layer: int, parts: int = 1, experts: int | None = None) -> int:
    """Parameters of decoder layer `layer`, or of one of its `parts`, with so many of its experts (default: all)."""
    norms = 2 * (model.pre_norm + model.sandwich_norm) * model.hidden_size * _norm(model)
    return attention_parameters(model, parts) + mlp_parameters(model, layer, parts, experts) + norms


def outer_parameters(model: ModelConfig, parts: int = 1, first: bool = True, last: bool = True) -> int:
    """Parameters outside the layers: those before them (`first`), those after them (`last`), or both.

    The vocabulary is the padded one when known, else the plain one, else 0 (the embedding is then left out).
    """
    D, V = model.hidden_size, model.padded_vocab_size or model.vocab_size or 0
    norm = _norm(model)
    count = 0
    if first:
        count += V * D // parts + D * norm * model.embedding_norm
        count += (model.max_position_embeddings or 0) * D * (model.position_embedding == "learned_absolute")
    if last:
        own_head = not (model.tie_word_embeddings and first)  # a tied pair in two places is two copies
        count += D * norm + V * D // parts * own_head + V // parts * model.lm_head_bias
    return count


def count_parameters(model: ModelConfig, active: bool = False) -> int:
    """Parameters of the whole decoder; a tied output matrix is counted once. `active`: those that one token meets."""
    model = model.resolve()
    assert model.num_layers and model.hidden_size and model.num_attention_heads
    assert model.head_dim and model.num_key_value_heads and model.ffn_hidden_size
    experts = model.router_topk if active else None
    layers = sum(layer_parameters(model, layer, experts=experts) for layer in range(model.num_layers))
    return outer_parameters(model) + layers
