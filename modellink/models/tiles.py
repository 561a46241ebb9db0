"""Masked attention as tiles: rectangles of queries and keys, of which each is all visible, a triangle, or a band.

    packed documents        one document of a row is one triangle; documents that do not meet cost nothing
    a sliding window        slices of queries, each with the keys that its window reaches: S x window, not S x S
    parts of a sequence     what the queries of a rank have to do with the keys of another (context parallelism)

A mask is given by positions and documents on the host, so nothing is dense. Legend: B batch, S queries, T keys, H query
heads, G key/value heads, K key size, V value size, L all positions.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from itertools import pairwise
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from modellink.models.blockwise import BlockMask, ScoreRule, attend, attend_backward, kernel_for, merge_

Ids = npt.NDArray[np.int64]
# queries of a window slice, at most: a slice of R computes R + window keys for each query
WINDOW_ROWS = 1024


class Tile(NamedTuple):
    """These queries of these rows of the batch see these keys; `first`: no tile before has any of these queries."""

    rows: slice
    queries: slice
    keys: slice
    mask: BlockMask
    first: bool


class _Run(NamedTuple):
    """Neighbours `start`..`stop` in a tensor that stand at neighbouring positions, from `position`, in one document."""

    start: int
    stop: int
    position: int
    document: int


def _runs(positions: Ids, documents: Ids | None) -> list[_Run]:
    if len(positions) == 0:
        return []
    breaks = np.diff(positions) != 1
    if documents is not None:
        breaks |= np.diff(documents) != 0
    edges = [0, *(np.flatnonzero(breaks) + 1).tolist(), len(positions)]
    of = (lambda place: 0) if documents is None else (lambda place: int(documents[place]))
    return [_Run(a, b, int(positions[a]), of(a)) for a, b in pairwise(edges)]


def _ranked(queries_S: Ids, keys_T: Ids, causal: bool) -> tuple[Ids, Ids]:
    """Positions of which only the order matters, closed up, so that there are fewer runs."""
    if not causal:
        return np.arange(len(queries_S)), np.arange(len(keys_T))
    _, place = np.unique(np.concatenate((queries_S, keys_T)), return_inverse=True)
    place = place.reshape(-1).astype(np.int64)
    return place[: len(queries_S)], place[len(queries_S) :]


def _meet(query: _Run, key: _Run, causal: bool, window: int | None) -> Iterator[tuple[slice, slice, BlockMask]]:
    """The tiles of two runs of one document."""
    q0, q1 = query.position, query.position + query.stop - query.start
    k0, k1 = key.position, key.position + key.stop - key.start
    if causal:
        q0, k1 = max(q0, k0), min(k1, q1)
    if window is not None:
        q1 = min(q1, k1 - 1 + window)
        k0 = max(k0, q0 - window + 1)
    if q0 >= q1 or k0 >= k1:
        return

    def tile(qa: int, qb: int, ka: int, kb: int) -> tuple[slice, slice, BlockMask]:
        ahead, beyond = causal and kb - 1 > qa, window is not None and qb - 1 - ka >= window
        queries = slice(qa - query.position + query.start, qb - query.position + query.start)
        keys = slice(ka - key.position + key.start, kb - key.position + key.start)
        return queries, keys, BlockMask(qa - ka, ahead, window if beyond else None)

    if window is not None and q1 - 1 - k0 >= window:
        rows = min(WINDOW_ROWS, max(128, window // 2))
        for start in range(q0, q1, rows):
            stop = min(start + rows, q1)
            yield tile(start, stop, max(k0, start - window + 1), min(k1, stop) if causal else k1)
    elif causal and k0 < q0 < k1:  # what lies before all of them, and a triangle
        yield tile(q0, q1, k0, q0)
        yield tile(q0, q1, q0, k1)
    else:
        yield tile(q0, q1, k0, k1)


def make_tiles(
    queries_S: Ids,
    keys_T: Ids,
    documents_BL: Ids | None = None,
    causal: bool = True,
    window: int | None = None,
    by_distance: bool = False,
) -> list[Tile]:
    """Tiles between queries and keys that stand at these positions of a sequence, rising in each of their runs.

    `documents_BL` numbers the documents of each row. `by_distance`: scores depend on the distance (ALiBi), so that
    offsets must be those of the sequence; otherwise runs are joined wherever only their order matters.
    """
    if window is not None and window > max(int(queries_S.max(initial=0)), int(keys_T.max(initial=0))):
        window = None
    positions = queries_S, keys_T
    if window is None and not by_distance:
        positions = _ranked(queries_S, keys_T, causal)
    tiles: list[Tile] = []
    same = documents_BL is None or bool((documents_BL == documents_BL[:1]).all())
    for row in range(1 if documents_BL is None or same else len(documents_BL)):
        rows = slice(None) if same else slice(row, row + 1)
        numbers = [None if documents_BL is None else documents_BL[row, at] for at in (queries_S, keys_T)]
        queries, keys = (_runs(at, of) for at, of in zip(positions, numbers, strict=True))
        of_document: dict[int, list[_Run]] = {}
        for run in keys:
            of_document.setdefault(run.document, []).append(run)
        for run in queries:
            seen = False
            for other in of_document.get(run.document, ()):
                met = list(_meet(run, other, causal, window))
                for place, (these, those, mask) in enumerate(met):
                    # a window's slices hold other queries each; the two parts of a triangle the same
                    again = seen or (place > 0 and these == met[place - 1][0])
                    tiles.append(Tile(rows, these, those, mask, not again))
                seen = seen or bool(met)
    return tiles


def forward_tiles(
    q: Tensor, k: Tensor, v: Tensor, rule: ScoreRule, tiles: Sequence[Tile], out: Tensor, lse: Tensor, fresh: bool
) -> None:
    """Merge attention to these keys into out [B, H, S, V] and lse [B, H, S]; `fresh`: nothing is in them yet."""
    for rows, queries, keys, mask, first in tiles:
        more, more_lse = attend(q[rows, :, queries], k[rows, :, keys], v[rows, :, keys], rule, mask)
        here, here_lse = out[rows, :, queries], lse[rows, :, queries]
        if first and fresh:
            here.copy_(more)
            here_lse.copy_(more_lse)
        else:
            merge_(here, here_lse, more, more_lse)


def sum_dtype(tiles: Sequence[Tile], dtype: torch.dtype) -> torch.dtype:
    """In what to add up the gradients of keys: `dtype` where each comes from one tile, fp32 where several meet."""
    alone = all(tile.first and tile.mask.window is None for tile in tiles)
    return dtype if alone else torch.promote_types(dtype, torch.float32)


def backward_tiles(
    grad: Tensor,
    saved: tuple[Tensor, Tensor, Tensor],
    k: Tensor,
    v: Tensor,
    rule: ScoreRule,
    tiles: Sequence[Tile],
    sums: tuple[Tensor, Tensor, Tensor],
) -> None:
    """Add to `sums` the gradients of q, k, v by these tiles; `saved` are q and the merged out and lse."""
    q, out, lse = saved
    dq, dk, dv = sums
    for rows, queries, keys, mask, _ in tiles:
        at_queries = [x[rows, :, queries] for x in (grad, q, out, lse)]
        here = k[rows, :, keys], v[rows, :, keys]
        found = attend_backward(at_queries[0], at_queries[1], *here, at_queries[2], at_queries[3], rule, mask)
        dq[rows, :, queries] += found[0]
        dk[rows, :, keys] += found[1]
        dv[rows, :, keys] += found[2]


class _TiledAttention(torch.autograd.Function):
    """Attention by tiles on one device; keeps q, k, v, out and lse."""

    @staticmethod
    def forward(ctx, q: Tensor, k: Tensor, v: Tensor, rule: ScoreRule, tiles: list[Tile]) -> Tensor:  # type: ignore[no-untyped-def]
        wide = torch.promote_types(q.dtype, torch.float32)
        once = all(tile.first for tile in tiles)  # nothing to merge, no need for a wider sum
        out = q.new_zeros(*q.shape[:-1], v.shape[-1], dtype=q.dtype if once else wide)
        lse = q.new_full(q.shape[:-1], float("-inf"), dtype=wide)
        forward_tiles(q, k, v, rule, tiles, out, lse, fresh=True)
        out = out.to(q.dtype)
        ctx.save_for_backward(q, k, v, out, lse)
        ctx.rule, ctx.tiles = rule, tiles
        return out

    @staticmethod
    def backward(ctx, grad: Tensor) -> tuple[Any, ...]:  # type: ignore[no-untyped-def]
        q, k, v, out, lse = ctx.saved_tensors
        dtype = sum_dtype(ctx.tiles, q.dtype)
        dq, dk, dv = (torch.zeros_like(x, dtype=dtype) for x in (q, k, v))
        backward_tiles(grad, (q, out, lse), k, v, ctx.rule, ctx.tiles, (dq, dk, dv))
        return dq.to(q.dtype), dk.to(k.dtype), dv.to(v.dtype), None, None


def attend_tiles(q: Tensor, k: Tensor, v: Tensor, rule: ScoreRule, tiles: list[Tile]) -> Tensor:
    """q [B, H, S, K], k [B, G, T, K], v [B, G, T, V] -> [B, H, S, V] in the dtype of q, with gradients."""
    return _TiledAttention.apply(q, k, v, rule, tiles)


def have_kernels(q: Tensor, k: Tensor, v: Tensor, rule: ScoreRule, tiles: Sequence[Tile]) -> bool:
    """Whether fused kernels compute all of these tiles (key/value heads are repeated where a kernel needs it)."""
    keys, values = (x[:, :1].expand(-1, q.shape[1], -1, -1) for x in (k, v))
    return all(
        kernel_for(q[:, :, t.queries], keys[:, :, t.keys], values[:, :, t.keys], rule, t.mask) is not None
        for t in tiles
    )
