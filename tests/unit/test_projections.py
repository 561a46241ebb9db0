"""What passes through matrices by hand: gradients of weights, and which of them a backward pass wants."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn

from modellink.models.projections import separately, wanted, weight_gradients


@pytest.mark.parametrize("bias", [False, True])
def test_gradients_of_weights_against_autograd(bias: bool) -> None:
    torch.manual_seed(0)
    linears = [nn.Linear(6, width, bias=bias, dtype=torch.float64) for width in (5, 3)]
    x_TD = torch.randn(7, 6, dtype=torch.float64)
    outputs = separately(x_TD, linears)
    grads_TF = [torch.randn_like(output) for output in outputs]
    weights = [linear.weight for linear in linears]
    biases = [linear.bias for linear in linears if bias]
    expected = torch.autograd.grad(outputs, [*weights, *biases], grads_TF)
    ours = weight_gradients(grads_TF, x_TD, [True] * len(expected))
    assert ours[len(expected) :] == [None] * (4 - len(expected))
    for mine, theirs in zip(ours[: len(expected)], expected, strict=True):
        torch.testing.assert_close(mine, theirs)
    first, *others = weight_gradients(grads_TF, x_TD, [True] + [False] * (len(expected) - 1))
    assert first is not None and others == [None] * 3


class _Product(torch.autograd.Function):
    seen: list[list[bool]] = []

    @staticmethod
    def forward(ctx: Any, x: Tensor, w: Tensor) -> Tensor:
        ctx.save_for_backward(x, w)
        return x * w

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, Tensor]:
        _Product.seen.append(wanted(ctx))
        x, w = ctx.saved_tensors
        return grad * w, grad * x


def test_wanted_says_what_this_pass_goes_on_from() -> None:
    x, w = (torch.ones(2, requires_grad=True) for _ in range(2))
    y = _Product.apply(x * 2, w * 2).sum()
    _Product.seen.clear()
    torch.autograd.grad(y, x, retain_graph=True)
    torch.autograd.grad(y, w, retain_graph=True)
    y.backward()
    assert _Product.seen == [[True, False], [False, True], [True, True]]
