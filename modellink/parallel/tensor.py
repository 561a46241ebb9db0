"""Tensor and sequence parallelism: the plan's kinds turned into DTensor styles.

Most modules become DTensor programs. Latent attention, experts and sinks sort, split and concatenate in ways that need
no communication but that DTensor cannot see through: they run as a `LocalRegion`, on this rank's shards as plain
tensors, with one sum over the group at the end.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager
from typing import Any

import torch
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.tensor import DTensor, Partial, Replicate, Shard, distribute_module, distribute_tensor
from torch.distributed.tensor.parallel import (
    ColwiseParallel,
    ParallelStyle,
    PrepareModuleInput,
    RowwiseParallel,
    SequenceParallel,
    parallelize_module,
)
from torch.func import functional_call

from modellink import device
from modellink.config.schema import ParallelConfig
from modellink.models.attention import Attention, AttentionCore
from modellink.models.decoder import Decoder
from modellink.models.layers import MLP, Dropout
from modellink.models.mla import LatentAttention
from modellink.models.moe import MoE
from modellink.parallel.async_tensor import OverlappedBlock, overlap_over
from modellink.parallel.plan import SUMMED, kind_of, split_dimension
from modellink.parallel.shard import summed_local


class ReplicatedEmbedding(ParallelStyle):
    """A replicated module on replicated input whose output is cut to `output_layout`; gradients come back whole."""

    def __init__(self, output_layout: Shard | Replicate) -> None:
        self.output_layout = output_layout

    def _partition(self, name: str, module: nn.Module, mesh: DeviceMesh) -> None:
        for key, parameter in module.named_parameters(recurse=False):
            whole = nn.Parameter(distribute_tensor(parameter, mesh, [Replicate()], src_data_rank=None))
            module.register_parameter(key, whole)

    def _apply(self, module: nn.Module, device_mesh: DeviceMesh) -> nn.Module:
        def enter(_: nn.Module, inputs: tuple[Tensor, ...], mesh: DeviceMesh) -> Any:
            return tuple(DTensor.from_local(t, mesh, [Replicate()], run_check=False) for t in inputs)

        def leave(_: nn.Module, output: DTensor, mesh: DeviceMesh) -> Any:
            return output.redistribute(placements=[self.output_layout]).to_local()

        return distribute_module(module, device_mesh, self._partition, enter, leave)


OWN = "experts."  # parameters that `expert.split_experts` splits


def local_part(name: str, parameter: Any, tensor_ranks: int) -> Tensor:
    """This rank's shard of the DTensor `parameter` as a plain tensor, with the placements that its gradient has."""
    local = summed_local(parameter)
    return local / tensor_ranks if name.endswith(SUMMED) else local


class LocalRegion:
    """Runs `module` on this rank's shards as plain tensors; what the ranks return are parts of one sum.

    Activations arrive and leave as they lie `between` blocks; None: arguments and result are split over heads already.
    Experts look after their own parameters. Replicated ones meet another part of the work on every rank, so their
    gradients are partial sums too.
    """

    def __init__(self, module: nn.Module, mesh: DeviceMesh, between: Shard | Replicate | None) -> None:
        self.module, self.mesh, self.between = module, mesh, between

    def __call__(self, x: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        named = self.module.named_parameters()
        ranks = self.mesh.size()
        local = {name: local_part(name, p, ranks) for name, p in named if not name.startswith(OWN)}
        if self.between is None:
            return functional_call(self.module, local, (x, *args), kwargs)
        whole = DTensor.from_local(x, self.mesh, [self.between], run_check=False).redistribute(placements=[Replicate()])
        part = functional_call(self.module, local, (whole.to_local(grad_placements=[Partial()]), *args), kwargs)
        sum_of_parts = DTensor.from_local(part, self.mesh, [Partial()], run_check=False)
        return sum_of_parts.redistribute(placements=[self.between]).to_local()


def apply_local_regions(model: Decoder, mesh: DeviceMesh, between: Shard | Replicate) -> list[str]:
    """Shard latent attention, experts and sinks by the plan and hand in regions to run them; returns their names."""
    regions = []
    layers: Any = model.layers.items()
    for index, layer in layers:
        attention, mlp, name = layer.self_attn, layer.mlp, f"layers.{index}"
        if isinstance(attention, LatentAttention):
            layer.run_attention = LocalRegion(attention, mesh, between)
            regions.append(f"{name}.self_attn")
        elif attention.core.sinks is not None:
            attention.run_core = LocalRegion(attention.core, mesh, None)
            regions.append(f"{name}.self_attn.core")
        if isinstance(mlp, MoE):
            layer.run_mlp = LocalRegion(mlp, mesh, between)
            regions.append(f"{name}.mlp")
    for region in regions:
        for name, parameter in list(model.get_submodule(region).named_parameters(prefix=region)):
            if not name.startswith(f"{region}.{OWN}"):
                _split(model, name, parameter, mesh)
    return regions


def _split(model: Decoder, name: str, parameter: nn.Parameter, mesh: DeviceMesh) -> None:
    """Make a parameter of `model` the DTensor that the plan says."""
    dim = split_dimension(name)
    placement = Replicate() if dim is None else Shard(dim)
    split = distribute_tensor(parameter, mesh, [placement], src_data_rank=None)
    owner, _, leaf = name.rpartition(".")
    owned = nn.Parameter(split, requires_grad=parameter.requires_grad)
    model.get_submodule(owner).register_parameter(leaf, owned)


def apply_overlapped_blocks(model: Decoder, mesh: DeviceMesh) -> set[str]:
    """Shard the matrices of attention and dense MLPs, and hand in ways through them that overlap; the names of blocks
    and matrices, which need no other style."""
    block = OverlappedBlock(overlap_over(mesh.get_group()))
    done = set()
    for name, module in model.named_modules():
        if kind_of(name) != "block" or not isinstance(module, (Attention, MLP)):
            continue
        module.enter, module.leave = block.enter, block.leave
        matrices = [f"{name}.{leaf}" for leaf, child in module.named_children() if isinstance(child, nn.Linear)]
        for matrix in matrices:
            for parameter_name, parameter in list(model.get_submodule(matrix).named_parameters(prefix=matrix)):
                _split(model, parameter_name, parameter, mesh)
        done |= {name, *matrices}
    return done


def style_of(kind: str, sequence_parallel: bool) -> ParallelStyle | None:
    """DTensor style of a plan kind. Between blocks activations are split over the sequence, or whole on every rank."""
    between = Shard(1) if sequence_parallel else Replicate()
    styles: dict[str, Callable[[], ParallelStyle | None]] = {
        "vocabulary_in": lambda: RowwiseParallel(input_layouts=Replicate(), output_layouts=between),
        "positions": lambda: ReplicatedEmbedding(between),
        "norm": lambda: SequenceParallel(use_local_output=True) if sequence_parallel else None,
        "heads": lambda: None,
        "head_norm": lambda: SequenceParallel(sequence_dim=2, use_local_output=True),
        # stays a DTensor inside the block, so that the column splits' input gradients are summed before one reduction
        "block": lambda: PrepareModuleInput(input_layouts=(between,), desired_input_layouts=(Replicate(),)),
        "column": ColwiseParallel,
        "row": lambda: RowwiseParallel(output_layouts=between),
        "vocabulary_out": lambda: ColwiseParallel(input_layouts=between, output_layouts=Shard(-1)),
    }
    return styles[kind]()


def own_random_stream(rank: int) -> Callable[[], AbstractContextManager[object]]:
    """Region in which each tensor rank draws differently.

    The seed of the region comes from the common stream, so a recomputed forward pass, which restores that stream, draws
    the same numbers again, and the common stream stays common.
    """

    @contextlib.contextmanager
    def region() -> Iterator[None]:
        seed = int(torch.empty((), dtype=torch.int64).random_())
        before = device.rng_state()
        try:
            device.seed_all((seed + rank) % 2**63)
            yield
        finally:
            device.set_rng_state(before)

    return region


def apply_tensor_parallel(model: Decoder, mesh: DeviceMesh, parallel: ParallelConfig) -> None:
    """Shard `model` (parameters may be on the meta device) over the one-dimensional tensor `mesh`, in place."""
    sequence_parallel = parallel.sequence_parallel
    regions = apply_local_regions(model, mesh, Shard(1) if sequence_parallel else Replicate())
    inside = tuple(f"{region}." for region in regions)
    overlapped = set()
    if sequence_parallel and parallel.async_tensor_parallel:
        overlapped = apply_overlapped_blocks(model, mesh)
    styles = {}
    for name, _ in model.named_modules():
        kind = None if f"{name}.".startswith(inside) or name in overlapped else kind_of(name)
        style = style_of(kind, sequence_parallel) if kind is not None else None
        if style is not None:
            styles[name] = style
    parallelize_module(model, mesh, styles)
    model.tie_weights()
    rank, region = mesh.get_local_rank(), own_random_stream(mesh.get_local_rank())
    for name, module in model.named_modules():
        if isinstance(module, AttentionCore):
            module.first_head = rank * (module.total_heads // mesh.size())
        in_attention = ".self_attn." in name
        if isinstance(module, Dropout) and (sequence_parallel or in_attention):
            module.region = region
