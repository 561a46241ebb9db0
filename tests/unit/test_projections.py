"""Overlapped products as autograd sees them, on one rank: values, gradients, and what a pass computes."""

from __future__ import annotations

from collections.abc import Sequence
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from modellink.models.projections import wanted
from modellink.parallel.async_tensor import OverlappedBlock, Products


class Alone:
    """An `Overlap` of one rank that counts what would communicate."""

    calls = 0

    def gather_products(self, x_tD: Tensor, matrices_DF: Sequence[Tensor]) -> tuple[Tensor, list[Tensor]]:
        self.calls += 1
        return x_tD.clone(), [x_tD @ matrix for matrix in matrices_DF]

    def products_scatter(self, products: Products) -> Tensor:
        self.calls += 1
        return torch.stack([left @ right for left, right in products]).sum(0)


@pytest.mark.parametrize("bias", [False, True])
def test_overlapped_block_against_plain_products(bias: bool) -> None:
    """In one backward pass, and in one for inputs and one for weights: the second does not communicate."""
    torch.manual_seed(0)
    into = [nn.Linear(6, width, bias=bias, dtype=torch.float64) for width in (5, 5, 3)]
    out = nn.Linear(5, 6, bias=bias, dtype=torch.float64)
    x = torch.randn(2, 7, 6, dtype=torch.float64, requires_grad=True)
    weights = [parameter for linear in (*into, out) for parameter in linear.parameters()]

    def loss(first: Tensor, second: Tensor, third: Tensor, leave: Any) -> Tensor:
        return leave(first.sin() * second, out).square().sum() + third.cos().sum()

    expected = torch.autograd.grad(loss(*(linear(x) for linear in into), lambda h, linear: linear(h)), [x, *weights])
    overlap = Alone()
    block = OverlappedBlock(overlap)
    # shards come out of parameters by an operation, as these do
    shards: list[Any] = [
        SimpleNamespace(weight=each.weight * 1, bias=each.bias * 1 if bias else None) for each in (*into, out)
    ]
    total = loss(*block.enter(x, shards[:3]), lambda h, _: block.leave(h, shards[3]))
    assert overlap.calls == 2
    whole = torch.autograd.grad(total, [x, *weights], retain_graph=True)
    assert overlap.calls == 4
    for mine, theirs in zip(whole, expected, strict=True):
        torch.testing.assert_close(mine, theirs)
    nodes = []

    def collect(node: Any) -> None:
        if node is not None and node not in nodes:
            nodes.append(node)
            for following, _ in node.next_functions:
                collect(following)

    collect(total.grad_fn)
    # as a pipeline takes it apart: what reaches the nodes that know a weight, then those nodes alone
    known = [node for node in nodes if node.name() in ("_WeighBackward", "_KeepBackward")]
    assert len(known) == 4
    reached: dict[Any, Tensor] = {}
    handles = [node.register_prehook(lambda grads, node=node: reached.update({node: grads[0]})) for node in known]
    (grad_x,) = torch.autograd.grad(total, [x], retain_graph=True)
    for handle in handles:
        handle.remove()
    assert torch.equal(grad_x, whole[0])
    before = overlap.calls
    found: dict[int, Tensor] = {}
    for node in known:
        matrices = [out.weight] if node.name() == "_KeepBackward" else [linear.weight for linear in into]
        edge = torch.autograd.graph.GradientEdge(node, 0)
        grads = torch.autograd.grad([edge], matrices, [reached[node]], retain_graph=True, allow_unused=True)
        found |= {id(weight): grad for weight, grad in zip(matrices, grads, strict=True) if grad is not None}
    assert overlap.calls == before
    for weight, grad in zip(weights, whole[1:], strict=True):
        assert weight.ndim == 1 or torch.equal(found[id(weight)], grad)


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
