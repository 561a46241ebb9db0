"""Moving tensors from a source to a sink, part by part, on several threads, within a fixed amount of memory.

A sink says which parts it consists of and which tensors each needs. Threads take parts; within a part, tensors move
group by group (those that share a stored tensor on either side). A group may be in memory only when the groups of all
threads together are no larger than the largest group of the model, so the number of threads does not change the peak,
and since every part is written by one thread in a fixed order, it does not change a byte either.
"""

from __future__ import annotations

import contextlib
import itertools
import math
import threading
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor, wait
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

import torch
from rich.progress import BarColumn, DownloadColumn, Progress, TextColumn, TimeRemainingColumn, TransferSpeedColumn
from torch import Tensor

from modellink.checkpoint.digest import digest, is_finite
from modellink.checkpoint.source import Source
from modellink.errors import ModelLinkError

SMALL = 64 << 20  # bytes that may always be in memory, so that small models need not wait


@dataclass(frozen=True)
class Part:
    """What one thread writes in one go, and what is kept of an interrupted conversion: tensors by groups."""

    name: str
    groups: list[list[str]]


class Sink(Protocol):
    """A checkpoint that is written into a folder."""

    folder: Path
    parts: list[Part]

    def create(self) -> None:
        """Prepare the folder, which may hold finished parts already."""

    def write(self, part: Part, groups: Iterator[dict[str, Tensor]]) -> Any:
        """Write a part, durably; what it returns is JSON, for `finish`. A group's dictionary is emptied after use."""

    def finish(self, reports: Mapping[str, Any]) -> None:
        """Write what makes the folder complete, from what `write` returned for each part."""


class Room:
    """How many bytes of tensors may be in memory: `take` waits until others have given back enough."""

    def __init__(self, size: int) -> None:
        self.size, self.used = size, 0
        self._changed = threading.Condition()

    @contextlib.contextmanager
    def take(self, size: int) -> Iterator[None]:
        with self._changed:
            self._changed.wait_for(lambda: self.used == 0 or self.used + size <= self.size)
            self.used += size
        try:
            yield
        finally:
            with self._changed:
                self.used -= size
                self._changed.notify_all()


class Pump:
    """Moves the tensors of `source`, cast to `dtype` (default: each as stored), on `workers` threads."""

    def __init__(self, source: Source, dtype: torch.dtype | None, workers: int, progress: bool) -> None:
        self.source, self.workers, self.progress = source, workers, progress
        self.shapes = source.shapes
        self.dtypes = {name: dtype or stored for name, stored in source.dtypes.items()}

    def size(self, names: Iterable[str]) -> int:
        """Bytes of tensors as they are written."""
        return sum(math.prod(self.shapes[name]) * self.dtypes[name].itemsize for name in names)

    def run(self, parts: Sequence[Part], work: Any, title: str) -> None:
        """Call `work(part, groups)` for every part, `groups` yielding the tensors; raises what the first that fails
        raised, after the others have stopped."""
        room = Room(max([SMALL, *(self.size(group) for part in parts for group in part.groups)]))
        stopped = threading.Event()
        names = [name for part in parts for group in part.groups for name in group]
        with progress_bar(not self.progress) as bar, ThreadPoolExecutor(self.workers) as pool:
            task = bar.add_task(title, total=self.size(names), tensors=0, of=len(names))
            counter = itertools.count(1)

            def moved(size: int) -> None:
                bar.update(task, advance=size, tensors=next(counter))

            failures: list[BaseException] = []

            def one(part: Part) -> None:
                if stopped.is_set():
                    return
                try:
                    work(part, self._groups(part, room, stopped, moved))
                except BaseException as error:
                    if not stopped.is_set():
                        failures.append(error)
                    stopped.set()

            futures = [pool.submit(one, part) for part in parts]
            try:
                wait(futures)
            finally:  # an interruption too
                stopped.set()
        if failures:
            raise failures[0]

    def _groups(
        self, part: Part, room: Room, stopped: threading.Event, moved: Callable[[int], None]
    ) -> Iterator[dict[str, Tensor]]:
        for names in part.groups:
            if stopped.is_set():
                raise ModelLinkError("stopped because another part failed.")
            with room.take(self.size(names)):
                tensors = self.source.read(names)
                for name in names:
                    tensors[name] = self._cast(name, tensors[name])
                yield tensors
                tensors.clear()
            for name in names:
                moved(self.size([name]))

    def _cast(self, name: str, tensor: Tensor) -> Tensor:
        dtype = self.dtypes[name]
        if tensor.dtype == dtype:
            return tensor
        cast = tensor.to(dtype)
        if not is_finite(cast):
            raise ModelLinkError(
                f"{self.source.folder}: tensor {name!r} holds values beyond the range of "
                f"{str(dtype).removeprefix('torch.')}: convert to bfloat16 or float32."
            )
        return cast


def digests(groups: Iterator[dict[str, Tensor]], found: dict[str, str]) -> Iterator[dict[str, Tensor]]:
    """Pass `groups` on, and put the digest of every tensor into `found`."""
    for tensors in groups:
        found |= {name: digest(tensor) for name, tensor in tensors.items()}
        yield tensors


def merge_groups(*sides: Iterable[Iterable[str]]) -> list[list[str]]:
    """The smallest groups of names that cut through no group of any of `sides`, in the order of the first of them."""
    group_of: dict[str, list[str]] = {}
    for groups in sides:
        for group in groups:
            whole: list[str] = []
            for name in group:
                for member in group_of.get(name, [name]):
                    if member not in whole:
                        whole.append(member)
            group_of |= dict.fromkeys(whole, whole)
    return list({id(group): group for group in group_of.values()}.values())


def cut_parts(groups: Iterable[list[str]], size: Any, limit: int, name: str) -> list[Part]:
    """Parts called `name` with a number, of neighbouring groups of at most `limit` bytes (but whole groups)."""
    parts: list[Part] = []
    held = limit + 1
    for group in groups:
        added = size(group)
        if held + added > limit:
            parts.append(Part(name.format(len(parts)), []))
            held = 0
        parts[-1].groups.append(group)
        held += added
    return parts


def progress_bar(disable: bool) -> Progress:
    return Progress(
        TextColumn("{task.description}"),
        BarColumn(),
        TextColumn("{task.fields[tensors]}/{task.fields[of]} tensors"),
        DownloadColumn(),
        TransferSpeedColumn(),
        TimeRemainingColumn(),
        disable=disable,
    )
