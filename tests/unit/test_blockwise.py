"""Attention in blocks against one softmax in float64, and packed documents against documents alone."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from modellink import device
from modellink.config.schema import ModelConfig
from modellink.models import blockwise
from modellink.models.blockwise import KERNELS, BlockMask, ScoreRule, attend, attend_backward, merge_
from modellink.models.decoder import Decoder

QUERIES, KEYS, HEADS, GROUPS, SIZE = 5, 12, 4, 2, 8


def plain(q: Tensor, k: Tensor, v: Tensor, rule: ScoreRule, allowed: Tensor, distances: Tensor) -> Tensor:
    k, v = k.repeat_interleave(HEADS // GROUPS, 1), v.repeat_interleave(HEADS // GROUPS, 1)
    scores = q @ k.mT * rule.scale
    if rule.softcap is not None:
        scores = rule.softcap * torch.tanh(scores / rule.softcap)
    if rule.slopes_H is not None:
        scores = scores - rule.slopes_H[:, None, None] * distances
    return torch.nan_to_num(scores.masked_fill(~allowed, float("-inf")).softmax(-1)) @ v


@pytest.mark.parametrize("rows", [2, 1024])
@pytest.mark.parametrize("value_size", [SIZE, 6])
@pytest.mark.parametrize("kind", ["plain", "capped", "sloped", "masked"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_blocks_merge_to_one_softmax(
    kind: str, value_size: int, rows: int, dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Three blocks of keys, one of which some queries do not see at all; gradients by each block alone."""
    monkeypatch.setattr(blockwise, "QUERY_ROWS", rows)
    generator = torch.Generator().manual_seed(0)

    def draw(*shape: int) -> Tensor:
        return torch.randn(shape, generator=generator, dtype=torch.float64)

    q, k = draw(2, HEADS, QUERIES, SIZE), draw(2, GROUPS, KEYS, SIZE)
    v, grad = draw(2, GROUPS, KEYS, value_size), draw(2, HEADS, QUERIES, value_size)
    slopes = torch.tensor([0.5, 0.25, 0.1, 0.7]) if kind == "sloped" else None
    rule = ScoreRule(0.4, 3.0 if kind == "capped" else None, slopes)
    distances = torch.arange(KEYS - QUERIES, KEYS)[:, None] - torch.arange(KEYS)
    allowed = (distances >= 0) & (distances < 6) if kind == "masked" else torch.ones_like(distances, dtype=torch.bool)

    leaves = [x.clone().requires_grad_() for x in (q, k, v)]
    expected = plain(*leaves, rule, allowed, distances)
    expected.backward(grad)
    mine, cuts = [x.to(dtype) for x in (q, k, v)], [slice(0, 3), slice(3, 7), slice(7, KEYS)]
    window = 6 if kind == "masked" else None
    masks = [BlockMask(KEYS - QUERIES - cut.start, kind == "masked", window) for cut in cuts]
    out, lse = attend(mine[0], mine[1][:, :, cuts[0]], mine[2][:, :, cuts[0]], rule, masks[0])
    for cut, mask in zip(cuts[1:], masks[1:], strict=True):
        merge_(out, lse, *attend(mine[0], mine[1][:, :, cut], mine[2][:, :, cut], rule, mask))
    tolerance = 1e-12 if dtype == torch.float64 else 1e-5
    torch.testing.assert_close(out.double(), expected, rtol=0, atol=tolerance)
    dq = torch.zeros_like(out[..., :1].expand(*out.shape[:-1], SIZE))
    for cut, mask in zip(cuts, masks, strict=True):
        keys, values = mine[1][:, :, cut], mine[2][:, :, cut]
        found = attend_backward(grad.to(dtype), mine[0], keys, values, out, lse, rule, mask)
        dq = dq + found[0]
        torch.testing.assert_close(found[1].double(), leaves[1].grad[:, :, cut], rtol=0, atol=4 * tolerance)
        torch.testing.assert_close(found[2].double(), leaves[2].grad[:, :, cut], rtol=0, atol=4 * tolerance)
    torch.testing.assert_close(dq.double(), leaves[0].grad, rtol=0, atol=4 * tolerance)


@pytest.mark.parametrize("softcap", [None, 5.0])
@pytest.mark.parametrize(("queries", "keys"), [(6, 6), (4, 6)])
def test_masks_by_kernel_and_by_hand(queries: int, keys: int, softcap: float | None) -> None:
    """Triangle and bands: a fused kernel, plain products, and float64 with the mask written out."""
    generator = torch.Generator().manual_seed(1)
    q, k = (torch.randn(1, 2, length, 8, generator=generator, dtype=torch.float64) for length in (queries, keys))
    rule = ScoreRule(0.3, softcap)
    for mask in (BlockMask(keys - queries, True), BlockMask(keys - queries, True, 3), BlockMask(2, False, 7)):
        scores = q @ k.mT * 0.3
        scores = scores if softcap is None else softcap * torch.tanh(scores / softcap)
        hidden = ~mask.allowed(slice(0, queries), keys, q.device)
        weights = scores.masked_fill(hidden, float("-inf"))
        for dtype in (torch.float32, torch.float64):
            out, lse = attend(q.to(dtype), k.to(dtype), k.to(dtype), rule, mask)
            torch.testing.assert_close(out.double(), weights.softmax(-1) @ k, rtol=0, atol=1e-6)
            torch.testing.assert_close(lse.double(), weights.logsumexp(-1), rtol=0, atol=1e-6)


def test_merging_what_saw_nothing() -> None:
    """-inf is the log of an empty sum: merging it changes nothing, on either side or both."""
    out, lse = torch.tensor([[1.0], [0.0], [0.0]]), torch.tensor([0.5, -torch.inf, -torch.inf])
    merge_(out, lse, torch.tensor([[0.0], [2.0], [0.0]]), torch.tensor([-torch.inf, 0.25, -torch.inf]))
    assert out.flatten().tolist() == [1.0, 2.0, 0.0]
    assert lse.tolist() == [0.5, 0.25, -torch.inf]


@pytest.mark.parametrize("groups", [HEADS, GROUPS])
@pytest.mark.parametrize(
    ("name", "dtype", "keys", "value_size", "mask"),
    [
        ("flash", torch.bfloat16, 24, SIZE, BlockMask()),
        ("flash", torch.bfloat16, 16, SIZE, BlockMask(0, True)),
        ("flash", torch.float16, 24, SIZE, BlockMask(8, True, 5)),
        ("efficient", torch.float32, 24, SIZE, BlockMask()),
        ("efficient", torch.bfloat16, 16, 2 * SIZE, BlockMask(0, True)),
        (None, torch.float32, 24, SIZE, BlockMask(8, True, 5)),
        (None, torch.bfloat16, 24, SIZE, BlockMask(3, True, 5)),
        (None, torch.float64, 24, SIZE, BlockMask()),
    ],
)
def test_kernels_of_a_gpu_by_shape(
    name: str | None, dtype: torch.dtype, keys: int, value_size: int, mask: BlockMask, groups: int
) -> None:
    """Without a GPU: which kernel a block gets, and that its operators exist and give these shapes and types."""
    q, k, v = (
        torch.empty(2, heads, length, size, dtype=dtype, device="meta")
        for heads, length, size in ((HEADS, 16, SIZE), (groups, keys, SIZE), (groups, keys, value_size))
    )
    grouped = groups != HEADS
    table = [KERNELS[row] for row in device.attention_kernels("cuda")]
    kernel = next((row for row in table if row.takes(q, k, v, mask)), None)
    if name is None or (grouped and not KERNELS[name].grouped):
        assert kernel is None
        return
    assert kernel is KERNELS[name]
    out, lse = kernel.forward(q, k, v, mask, 0.4)
    assert out.shape == (2, HEADS, 16, value_size)
    assert lse.shape == (2, HEADS, 16)
    assert (out.dtype, lse.dtype) == (dtype, torch.float32)
    found = kernel.backward(torch.empty_like(out), q, k, v, out, lse, mask, 0.4)
    assert [x.shape for x in found] == [x.shape for x in (q, k, v)]


def test_packed_documents_of_a_gpu_by_shape() -> None:
    q, k = (torch.empty(2, heads, 16, SIZE, dtype=torch.bfloat16, device="meta") for heads in (HEADS, GROUPS))
    packed = KERNELS["flash"].packed
    assert packed is not None
    assert packed(q, k, k, torch.empty(5, dtype=torch.int32, device="meta"), 9, True, 4, 0.3).shape == q.shape


MODELS: dict[str, dict[str, Any]] = {
    "rope": {"position_embedding": "rope"},
    "alibi": {"position_embedding": "alibi"},
    "window": {"position_embedding": "rope", "sliding_window": 3},
    "sinks": {"position_embedding": "rope", "attention_sinks": True},
    "capped": {"position_embedding": "rope", "attention_logit_softcap": 2.0},
}


@pytest.mark.parametrize("name", MODELS)
def test_packed_documents_are_as_documents_alone(name: str) -> None:
    """Rows with other borders each: logits of every document equal those of a sequence that holds nothing else."""
    config = ModelConfig(
        num_layers=2, hidden_size=32, num_attention_heads=4, num_key_value_heads=2, vocab_size=50, padded_vocab_size=50,
        attention_dropout=0.0, hidden_dropout=0.0, max_position_embeddings=16, **MODELS[name],
    ).resolve()  # fmt: skip
    torch.manual_seed(0)
    model = Decoder(config).eval()
    lengths = [[4, 7, 3], [9, 1, 4]]
    tokens = torch.randint(0, 50, (2, 14))
    documents = torch.stack([torch.arange(3).repeat_interleave(torch.tensor(row)) for row in lengths])
    positions = torch.stack([torch.cat([torch.arange(length) for length in row]) for row in lengths])
    with torch.no_grad():
        packed = model(tokens, positions, documents=documents)
        for row, sizes in enumerate(lengths):
            for part, mine in zip(tokens[row].split(sizes), packed[row].split(sizes), strict=True):
                torch.testing.assert_close(mine, model(part[None])[0], rtol=0, atol=1e-5)
        assert (model(tokens, positions) - packed).abs().max() > 1e-3
