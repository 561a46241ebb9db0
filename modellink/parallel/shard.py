"""From a full tensor to the piece this rank holds, without communication.

Initial weights and files hold full tensors; a rank cuts its own piece out of them. Slicing before reading matters for
files, so a piece is described first (`local_region`) and cut second.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from torch.distributed.tensor import DTensor, Partial

from modellink.optim.local import local_tensor


def chunk_bounds(length: int, parts: int, index: int) -> tuple[int, int]:
    """[start, end) of chunk `index` when `length` rows are cut like `torch.chunk`: ceil(length / parts) rows each, last
    ones fewer."""
    size = -(-length // parts)
    return min(index * size, length), min((index + 1) * size, length)


def local_region(parameter: Tensor) -> tuple[tuple[int, int], ...]:
    """[start, end) along each dimension of the full tensor that this rank holds of `parameter` (everything for a plain
    one).

    """
    place = parameter.device_mesh.get_coordinate() if isinstance(parameter, DTensor) else None
    return region_at(parameter, place or ())


def region_at(parameter: Tensor, place: Sequence[int]) -> tuple[tuple[int, int], ...]:
    """The same of the rank at coordinates `place` in the parameter's mesh.

    Mesh dimensions are walked from the innermost outwards: tensor parallelism cuts first and FSDP cuts what remains,
    which is how FSDP2 lays out a parameter that is already split.
    """
    region = [(0, size) for size in parameter.shape]
    if isinstance(parameter, DTensor):
        mesh = parameter.device_mesh
        for axis in reversed(range(mesh.ndim)):
            placement = parameter.placements[axis]
            dim = getattr(placement, "dim", None)
            if dim is None:
                continue
            start, end = region[dim]
            low, high = chunk_bounds(end - start, mesh.size(axis), place[axis])
            region[dim] = (start + low, start + high)
    return tuple(region)


def local_slice(full: Any, parameter: Tensor) -> Tensor:
    """Cut this rank's piece of `parameter` out of `full`: a tensor of the full shape, or a safetensors slice of one."""
    region = local_region(parameter)
    piece = full[tuple(slice(start, end) for start, end in region)]
    return piece if isinstance(piece, Tensor) else torch.as_tensor(piece)


@torch.no_grad()
def copy_full_into(full: Any, parameter: Tensor) -> None:
    """Overwrite the local piece of `parameter` from the full tensor (or safetensors slice) `full`, casting to its
    dtype."""
    target = local_tensor(parameter)
    if target.numel():
        target.copy_(local_slice(full, parameter))


def summed_local(parameter: Tensor) -> Tensor:
    """This rank's shard of `parameter` for work of which each rank does another part.

    Where the parameter is whole on every rank, the gradients that the ranks find are parts of one sum.
    """
    if not isinstance(parameter, DTensor):
        return parameter
    return parameter.to_local(grad_placements=[Partial() if p.is_replicate() else p for p in parameter.placements])
