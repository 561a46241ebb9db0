"""Stop signals, limits of a run, and telling a dead peer from an own mistake, in one process."""

from __future__ import annotations

import os
import signal
import subprocess
import sys

import pytest
import torch
import torch.distributed as dist

from modellink.errors import RunFailure
from modellink.train.resilience import ExitConditions, PeerWatch, SignalHandler, is_collective_failure


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_signal_sets_a_flag_and_old_handlers_return(number: signal.Signals) -> None:
    before = [signal.getsignal(n) for n in (signal.SIGTERM, signal.SIGINT)]
    with SignalHandler() as handler:
        conditions = ExitConditions(signals=handler)
        assert conditions.check(1) is None
        signal.raise_signal(number)
        assert handler.received is number
        reason = conditions.check(2)
        assert reason is not None and number.name in reason.text and reason.exit_code == 130
    assert [signal.getsignal(n) for n in (signal.SIGTERM, signal.SIGINT)] == before


def test_second_interrupt_breaks_off() -> None:
    with SignalHandler() as handler:
        signal.raise_signal(signal.SIGINT)
        with pytest.raises(KeyboardInterrupt):
            signal.raise_signal(signal.SIGINT)
        signal.raise_signal(signal.SIGTERM)
        assert handler.received is signal.SIGTERM


def test_interval_and_duration() -> None:
    now = [1000.0]
    conditions = ExitConditions(exit_interval=10, exit_duration_in_mins=2, clock=lambda: now[0])
    assert conditions.check(9) is None
    reason = conditions.check(20)
    assert reason is not None and "exit_interval 10" in reason.text and reason.exit_code == 0
    now[0] += 119
    assert conditions.check(21) is None
    now[0] += 1
    reason = conditions.check(22)
    assert reason is not None and "2 minutes" in reason.text and reason.exit_code == 0
    assert ExitConditions().check(10) is None


def test_which_errors_are_a_dead_peer() -> None:
    peer = RuntimeError("[/pytorch/third_party/gloo/gloo/transport/tcp/pair.cc:547] Connection closed by peer [::1]:1")
    assert is_collective_failure(peer)
    assert is_collective_failure(dist.DistBackendError("NCCL error"))
    assert not is_collective_failure(RuntimeError("mat1 and mat2 shapes cannot be multiplied"))
    assert not is_collective_failure(ValueError("gloo"))
    assert not is_collective_failure(torch.OutOfMemoryError("out of memory"))


CLOSED = "Connection closed by peer"


def watch_of_two(store: dist.Store) -> PeerWatch:
    return PeerWatch(store, rank=0, world_size=2, patience_s=0.2)


def verdict_of(watch: PeerWatch, iteration: int) -> str:
    with pytest.raises(RunFailure) as raised, watch.iteration(iteration):
        raise RuntimeError(CLOSED)
    assert raised.value.exit_code == 1
    return str(raised.value)


def test_dead_process_is_named_with_its_step() -> None:
    store = dist.HashStore()
    watch = watch_of_two(store)
    peer = PeerWatch(store, rank=1, world_size=2)
    child = subprocess.Popen([sys.executable, "-c", ""])
    store.set("modellink/watch/place/1", f"{child.pid} {os.uname().nodename}")
    peer.beat(6)
    child.wait()
    with watch.iteration(6):
        pass
    assert f"rank 1 (process {child.pid} on " in verdict_of(watch, 7)
    assert "died in iteration 7" in verdict_of(watch, 7)


def test_reported_failure_is_passed_on_and_the_first_verdict_stays() -> None:
    store = dist.HashStore()
    watch = watch_of_two(store)
    peer = PeerWatch(store, rank=1, world_size=2)
    with pytest.raises(ValueError, match="loss is NaN"), peer.iteration(3):
        raise ValueError("loss is NaN")
    first = verdict_of(watch, 3)
    assert "rank 1 failed in iteration 3 (ValueError: loss is NaN)" in first
    # rank 0 leaves now; a third rank that notices later must not blame it
    store.set("modellink/watch/failed/0", "3 RunFailure: ...")
    late = PeerWatch(store, rank=2, world_size=3, patience_s=0.2)
    assert verdict_of(late, 3) == first


def test_lagging_rank_and_no_culprit() -> None:
    store = dist.HashStore()
    watch = watch_of_two(store)
    peer = PeerWatch(store, rank=1, world_size=2)
    watch.beat(5)
    peer.beat(4)
    assert "rank 1 stopped after iteration 4" in verdict_of(watch, 6)


@pytest.mark.parametrize(("asked", "sentence"), [(False, "rank 1 gave no sign of life"), (True, "check the network")])
def test_rank_on_another_host_is_named_by_its_silence(asked: bool, sentence: str) -> None:
    store = dist.HashStore()
    watch = watch_of_two(store)
    peer = PeerWatch(store, rank=1, world_size=2)
    store.set("modellink/watch/place/1", "1 elsewhere")
    for each in (watch, peer):
        each.beat(5)
    if asked:
        store.set("modellink/watch/asking/1", "6")
    assert sentence in verdict_of(watch, 6)
