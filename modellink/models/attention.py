"""Grouped-query attention: projections, rotation, and a core that may be exchanged.

The projections see only local shapes (`view(..., -1, K)`), so a column shard of q/k/v is simply fewer heads. What
happens between rotated q, k, v and the weighted sum is `AttentionCore`; context parallelism replaces that one module
and nothing else. Legend: B batch, S query length, T key length, D hidden, H query heads, G key/value heads, K head
size.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from modellink.config.schema import ModelConfig
from modellink.models.blockwise import BlockMask, ScoreRule, kernel_for
from modellink.models.cache import LayerCache
from modellink.models.layers import Dropout, Runner, make_norm, run_plainly
from modellink.models.projections import Enter, Leave, by_itself, separately
from modellink.models.rope import RopeTable, rotate
from modellink.models.tiles import Ids, Tile, attend_tiles, have_kernels, make_tiles


def alibi_slopes(heads: int) -> Tensor:
    """fp32 [heads]: slopes of ALiBi (Press et al., arXiv:2108.12409), interpolated when `heads` is no power of two."""

    def power_of_two(n: int) -> list[float]:
        start = 2.0 ** (-(2.0 ** -(math.log2(n) - 3)))
        return [start ** (i + 1) for i in range(n)]

    closest = 2 ** math.floor(math.log2(heads))
    slopes = power_of_two(closest)
    if closest != heads:
        slopes += power_of_two(2 * closest)[0::2][: heads - closest]
    return torch.tensor(slopes, dtype=torch.float32)


ALL_HEADS = slice(None)


class AttentionMask:
    """Who may look at whom in one forward pass: causal, within a document, within a window. Dense masks are built only
    when a kernel needs one, then kept.

    query_length S queries are the last of key_length T positions. `first_key` int [B] masks the keys before it (left
    padding). `documents` int [B, all positions] numbers the documents of a packed sequence: keys of other documents
    are hidden.
    """

    def __init__(
        self,
        query_length: int,
        key_length: int,
        device: torch.device,
        first_key: Tensor | None = None,
        documents: Tensor | None = None,
        causal: bool = True,
    ) -> None:
        self.query_length, self.key_length, self.device, self.first_key = query_length, key_length, device, first_key
        self.documents, self.causal = documents, causal
        self._dense: dict[int | None, Tensor] = {}
        self.derived: dict[Any, Any] = {}  # what others build from this mask, kept for all layers

    def is_trivial(self, window: int | None) -> bool:
        """True when a kernel's own causal rule (or no rule at all) says the same."""
        if self.first_key is not None or self.documents is not None:
            return False
        if window is not None and window < self.key_length:
            return False
        return not self.causal or self.query_length in (1, self.key_length)

    def positions(self) -> tuple[Tensor, Tensor]:
        """int64 [S] and [T]: where queries and keys stand in the sequence."""
        key = torch.arange(self.key_length, device=self.device)
        return key[self.key_length - self.query_length :], key

    def distances(self) -> Tensor:
        """int [S, T]: how far each key lies behind each query; negative for keys ahead."""
        query, key = self.positions()
        return query[:, None] - key[None, :]

    def dense(self, window: int | None) -> Tensor:
        """bool [S, T] or [B, 1, S, T]: True where the key may be seen. Rows that see nothing (padding) see self."""
        if window not in self._dense:
            (query, key), distance = self.positions(), self.distances()
            allowed = distance >= 0 if self.causal else torch.ones_like(distance, dtype=torch.bool)
            if window is not None:
                allowed &= distance < window
            if self.documents is not None:
                allowed = allowed & (self.documents[:, None, query, None] == self.documents[:, None, None, key])
            if self.first_key is not None:
                real = key >= self.first_key[:, None, None, None]
                allowed = (allowed & real) | (distance == 0)  # softmax over nothing would be NaN
            self._dense[window] = allowed
        return self._dense[window]

    def host_documents(self) -> Ids | None:
        """`documents` on the host; the device is waited for once."""
        if self.documents is not None and "documents" not in self.derived:
            self.derived["documents"] = self.documents.cpu().numpy().astype(np.int64)
        return self.derived.get("documents")

    def tiles(self, window: int | None) -> list[Tile]:
        """What is seen, without a dense mask; not for left padding."""
        if ("tiles", window) not in self.derived:
            assert self.first_key is None
            keys = np.arange(self.key_length)
            queries = keys[self.key_length - self.query_length :]
            self.derived["tiles", window] = make_tiles(queries, keys, self.host_documents(), self.causal, window)
        return self.derived["tiles", window]

    def starts(self, rows: int) -> tuple[Tensor, int]:
        """int32 [documents + 1]: where the documents of all `rows` start, one row after the other; the longest one."""
        if "starts" not in self.derived:
            documents = self.host_documents()
            borders = np.zeros((rows, self.key_length), np.bool_)
            borders[:, 0] = True
            if documents is not None:
                borders[:, 1:] = np.diff(documents) != 0
            starts = np.append(np.flatnonzero(borders), borders.size).astype(np.int32)
            self.derived["starts"] = torch.from_numpy(starts).to(self.device), int(np.diff(starts).max())
        return self.derived["starts"]


class AttentionCore(nn.Module):
    """softmax(q k^T * scale + mask) v on one device, with dropout, window, ALiBi, soft cap and sinks.

    A sink is one more logit of each head, learned, that takes its share of the softmax and has no value (gpt-oss).
    `first_head` is the global index of the first local query head; tensor parallelism sets it, only ALiBi reads it.
    `heads` of `attend` says which of the local query heads are given, where only some are.
    """

    def __init__(self, config: ModelConfig, layer: int) -> None:
        super().__init__()
        self.scale = (config.query_scale or config.head_dim) ** -0.5
        self.divisor = layer + 1 if config.query_key_layer_scaling else 1
        self.window = config.sliding_window if config.layer_has_window(layer) else None
        self.softcap = config.attention_logit_softcap
        self.alibi = config.position_embedding == "alibi"
        self.total_heads = config.num_attention_heads
        self.first_head = 0
        self.sinks = nn.Parameter(torch.zeros(config.num_attention_heads)) if config.attention_sinks else None
        self.dropout = Dropout(config.attention_dropout)
        # context parallelism hands in another way, which calls `attend` with what it has brought together
        self.context: Callable[[AttentionCore, Tensor, Tensor, Tensor, AttentionMask], Tensor] | None = None

    def forward(self, q_BHSK: Tensor, k_BGTK: Tensor, v_BGTK: Tensor, mask: AttentionMask) -> Tensor:
        """Returns [B, H, S, K] in the dtype of q."""
        if self.context is not None:
            return self.context(self, q_BHSK, k_BGTK, v_BGTK, mask)
        return self.attend(q_BHSK, k_BGTK, v_BGTK, mask)

    def attend(
        self, q_BHSK: Tensor, k_BGTK: Tensor, v_BGTK: Tensor, mask: AttentionMask, heads: slice = ALL_HEADS
    ) -> Tensor:
        """The same on this device alone."""
        probability = self.dropout.probability
        scale = self.scale
        if self.divisor != 1:  # smaller products in fp16; the kernels multiply back in fp32
            q_BHSK, scale = q_BHSK / self.divisor, scale * self.divisor
        by_hand = self.softcap is not None or self.sinks is not None
        trivial = mask.is_trivial(self.window) and not self.alibi and not by_hand
        with self.dropout.stream():
            if trivial:
                return F.scaled_dot_product_attention(
                    q_BHSK,
                    k_BGTK,
                    v_BGTK,
                    dropout_p=probability,
                    is_causal=mask.causal and mask.query_length > 1,
                    scale=scale,
                    enable_gqa=q_BHSK.shape[1] != k_BGTK.shape[1],
                )
            if not (by_hand or self.alibi or probability):
                out_BHSK = self._attend_sparsely(q_BHSK, k_BGTK, v_BGTK, mask, scale)
                if out_BHSK is not None:
                    return out_BHSK
            repeats = q_BHSK.shape[1] // k_BGTK.shape[1]
            if repeats > 1:  # memory-efficient kernels take a mask or grouped heads, not both
                k_BGTK, v_BGTK = k_BGTK.repeat_interleave(repeats, 1), v_BGTK.repeat_interleave(repeats, 1)
            bias = self._bias(mask, q_BHSK, heads)
            if not by_hand:
                return F.scaled_dot_product_attention(
                    q_BHSK, k_BGTK, v_BGTK, attn_mask=bias, dropout_p=probability, scale=scale
                )
            scores = q_BHSK @ k_BGTK.transpose(-1, -2)
            scores = scores.to(torch.promote_types(scores.dtype, torch.float32)) * scale
            if self.softcap is not None:
                scores = self.softcap * torch.tanh(scores / self.softcap)
            scores = scores.masked_fill(~bias, float("-inf")) if bias.dtype == torch.bool else scores + bias
            weights = self._softmax(scores, heads).to(q_BHSK.dtype)
            return F.dropout(weights, probability) @ v_BGTK

    def _attend_sparsely(self, q: Tensor, k: Tensor, v: Tensor, mask: AttentionMask, scale: float) -> Tensor | None:
        """Documents and windows at the cost of what is seen; None where no fused kernel does that."""
        if mask.first_key is not None:
            return None
        window = self.window if self.window is not None and self.window < mask.key_length else None
        rule = ScoreRule(scale)
        kernel = kernel_for(q, k, v, rule, BlockMask())
        whole = mask.query_length == mask.key_length and (mask.causal or window is None)
        if whole and kernel is not None and kernel.packed is not None:
            return kernel.packed(q, k, v, *mask.starts(len(q)), mask.causal, window, scale)
        tiles = mask.tiles(window)
        return attend_tiles(q, k, v, rule, tiles) if have_kernels(q, k, v, rule, tiles) else None

    def _softmax(self, scores_BHST: Tensor, heads: slice) -> Tensor:
        if self.sinks is None:
            return scores_BHST.softmax(-1)
        sinks_BHS1 = self.sinks[heads].to(scores_BHST.dtype)[:, None, None].expand(*scores_BHST.shape[:-1], 1)
        return torch.cat((scores_BHST, sinks_BHS1), -1).softmax(-1)[..., :-1]

    def slopes(self, heads: slice, count: int) -> Tensor:
        """fp32 [count]: ALiBi slopes of the `count` query heads given."""
        first = self.first_head + (heads.start or 0)
        return alibi_slopes(self.total_heads)[first : first + count]

    def _bias(self, mask: AttentionMask, q_BHSK: Tensor, heads: slice) -> Tensor:
        """bool mask, or the additive ALiBi bias in the dtype of q with -inf where a key may not be seen."""
        allowed = mask.dense(self.window)
        if not self.alibi:
            return allowed
        slopes = self.slopes(heads, q_BHSK.shape[1]).to(q_BHSK.device)
        bias = -slopes[:, None, None] * mask.distances()
        return bias.masked_fill(~allowed, float("-inf")).to(q_BHSK.dtype)


class Attention(nn.Module):
    """Multi-head, grouped-query or multi-query self-attention of one layer."""

    def __init__(self, config: ModelConfig, layer: int) -> None:
        super().__init__()
        hidden, head = config.hidden_size, config.head_dim
        self.head_dim = head
        self.rope_interleaved = config.rope_interleaved
        self.q_proj = nn.Linear(hidden, config.num_attention_heads * head, bias=config.qkv_bias)
        self.k_proj = nn.Linear(hidden, config.num_key_value_heads * head, bias=config.qkv_bias)
        self.v_proj = nn.Linear(hidden, config.num_key_value_heads * head, bias=config.qkv_bias)
        self.o_proj = nn.Linear(config.num_attention_heads * head, hidden, bias=config.attention_output_bias)
        self.norm_all_heads = config.qk_norm_all_heads
        normed = [config.num_attention_heads, config.num_key_value_heads] if self.norm_all_heads else [1, 1]
        self.q_norm = make_norm(config, normed[0] * head) if config.qk_norm else None
        self.k_norm = make_norm(config, normed[1] * head) if config.qk_norm else None
        self.core = AttentionCore(config, layer)
        # tensor parallelism hands in another way of running a core that has parameters
        self.run_core: Callable[[Tensor, Tensor, Tensor, AttentionMask], Tensor] | None = None
        self.core_runner: Runner = run_plainly
        # another way through the matrices into and out of the block can be handed in
        self.enter: Enter = separately
        self.leave: Leave = by_itself

    def forward(
        self, x_BSD: Tensor, *, rope: RopeTable | None, mask: AttentionMask, cache: LayerCache | None = None
    ) -> Tensor:
        """[B, S, D] -> [B, S, D]; with `cache`, keys and values of earlier tokens come first."""
        q, k, v = self.enter(x_BSD, (self.q_proj, self.k_proj, self.v_proj))
        if self.q_norm is not None and self.norm_all_heads:
            q, k = self.q_norm(q), self.k_norm(k)
        q, k, v = (t.unflatten(-1, (-1, self.head_dim)) for t in (q, k, v))
        if self.q_norm is not None and not self.norm_all_heads:
            q, k = self.q_norm(q), self.k_norm(k)
        if rope is not None:
            q, k = rotate(q, rope, self.rope_interleaved), rotate(k, rope, self.rope_interleaved)
            q = q if rope.query_scale is None else q * rope.query_scale
        q, k, v = (t.transpose(1, 2) for t in (q, k, v))
        if cache is not None:
            k, v = cache.append(k, v)
        out_BHSK = self.core_runner(self.run_core or self.core, q, k, v, mask)
        return self.leave(out_BHSK.transpose(1, 2).flatten(-2), self.o_proj)
