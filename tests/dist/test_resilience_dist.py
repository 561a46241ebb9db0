"""Stopping together, and naming the rank that died, with real processes."""

from __future__ import annotations

import os
import signal
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
from spawn import DistributedFailure, run_distributed

from modellink.errors import RunFailure
from modellink.train.resilience import ExitConditions, PeerWatch, SignalHandler

pytestmark = pytest.mark.dist


def connect(rank: int, world_size: int) -> PeerWatch:
    store = dist.TCPStore("127.0.0.1", int(os.environ["MASTER_PORT"]), is_master=False)
    return PeerWatch(store, rank, world_size)


def signal_then_death(rank: int, world_size: int, folder: str, way: str) -> None:
    stopped_at = 0
    with SignalHandler() as handler:
        conditions = ExitConditions(signals=handler, exit_duration_in_mins=60)
        for iteration in range(1, 10):
            if rank == 1 and iteration == 3:
                signal.raise_signal(signal.SIGTERM)
            reason = conditions.check(iteration)
            if reason is not None:
                stopped_at = iteration
                break
    assert stopped_at == 3 and reason is not None and "SIGTERM" in reason.text, (stopped_at, reason)

    watch = connect(rank, world_size)
    try:
        for iteration in range(1, 10):
            with watch.iteration(iteration):
                if rank == 1 and iteration == 4:
                    if way == "killed":
                        os.kill(os.getpid(), signal.SIGKILL)
                    raise ValueError("loss is NaN")
                dist.all_reduce(torch.ones(4))
    except RunFailure as failure:
        Path(folder, f"{rank}.txt").write_text(str(failure))
        raise


@pytest.mark.parametrize(
    ("way", "sentence"),
    [("killed", "died in iteration 4"), ("raises", "rank 1 failed in iteration 4 (ValueError: loss is NaN)")],
)
def test_signal_stops_all_and_a_dead_rank_is_named_by_all(tmp_path: Path, way: str, sentence: str) -> None:
    with pytest.raises(DistributedFailure):
        run_distributed(signal_then_death, 3, str(tmp_path), way)
    texts = {path.stem: path.read_text() for path in tmp_path.glob("*.txt")}
    assert texts.keys() == {"0", "2"}, "a survivor did not report"
    assert texts["0"] == texts["2"]
    assert "rank 1 " in texts["0"] and sentence in texts["0"]
