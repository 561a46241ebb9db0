"""Collectives with gradients, for what DTensor does not cover: tensors whose parts travel between ranks.

Each is a `Flight` with two ends. What is computed between `depart` and `arrive` overlaps with the transfer; and since
autograd runs what was recorded last first, so does in backward what was recorded between the two: gradients set out as
soon as they are there, and are waited for after everything else that was computed meanwhile.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch.autograd.profiler import record_function

# torch 2.13 renamed these two and warns of their older names
all_gather_single = getattr(dist, "all_gather_single", dist.all_gather_into_tensor)
reduce_scatter_single = getattr(dist, "reduce_scatter_single", dist.reduce_scatter_tensor)

WAIT = "modellink: wait for a transfer"  # its name in traces

Start = Callable[[Tensor], tuple[Tensor, Any]]  # tensor -> (where the result will be, what to wait for)


class Flight:
    """One collective under way: `there` starts it, `back` starts that of the gradient."""

    def __init__(self, there: Start, back: Start) -> None:
        self.there, self.back = there, back
        self._cargo: tuple[Tensor, Tensor, Any] | None = None  # what leaves (it must outlive the transfer), what comes

    def depart(self, x: Tensor) -> Tensor:
        """Start it. Returns a ticket, for `arrive` and for autograd: an empty scalar."""
        return _Depart.apply(x, self)

    def arrive(self, ticket: Tensor) -> Tensor:
        """Wait for it: the result."""
        return _Arrive.apply(ticket, self)

    def start(self, kind: Start, x: Tensor) -> Tensor:
        """Start either direction: a ticket."""
        x = x.contiguous()
        self._cargo = (x, *kind(x))
        return torch.zeros((), dtype=x.dtype, device=x.device)

    def finish(self) -> Tensor:
        """Wait for the direction that was started last."""
        assert self._cargo is not None
        (_, result, work), self._cargo = self._cargo, None
        with record_function(WAIT):
            work.wait()
        return result


class _Depart(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x: Tensor, flight: Flight) -> Tensor:  # type: ignore[no-untyped-def]
        ctx.flight = flight
        return flight.start(flight.there, x)

    @staticmethod
    def backward(ctx, _: Tensor) -> tuple[Tensor, None]:  # type: ignore[no-untyped-def]
        return ctx.flight.finish(), None


class _Arrive(torch.autograd.Function):
    @staticmethod
    def forward(ctx, _: Tensor, flight: Flight) -> Tensor:  # type: ignore[no-untyped-def]
        ctx.flight = flight
        return flight.finish()

    @staticmethod
    def backward(ctx, grad: Tensor) -> tuple[Tensor, None]:  # type: ignore[no-untyped-def]
        return ctx.flight.start(ctx.flight.back, grad), None


def _exchange(group: dist.ProcessGroup, sent: list[int] | None, received: list[int] | None) -> Start:
    def start(x: Tensor) -> tuple[Tensor, Any]:
        out = x.new_empty(len(x) if received is None else sum(received), *x.shape[1:])
        return out, dist.all_to_all_single(out, x, received, sent, group=group, async_op=True)

    return start


def _gather(group: dist.ProcessGroup) -> Start:
    def start(x: Tensor) -> tuple[Tensor, Any]:
        out = x.new_empty(dist.get_world_size(group) * len(x), *x.shape[1:])
        return out, all_gather_single(out, x, group=group, async_op=True)

    return start


def _scatter(group: dist.ProcessGroup) -> Start:
    def start(x: Tensor) -> tuple[Tensor, Any]:
        out = x.new_empty(len(x) // dist.get_world_size(group), *x.shape[1:])
        return out, reduce_scatter_single(out, x, group=group, async_op=True)

    return start


def exchange_flight(
    group: dist.ProcessGroup, sent: list[int] | None = None, received: list[int] | None = None
) -> Flight:
    """Rows to the ranks of `group` in order, `sent` of them each (default: as many to each); returns the rows that
    arrive, `received` of them from each rank. The gradient travels back the same way."""
    return Flight(_exchange(group, sent, received), _exchange(group, received, sent))


def gather_flight(group: dist.ProcessGroup) -> Flight:
    """Rows of all ranks of `group`, one rank after the other; gradients are summed back to the rows' owners."""
    return Flight(_gather(group), _scatter(group))


def scatter_flight(group: dist.ProcessGroup) -> Flight:
    """Sum over the ranks of `group`, each of which gets its equal share of the rows."""
    return Flight(_scatter(group), _gather(group))


def all_to_all(
    x: Tensor, group: dist.ProcessGroup, sent: list[int] | None = None, received: list[int] | None = None
) -> Tensor:
    """`exchange_flight`, waited for at once."""
    flight = exchange_flight(group, sent, received)
    return flight.arrive(flight.depart(x))


def gather_rows(x: Tensor, group: dist.ProcessGroup) -> Tensor:
    """`gather_flight`, waited for at once."""
    flight = gather_flight(group)
    return flight.arrive(flight.depart(x))
