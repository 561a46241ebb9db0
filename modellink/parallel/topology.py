"""Which rank holds what: named device meshes over `pp, dp_replicate, dp_shard, cp, tp` (tensor fastest, pipeline
slowest).

Two meshes over the same ranks say the same in two ways. `mesh` is how weights lie: ranks of one context hold the same
weights, so they shard or replicate them as data ranks do, and its dp axes contain cp. `data` is how a batch lies: rows
over dp, positions over cp. With expert parallelism `experts` is how experts lie: over neighbouring data and context
ranks, sharded or replicated over the others. World size 1 has no mesh at all, so single-device code takes no detour.
Axes of size 1 never communicate.
"""

from __future__ import annotations

import math
import os
from datetime import timedelta

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh

from modellink import device
from modellink.config.schema import ParallelConfig
from modellink.errors import ModelLinkError

WEIGHTS = ("pp", "dp_replicate", "dp_shard", "tp")
DATA = ("pp", "dp", "cp", "tp")
EXPERTS = ("pp", "expert_replicate", "expert_shard", "ep", "tp")


def launched_world_size() -> int:
    """World size of the launch (torchrun's WORLD_SIZE), 1 without a launcher."""
    return int(os.environ.get("WORLD_SIZE", "1"))


def launched_rank() -> int:
    """Global rank of this process, 0 without a launcher."""
    return int(os.environ.get("RANK", "0"))


def launched_local_rank() -> int:
    """Number of this process on its machine, 0 without a launcher."""
    return int(os.environ.get("LOCAL_RANK", "0"))


def data_parallel_size(parallel: ParallelConfig, world_size: int) -> int:
    """Ranks left for data parallelism; ModelLinkError when the model-parallel sizes do not divide the world."""
    model_ranks = parallel.tensor_parallel * parallel.pipeline_parallel * parallel.context_parallel
    if world_size % model_ranks:
        raise ModelLinkError(
            f"{world_size} processes cannot be divided into tensor {parallel.tensor_parallel} x pipeline "
            f"{parallel.pipeline_parallel} x context {parallel.context_parallel} = {model_ranks} model-parallel ranks: "
            f"launch a multiple of {model_ranks} processes or change the parallel sizes."
        )
    return world_size // model_ranks


def initialize_distributed(parallel: ParallelConfig) -> torch.device:
    """Join the process group that the launcher describes (none for one process); returns this rank's device."""
    local = device.set_device(launched_local_rank())
    if launched_world_size() > 1 and not dist.is_initialized():
        dist.init_process_group(
            backend=device.backend(), timeout=timedelta(minutes=parallel.distributed_timeout_minutes)
        )
    return local


class Topology:
    """Sizes, this rank's coordinates and process groups of a layout.

    `zero_stage` 0 replicates over all data ranks; 1-3 shard over dp_shard = data ranks / `data_parallel_replicas`.
    """

    def __init__(self, parallel: ParallelConfig, world_size: int | None = None) -> None:
        self.parallel = parallel
        self.world_size = world_size or (dist.get_world_size() if dist.is_initialized() else 1)
        self.rank = dist.get_rank() if dist.is_initialized() else 0
        self.dp = data_parallel_size(parallel, self.world_size)
        self.zero_stage = parallel.zero_stage or (1 if parallel.distributed_optimizer else 0)
        context, tensor = parallel.context_parallel, parallel.tensor_parallel
        copies = self.dp * context  # ranks that hold the same weights, or shards of them
        replicas = copies if self.zero_stage == 0 else parallel.data_parallel_replicas
        if self.zero_stage and self.dp % replicas:
            raise ModelLinkError(
                f"{self.dp} data-parallel ranks cannot be divided into {replicas} replicas: "
                f"choose --data-parallel-replicas among the divisors of {self.dp}."
            )
        self.copies = copies
        self.sizes = {
            "pp": parallel.pipeline_parallel,
            "dp_replicate": replicas,
            "dp_shard": copies // replicas,
            "dp": self.dp,
            "cp": context,
            "ep": parallel.expert_parallel,
            "tp": tensor,
        }
        same_experts = copies // parallel.expert_parallel  # ranks that hold the same experts, or shards of them
        self.sizes["expert_replicate"] = math.gcd(replicas, same_experts)
        self.sizes["expert_shard"] = same_experts // self.sizes["expert_replicate"]
        self.mesh, self.data = self._new_mesh(WEIGHTS), self._new_mesh(DATA)
        self.experts = self._new_mesh(EXPERTS) if parallel.expert_parallel > 1 else None

    def _new_mesh(self, axes: tuple[str, ...]) -> DeviceMesh | None:
        if self.world_size == 1:
            return None
        return init_device_mesh(device.device_type(), tuple(self.sizes[a] for a in axes), mesh_dim_names=axes)

    def _mesh_of(self, axis: str) -> DeviceMesh | None:
        return self.mesh if axis in WEIGHTS else self.data if axis in DATA else self.experts

    def size(self, axis: str) -> int:
        """Number of ranks along `axis`."""
        return self.sizes[axis]

    def coordinate(self, axis: str) -> int:
        """This rank's place along `axis`."""
        mesh = self._mesh_of(axis)
        return mesh.get_local_rank(axis) if mesh is not None else 0

    def group(self, axis: str) -> dist.ProcessGroup | None:
        """Process group along `axis`, None where the axis has one rank."""
        mesh = self._mesh_of(axis)
        return mesh.get_group(axis) if mesh is not None and self.sizes[axis] > 1 else None

    @property
    def dp_rank(self) -> int:
        """This rank's place among the data-parallel ranks."""
        return self.coordinate("dp")

    @property
    def is_main(self) -> bool:
        """Rank 0: the one that prints and writes shared files."""
        return self.rank == 0

    def reduce(self, tensor: Tensor, *axes: str, op: dist.ReduceOp.RedOpType = dist.ReduceOp.SUM) -> Tensor:
        """All-reduce `tensor` in place over each of `axes` in turn; returns it."""
        for axis in axes:
            group = self.group(axis)
            if group is not None:
                dist.all_reduce(tensor, op=op, group=group)
        return tensor

    def sum_over_data(self, tensor: Tensor) -> Tensor:
        """Sum over everything that splits the batch: data and context ranks."""
        return self.reduce(tensor, "dp", "cp")

    def describe(self) -> str:
        """One line for the log, for example `tp 2 x pp 2 x dp 2`."""
        sharding = {0: "", 1: " (ZeRO-1)", 2: " (ZeRO-2)", 3: " (ZeRO-3)"}
        experts = f", ep {self.sizes['ep']}" if self.sizes["ep"] > 1 else ""
        sizes = f"tp {self.sizes['tp']} x pp {self.sizes['pp']} x cp {self.sizes['cp']} x dp {self.dp}"
        return f"{sizes}{sharding[self.zero_stage]}{experts}"
