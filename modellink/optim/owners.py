"""Work on whole matrices whose parts lie on several ranks, shared out over these ranks.

    rank 0   A0 B0  ──▶  A = A0 A1  ──▶  work(A)  ──▶  A0' B0'
    rank 1   A1 B1  ──▶  B = B0 B1  ──▶  work(B)  ──▶  A1' B1'

Every matrix has one owner among the ranks that hold its parts. Parts travel to the owner, which does the work, cuts the
result and sends the parts back. So each rank does its share of the work, and sends and receives no more than its own
parts, twice. Owners are chosen by cost, dearest first, always the rank with the least to do; all ranks choose alike,
from shapes alone. Messages to one rank travel together.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.tensor import DTensor

from modellink.parallel.shard import region_at

Box = tuple[slice, ...]


@dataclass(frozen=True)
class Split:
    """Where the parts of a matrix (or of a stack of matrices [E, rows, columns], whose E is not put together) lie."""

    ranks: tuple[int, ...]  # global ranks
    boxes: tuple[Box, ...]  # what each of them holds of the whole
    shape: tuple[int, ...]

    def numel(self, index: int) -> int:
        """Elements that `ranks[index]` holds."""
        size = 1
        for box in self.boxes[index]:
            size *= box.stop - box.start
        return size

    @property
    def cost(self) -> int:
        """Products of the matrix with its own transpose: rows^2 x columns, rows being the shorter side."""
        short, long = sorted(self.shape[-2:])
        return short * short * (2 * long + short) * (self.shape[0] if len(self.shape) == 3 else 1)


def split_of(param: Tensor) -> Split | None:
    """How `param`, a matrix or a stack of them, is cut; None where every rank holds whole matrices."""
    if not isinstance(param, DTensor):
        return None
    mesh, stacked = param.device_mesh, param.ndim == 3
    cut = [
        axis
        for axis, place in enumerate(param.placements)
        if not place.is_replicate() and mesh.size(axis) > 1 and not (stacked and getattr(place, "dim", None) == 0)
    ]
    here = mesh.get_coordinate()
    if not cut or here is None:
        return None
    choices = [range(mesh.size(axis)) if axis in cut else [here[axis]] for axis in range(mesh.ndim)]
    places = list(itertools.product(*choices))
    regions = [region_at(param, place) for place in places]
    filled = [region for region in regions if all(start < end for start, end in region)]
    low = [min(region[dim][0] for region in filled) for dim in range(param.ndim)] if filled else [0] * param.ndim
    high = [max(region[dim][1] for region in filled) for dim in range(param.ndim)] if filled else low
    boxes = [tuple(slice(a - z, b - z) for (a, b), z in zip(region, low, strict=True)) for region in regions]
    ranks = tuple(int(mesh.mesh[place].item()) for place in places)
    return Split(ranks, tuple(boxes), tuple(b - a for a, b in zip(low, high, strict=True)))


def owners_of(splits: Sequence[Split]) -> list[int]:
    """The global rank that works on each matrix."""
    loads: dict[tuple[int, ...], dict[int, int]] = {}
    owners = [0] * len(splits)
    for index in sorted(range(len(splits)), key=lambda i: -splits[i].cost):
        # among the same holders only: who else holds what else is not known to all of them
        load = loads.setdefault(splits[index].ranks, dict.fromkeys(splits[index].ranks, 0))
        owners[index] = min(load, key=lambda rank: load[rank])
        load[owners[index]] += splits[index].cost
    return owners


def work_on_owners(shards: Sequence[Tensor], splits: Sequence[Split], work: Callable[[Tensor], Tensor]) -> list[Tensor]:
    """This rank's parts of `work(whole)` for each of `shards`, its own parts of the whole matrices.

    `work` keeps shape and dtype. All shards have one dtype and device. Collective over the ranks of all `splits`: each
    calls with the matrices it shares with others in the same order.
    """
    if not shards:
        return []
    me, owners = dist.get_rank(), owners_of(splits)
    mine = [index for index, owner in enumerate(owners) if owner == me]
    sent = [(owner, shard.reshape(-1)) for owner, shard in zip(owners, shards, strict=True)]
    wanted = [(rank, splits[i].numel(n)) for i in mine for n, rank in enumerate(splits[i].ranks)]
    arrived = iter(_exchange(sent, wanted, shards[0]))
    returned: list[tuple[int, Tensor]] = []
    for index in mine:
        split = splits[index]
        whole = shards[index].new_empty(split.shape)
        for box in split.boxes:
            part = whole[box]
            part.copy_(next(arrived).view(part.shape))
        made = work(whole)
        returned += [(rank, made[box].reshape(-1)) for rank, box in zip(split.ranks, split.boxes, strict=True)]
    wanted = [(owner, shard.numel()) for owner, shard in zip(owners, shards, strict=True)]
    # an owner sends in the order of its matrices, which is the order in which the others wait for them
    parts = _exchange(returned, wanted, shards[0])
    return [part.view(shard.shape) for part, shard in zip(parts, shards, strict=True)]


def _exchange(sent: list[tuple[int, Tensor]], wanted: list[tuple[int, int]], like: Tensor) -> list[Tensor]:
    """Send flat tensors to (global) ranks; returns the flat tensors of the `wanted` (rank, elements), in that order.

    What goes to one rank is one message, in the order of `sent`, which is the receiver's order of `wanted`.
    """
    me = dist.get_rank()
    outgoing: dict[int, list[Tensor]] = {}
    for rank, tensor in sent:
        outgoing.setdefault(rank, []).append(tensor)
    sizes: dict[int, list[int]] = {}
    for rank, size in wanted:
        sizes.setdefault(rank, []).append(size)
    messages = {rank: torch.cat(tensors) for rank, tensors in outgoing.items()}
    arriving = {rank: like.new_empty(sum(counts)) for rank, counts in sizes.items() if rank != me}
    operations = [dist.P2POp(dist.isend, m, rank) for rank, m in messages.items() if rank != me and m.numel()]
    operations += [dist.P2POp(dist.irecv, buffer, rank) for rank, buffer in arriving.items() if buffer.numel()]
    for request in dist.batch_isend_irecv(operations) if operations else []:
        request.wait()
    arriving[me] = messages.get(me, like.new_empty(0))
    parts = {rank: iter(arriving[rank].split(counts)) for rank, counts in sizes.items()}
    return [next(parts[rank]) for rank, _ in wanted]
