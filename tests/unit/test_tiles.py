"""Tiles against a dense mask: positions, documents and windows of every kind, forward and gradients."""

from __future__ import annotations

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from modellink.models.attention import AttentionMask
from modellink.models.blockwise import ScoreRule
from modellink.models.tiles import Ids, Tile, attend_tiles, have_kernels, make_tiles

LENGTH, ROWS, HEADS, GROUPS, SIZE = 24, 2, 4, 2, 8
DOCUMENTS = np.stack([np.repeat([0, 1, 2], [5, 12, 7]), np.repeat([0, 1, 2, 3], [1, 9, 9, 5])])
WHOLE = np.arange(LENGTH)
ENDS = np.concatenate((WHOLE[:6], WHOLE[18:]))  # the first and last of four chunks, as a rank of a ring holds them
MIDDLE = WHOLE[6:18]
PLACES = {"whole": (WHOLE, WHOLE), "last": (WHOLE[17:], WHOLE), "ends": (ENDS, WHOLE)}
PLACES |= {"same part": (ENDS, ENDS), "other part": (ENDS, MIDDLE), "part before": (MIDDLE, ENDS)}


def dense(queries: Ids, keys: Ids, documents: Ids | None, causal: bool, window: int | None) -> Tensor:
    distance = torch.from_numpy(queries[:, None] - keys[None])
    allowed = distance >= 0 if causal else torch.ones_like(distance, dtype=torch.bool)
    if window is not None:
        allowed = allowed & (distance < window)
    if documents is None:
        return allowed.expand(ROWS, 1, *allowed.shape)
    return allowed & torch.from_numpy(documents[:, None, queries, None] == documents[:, None, None, keys])


def painted(tiles: list[Tile], queries: int, keys: int) -> Tensor:
    """How often each key is seen by each query, and that `first` says when that is the first tile of a query."""
    seen = torch.zeros(ROWS, queries, keys, dtype=torch.int64)
    begun = torch.zeros(ROWS, queries, dtype=torch.bool)
    for rows, q, k, mask, first in tiles:
        if first:
            assert not begun[rows, q].any()
        begun[rows, q] = True
        size = q.stop - q.start
        seen[rows, q, k] += mask.allowed(slice(0, size), k.stop - k.start, torch.device("cpu")).long()
    return seen


@pytest.mark.parametrize("by_distance", [False, True])
@pytest.mark.parametrize("window", [None, 4, 11, 24])
@pytest.mark.parametrize("causal", [True, False])
@pytest.mark.parametrize("packed", [False, True])
@pytest.mark.parametrize("place", PLACES)
def test_tiles_cover_what_is_seen_once(
    place: str, packed: bool, causal: bool, window: int | None, by_distance: bool
) -> None:
    queries, keys = PLACES[place]
    documents = DOCUMENTS if packed else None
    tiles = make_tiles(queries, keys, documents, causal, window, by_distance)
    expected = dense(queries, keys, documents, causal, window)[:, 0].long()
    assert torch.equal(painted(tiles, len(queries), len(keys)), expected)
    if by_distance:
        for _, q, k, mask, _ in tiles:
            assert mask.offset == queries[q.start] - keys[k.start]
    if not packed and not by_distance and (window is None or window >= LENGTH):
        assert len(tiles) <= 3  # one kernel call where only the order of whole parts matters, a few at an edge


def test_documents_that_do_not_meet_cost_nothing() -> None:
    apart = np.repeat([[0, 1]], [12, 12], axis=1)
    assert make_tiles(WHOLE[12:], WHOLE[:12], apart) == []
    triangles = make_tiles(WHOLE, WHOLE, apart)
    assert [(t.queries, t.keys, t.mask.kind(12, 12)) for t in triangles] == [
        (slice(0, 12), slice(0, 12), "causal"),
        (slice(12, 24), slice(12, 24), "causal"),
    ]


@pytest.mark.parametrize(("groups", "window"), [(HEADS, None), (GROUPS, None), (GROUPS, 5), (1, 5)])
@pytest.mark.parametrize("packed", [False, True])
@pytest.mark.parametrize("place", ["whole", "last"])
def test_equal_to_a_dense_mask(place: str, packed: bool, groups: int, window: int | None) -> None:
    queries, keys = PLACES[place]
    documents = DOCUMENTS if packed else None
    generator = torch.Generator().manual_seed(0)
    shapes = [(ROWS, HEADS, len(queries), SIZE), (ROWS, groups, len(keys), SIZE), (ROWS, groups, len(keys), SIZE)]
    leaves = [torch.randn(shape, generator=generator).requires_grad_() for shape in shapes]
    tiles, rule = make_tiles(queries, keys, documents, True, window), ScoreRule(0.3)
    assert have_kernels(*leaves, rule, tiles)
    found = attend_tiles(*leaves, rule, tiles)
    grad = torch.randn(found.shape, generator=generator)
    gradients = torch.autograd.grad(found, leaves, grad)
    q, k, v = leaves
    allowed = dense(queries, keys, documents, True, window)
    expected = F.scaled_dot_product_attention(q, k, v, attn_mask=allowed, scale=0.3, enable_gqa=True)
    torch.testing.assert_close(found, expected, rtol=0, atol=1e-6)
    for mine, theirs in zip(gradients, torch.autograd.grad(expected, leaves, grad), strict=True):
        torch.testing.assert_close(mine, theirs, rtol=0, atol=2e-6)


def test_half_precision_is_rounded_once() -> None:
    """Each query and key in one tile: the result is the kernel's own, in its dtype."""
    documents = np.repeat([[0, 1]], [10, 14], axis=1)
    q = torch.randn(1, HEADS, LENGTH, SIZE, generator=torch.Generator().manual_seed(0)).bfloat16().requires_grad_()
    out = attend_tiles(q, q, q, ScoreRule(0.3), make_tiles(WHOLE, WHOLE, documents))
    for part in (slice(0, 10), slice(10, 24)):
        x = q[:, :, part]
        assert torch.equal(out[:, :, part], F.scaled_dot_product_attention(x, x, x, is_causal=True, scale=0.3))


def test_starts_of_documents_in_all_rows() -> None:
    mask = AttentionMask(LENGTH, LENGTH, torch.device("cpu"), documents=torch.from_numpy(DOCUMENTS))
    starts, longest = mask.starts(ROWS)
    assert starts.dtype == torch.int32
    assert starts.tolist() == [0, 5, 17, 24, 25, 34, 43, 48]
    assert longest == 12
    assert AttentionMask(8, 8, torch.device("cpu")).starts(3)[0].tolist() == [0, 8, 16, 24]
