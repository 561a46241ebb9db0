"""Leaving in good order: stop signals, limits of a run, and naming the rank that died.

All ranks stop at the same iteration or they hang in the next collective, so every decision here is agreed on by all of
them. A dead rank cannot agree to anything: the survivors find it by what it last published in the rendezvous store.
"""

from __future__ import annotations

import contextlib
import os
import signal
import socket
import sys
import threading
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from types import FrameType
from typing import Any

import torch
import torch.distributed as dist

from modellink.errors import RunFailure

INTERRUPTED = 130


class SignalHandler:
    """Turns SIGTERM and SIGINT into a flag while it is active (a context manager).

    The first signal sets the flag, so that the iteration under way ends and a checkpoint can be written; a second
    SIGINT raises KeyboardInterrupt. The handlers that were there before come back on exit.
    """

    def __init__(self, signals: tuple[signal.Signals, ...] = (signal.SIGTERM, signal.SIGINT)) -> None:
        self.signals = signals
        self.received: signal.Signals | None = None
        self._previous: dict[signal.Signals, Any] = {}

    def __enter__(self) -> SignalHandler:
        for number in self.signals:
            self._previous[number] = signal.signal(number, self._note)
        return self

    def __exit__(self, *_: object) -> None:
        for number, handler in self._previous.items():
            if signal.getsignal(number) == self._note:  # a run that ends for another reason may ignore signals by now
                signal.signal(number, handler)
        self._previous.clear()

    def _note(self, number: int, _: FrameType | None) -> None:
        if number == signal.SIGINT and self.received == signal.SIGINT:
            raise KeyboardInterrupt
        self.received = signal.Signals(number)


@dataclass(frozen=True)
class StopReason:
    """Why a run ends before its last iteration, as a sentence for the log, and the exit code that goes with it."""

    text: str
    exit_code: int = 0


class ExitConditions:
    """When to stop early: a multiple of `exit_interval`, `exit_duration_in_mins` since construction, or a signal.

    `check` is called by every rank after every iteration; with a process group it makes one all-reduce of two integers
    over `group` on `device` (skipped when neither a signal nor the clock can stop the run).
    """

    def __init__(
        self,
        *,
        exit_interval: int | None = None,
        exit_duration_in_mins: float | None = None,
        signals: SignalHandler | None = None,
        group: dist.ProcessGroup | None = None,
        device: torch.device | str = "cpu",
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self.exit_interval = exit_interval
        self.exit_duration_in_mins = exit_duration_in_mins
        self.signals = signals
        self.group = group
        self.device = device
        self.clock = clock
        self._begin = clock()

    def check(self, iteration: int) -> StopReason | None:
        """Return why to stop after `iteration`, the same on every rank, or None to go on. A signal comes first."""
        received, expired = self._agreed()
        if received:
            return StopReason(f"{signal.Signals(received).name} was received", INTERRUPTED)
        if expired:
            return StopReason(f"the run has lasted {self.exit_duration_in_mins:g} minutes (exit_duration_in_mins)")
        if self.exit_interval and iteration % self.exit_interval == 0:
            return StopReason(f"iteration {iteration} is a multiple of exit_interval {self.exit_interval}")
        return None

    def _agreed(self) -> tuple[int, int]:
        if self.signals is None and self.exit_duration_in_mins is None:
            return 0, 0
        minutes = (self.clock() - self._begin) / 60
        received = 0 if self.signals is None or self.signals.received is None else int(self.signals.received)
        expired = self.exit_duration_in_mins is not None and minutes >= self.exit_duration_in_mins
        if not dist.is_initialized():
            return received, int(expired)
        votes = torch.tensor([received, int(expired)], dtype=torch.int32, device=self.device)
        dist.all_reduce(votes, op=dist.ReduceOp.MAX, group=self.group)
        received, stop = votes.tolist()
        return received, stop


def _is_alive(pid: int) -> bool:
    """Tell whether process `pid` of this host still runs; one that has ended but is not reaped yet does not."""
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    except PermissionError:
        return True
    with contextlib.suppress(OSError):
        # the state letter follows the name in parentheses, which may itself hold blanks
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] not in "ZX"
    return True


_COLLECTIVE_WORDS = (
    "gloo", "nccl", "hccl", "connection closed by peer", "connection reset", "broken pipe", "timed out waiting",
    "wait timeout", "processgroup",
)  # fmt: skip


def is_collective_failure(error: BaseException) -> bool:
    """Tell whether `error` comes from a collective whose other side is gone, rather than from this rank's own work."""
    if isinstance(error, dist.DistError):
        return True
    text = str(error).lower()
    return isinstance(error, RuntimeError) and any(word in text for word in _COLLECTIVE_WORDS)


def _in_main_thread() -> bool:
    return threading.current_thread() is threading.main_thread()


def _advice(what: str) -> str:
    return f"{what}; see the log of that rank, then resume from the last checkpoint."


def _listed(ranks: list[int]) -> str:
    more = f" and {len(ranks) - 8} more" if len(ranks) > 8 else ""
    return f"rank {', '.join(str(rank) for rank in ranks[:8])}{more}"


class PeerWatch:
    """Names the rank that died, and at which step, when a collective fails on the survivors, and ends them.

    Every rank publishes in `store` where it runs and the last iteration it finished; a rank that fails on its own
    publishes why. `store` is the rendezvous store (that of torchrun outlives any rank). Wrap each iteration:

        with watch.iteration(n):
            ...

    A survivor learns of a death in one of three ways. Its collective fails (gloo does at once): RunFailure. torchrun,
    which ends the whole group, sends SIGTERM first: RunFailure as well, where a peer of this host is gone. Or its
    collective waits on (NCCL does): a thread that looks every `look_every_s` prints the sentence and ends the process
    with exit code 1, because nothing else can. `patience_s` is how long a survivor waits for a trace of what happened:
    a process takes a moment to disappear.
    """

    def __init__(
        self, store: dist.Store, rank: int, world_size: int, *, patience_s: float = 5.0, look_every_s: float = 2.0
    ) -> None:
        self.store = dist.PrefixStore("modellink/watch", store)
        self.rank = rank
        self.world_size = world_size
        self.patience_s = patience_s
        self.look_every_s = look_every_s
        self._host = socket.gethostname()
        self._iteration = -1
        self._inside = threading.Event()
        self._leaving = False
        self._ending: str | None = None  # the sentence, once SIGTERM has been answered with it
        self._thread: threading.Thread | None = None
        local, size = int(os.environ.get("LOCAL_RANK", "0")), int(os.environ.get("LOCAL_WORLD_SIZE", "1"))
        self._neighbours = [r for r in range(rank - local, rank - local + size) if r != rank and 0 <= r < world_size]
        self.store.set(f"place/{rank}", f"{os.getpid()} {self._host}")
        self.beat(-1)

    def beat(self, iteration: int) -> None:
        """Publish that this rank finished `iteration` (-1: none yet)."""
        self.store.set(f"done/{self.rank}", str(iteration))

    @contextlib.contextmanager
    def iteration(self, iteration: int) -> Iterator[None]:
        """Publish the end of the enclosed iteration; turn a failed collective into RunFailure naming the dead rank."""
        self._iteration = iteration
        self._start_thread()
        handles = signal.getsignal(signal.SIGTERM) == signal.SIG_DFL and _in_main_thread()
        if handles:
            signal.signal(signal.SIGTERM, self._terminated)
        self._inside.set()
        try:
            yield
        except Exception as error:
            if self._ending is not None:
                raise RunFailure(self._ending) from error  # possibly wrapped by what it went through
            if is_collective_failure(error):
                self._leave()
                raise RunFailure(self.verdict(iteration)) from error
            with contextlib.suppress(RuntimeError):  # the store may be gone; the error itself matters more
                self.store.set(f"failed/{self.rank}", f"{iteration} {type(error).__name__}: {error}")
                self._first_verdict(_advice(self._fault(self.rank) or ""))
            raise
        finally:
            self._inside.clear()
            if handles and not self._leaving:
                signal.signal(signal.SIGTERM, signal.SIG_DFL)
        self.beat(iteration)

    def _leave(self) -> None:
        """This process ends by itself, with a sentence: torchrun's SIGTERM must not cut it short (SIGKILL follows)."""
        self._leaving = True
        if _in_main_thread():
            signal.signal(signal.SIGTERM, signal.SIG_IGN)

    def _terminated(self, number: int, _: FrameType | None) -> None:
        if self._leaving:
            return
        died = False
        with contextlib.suppress(RuntimeError):  # without a store nobody can be found dead
            died = any(self._fault(rank) and not self._was_stopped(rank) for rank in self._neighbours)
            if not died:
                self.store.set(f"stopped/{self.rank}", str(self._iteration))
        if not died:  # the whole run is asked to stop: what SIGTERM does where nobody handles it
            signal.signal(number, signal.SIG_DFL)
            os.kill(os.getpid(), number)
            return
        self._leave()
        self._ending = self.verdict(self._iteration)
        raise RunFailure(self._ending)

    def _start_thread(self) -> None:
        if self._thread is None:
            self._thread = threading.Thread(target=self._keep_looking, name="peer watch", daemon=True)
            self._thread.start()

    def _keep_looking(self) -> None:
        while self._inside.wait():
            at = self._iteration
            time.sleep(self.look_every_s)
            with contextlib.suppress(RuntimeError):  # a store that is gone is the main thread's to report
                if self._is_stuck(at) and self._somebody_died(at):
                    time.sleep(self.patience_s)  # a collective that notices fails by then, in the main thread
                    if self._is_stuck(at):
                        print(f"[rank {self.rank}] modellink: error: {self.verdict(at)}", file=sys.stderr, flush=True)
                        os._exit(1)

    def _is_stuck(self, iteration: int) -> bool:
        return self._inside.is_set() and self._iteration == iteration and not self._leaving

    def _somebody_died(self, iteration: int) -> bool:
        if self.store.check(["verdict"]):
            return True
        return any(self._fault(rank) and self._done(rank) < iteration for rank in self._neighbours)

    def verdict(self, iteration: int) -> str:
        """Return the sentence that says which rank stopped at which iteration, the same on every survivor that asks."""
        try:
            return self._first_verdict(self._look(iteration))
        except RuntimeError:
            return (
                f"a collective failed in iteration {iteration} and the rendezvous store does not answer: the process "
                "that holds it (torchrun, or rank 0) has died; see its log, then resume from the last checkpoint."
            )

    def _first_verdict(self, found: str) -> str:
        # the first survivor to notice leaves too, and later ones would take it for the culprit
        return self.store.compare_set("verdict", "", found).decode()

    def _look(self, iteration: int) -> str:
        self.store.set(f"asking/{self.rank}", str(iteration))
        deadline = time.monotonic() + self.patience_s
        while True:
            culprits = [text for rank in range(self.world_size) if rank != self.rank and (text := self._fault(rank))]
            if culprits or self.store.check(["verdict"]) or time.monotonic() > deadline:
                break
            time.sleep(0.05)
        if culprits:
            return _advice("; ".join(culprits[:3]))
        done = {rank: self._done(rank) for rank in range(self.world_size)}
        last = min(done.values())
        what = f"a collective failed in iteration {iteration}"
        if last < max(done.values()):
            lagging = _listed([rank for rank, finished in done.items() if finished == last])
            return (
                f"{what}: {lagging} stopped after iteration {last}; see the log, then resume from the last checkpoint."
            )
        silent = [rank for rank in done if not self.store.check([f"asking/{rank}"])]
        if silent:
            return (
                f"{what}: every rank had finished iteration {last}, but {_listed(silent)} gave no sign of life for "
                f"{self.patience_s:g} s since; see the log, then resume from the last checkpoint."
            )
        return (
            f"{what} although every rank had finished iteration {last} and none has died; check the network between "
            "the hosts, then resume from the last checkpoint."
        )

    def _fault(self, rank: int) -> str | None:
        """Return what is known to have stopped `rank`: its own report, or the end of its process on this host."""
        if self.store.check([f"failed/{rank}"]):
            at, _, reason = self.store.get(f"failed/{rank}").decode().partition(" ")
            return f"rank {rank} failed in iteration {at} ({reason})"
        if self._was_stopped(rank):
            return f"rank {rank} was stopped by SIGTERM in iteration {self.store.get(f'stopped/{rank}').decode()}"
        if self.store.check([f"place/{rank}"]):
            pid, _, host = self.store.get(f"place/{rank}").decode().partition(" ")
            if host == self._host and not _is_alive(int(pid)):
                return f"rank {rank} (process {pid} on {host}) died in iteration {self._done(rank) + 1}"
        return None

    def _was_stopped(self, rank: int) -> bool:
        return self.store.check([f"stopped/{rank}"])

    def _done(self, rank: int) -> int:
        return int(self.store.get(f"done/{rank}")) if self.store.check([f"done/{rank}"]) else -1
