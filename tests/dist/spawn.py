"""Run one function in several processes joined by a gloo group, and hand back what each rank returned.

The function is called as ``fn(rank, world_size, *args)``; it and its arguments must be picklable (a function at the top
of a test module is). What it returns is carried home by ``torch.save`` and read with ``weights_only=True``: tensors,
numbers, strings and dicts, lists or tuples of them. Import it as ``from spawn import run_distributed`` in tests/dist.
"""

from __future__ import annotations

import faulthandler
import os
import tempfile
import time
import traceback
from collections.abc import Callable
from datetime import timedelta
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
import torch.multiprocessing as mp

from modellink import device

GRACE_S = 5.0  # how long the other ranks may go on after one failed, so that their own errors are seen too


class DistributedFailure(AssertionError):
    """A rank raised, died or ran out of time; the message holds the tracebacks of every rank that has one."""


def _child(
    fn: Callable[..., Any],
    rank: int,
    world_size: int,
    port: int,
    folder: str,
    timeout: float,
    init_group: bool,
    args: tuple[Any, ...],
) -> None:
    os.environ |= {
        "RANK": str(rank), "WORLD_SIZE": str(world_size), "LOCAL_RANK": str(rank), "LOCAL_WORLD_SIZE": str(world_size),
        "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port), "TORCHELASTIC_USE_AGENT_STORE": "True",
        "TORCHELASTIC_RESTART_COUNT": "0",
    }  # fmt: skip
    torch.set_num_threads(1)
    faulthandler.enable()  # a rank that a signal ends says where it was
    try:
        if init_group:
            limit = timedelta(seconds=timeout)
            store = dist.TCPStore("127.0.0.1", port, is_master=False, timeout=limit)
            dist.init_process_group(
                device.host_backend(), store=store, rank=rank, world_size=world_size, timeout=limit
            )
        torch.save(fn(rank, world_size, *args), Path(folder, f"{rank}.pt"))
        if dist.is_initialized():
            dist.barrier()
            dist.destroy_process_group()
    except BaseException:
        Path(folder, f"{rank}.err").write_text(traceback.format_exc())
        # skip the interpreter's exit: destructors of a broken group may wait for peers
        os._exit(1)


def _wait(processes: list[Any], timeout: float) -> str | None:
    """Wait for all; return None when every one exited with 0, else one sentence about what went wrong first."""
    deadline, verdict = time.monotonic() + timeout, None
    while any(process.is_alive() for process in processes) and time.monotonic() < deadline:
        failed = [rank for rank, process in enumerate(processes) if process.exitcode not in (None, 0)]
        if failed and verdict is None:
            verdict = f"rank {failed[0]} exited with {processes[failed[0]].exitcode}"
            deadline = min(deadline, time.monotonic() + GRACE_S)
        time.sleep(0.02)
    alive = [rank for rank, process in enumerate(processes) if process.is_alive()]
    if verdict is None and alive:
        verdict = f"ranks {alive} were still running after {timeout} s"
    failed = [rank for rank, process in enumerate(processes) if process.exitcode not in (None, 0)]
    if verdict is None and failed:  # the last process died between two looks
        verdict = f"rank {failed[0]} exited with {processes[failed[0]].exitcode}"
    return verdict


def run_distributed(
    fn: Callable[..., Any], world_size: int, *args: Any, timeout: float = 120, init_group: bool = True
) -> list[Any]:
    """Return ``[fn(rank, world_size, *args) for each rank]``, each computed in its own process (CPU, one thread).

    `init_group=False` leaves the default group to `fn`; ``init_process_group`` then finds its rendezvous in
    the environment, as under torchrun. Raises DistributedFailure, with the children's tracebacks, when a rank raises,
    dies or is not done after `timeout` seconds; no process outlives the call.
    """
    # the store lives in the parent, as torchrun's does: no race for a free port, and it survives a dead rank
    server = dist.TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False)
    context = mp.get_context("spawn")
    inherited = {name: os.environ.get(name) for name in ("OMP_NUM_THREADS", "GLOO_SOCKET_IFNAME")}
    with tempfile.TemporaryDirectory() as folder:
        processes = [
            context.Process(target=_child, args=(fn, rank, world_size, server.port, folder, timeout, init_group, args))
            for rank in range(world_size)
        ]
        try:
            os.environ["OMP_NUM_THREADS"] = "1"  # read while torch is imported: too late once the child runs
            os.environ.setdefault("GLOO_SOCKET_IFNAME", "lo")
            for process in processes:
                process.start()
            verdict = _wait(processes, timeout)
        finally:
            for name, value in inherited.items():
                if value is None:
                    os.environ.pop(name, None)
                else:
                    os.environ[name] = value
            for process in processes:
                if process.pid is not None:
                    process.kill()
                    process.join()
        if verdict is not None:
            errors = [f"--- rank {path.stem}\n{path.read_text()}" for path in sorted(Path(folder).glob("*.err"))]
            raise DistributedFailure("\n".join([verdict, *errors]))
        silent = [rank for rank in range(world_size) if not Path(folder, f"{rank}.pt").exists()]
        if silent:
            raise DistributedFailure(f"ranks {silent} exited with 0 without returning from {fn.__qualname__}")
        return [torch.load(Path(folder, f"{rank}.pt"), weights_only=True) for rank in range(world_size)]
