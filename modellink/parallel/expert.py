"""Expert parallelism: every rank of a group holds some experts of a layer, and tokens travel to them and back.

    alltoall    rows go to the ranks of their experts, are sorted there, and come back: traffic is what is routed
    allgather   all tokens go to all ranks, each runs what its experts have to do, and sums come back: no host waits

The group lies over data and context ranks; experts are also split by the tensor group and sharded by FSDP over the data
ranks that hold the same ones. Source: Megatron-Core's dispatchers. Legend: E experts, e experts of one rank, R rows
sent, T tokens, D hidden, k experts of a token.
"""

from __future__ import annotations

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.tensor import Replicate, Shard, distribute_tensor

from modellink.config.schema import ParallelConfig
from modellink.models.decoder import Decoder
from modellink.models.moe import Experts, MoE, Routing
from modellink.parallel.collectives import all_to_all, gather_rows, scatter_sum
from modellink.parallel.plan import split_dimension
from modellink.parallel.tensor import local_part
from modellink.parallel.topology import Topology


class AllToAll:
    """`MoE.run_experts`: rows sorted by expert -> the rows that all experts make of them, in the same order."""

    def __init__(self, experts: Experts, group: dist.ProcessGroup) -> None:
        self.experts, self.group, self.size = experts, group, dist.get_world_size(group)

    def __call__(self, x_RD: Tensor, counts_E: Tensor) -> Tensor:
        counts_Ne = counts_E.unflatten(0, (self.size, -1))  # N ranks
        arriving_Ne = torch.empty_like(counts_Ne)
        dist.all_to_all_single(arriving_Ne, counts_Ne.contiguous(), group=self.group)
        sent, received = torch.stack((counts_Ne.sum(1), arriving_Ne.sum(1))).tolist()
        rows = all_to_all(x_RD, self.group, sent, received)
        # rows arrive sorted by (rank, expert); experts want (expert, rank)
        expert_Ne = torch.arange(counts_Ne.shape[1], device=x_RD.device).expand_as(arriving_Ne)
        order = expert_Ne.flatten().repeat_interleave(arriving_Ne.flatten(), output_size=len(rows)).argsort(stable=True)
        made = self.experts(rows[order], arriving_Ne.sum(0))
        back = torch.empty_like(made).index_copy(0, order, made)
        return all_to_all(back, self.group, received, sent)


class AllGather:
    """`MoE.run_routed`: tokens and their routing -> the weighted sums of all experts; nothing is ever dropped."""

    def __init__(self, experts: Experts, group: dist.ProcessGroup, local: int) -> None:
        self.experts, self.group, self.local = experts, group, local
        self.first = dist.get_rank(group) * local

    def __call__(self, x_TD: Tensor, routing: Routing) -> Tensor:
        tokens_TD = gather_rows(x_TD, self.group)
        weights_Tk = gather_rows(routing.weights_Tk, self.group)
        experts_Tk = gather_rows(routing.experts_Tk, self.group) - self.first
        here_P = ((experts_Tk >= 0) & (experts_Tk < self.local)).flatten().nonzero().flatten()
        mine_P = experts_Tk.flatten()[here_P]
        order = mine_P.argsort(stable=True)
        pairs_R = here_P[order]
        owners_R = pairs_R // experts_Tk.shape[1]
        made_RD = self.experts(tokens_TD[owners_R], mine_P.bincount(minlength=self.local))
        weights_R = weights_Tk.flatten()[pairs_R].to(made_RD.dtype)
        sums_TD = torch.zeros_like(tokens_TD).index_add(0, owners_R, made_RD * weights_R[:, None])
        return scatter_sum(sums_TD, self.group)


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
        if parallel.moe_token_dispatcher_type == "allgather":
            assert model.config.num_experts
            module.run_routed = AllGather(module.experts, group, model.config.num_experts // expert_ranks)
        else:
            module.run_experts = AllToAll(module.experts, group)


def split_experts(experts: Experts, prefix: str, mesh: DeviceMesh, axes: list[str]) -> None:
    """Parameters become DTensors: whole experts over `ep`, the width of each over `tp`."""
    for name, parameter in list(experts.named_parameters()):
        dim = split_dimension(f"{prefix}.{name}")
        width = Replicate() if dim is None else Shard(dim)
        placements = [Shard(0) if axis == "ep" else width for axis in axes]
        experts.register_parameter(
            name, nn.Parameter(distribute_tensor(parameter, mesh, placements, src_data_rank=None))
        )
