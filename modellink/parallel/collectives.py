"""Collectives with gradients, for what DTensor does not cover: tensors whose parts travel between ranks."""

from __future__ import annotations

from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor


class _AllToAll(torch.autograd.Function):
    @staticmethod
    def forward(  # type: ignore[no-untyped-def]
        ctx, x: Tensor, sent: list[int] | None, received: list[int] | None, group: dist.ProcessGroup
    ) -> Tensor:
        ctx.sent, ctx.received, ctx.group = sent, received, group
        rows = len(x) if received is None else sum(received)
        out = x.new_empty(rows, *x.shape[1:])
        dist.all_to_all_single(out, x.contiguous(), received, sent, group=group)
        return out

    @staticmethod
    def backward(ctx, grad: Tensor) -> tuple[Any, ...]:  # type: ignore[no-untyped-def]
        return _AllToAll.apply(grad, ctx.received, ctx.sent, ctx.group), None, None, None


def all_to_all(
    x: Tensor, group: dist.ProcessGroup, sent: list[int] | None = None, received: list[int] | None = None
) -> Tensor:
    """Rows of `x` to the ranks of `group` in order, `sent` of them each (default: as many to each); returns the rows
    that arrive, `received` of them from each rank. The gradient travels back the same way."""
    return _AllToAll.apply(x, sent, received, group)


class _GatherRows(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x: Tensor, group: dist.ProcessGroup) -> Tensor:  # type: ignore[no-untyped-def]
        ctx.group = group
        out = x.new_empty(dist.get_world_size(group) * len(x), *x.shape[1:])
        dist.all_gather_into_tensor(out, x.contiguous(), group=group)
        return out

    @staticmethod
    def backward(ctx, grad: Tensor) -> tuple[Tensor, None]:  # type: ignore[no-untyped-def]
        return _ScatterSum.apply(grad, ctx.group), None


class _ScatterSum(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x: Tensor, group: dist.ProcessGroup) -> Tensor:  # type: ignore[no-untyped-def]
        ctx.group = group
        out = x.new_empty(len(x) // dist.get_world_size(group), *x.shape[1:])
        dist.reduce_scatter_tensor(out, x.contiguous(), group=group)
        return out

    @staticmethod
    def backward(ctx, grad: Tensor) -> tuple[Tensor, None]:  # type: ignore[no-untyped-def]
        return _GatherRows.apply(grad, ctx.group), None


def gather_rows(x: Tensor, group: dist.ProcessGroup) -> Tensor:
    """Rows of all ranks of `group`, one rank after the other; gradients are summed back to the rows' owners."""
    return _GatherRows.apply(x, group)


def scatter_sum(x: Tensor, group: dist.ProcessGroup) -> Tensor:
    """Sum of `x` over the ranks of `group`, each of which gets its equal share of the rows."""
    return _ScatterSum.apply(x, group)
