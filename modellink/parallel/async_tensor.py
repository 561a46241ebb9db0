"""Tensor parallelism whose communication overlaps with its matrix products.

With sequence parallelism a block gathers its input, and the parts of its output are summed and scattered. Here both
travel in pieces, one a tensor rank, while other pieces are multiplied:

    gather   the shard that is here is multiplied while the next one arrives
    scatter  the sum for one rank travels on while the next piece is multiplied, and is added to it

Backward does the same with the roles exchanged. The pieces travel round a ring, on any device; where ranks can read
each other's memory, torch's fused operators take over. Only blocks whose matrices all read the input itself are run so
(attention, dense MLP); latent attention and experts gather once and are left alone. Source: Wang et al. (ASPLOS 2023,
overlap by decomposition). Legend: B batch, s local positions, S = t s positions, D in, F out; T = S B rows, position
first, so that a piece is contiguous.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Protocol

import torch
import torch.distributed as dist
from torch import Tensor, nn

from modellink import device
from modellink.models.projections import wanted
from modellink.parallel.shard import summed_local

Products = Sequence[tuple[Tensor, Tensor]]


class Overlap(Protocol):
    """Products together with the collective before or after them. No gradients."""

    def gather_products(self, x_tD: Tensor, matrices_DF: Sequence[Tensor]) -> tuple[Tensor, list[Tensor]]:
        """Rows of all ranks [T, D], and their product with each matrix [T, F]."""

    def products_scatter(self, products: Products) -> Tensor:
        """Sum of the products [T, F] @ [F, D], summed over the ranks; this rank's rows [T / ranks, D]."""


class Ring:
    """Pieces go from neighbour to neighbour."""

    def __init__(self, group: dist.ProcessGroup) -> None:
        self.group, self.size, self.rank = group, dist.get_world_size(group), dist.get_rank(group)
        members = dist.get_process_group_ranks(group)
        self.following, self.before = (members[(self.rank + step) % self.size] for step in (1, -1))

    def _pass_on(self, leaving: Tensor, arriving: Tensor) -> list[Any]:
        return dist.batch_isend_irecv(
            [
                dist.P2POp(dist.isend, leaving, self.following, self.group),
                dist.P2POp(dist.irecv, arriving, self.before, self.group),
            ]
        )

    def gather_products(self, x_tD: Tensor, matrices_DF: Sequence[Tensor]) -> tuple[Tensor, list[Tensor]]:
        whole_TD = x_tD.new_empty(len(x_tD) * self.size, x_tD.shape[1])
        pieces = whole_TD.chunk(self.size)
        pieces[self.rank].copy_(x_tD)
        # no product is written into another tensor: operator-level recomputation keeps what products return
        made = [[x_tD] * self.size for _ in matrices_DF]
        for step in range(self.size):
            here, coming = (self.rank - step) % self.size, (self.rank - step - 1) % self.size
            works = self._pass_on(pieces[here], pieces[coming]) if step < self.size - 1 else []
            for matrix_DF, products in zip(matrices_DF, made, strict=True):
                products[here] = pieces[here] @ matrix_DF
            for work in works:
                work.wait()
        return whole_TD, [torch.cat(products) for products in made]

    def products_scatter(self, products: Products) -> Tensor:
        lefts = [left_TF.chunk(self.size) for left_TF, _ in products]
        arriving: Tensor | None = None
        works: list[Any] = []
        for step in range(self.size):
            target = (self.rank - 1 - step) % self.size  # its own at last
            total = lefts[0][target] @ products[0][1]
            for left, (_, right) in zip(lefts[1:], products[1:], strict=True):
                total = torch.addmm(total, left[target], right)
            for work in works:
                work.wait()
            if arriving is not None:
                total = total + arriving
            if step < self.size - 1:
                leaving, arriving = total, torch.empty_like(total)
                works = self._pass_on(leaving, arriving)
        return total


class SymmetricMemory:
    """torch's fused operators: ranks read each other's pieces out of memory that they share."""

    def __init__(self, group: dist.ProcessGroup, operators: Any = None) -> None:
        self.group, self.name = group, group.group_name
        self.operators = operators or torch.ops.symm_mem

    def gather_products(self, x_tD: Tensor, matrices_DF: Sequence[Tensor]) -> tuple[Tensor, list[Tensor]]:
        whole_TD, made = self.operators.fused_all_gather_matmul(x_tD, list(matrices_DF), 0, self.name, return_A=True)
        return whole_TD, list(made)

    def products_scatter(self, products: Products) -> Tensor:
        left_TF, right_FD = products[0]
        if len(products) > 1:
            left_TF, right_FD = torch.cat([each[0] for each in products], 1), torch.cat([each[1] for each in products])
        return self.operators.fused_matmul_reduce_scatter(left_TF, right_FD, "sum", 0, self.name)


def overlap_over(group: dist.ProcessGroup) -> Overlap:
    """The best way that the device has; `group` must lie on one machine for shared memory."""
    together = device.device_count() % dist.get_world_size(group) == 0  # tensor ranks are neighbours
    return SymmetricMemory(group) if device.supports("symmetric_memory") and together else Ring(group)


def _rows(x_BSD: Tensor) -> Tensor:
    return x_BSD.transpose(0, 1).flatten(0, 1).contiguous()


def _unrows(x_TD: Tensor, batch: int) -> Tensor:
    return x_TD.unflatten(0, (-1, batch)).transpose(0, 1)


class _Enter(torch.autograd.Function):
    """This rank's rows x [t, D] and matrices [F, D] without gradient -> all rows [T, D], their products [T, F]."""

    @staticmethod
    def forward(ctx, overlap: Overlap, x_tD: Tensor, *weights: Tensor) -> tuple[Tensor, ...]:  # type: ignore[no-untyped-def]
        ctx.overlap, ctx.weights = overlap, weights
        whole_TD, made = overlap.gather_products(x_tD, [weight_FD.T for weight_FD in weights])
        ctx.mark_non_differentiable(whole_TD)
        return whole_TD, *made

    @staticmethod
    def backward(ctx, _: Tensor, *grads: Tensor) -> tuple[Tensor | None, ...]:  # type: ignore[no-untyped-def]
        products = [(grad_TF.contiguous(), weight_FD) for grad_TF, weight_FD in zip(grads, ctx.weights, strict=True)]
        return None, ctx.overlap.products_scatter(products), *(None for _ in ctx.weights)


class _Weigh(torch.autograd.Function):
    """y [T, F], which is the product of x [T, D] and a matrix [F, D]: gives that matrix its gradient.

    A node of its own for each matrix, because a backward pass may be taken apart into one for inputs and one for
    weights: what communicates must run in the first alone.
    """

    @staticmethod
    def forward(ctx, y_TF: Tensor, x_TD: Tensor, weight_FD: Tensor) -> Tensor:  # type: ignore[no-untyped-def]
        ctx.save_for_backward(x_TD)
        return y_TF.view_as(y_TF)

    @staticmethod
    def backward(ctx, grad_TF: Tensor) -> tuple[Tensor | None, ...]:  # type: ignore[no-untyped-def]
        (x_TD,) = ctx.saved_tensors
        return grad_TF, None, grad_TF.T @ x_TD if wanted(ctx)[-1] else None


class _Gathered:
    """A gradient of all rows, which the gradient of the input gathers and that of the matrix reads."""

    rows_TD: Tensor | None = None


class _Keep(torch.autograd.Function):
    """h [T, F] before its product with a matrix [D, F]: keeps what the gradient of the matrix needs.

    Nothing is kept after this, so where h is rebuilt in backward the product is not made again.
    """

    @staticmethod
    def forward(ctx, gathered: _Gathered, h_TF: Tensor, weight_DF: Tensor) -> Tensor:  # type: ignore[no-untyped-def]
        ctx.save_for_backward(h_TF)
        ctx.gathered = gathered
        return h_TF.view_as(h_TF)

    @staticmethod
    def backward(ctx, grad_TF: Tensor) -> tuple[Tensor | None, ...]:  # type: ignore[no-untyped-def]
        (h_TF,) = ctx.saved_tensors
        _, needs_weight = wanted(ctx)
        if not needs_weight:
            return None, grad_TF, None
        grad_TD, ctx.gathered.rows_TD = ctx.gathered.rows_TD, None
        return None, grad_TF, grad_TD.T @ h_TF


class _Leave(torch.autograd.Function):
    """h [T, F] and a matrix [D, F] without gradient -> this rank's rows of the products summed over ranks, [t, D]."""

    @staticmethod
    def forward(  # type: ignore[no-untyped-def]
        ctx, overlap: Overlap, gathered: _Gathered, h_TF: Tensor, weight_DF: Tensor
    ) -> Tensor:
        ctx.overlap, ctx.gathered, ctx.weight_DF = overlap, gathered, weight_DF
        return overlap.products_scatter([(h_TF, weight_DF.T)])

    @staticmethod
    def backward(ctx, grad_tD: Tensor) -> tuple[Tensor | None, ...]:  # type: ignore[no-untyped-def]
        ctx.gathered.rows_TD, (grad_TF,) = ctx.overlap.gather_products(grad_tD.contiguous(), [ctx.weight_DF])
        return None, None, grad_TF, None


class OverlappedBlock:
    """`enter` and `leave` of attention and MLP: positions of this rank in, positions of this rank out."""

    def __init__(self, overlap: Overlap) -> None:
        self.overlap = overlap

    def enter(self, x_BsD: Tensor, linears: Sequence[nn.Linear]) -> list[Tensor]:
        weights = [summed_local(linear.weight) for linear in linears]
        whole_TD, *made = _Enter.apply(self.overlap, _rows(x_BsD), *(weight_FD.detach() for weight_FD in weights))
        out = []
        for y_TF, weight_FD, linear in zip(made, weights, linears, strict=True):
            y_TF = _Weigh.apply(y_TF, whole_TD, weight_FD)
            out.append(_unrows(y_TF if linear.bias is None else y_TF + summed_local(linear.bias), len(x_BsD)))
        return out

    def leave(self, h_BSF: Tensor, linear: nn.Linear) -> Tensor:
        weight_DF, gathered = summed_local(linear.weight), _Gathered()
        h_TF = _Keep.apply(gathered, _rows(h_BSF), weight_DF)
        y_BsD = _unrows(_Leave.apply(self.overlap, gathered, h_TF, weight_DF.detach()), len(h_BSF))
        return y_BsD if linear.bias is None else y_BsD + summed_local(linear.bias)
