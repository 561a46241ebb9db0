"""gloo with one worker a group: with two, gathers of DTensors break the heap of torch 2.13 sooner or later."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
import torch.distributed as dist
from spawn import run_distributed
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import Shard, distribute_tensor

from modellink import device

pytestmark = pytest.mark.dist


def workers() -> int:
    """Threads of this process that carry out collectives of gloo."""
    return sum("gloo_runloop" in path.read_text() for path in Path("/proc/self/task").glob("*/comm"))


def gather_at_once(rank: int, world: int) -> tuple[int, bool, list[int]]:
    mesh = init_device_mesh("cpu", (1, world), mesh_dim_names=("pp", "tp"))
    group = mesh.get_group("tp")
    gather, wait = torch.ops._c10d_functional.all_gather_into_tensor, torch.ops._c10d_functional.wait_tensor
    own = torch.full((3,), float(rank))
    expected = torch.arange(float(world)).repeat_interleave(3)
    right = True
    for _ in range(200):
        found = [gather(own, world, group.group_name) for _ in range(32)]
        right &= all(torch.equal(wait(each), expected) for each in found)
    whole = torch.randn(4, 2, generator=torch.Generator().manual_seed(0))
    right &= torch.equal(distribute_tensor(whole, mesh["tp"], [Shard(0)]).full_tensor(), whole)
    objects: list[int | None] = [None] * world
    dist.all_gather_object(objects, rank, group=dist.new_group(backend=device.host_backend()))
    return workers(), right, [each for each in objects if each is not None]


@pytest.mark.skipif(not Path("/proc/self/task").exists(), reason="counts threads where Linux lists them")
def test_groups_have_one_worker_each_and_gather_right() -> None:
    for found, right, objects in run_distributed(gather_at_once, 2):
        assert found == 3, "the default group, which is the axis tp as well, the axis pp, the group of objects"
        assert right and objects == [0, 1]
