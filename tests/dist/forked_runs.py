"""Run `modellink train` in forked processes that can be killed: one import of the framework serves many runs.

Called by tests as a program of its own, because a fork is only safe in a process without threads:

    python forked_runs.py CASES.json RESULTS.json

CASES.json is a list of runs, done one after another; each is {"argv": [...], "ranks": 2, "die": "phase" or null,
"kill_after": seconds or null}. RESULTS.json gets each run's exit codes by rank (-9: killed), duration and last output.
"""

from __future__ import annotations

import json
import os
import signal
import socket
import sys
import time
from pathlib import Path
from typing import Any

import matplotlib.pyplot  # noqa: F401  imported once for all runs, it takes a second
import torch

from modellink.checkpoint import store as store_module
from modellink.checkpoint.store import CheckpointStore
from modellink.cli.main import main
from modellink.train.trainer import Trainer

LIMIT_S = 120.0
# Where a run can be told to die: (object, attribute, before or after it did its work, which call).
PHASES: dict[str, tuple[Any, str, str, int]] = {
    "before the step": (Trainer, "_iteration", "before", 6),
    "after the step": (Trainer, "_iteration", "after", 5),
    "before the save": (CheckpointStore, "_open", "before", 2),
    "save opened": (CheckpointStore, "_open", "after", 2),
    "shards written": (store_module, "write_shards", "after", 2),
    "own files written": (CheckpointStore, "_write_own", "after", 2),
    "manifest written": (CheckpointStore, "_write_manifest", "after", 2),
    "before the tracker": (CheckpointStore, "_track", "before", 2),
    "after the tracker": (CheckpointStore, "_track", "after", 2),
    "old steps pruned": (CheckpointStore, "_prune", "after", 2),
}


def _arrange_death(phase: str) -> None:
    """Kill this process with SIGKILL at a call of `phase`."""
    owner, name, when, call = PHASES[phase]
    original, calls = getattr(owner, name), [0]

    def dying(*args: Any, **kwargs: Any) -> Any:
        calls[0] += 1
        if when == "before" and calls[0] == call:
            os.kill(os.getpid(), signal.SIGKILL)
        result = original(*args, **kwargs)
        if calls[0] == call:
            os.kill(os.getpid(), signal.SIGKILL)
        return result

    setattr(owner, name, dying)


def _child(argv: list[str], rank: int, ranks: int, port: int, phase: str | None, output: Path) -> None:
    log = os.open(output, os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
    os.dup2(log, 1)
    os.dup2(log, 2)
    if ranks > 1:
        os.environ |= {
            "RANK": str(rank), "WORLD_SIZE": str(ranks), "LOCAL_RANK": str(rank), "LOCAL_WORLD_SIZE": str(ranks),
            "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port),
        }  # fmt: skip
    if phase is not None:
        _arrange_death(phase)
    code = 1
    try:
        code = main(["train", *argv])
        sys.stdout.flush()
    finally:
        os._exit(code)


def _free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


def run(case: dict[str, Any], folder: Path) -> dict[str, Any]:
    """Fork the ranks of one run and wait for them; at `kill_after` seconds those that still run are killed."""
    ranks, port = case.get("ranks", 1), _free_port()
    logs = [folder / f"rank_{rank}.log" for rank in range(ranks)]
    codes: dict[int, int] = {}
    running = {}
    for rank in range(ranks):
        pid = os.fork()
        if pid == 0:
            _child(case["argv"], rank, ranks, port, case.get("die"), logs[rank])
        running[pid] = rank
    began = time.monotonic()
    while running:
        if time.monotonic() - began > (case.get("kill_after") or LIMIT_S):
            for pid in running:
                os.kill(pid, signal.SIGKILL)
        for pid in list(running):
            done, status = os.waitpid(pid, os.WNOHANG)
            if done:
                codes[running.pop(pid)] = os.waitstatus_to_exitcode(status)
        time.sleep(0.005)
    return {
        "codes": [codes[rank] for rank in range(ranks)],
        "seconds": time.monotonic() - began,
        "output": [log.read_text()[-2000:] for log in logs],
    }


if __name__ == "__main__":
    torch.set_num_threads(1)
    cases, results = json.loads(Path(sys.argv[1]).read_text()), []
    for case in cases:
        results.append(run(case, Path(sys.argv[2]).parent))
        Path(sys.argv[2]).write_text(json.dumps(results))
