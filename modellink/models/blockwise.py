"""Attention to one block of keys, merged over blocks: what ring attention computes while blocks travel.

    out_i, lse_i = attend(q, k_i, v_i)         softmax within block i, and the log of its denominator
    lse = log sum_i exp(lse_i)                 out = sum_i exp(lse_i - lse) out_i            (`merge_`)
    dq_i, dk_i, dv_i = attend_backward(...)    needs the merged out and lse only: blocks are independent again

Fused kernels are rows of a table, `KERNELS`; what none of them knows is computed by plain products over slices of
queries. Source: Liu et al., arXiv:2310.01889; Dao, arXiv:2307.08691, section 3.1. Legend: B batch, S queries, T keys,
H query heads, G key/value heads, K key size, V value size.
"""

from __future__ import annotations

import inspect
import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from modellink import device

# rows of scores at a time: plain products cost this many fp32 rows of T scores, not S of them
QUERY_ROWS = 1024


@dataclass(frozen=True)
class ScoreRule:
    """How scores come from queries and keys: scale, soft cap, ALiBi slopes (fp32 [H])."""

    scale: float
    softcap: float | None = None
    slopes_H: Tensor | None = None


@dataclass(frozen=True)
class BlockMask:
    """Which keys of a block the queries see: query i stands `offset` + i - j positions behind key j.

    `causal` hides keys ahead, `window` those that many positions behind or more.
    """

    offset: int = 0
    causal: bool = False
    window: int | None = None

    def kind(self, queries: int, keys: int) -> str:
        """ "full": all is seen; "causal": the lower triangle of a square; "band": anything else."""
        if self.window is None and (not self.causal or self.offset >= keys - 1):
            return "full"
        return "causal" if self.window is None and self.offset == 0 and queries == keys else "band"

    def leaves_none(self, queries: int, keys: int) -> bool:
        """Whether some query sees no key at all, which kernels do not agree about."""
        behind = self.window is not None and self.offset + queries - keys >= self.window
        return behind or (self.causal and self.offset < 0)

    def distances(self, rows: slice, keys: int, on: torch.device) -> Tensor:
        """int64 [rows, T]: how far each key lies behind each query."""
        return torch.arange(self.offset + rows.start, self.offset + rows.stop, device=on)[:, None] - torch.arange(
            keys, device=on
        )

    def allowed(self, rows: slice, keys: int, on: torch.device) -> Tensor:
        """bool [rows, T]: True where the key is seen."""
        distances = self.distances(rows, keys, on)
        allowed = distances >= 0 if self.causal else torch.ones_like(distances, dtype=torch.bool)
        return allowed if self.window is None else allowed & (distances < self.window)


# --- fused kernels ----------------------------------------------------------------------------------------------------

Forward = Callable[[Tensor, Tensor, Tensor, BlockMask, float], tuple[Tensor, Tensor]]
Backward = Callable[[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, BlockMask, float], tuple[Tensor, Tensor, Tensor]]


# q, k, v [B, heads, S, K], where documents start in all rows [documents + 1], the longest, causal, window, scale
Packed = Callable[[Tensor, Tensor, Tensor, Tensor, int, bool, int | None, float], Tensor]


@dataclass(frozen=True)
class Kernel:
    """A fused kernel that returns the log-sum-exp and whose backward takes it; what it can be asked for.

    `packed` computes all documents of a batch at once. `grouped`: fewer key/value heads than query heads. `values`:
    values of another size than keys. `align`: bytes that the row of a head must be a multiple of. `aligned_band`: a
    causal band only, and only where the last query stands on the last key.
    """

    forward: Forward
    backward: Backward
    dtypes: frozenset[torch.dtype]
    kinds: frozenset[str]
    grouped: bool = True
    values: bool = False
    align: int = 1
    largest: int = 1 << 30
    aligned_band: bool = False
    packed: Packed | None = None

    def takes(self, q: Tensor, k: Tensor, v: Tensor, mask: BlockMask) -> bool:
        queries, keys, (size, value_size) = q.shape[2], k.shape[2], (q.shape[3], v.shape[3])
        kind = mask.kind(queries, keys)
        if q.dtype not in self.dtypes or kind not in self.kinds or max(size, value_size) > self.largest:
            return False
        if kind == "band" and mask.leaves_none(queries, keys):
            return False
        if kind == "band" and self.aligned_band and not (mask.causal and mask.offset == keys - queries):
            return False
        whole = size * q.itemsize % self.align == 0 and value_size * q.itemsize % self.align == 0
        return whole and (self.values or size == value_size) and (self.grouped or q.shape[1] == k.shape[1])


def _host_mask(q: Tensor, k: Tensor, mask: BlockMask) -> tuple[bool, Tensor | None]:
    kind = mask.kind(q.shape[2], k.shape[2])
    if kind != "band":
        return kind == "causal", None
    hidden = ~mask.allowed(slice(0, q.shape[2]), k.shape[2], q.device)
    return False, q.new_zeros(hidden.shape).masked_fill_(hidden, float("-inf"))


def _host_forward(q: Tensor, k: Tensor, v: Tensor, mask: BlockMask, scale: float) -> tuple[Tensor, Tensor]:
    causal, bias = _host_mask(q, k, mask)
    return torch.ops.aten._scaled_dot_product_flash_attention_for_cpu(q, k, v, 0.0, causal, attn_mask=bias, scale=scale)


def _host_backward(
    grad: Tensor, q: Tensor, k: Tensor, v: Tensor, out: Tensor, lse: Tensor, mask: BlockMask, scale: float
) -> tuple[Tensor, Tensor, Tensor]:
    causal, bias = _host_mask(q, k, mask)
    return torch.ops.aten._scaled_dot_product_flash_attention_for_cpu_backward(
        grad, q, k, v, out, lse, 0.0, causal, attn_mask=bias, scale=scale
    )


def _flash_window(q: Tensor, k: Tensor, mask: BlockMask) -> tuple[bool, int, int]:
    """(causal, keys to the left, keys to the right); -1 is no limit. The kernel aligns last query and last key."""
    kind = mask.kind(q.shape[2], k.shape[2])
    if kind == "band":
        return (
            (mask.window is None),
            (-1 if mask.window is None else mask.window - 1),
            (-1 if mask.window is None else 0),
        )
    return kind == "causal", -1, -1


def _flash_forward(q: Tensor, k: Tensor, v: Tensor, mask: BlockMask, scale: float) -> tuple[Tensor, Tensor]:
    causal, left, right = _flash_window(q, k, mask)
    by_position = [x.transpose(1, 2) for x in (q, k, v)]  # [B, S, H, K]
    out, lse, *_ = torch.ops.aten._flash_attention_forward(
        *by_position, None, None, q.shape[2], k.shape[2], 0.0, causal, False,
        scale=scale, window_size_left=left, window_size_right=right,
    )  # fmt: skip
    return out.transpose(1, 2), lse


def _flash_backward(
    grad: Tensor, q: Tensor, k: Tensor, v: Tensor, out: Tensor, lse: Tensor, mask: BlockMask, scale: float
) -> tuple[Tensor, Tensor, Tensor]:
    causal, left, right = _flash_window(q, k, mask)
    by_position = [x.transpose(1, 2) for x in (grad, q, k, v, out)]
    # the states of a generator that draws nothing
    state, unused = torch.zeros(2, dtype=torch.uint64, device=q.device), q.new_empty(0)
    found = torch.ops.aten._flash_attention_backward(
        *by_position, lse.contiguous(), None, None, q.shape[2], k.shape[2], 0.0, causal, state, unused,
        scale=scale, window_size_left=left, window_size_right=right,
    )  # fmt: skip
    dq, dk, dv = (x.transpose(1, 2) for x in found)
    return dq, dk, dv


def _flash_packed(
    q: Tensor, k: Tensor, v: Tensor, starts: Tensor, longest: int, causal: bool, window: int | None, scale: float
) -> Tensor:
    from torch.nn.attention.varlen import varlen_attn

    run: Any = varlen_attn
    options: dict[str, Any] = {}
    if q.shape[1] != k.shape[1]:
        if "enable_gqa" in inspect.signature(run).parameters:  # torch 2.12
            options["enable_gqa"] = True
        else:
            k, v = _expand(k, q.shape[1]), _expand(v, q.shape[1])
    rows = [x.transpose(1, 2).flatten(0, 1) for x in (q, k, v)]  # [B S, heads, K]
    sides = -1 if window is None else window - 1, 0 if causal else -1
    out: Tensor = run(*rows, starts, starts, longest, longest, scale=scale, window_size=sides, **options)
    return out.unflatten(0, (len(q), -1)).transpose(1, 2)


def _efficient_forward(q: Tensor, k: Tensor, v: Tensor, mask: BlockMask, scale: float) -> tuple[Tensor, Tensor]:
    causal = mask.kind(q.shape[2], k.shape[2]) == "causal"
    out, lse, *_ = torch.ops.aten._scaled_dot_product_efficient_attention(q, k, v, None, True, 0.0, causal, scale=scale)
    return out, lse[..., : q.shape[2]]  # the kernel rounds the number of queries up to its tile


def _efficient_backward(
    grad: Tensor, q: Tensor, k: Tensor, v: Tensor, out: Tensor, lse: Tensor, mask: BlockMask, scale: float
) -> tuple[Tensor, Tensor, Tensor]:
    causal = mask.kind(q.shape[2], k.shape[2]) == "causal"
    # rows beyond the last query weigh exp(-inf) = 0, as in what the forward kernel returns
    padded = F.pad(lse, (0, -q.shape[2] % 32), value=math.inf).contiguous()
    state = torch.zeros((), dtype=torch.int64, device=q.device)
    dq, dk, dv, _ = torch.ops.aten._scaled_dot_product_efficient_attention_backward(
        grad, q, k, v, None, out, padded, state, state, 0.0, [True, True, True, False], causal, scale=scale
    )
    return dq, dk, dv


_HALF = frozenset((torch.bfloat16, torch.float16))
_SINGLE = frozenset((torch.bfloat16, torch.float16, torch.float32))
_PLAIN, _EVERY = frozenset(("full", "causal")), frozenset(("full", "causal", "band"))
# by the name that `device.attention_kernels` gives; the first that takes a block computes it
KERNELS: dict[str, Kernel] = {
    "host": Kernel(_host_forward, _host_backward, _SINGLE, _EVERY),
    "flash": Kernel(
        _flash_forward, _flash_backward, _HALF, _EVERY, align=16, largest=256, aligned_band=True, packed=_flash_packed
    ),
    "efficient": Kernel(
        _efficient_forward, _efficient_backward, _SINGLE, _PLAIN, grouped=False, values=True, align=16
    ),
}  # fmt: skip


def kernel_for(q: Tensor, k: Tensor, v: Tensor, rule: ScoreRule, mask: BlockMask) -> Kernel | None:
    """The fused kernel for this block of [B, H, S, K] and [B, G, T, ...], None where plain products are needed."""
    if rule.softcap is not None or rule.slopes_H is not None:
        return None
    found = (KERNELS[name] for name in device.attention_kernels(q.device.type))
    return next((kernel for kernel in found if kernel.takes(q, k, v, mask)), None)


# --- one block --------------------------------------------------------------------------------------------------------


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
        scores = scores - rule.slopes_H[:, None, None] * mask.distances(rows, k.shape[2], q.device)
    if mask.causal or mask.window is not None:
        scores = scores.masked_fill(~mask.allowed(rows, k.shape[2], q.device), float("-inf"))
    return scores, slope


def _slices(queries: int) -> list[slice]:
    return [slice(start, min(start + QUERY_ROWS, queries)) for start in range(0, queries, QUERY_ROWS)]


def attend(q: Tensor, k: Tensor, v: Tensor, rule: ScoreRule, mask: BlockMask) -> tuple[Tensor, Tensor]:
    """q [B, H, S, K], k [B, G, T, K], v [B, G, T, V] -> (out [B, H, S, V], lse [B, H, S]).

    out is in the dtype of q where a fused kernel computes it, otherwise in fp32 or wider, as lse always is. A query
    that sees no key of the block has out 0 and lse -inf.
    """
    kernel = kernel_for(q, k, v, rule, mask)
    if kernel is not None:
        return kernel.forward(q, k, v, mask, rule.scale)
    k, v = _expand(k, q.shape[1]), _expand(v, q.shape[1])
    kernel = kernel_for(q, k, v, rule, mask)
    if kernel is not None:
        return kernel.forward(q, k, v, mask, rule.scale)
    wide = torch.promote_types(q.dtype, torch.float32)
    out = q.new_empty(*q.shape[:-1], v.shape[-1], dtype=wide)
    lse = q.new_empty(q.shape[:-1], dtype=wide)
    for rows in _slices(q.shape[2]):
        scores, _ = _scores(q[:, :, rows], k, rule, mask, rows)
        lse[:, :, rows] = scores.logsumexp(-1)
        weights = torch.exp(scores - _finite(lse[:, :, rows])[..., None])
        out[:, :, rows] = weights @ v.to(wide)
    return out, lse


def _finite(lse: Tensor) -> Tensor:
    """-inf (no key seen) as 0: exp(-inf - 0) is the 0 that is wanted."""
    return lse.masked_fill(lse == float("-inf"), 0.0)


def merge_(out: Tensor, lse: Tensor, more: Tensor, more_lse: Tensor) -> None:
    """Make `out` and `lse` (fp32 or wider) those of the keys of both blocks: one pass over out.

    exp(more_lse - logaddexp(lse, more_lse)) is sigmoid(more_lse - lse), and the two shares add up to 1.
    """
    share = torch.sigmoid((more_lse - lse).nan_to_num_(nan=-math.inf))  # NaN: neither saw a key
    out.lerp_(more.to(out.dtype), share[..., None])
    torch.logaddexp(lse, more_lse, out=lse)


def attend_backward(
    grad: Tensor, q: Tensor, k: Tensor, v: Tensor, out: Tensor, lse: Tensor, rule: ScoreRule, mask: BlockMask
) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients of q, k, v by this block, given the merged `out` and `lse` and out's gradient.

    In the dtype of q where a fused kernel computes them, otherwise in fp32 or wider.
    """
    heads, groups = q.shape[1], k.shape[1]
    kernel = kernel_for(q, k, v, rule, mask)
    if kernel is None:
        k, v = _expand(k, heads), _expand(v, heads)
        kernel = kernel_for(q, k, v, rule, mask)
    if kernel is not None:
        found = kernel.backward(grad.to(q.dtype), q, k, v, out.to(q.dtype), lse.float(), mask, rule.scale)
        return found[0], _collect(found[1], groups), _collect(found[2], groups)
    wide = torch.promote_types(q.dtype, torch.float32)
    grad, out, k_wide, v_wide = grad.to(wide), out.to(wide), k.to(wide), v.to(wide)
    delta = (grad * out).sum(-1, keepdim=True)
    dq, dk, dv = torch.empty_like(q, dtype=wide), torch.zeros_like(k_wide), torch.zeros_like(v_wide)
    for rows in _slices(q.shape[2]):
        scores, slope = _scores(q[:, :, rows], k, rule, mask, rows)
        weights = torch.exp(scores - _finite(lse[:, :, rows])[..., None])
        dv += weights.transpose(-1, -2) @ grad[:, :, rows]
        dscores = weights * (grad[:, :, rows] @ v_wide.transpose(-1, -2) - delta[:, :, rows])
        if slope is not None:
            dscores = dscores * slope
        dq[:, :, rows] = (dscores @ k_wide) * rule.scale
        dk += (dscores.transpose(-1, -2) @ q[:, :, rows].to(wide)) * rule.scale
    return dq, _collect(dk, groups), _collect(dv, groups)
