"""Processes for benchmarks of what several ranks do together, on this machine."""

from __future__ import annotations

import os
import tempfile
from collections.abc import Callable
from typing import Any

import torch
import torch.distributed as dist
import torch.multiprocessing as mp

from modellink import device


def _rank(rank: int, world: int, threads: int, folder: str, work: Callable[..., Any], arguments: Any) -> None:
    os.environ |= {"RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": str(world)}
    torch.set_num_threads(threads)
    dist.init_process_group(device.backend(), init_method=f"file://{folder}/store", rank=rank, world_size=world)
    torch.save(work(*arguments), f"{folder}/{rank}.pt")
    dist.barrier()
    dist.destroy_process_group()


def on_ranks(work: Callable[..., Any], world: int, *arguments: Any, threads: int = 1) -> list[Any]:
    """What `work(*arguments)` returns on each of `world` processes in one process group: numbers, text, containers."""
    os.environ["OMP_NUM_THREADS"] = str(threads)
    os.environ.setdefault("GLOO_SOCKET_IFNAME", "lo")
    with tempfile.TemporaryDirectory() as folder:
        mp.spawn(_rank, (world, threads, folder, work, arguments), nprocs=world)
        return [torch.load(f"{folder}/{rank}.pt", weights_only=True) for rank in range(world)]
