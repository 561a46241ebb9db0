"""The one decoder. Every family is a row of data over it; every parallel layout holds a subset of its names.

    tokens_BS ─▶ embed_tokens ─▶ [scale, + positions, norm] ─▶ layers 0..L-1 ─▶ norm ─▶ lm_head ─▶ logits_BSV

    layer:  x ─▶ input_layernorm ─▶ self_attn ─▶ (attention_output_norm) ─▶ + x
            x ─▶ post_attention_layernorm ─▶ mlp ─▶ (mlp_output_norm)    ─▶ + x

A pipeline stage is the same class built for a range of layers: the first holds the embedding, the last the final norm
and the output matrix, and parameter names are those of the whole model. Legend: B batch, S sequence, D hidden, V padded
vocabulary.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from functools import partial

import torch
from torch import Tensor, nn

from modellink.config.schema import ModelConfig
from modellink.models.attention import Attention, AttentionMask
from modellink.models.cache import KVCache, LayerCache
from modellink.models.layers import MLP, Dropout, LayerNorm, NormalizedLinear, RMSNorm, Runner, make_norm, run_plainly
from modellink.models.mla import LatentAttention, rope_config
from modellink.models.moe import MoE
from modellink.models.rope import RopeTable, RotaryEmbedding

LayerCall = Callable[[Tensor], Tensor]
RunLayers = Callable[[list[LayerCall], Tensor], Tensor]
# (decoder, final hidden states [B, S, D], labels [B, S]) -> losses [B, S]
OutputLosses = Callable[["Decoder", Tensor, Tensor], Tensor]


class DecoderLayer(nn.Module):
    """Attention and MLP with residual connections, norms before the branches, on their outputs, or both."""

    def __init__(self, config: ModelConfig, layer: int) -> None:
        super().__init__()
        hidden = config.hidden_size
        self.input_layernorm = make_norm(config, hidden) if config.pre_norm else None
        latent = config.multi_head_latent_attention
        self.self_attn = LatentAttention(config, layer) if latent else Attention(config, layer)
        self.attention_output_norm = make_norm(config, hidden) if config.sandwich_norm else None
        self.post_attention_layernorm = make_norm(config, hidden) if config.pre_norm else None
        self.mlp = MoE(config) if config.layer_has_experts(layer) else MLP(config)
        self.mlp_output_norm = make_norm(config, hidden) if config.sandwich_norm else None
        self.residual_multiplier = config.residual_multiplier
        self.dropout = Dropout(config.hidden_dropout)
        # tensor parallelism hands in another way of running a branch that it cannot split by itself
        self.run_attention: Callable[..., Tensor] | None = None
        self.run_mlp: Callable[[Tensor], Tensor] | None = None
        self.norm_runner: Runner = run_plainly
        self.mlp_runner: Runner = run_plainly

    def forward(
        self, x_BSD: Tensor, *, rope: RopeTable | None, mask: AttentionMask, cache: LayerCache | None = None
    ) -> Tensor:
        """[B, S, D] -> [B, S, D]."""
        attention, mlp = self.run_attention or self.self_attn, self.run_mlp or self.mlp
        branch = attention(self._enter(x_BSD, self.input_layernorm), rope=rope, mask=mask, cache=cache)
        x_BSD = self._add(x_BSD, branch, self.attention_output_norm)
        branch = self.mlp_runner(mlp, self._enter(x_BSD, self.post_attention_layernorm))
        return self._add(x_BSD, branch, self.mlp_output_norm)

    def _enter(self, x_BSD: Tensor, norm: RMSNorm | LayerNorm | None) -> Tensor:
        """The input of a branch; its dtype differs from that of x only when the residual stream is fp32."""
        if norm is None:
            return x_BSD.to(self.self_attn.o_proj.weight.dtype)
        return self.norm_runner(norm, x_BSD).to(norm.weight.dtype)

    def _add(self, x_BSD: Tensor, branch_BSD: Tensor, norm: nn.Module | None) -> Tensor:
        if norm is not None:
            branch_BSD = self.norm_runner(norm, branch_BSD)
        if self.residual_multiplier != 1.0:
            branch_BSD = branch_BSD * self.residual_multiplier
        return x_BSD + self.dropout(branch_BSD)


def run_layers_plainly(layers: list[LayerCall], x_BSD: Tensor) -> Tensor:
    """One layer after the other; recomputation hands in another way of running them."""
    for layer in layers:
        x_BSD = layer(x_BSD)
    return x_BSD


class Decoder(nn.Module):
    """A decoder-only transformer, or the pipeline stage of one that holds `layers` (default: all of them).

    `first` and `last` say whether this part owns the embedding and the output. Sizes in `config` must be resolved.
    """

    def __init__(
        self, config: ModelConfig, layers: range | list[int] | None = None, first: bool = True, last: bool = True
    ) -> None:
        super().__init__()
        assert config.padded_vocab_size, "the padded vocabulary must be resolved before a model is built"
        self.config = config
        indices = list(range(config.num_layers)) if layers is None else list(layers)
        hidden, vocab = config.hidden_size, config.padded_vocab_size
        self.embed_tokens = nn.Embedding(vocab, hidden) if first else None
        learned = first and config.position_embedding == "learned_absolute"
        self.embed_positions = nn.Embedding(config.max_position_embeddings, hidden) if learned else None
        self.embed_norm = make_norm(config, hidden) if first and config.embedding_norm else None
        self.embed_dropout = Dropout(config.hidden_dropout)
        self.rope, self.rope_window = self._rotations()
        # a dict, not a list: a stage's layers keep their global index as their name
        self.layers = nn.ModuleDict({str(i): DecoderLayer(config, i) for i in indices})
        self.norm = make_norm(config, hidden) if last else None
        head = NormalizedLinear if config.normalize_lm_head else nn.Linear
        self.lm_head = head(hidden, vocab, bias=config.lm_head_bias) if last else None
        self.run_layers: RunLayers = run_layers_plainly
        self.causal = True  # False: every position sees all (--cp-attention-mask-type full)
        # training hands in losses that take the place of logits, which then need never exist whole
        self.output_losses: OutputLosses | None = None
        self.tie_weights()

    def _rotations(self) -> tuple[RotaryEmbedding | None, RotaryEmbedding | None]:
        """The rotation of the layers, and of those with a window where it is another one."""
        config = self.config
        if config.position_embedding != "rope":
            return None, None
        config = rope_config(config) if config.multi_head_latent_attention else config
        if config.rope_theta_window is None:
            return RotaryEmbedding(config), None
        local = dataclasses.replace(config, rope_theta=config.rope_theta_window, rope_scaling=None)
        return RotaryEmbedding(config), RotaryEmbedding(local)

    def tie_weights(self) -> None:
        """Make the output matrix the embedding matrix again where both live here (sharding replaces parameters)."""
        if self.config.tie_word_embeddings and self.lm_head is not None and self.embed_tokens is not None:
            self.lm_head.weight = self.embed_tokens.weight

    def cast(self, dtype: torch.dtype) -> Decoder:
        """Hold weights in `dtype`, but in fp32 those that no gradient moves (they are added to fp32 scores)."""
        for parameter in self.parameters():
            if parameter.requires_grad:
                parameter.data = parameter.data.to(dtype)
        return self

    def canonical_name(self, name: str) -> str:
        """Name of a parameter in checkpoints: a tied output matrix on a later stage is the embedding."""
        tied = self.config.tie_word_embeddings and name == "lm_head.weight"
        return "embed_tokens.weight" if tied else name

    def embed(self, tokens_BS: Tensor, position_ids: Tensor) -> Tensor:
        """Token (and learned position) embeddings, scaled and normalised: [B, S, D]."""
        config = self.config
        x_BSD = self.embed_tokens(tokens_BS)
        if config.embedding_times_sqrt_hidden:
            x_BSD = x_BSD * torch.tensor(config.hidden_size**0.5, dtype=x_BSD.dtype, device=x_BSD.device)
        if config.embedding_multiplier != 1.0:
            x_BSD = x_BSD * config.embedding_multiplier
        if self.embed_positions is not None:
            x_BSD = x_BSD + self.embed_positions(position_ids.expand(tokens_BS.shape))
        if self.embed_norm is not None:
            x_BSD = self.embed_norm(x_BSD)
        x_BSD = self.embed_dropout(x_BSD)
        return x_BSD.float() if config.fp32_residual else x_BSD

    def final_hidden(self, x_BSD: Tensor) -> Tensor:
        """Final norm and scaling, in the dtype of the output matrix."""
        x_BSD = self.norm(x_BSD).to(self.lm_head.weight.dtype)
        return x_BSD if self.config.hidden_divisor == 1.0 else x_BSD / self.config.hidden_divisor

    def project(self, x_BSD: Tensor) -> Tensor:
        """Output matrix, multiplier and soft cap: [B, S, V] (V local where the vocabulary is sharded)."""
        config = self.config
        logits_BSV = self.lm_head(x_BSD)
        if config.logits_multiplier != 1.0:
            logits_BSV = logits_BSV * config.logits_multiplier
        if config.output_logit_softcap is not None:
            cap = config.output_logit_softcap
            logits_BSV = cap * torch.tanh(logits_BSV / cap)
        return logits_BSV

    def logits(self, x_BSD: Tensor) -> Tensor:
        """Hidden states of the last layer -> [B, S, V]."""
        return self.project(self.final_hidden(x_BSD))

    def forward(
        self,
        x: Tensor,
        position_ids: Tensor | None = None,
        cache: KVCache | None = None,
        first_key: Tensor | None = None,
        sequence_length: int | None = None,
        last_only: bool = False,
        documents: Tensor | None = None,
        labels: Tensor | None = None,
    ) -> Tensor:
        """Token ids int [B, S] on the first stage, hidden states [B, S, D] on later ones -> logits or hidden states.

        position_ids int [B, S] or [S], default 0.. after what the cache holds. first_key int [B]: keys before it are
        left padding. documents int [B, whole sequence] numbers packed documents, which do not see each other.
        sequence_length S is needed only where x holds a shard of the sequence. last_only keeps the last
        position's logits, [B, 1, V]. With labels int [B, S] and `output_losses` the result is losses, fp32 [B, S].
        """
        past = cache.length if cache is not None else 0
        length = sequence_length or x.shape[1]
        if position_ids is None:
            position_ids = torch.arange(past, past + length, device=x.device)
        if self.embed_tokens is not None:
            x = self.embed(x, position_ids)
        rope = self.rope(position_ids, x.dtype) if self.rope is not None else None
        rope_window = rope if self.rope_window is None else self.rope_window(position_ids, x.dtype)
        mask = AttentionMask(length, past + length, x.device, first_key, documents, self.causal)
        calls: list[LayerCall] = []
        for place, (index, layer) in enumerate(self.layers.items()):
            layer_cache = cache.layers[place] if cache is not None else None
            table = rope_window if self.config.layer_has_window(int(index)) else rope
            calls.append(_bind(layer, rope=table, mask=mask, cache=layer_cache))
        x = self.run_layers(calls, x)
        if self.lm_head is None:
            return x
        if self.output_losses is not None and labels is not None:
            return self.output_losses(self, self.final_hidden(x), labels)
        return self.logits(x[:, -1:] if last_only else x)


def _bind(layer: nn.Module, **context: object) -> LayerCall:
    return partial(layer, **context)
