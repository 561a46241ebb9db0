"""Expert parallelism: every rank of a group holds some experts of a layer, and tokens travel to them and back.

    alltoall    rows go to the ranks of their experts, are sorted there, and come back: traffic is what is routed
    allgather   all tokens go to all ranks, each runs what its experts have to do, and sums come back: no host waits

The group lies over data and context ranks; experts are also split by the tensor group and sharded by FSDP over the data
ranks that hold the same ones. Source: Megatron-Core's dispatchers. Legend: E experts, e experts of one rank, N ranks, R
rows, T tokens (t in a part, of C), D hidden, k experts of a token, P pairs (T x k).
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.tensor import Replicate, Shard, distribute_tensor

from modellink.config.schema import ParallelConfig
from modellink.models.decoder import Decoder
from modellink.models.moe import Experts, MoE, Routing, chosen_experts, sort_by_expert, take_rows, weighted_sum
from modellink.parallel.collectives import Flight, exchange_flight, gather_flight, scatter_flight
from modellink.parallel.plan import split_dimension
from modellink.parallel.tensor import local_part
from modellink.parallel.topology import Topology

PARTS = 2  # of the tokens of a micro-batch: one part travels while the other is sorted or computed


@dataclass
class _Part:
    """The rows of some of the tokens: where they go, and how they lie on arrival."""

    pairs_R: Tensor  # int64: places in the part's flattened [t, k], sorted by expert
    there: Flight
    home: Flight
    order_R: Tensor | None  # int64: arriving rows sorted by expert; None where they arrive so
    counts_e: Tensor  # int64: rows of each local expert
    counts: list[int]  # the same on the host


class AllToAll:
    """`MoE.begin_routed`: rows travel to their experts and home again, in both directions of a training step.

    Overlapped, tokens go in two parts. One is sorted while the other travels there, the shared experts are computed
    while both do, and the experts work on one while the other arrives or is on its way home. Autograd walks the same
    way back (`collectives`), so gradients overlap as rows did. The host waits once, for all counts.
    Rows that would only pad an expert to its capacity stay at home.
    """

    def __init__(self, moe: MoE, group: dist.ProcessGroup, overlapped: bool) -> None:
        self.moe, self.config, self.group = moe, moe.config, group
        self.overlapped, self.size = overlapped, dist.get_world_size(group)
        moe.experts.exchange = self._run_experts

    def __call__(self, x_TD: Tensor, routing: Routing) -> Callable[[], Tensor]:
        cut = PARTS if self.overlapped else 1
        chosen = chosen_experts(routing, self.config).tensor_split(cut)
        sorted_ = [sort_by_expert(experts_tk.flatten(), self.config.num_experts) for experts_tk in chosen]
        counts_NCe = torch.stack([counts_E for _, _, counts_E in sorted_]).unflatten(1, (self.size, -1)).movedim(1, 0)
        counts_NCe = counts_NCe.contiguous()
        arriving_NCe = torch.empty_like(counts_NCe)
        counting = dist.all_to_all_single(arriving_NCe, counts_NCe, group=self.group, async_op=True)
        parts, tickets = [], []
        for number, (x_tD, (pairs_P, _, _)) in enumerate(zip(x_TD.tensor_split(cut), sorted_, strict=True)):
            rows = take_rows(x_tD, pairs_P, self.config.router_topk)  # what was dropped comes last
            if not number:
                counting.wait()
                leave, arrive = torch.stack((counts_NCe, arriving_NCe)).movedim(2, 1).tolist()
            sent, received = ([sum(counts) for counts in side[number]] for side in (leave, arrive))
            there = exchange_flight(self.group, sent, received)
            kept = sum(sent)
            part = _Part(
                pairs_P[:kept],
                there,
                exchange_flight(self.group, received, sent),
                by_expert(arriving_NCe[:, number], sum(received)),
                arriving_NCe[:, number].sum(0),
                [sum(counts) for counts in zip(*arrive[number], strict=True)],
            )
            parts.append(part)
            tickets.append(there.depart(rows if kept == len(rows) else rows[:kept]))
        finish = partial(self._finish, tickets, parts, routing.weights_Tk.tensor_split(cut))
        return finish if self.overlapped else _done(finish())

    def _finish(self, tickets: list[Tensor], parts: list[_Part], weights: tuple[Tensor, ...]) -> Tensor:
        returning = self.moe.experts(tickets, parts)
        sums = [
            weighted_sum(part.home.arrive(ticket), part.pairs_R, weights_tk)
            for ticket, part, weights_tk in zip(returning, parts, weights, strict=True)
        ]
        return sums[0] if len(sums) == 1 else torch.cat(sums)

    def _run_experts(self, run: Callable[..., Tensor], tickets: list[Tensor], parts: list[_Part]) -> list[Tensor]:
        """`Experts.exchange`: take rows in, run them, send them home, part by part."""
        returning = []
        for ticket, part in zip(tickets, parts, strict=True):
            rows = part.there.arrive(ticket)
            if part.order_R is not None:
                rows = _Permute.apply(rows, part.order_R, False)
            rows = run(rows, part.counts_e, part.counts)
            if part.order_R is not None:
                rows = _Permute.apply(rows, part.order_R, True)
            returning.append(part.home.depart(rows))
        return returning


def by_expert(arriving_Ne: Tensor, rows: int) -> Tensor | None:
    """int64 [rows]: how to take rows that arrive sorted by (rank, expert) so that they are sorted by (expert, rank).

    `arriving_Ne` int64 counts the rows from each rank for each expert, `rows` in all; None: they are already.
    """
    if 1 in arriving_Ne.shape:
        return None
    starts_Ne = (arriving_Ne.flatten().cumsum(0) - arriving_Ne.flatten()).view_as(arriving_Ne)
    lengths_S = arriving_Ne.T.flatten()  # segments in the order that experts want
    shifts_S = starts_Ne.T.flatten() - (lengths_S.cumsum(0) - lengths_S)
    return torch.arange(rows, device=lengths_S.device) + shifts_S.repeat_interleave(lengths_S, output_size=rows)


class _Permute(torch.autograd.Function):
    """Rows in the order `order_R` (a permutation), or back; the gradient of plain indexing would sort and add up."""

    @staticmethod
    def forward(ctx, x_RD: Tensor, order_R: Tensor, back: bool) -> Tensor:  # type: ignore[no-untyped-def]
        ctx.save_for_backward(order_R)
        ctx.back = back
        return torch.empty_like(x_RD).index_copy_(0, order_R, x_RD) if back else x_RD.index_select(0, order_R)

    @staticmethod
    def backward(ctx, grad: Tensor) -> tuple[Tensor, None, None]:  # type: ignore[no-untyped-def]
        return _Permute.apply(grad, ctx.saved_tensors[0], not ctx.back), None, None


def _done(result: Tensor) -> Callable[[], Tensor]:
    return lambda: result


class AllGather:
    """`MoE.begin_routed`: all tokens go to all ranks, each runs what its experts have to do; nothing is ever dropped.

    Overlapped, the shared experts are computed while tokens travel.
    """

    def __init__(self, moe: MoE, group: dist.ProcessGroup, overlapped: bool) -> None:
        self.experts, self.group, self.overlapped = moe.experts, group, overlapped
        self.local = moe.config.num_experts // dist.get_world_size(group)
        self.first = dist.get_rank(group) * self.local

    def __call__(self, x_TD: Tensor, routing: Routing) -> Callable[[], Tensor]:
        flights = [gather_flight(self.group) for _ in range(3)]
        gathered = (x_TD, routing.weights_Tk, routing.experts_Tk)
        tickets = [flight.depart(x) for flight, x in zip(flights, gathered, strict=True)]
        finish = partial(self._finish, flights, tickets)
        return finish if self.overlapped else _done(finish())

    def _finish(self, flights: list[Flight], tickets: list[Tensor]) -> Tensor:
        arrived = [flight.arrive(ticket) for flight, ticket in zip(flights, tickets, strict=True)]
        tokens_TD, weights_Tk, experts_Tk = arrived
        experts_Tk = experts_Tk - self.first
        here_P = ((experts_Tk >= 0) & (experts_Tk < self.local)).flatten().nonzero().flatten()
        mine_P = experts_Tk.flatten()[here_P]
        order = mine_P.argsort(stable=True)
        pairs_R = here_P[order]
        made_RD = self.experts(
            take_rows(tokens_TD, pairs_R, experts_Tk.shape[1]), mine_P.bincount(minlength=self.local)
        )
        home = scatter_flight(self.group)
        return home.arrive(home.depart(weighted_sum(made_RD, pairs_R, weights_Tk)))


def apply_expert_parallel(model: Decoder, topology: Topology, parallel: ParallelConfig) -> None:
    """Split the experts of `model` (which may be on the meta device) over expert and tensor ranks, in place."""
    expert_ranks, tensor_ranks = topology.size("ep"), topology.size("tp")
    axes = [axis for axis, size in (("ep", expert_ranks), ("tp", tensor_ranks)) if size > 1]
    if not axes:
        return
    root = topology.experts if expert_ranks > 1 else topology.mesh
    assert root is not None
    mesh = root[tuple(axes)]
    for name, module in model.named_modules():
        if not isinstance(module, MoE):
            continue
        split_experts(module.experts, f"{name}.experts", mesh, axes)
        module.experts.local = lambda leaf, parameter: local_part(f"experts.{leaf}", parameter, tensor_ranks)
        group = topology.group("ep")
        if group is None:
            continue
        dispatcher = AllGather if parallel.moe_token_dispatcher_type == "allgather" else AllToAll
        module.begin_routed = dispatcher(module, group, parallel.moe_permutation_async_comm)


def split_experts(experts: Experts, prefix: str, mesh: DeviceMesh, axes: list[str]) -> None:
    """Parameters become DTensors: whole experts over `ep`, the width of each over `tp`."""
    for name, parameter in list(experts.named_parameters()):
        dim = split_dimension(f"{prefix}.{name}")
        width = Replicate() if dim is None else Shard(dim)
        placements = [Shard(0) if axis == "ep" else width for axis in axes]
        experts.register_parameter(
            name, nn.Parameter(distribute_tensor(parameter, mesh, placements, src_data_rank=None))
        )
