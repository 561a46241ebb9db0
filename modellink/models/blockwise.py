"""Attention to one block of keys, merged over blocks: what ring attention computes while blocks travel.

    out_i, lse_i = attend(q, k_i, v_i)         softmax within block i, and the log of its denominator
    lse = log sum_i exp(lse_i)                 out = sum_i exp(lse_i - lse) out_i            (`merge`)
    dq_i, dk_i, dv_i = attend_backward(...)    needs the merged out and lse only: blocks are independent again

Source: Liu et al., arXiv:2310.01889; Dao, arXiv:2307.08691, section 3.1. Legend: B batch, S queries, T keys, H query
heads, G key/value heads, K key size, V value size.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

# rows of scores at a time: a block costs this many fp32 rows of T scores, not S of them
QUERY_ROWS = 1024


@dataclass(frozen=True)
class ScoreRule:
    """How scores come from queries and keys: scale, soft cap, ALiBi slopes (fp32 [H])."""

    scale: float
    softcap: float | None = None
    slopes_H: Tensor | None = None


@dataclass(frozen=True)
class BlockMask:
    """Which keys of a block the queries see: bool [S, T] or [B, 1, S, T]; without it those up to their own number
    (`causal`), or all. Distances, int [S, T], for ALiBi."""

    allowed: Tensor | None = None
    distances: Tensor | None = None
    causal: bool = False


def _is_plain(rule: ScoreRule, mask: BlockMask) -> bool:
    return rule.softcap is None and rule.slopes_H is None and mask.allowed is None


def _has_kernel(q: Tensor, v: Tensor) -> bool:
    return q.device.type == "cpu" and q.dtype != torch.float64 and q.shape[-1] == v.shape[-1]


def _expand(x_BGTK: Tensor, heads: int) -> Tensor:
    return x_BGTK if x_BGTK.shape[1] == heads else x_BGTK.repeat_interleave(heads // x_BGTK.shape[1], 1)


def _collect(grad_BHTK: Tensor, groups: int) -> Tensor:
    if grad_BHTK.shape[1] == groups:
        return grad_BHTK
    return grad_BHTK.unflatten(1, (groups, -1)).sum(2)


def _scores(q: Tensor, k: Tensor, rule: ScoreRule, mask: BlockMask, rows: slice) -> tuple[Tensor, Tensor | None]:
    """fp32 (or wider) scores [B, H, rows, T] with -inf where masked, and d capped / d raw where there is a soft cap."""
    wide = torch.promote_types(q.dtype, torch.float32)
    scores, slope = (q.to(wide) @ k.to(wide).transpose(-1, -2)) * rule.scale, None
    if rule.softcap is not None:
        ratio = torch.tanh(scores / rule.softcap)
        scores, slope = rule.softcap * ratio, 1 - ratio.square()
    if rule.slopes_H is not None:
        assert mask.distances is not None
        scores = scores - rule.slopes_H[:, None, None] * mask.distances[rows]
    allowed = mask.allowed
    if allowed is None and mask.causal:
        last = torch.arange(rows.start, rows.start + q.shape[2], device=q.device)
        allowed = torch.arange(k.shape[2], device=q.device) <= last[:, None]
    elif allowed is not None:
        allowed = allowed[..., rows, :]
    if allowed is not None:
        scores = scores.masked_fill(~allowed, float("-inf"))
    return scores, slope


def attend(q: Tensor, k: Tensor, v: Tensor, rule: ScoreRule, mask: BlockMask) -> tuple[Tensor, Tensor]:
    """q [B, H, S, K], k [B, G, T, K], v [B, G, T, V] -> (out [B, H, S, V] in fp32 or wider, lse [B, H, S]).

    A query that sees no key of the block has out 0 and lse -inf.
    """
    k, v = _expand(k, q.shape[1]), _expand(v, q.shape[1])
    wide = torch.promote_types(q.dtype, torch.float32)
    if _is_plain(rule, mask) and _has_kernel(q, v):
        out, lse = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu(
            q, k, v, 0.0, mask.causal, scale=rule.scale
        )
        return out.to(wide), lse.to(wide)
    out = q.new_empty(*q.shape[:-1], v.shape[-1], dtype=wide)
    lse = q.new_empty(q.shape[:-1], dtype=wide)
    for start in range(0, q.shape[2], QUERY_ROWS):
        rows = slice(start, start + QUERY_ROWS)
        scores, _ = _scores(q[:, :, rows], k, rule, mask, rows)
        lse[:, :, rows] = scores.logsumexp(-1)
        weights = torch.exp(scores - _finite(lse[:, :, rows])[..., None])
        out[:, :, rows] = weights @ v.to(wide)
    return out, lse


def _finite(lse: Tensor) -> Tensor:
    """-inf (no key seen) as 0: exp(-inf - 0) is the 0 that is wanted."""
    return lse.masked_fill(lse == float("-inf"), 0.0)


def merge(out: Tensor, lse: Tensor, more: Tensor, more_lse: Tensor) -> tuple[Tensor, Tensor]:
    """Attention to the keys of both blocks."""
    both = torch.logaddexp(lse, more_lse)
    base = _finite(both)
    share, more_share = torch.exp(lse - base)[..., None], torch.exp(more_lse - base)[..., None]
    return out * share + more * more_share, both


def attend_backward(
    grad: Tensor, q: Tensor, k: Tensor, v: Tensor, out: Tensor, lse: Tensor, rule: ScoreRule, mask: BlockMask
) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients of q, k, v by this block, in fp32 or wider, given the merged `out` and `lse` and out's gradient."""
    heads, groups = q.shape[1], k.shape[1]
    k, v = _expand(k, heads), _expand(v, heads)
    wide = torch.promote_types(q.dtype, torch.float32)
    if _is_plain(rule, mask) and _has_kernel(q, v):
        found = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu_backward(
            grad.to(q.dtype), q, k, v, out.to(q.dtype), lse.float(), 0.0, mask.causal, scale=rule.scale
        )
        dq, dk, dv = (tensor.to(wide) for tensor in found)
        return dq, _collect(dk, groups), _collect(dv, groups)
    grad, out, k_wide, v_wide = grad.to(wide), out.to(wide), k.to(wide), v.to(wide)
    delta = (grad * out).sum(-1, keepdim=True)
    dq, dk, dv = torch.empty_like(q, dtype=wide), torch.zeros_like(k_wide), torch.zeros_like(v_wide)
    for start in range(0, q.shape[2], QUERY_ROWS):
        rows = slice(start, start + QUERY_ROWS)
        scores, slope = _scores(q[:, :, rows], k, rule, mask, rows)
        weights = torch.exp(scores - _finite(lse[:, :, rows])[..., None])
        dv += weights.transpose(-1, -2) @ grad[:, :, rows]
        dscores = weights * (grad[:, :, rows] @ v_wide.transpose(-1, -2) - delta[:, :, rows])
        if slope is not None:
            dscores = dscores * slope
        dq[:, :, rows] = (dscores @ k_wide) * rule.scale
        dk += (dscores.transpose(-1, -2) @ q[:, :, rows].to(wide)) * rule.scale
    return dq, _collect(dk, groups), _collect(dv, groups)
