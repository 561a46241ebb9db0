"""Fused attention of a GPU against plain products in float64: blocks, their merging and gradients, packed documents."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from modellink import device
from modellink.config.schema import ModelConfig
from modellink.models.attention import AttentionCore, AttentionMask
from modellink.models.blockwise import KERNELS, BlockMask, ScoreRule, attend, attend_backward, kernel_for, merge_

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
HEADS, GROUPS, LENGTH, SIZE = 8, 2, 200, 64
TOLERANCE = {torch.float32: 1e-4, torch.float16: 5e-3, torch.bfloat16: 3e-2}


def draw(heads: int, length: int, size: int, seed: int) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(2, heads, length, size, generator=generator, dtype=torch.float64).to("cuda")


@pytest.mark.parametrize("dtype", TOLERANCE)
@pytest.mark.parametrize(
    ("kind", "keys", "groups", "value_size"),
    [
        ("full", 120, GROUPS, SIZE),
        ("full", 120, HEADS, 40),
        ("causal", LENGTH, GROUPS, SIZE),
        ("band", 260, GROUPS, SIZE),
    ],
)
def test_blocks_equal_plain_products(kind: str, keys: int, groups: int, value_size: int, dtype: torch.dtype) -> None:
    """Two blocks, the second one all visible: forward, log-sum-exp, merge, and gradients by each block alone."""
    masks = {"full": BlockMask(), "causal": BlockMask(0, True), "band": BlockMask(keys - LENGTH, True, 50)}
    mask, rule = masks[kind], ScoreRule(0.1)
    wide = [draw(HEADS, LENGTH, SIZE, 0), draw(groups, keys, SIZE, 1), draw(groups, keys, value_size, 2)]
    more = [draw(groups, 80, SIZE, 3), draw(groups, 80, value_size, 4)]
    grad = draw(HEADS, LENGTH, value_size, 5)
    q, k, v, more_k, more_v = (x.to(dtype) for x in (*wide, *more))
    if kind != "band":
        expanded = [x.repeat_interleave(HEADS // groups, 1) for x in (k, v)]
        assert kernel_for(q, *expanded, rule, mask) is not None
    # the same rounded numbers, in float64 and by hand
    rounded = [x.double() for x in (q, k, v, more_k, more_v)]
    exact, exact_lse = attend(*rounded[:3], rule, mask)
    out, lse = attend(q, k, v, rule, mask)
    bound = TOLERANCE[dtype]
    torch.testing.assert_close(out.double(), exact, rtol=0, atol=bound)
    torch.testing.assert_close(lse.double(), exact_lse, rtol=0, atol=bound)
    merged, total = out.float(), lse.clone()
    merge_(merged, total, *attend(q, more_k, more_v, rule, BlockMask()))
    merge_(exact, exact_lse, *attend(rounded[0], *rounded[3:], rule, BlockMask()))
    torch.testing.assert_close(merged.double(), exact, rtol=0, atol=bound)
    for keys_values, block in (((k, v), mask), ((more_k, more_v), BlockMask())):
        found = attend_backward(grad.to(dtype), q, *keys_values, merged.to(dtype), total, rule, block)
        doubles = [x.double() for x in keys_values]
        expected = attend_backward(grad, rounded[0], *doubles, exact, exact_lse, rule, block)
        for mine, theirs in zip(found, expected, strict=True):
            torch.testing.assert_close(mine.double(), theirs, rtol=0, atol=bound * theirs.abs().max().item())


@pytest.mark.parametrize("window", [None, 30])
@pytest.mark.parametrize("dtype", TOLERANCE)
def test_packed_documents_equal_a_dense_mask(dtype: torch.dtype, window: int | None) -> None:
    config = ModelConfig(
        num_layers=1, hidden_size=HEADS * SIZE, num_attention_heads=HEADS, num_key_value_heads=GROUPS, vocab_size=8,
        padded_vocab_size=8, attention_dropout=0.0, sliding_window=window,
    )  # fmt: skip
    core = AttentionCore(config.resolve(), 0)
    lengths = torch.tensor([[90, 7, 103], [1, 150, 49]])
    documents = torch.stack([torch.arange(3).repeat_interleave(row) for row in lengths]).to("cuda")
    mask = AttentionMask(LENGTH, LENGTH, documents.device, documents=documents)
    shapes = [(HEADS, 0), (GROUPS, 1), (GROUPS, 2)]
    leaves = [draw(heads, LENGTH, SIZE, seed).to(dtype).requires_grad_() for heads, seed in shapes]
    grad = draw(HEADS, LENGTH, SIZE, 3)
    found = core(*leaves, mask)
    gradients = torch.autograd.grad(found, leaves, grad.to(dtype))
    doubles = [x.detach().double().requires_grad_() for x in leaves]
    k, v = (x.repeat_interleave(HEADS // GROUPS, 1) for x in doubles[1:])
    expected = F.scaled_dot_product_attention(doubles[0], k, v, attn_mask=mask.dense(window), scale=core.scale)
    bound = TOLERANCE[dtype]
    torch.testing.assert_close(found.double(), expected, rtol=0, atol=bound)
    for mine, theirs in zip(gradients, torch.autograd.grad(expected, doubles, grad), strict=True):
        torch.testing.assert_close(mine.double(), theirs, rtol=0, atol=bound * theirs.abs().max().item())


def test_half_precision_has_the_flash_kernel() -> None:
    if not device.supports("flash_attention"):
        pytest.skip("this device or build has no flash attention")
    q, k = (draw(heads, LENGTH, SIZE, 0).bfloat16() for heads in (HEADS, GROUPS))
    for mask in (BlockMask(), BlockMask(0, True), BlockMask(0, True, 50)):
        assert kernel_for(q, k, k, ScoreRule(0.1), mask) is KERNELS["flash"]
