"""What overlaps with communication trains like one process: tensor parallelism in pieces, rows of experts in parts.

The schedule itself is proved too: gradients set out before what was computed meanwhile, and are waited for after it.
"""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest
import torch
import torch.distributed as dist
from equivalence import run_cases, wrong_cases
from spawn import run_distributed
from torch import Tensor
from torch.distributed import _symmetric_memory as symmetric

from modellink.parallel.async_tensor import Overlap, Ring, SymmetricMemory
from modellink.parallel.collectives import Flight, exchange_flight

TOLERANCE = 1e-5
SP = {"tensor_parallel": 2, "sequence_parallel": True, "async_tensor_parallel": True}
CASES: dict[int, list[tuple[str, dict[str, Any], int]]] = {
    2: [
        ("llama", SP, 2),
        ("gpt", SP, 2),
        ("tied", SP | {"recompute_granularity": "full"}, 1),
        ("deepseek", SP, 2),
        ("sinks", SP | {"recompute_granularity": "selective"}, 2),
        ("llama", SP | {"recompute_layers": ["0-1:mlp_act", "2-3:operators"]}, 2),
    ],
    4: [
        ("llama", SP | {"tensor_parallel": 4}, 2),
        ("gpt", SP | {"tensor_parallel": 4, "recompute_granularity": "full"}, 2),
        ("tied", SP | {"pipeline_parallel": 2}, 1),
    ],
}


class _Meanwhile(torch.autograd.Function):
    """Identity that notes when its backward runs."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, log: list[str]) -> Tensor:
        ctx.log = log
        return x.view_as(x)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:
        ctx.log.append("meanwhile")
        return grad, None


class _Logged(Flight):
    log: list[str]

    def start(self, kind: Any, x: Tensor) -> Tensor:
        self.log.append("there" if kind is self.there else "back")
        return super().start(kind, x)

    def finish(self) -> Tensor:
        self.log.append("wait")
        return super().finish()


def schedule(rank: int) -> tuple[list[str], bool]:
    """Order of events around a transfer in both directions, and whether values and gradients arrived."""
    plain = exchange_flight(dist.group.WORLD)
    flight = _Logged(plain.there, plain.back)
    flight.log = log = []
    x = torch.full((dist.get_world_size(), 3), float(rank), requires_grad=True)
    ticket = flight.depart(x)
    other = _Meanwhile.apply(x * 2, log)
    y = flight.arrive(ticket)
    log.append("backward")
    weight = torch.arange(1.0, dist.get_world_size() + 1)[:, None] * (rank + 1)
    (y * weight + other).sum().backward()
    # the row that went to rank r was weighed there, at the place of this rank
    expected = torch.arange(1.0, dist.get_world_size() + 1)[:, None] * (rank + 1) + 2
    right = torch.equal(y[:, 0], torch.arange(float(dist.get_world_size())))
    return log, right and torch.equal(x.grad, expected.expand_as(x))


def overlap_errors(rank: int) -> list[float]:
    """Differences of both ways to overlap products from gathering or summing first, in float64."""
    size, group = dist.get_world_size(), dist.group.WORLD
    draw = torch.Generator().manual_seed(0)
    x_TD, left_TF, more_TF, out_DF, w_FD, v_FD = (
        torch.randn(shape, generator=draw, dtype=torch.float64)
        for shape in ((4 * size, 6), (size, 4 * size, 5), (size, 4 * size, 3), (6, 7), (5, 6), (3, 6))
    )
    reference = SimpleNamespace(
        fused_all_gather_matmul=symmetric._fused_all_gather_matmul_fallback,
        fused_matmul_reduce_scatter=symmetric._fused_matmul_reduce_scatter_fallback,
    )
    ways: list[Overlap] = [Ring(group), SymmetricMemory(group, reference)]
    here = slice(4 * rank, 4 * rank + 4)
    summed = (left_TF @ w_FD + more_TF @ v_FD).sum(0)[here]
    errors = []
    for way in ways:
        whole, (first, second) = way.gather_products(x_TD[here].contiguous(), [out_DF, out_DF[:, :2]])
        mine = way.products_scatter([(left_TF[rank], w_FD), (more_TF[rank], v_FD)])
        pairs = ((whole, x_TD), (first, x_TD @ out_DF), (second, x_TD @ out_DF[:, :2]), (mine, summed))
        errors.append(max((ours - theirs).abs().max().item() for ours, theirs in pairs))
    return errors


def everything(rank: int, world_size: int, cases: list[tuple[str, dict[str, Any], int]]) -> dict[str, Any]:
    return {
        "schedule": schedule(rank),
        "errors": overlap_errors(rank),
        "cases": run_cases(rank, world_size, cases, []),
    }


@pytest.fixture(scope="module", params=sorted(CASES), ids=lambda world: f"{world}-ranks")
def results(request: pytest.FixtureRequest) -> tuple[int, list[dict[str, Any]]]:
    world = request.param
    return world, run_distributed(everything, world, CASES[world], timeout=300)


@pytest.mark.dist
def test_overlapped_layouts_equal_one_process(results: tuple[int, list[dict[str, Any]]]) -> None:
    world, per_rank = results
    assert not wrong_cases(CASES[world], [rank["cases"] for rank in per_rank], TOLERANCE)


@pytest.mark.dist
def test_gradients_set_out_early_and_are_waited_for_late(results: tuple[int, list[dict[str, Any]]]) -> None:
    for rank in results[1]:
        log, right = rank["schedule"]
        assert log == ["there", "wait", "backward", "back", "meanwhile", "wait"]
        assert right


@pytest.mark.dist
def test_products_in_pieces_equal_products(results: tuple[int, list[dict[str, Any]]]) -> None:
    """The ring, and torch's fused operators by their reference implementation."""
    for rank in results[1]:
        assert max(rank["errors"]) < 1e-12
