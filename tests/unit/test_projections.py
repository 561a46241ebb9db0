"""Which gradients a backward pass wants."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from modellink.models.projections import wanted


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
