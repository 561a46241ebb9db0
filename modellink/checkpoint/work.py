"""The hidden folder beside a target in which a conversion works, and from which an interrupted one goes on.

    .NAME.tmp-1a2b3c4d5e6f/      the digits identify the source, its files' sizes and times, and all options
        journal.jsonl            first line: that identity; then one line per finished part, with what it reported
        content/                 the target as it will be

One process works in it at a time, holding its lock, which ends with the process whatever ends that. The same command
finds the folder again and does the parts that are not in the journal; folders that other commands left for the same
target, and that no living process holds, are removed. The content takes the target's name when it is complete.
"""

from __future__ import annotations

import fcntl
import glob
import hashlib
import json
import os
import shutil
import sys
import threading
from collections.abc import Collection, Iterable
from pathlib import Path
from types import TracebackType
from typing import Any

from modellink.errors import ModelLinkError
from modellink.files import fsync_directory, replace_folder, restore_folder, sync_folder

_JOURNAL = "journal.jsonl"


def fingerprint(folder: Path, *, deep: bool) -> dict[str, list[int]]:
    """Size and time of last change of every file in `folder` (with `deep`, in its subfolders too)."""
    files = sorted(path for path in (folder.rglob("*") if deep else folder.glob("*")) if path.is_file())
    return {str(path.relative_to(folder)): [(state := path.stat()).st_size, state.st_mtime_ns] for path in files}


class WorkFolder:
    """As a context: the folder for `target`, locked. Leaving it with an exception keeps the folder only when parts are
    finished and the exception says nothing against the source (a full disk, an interruption)."""

    def __init__(self, target: Path, identity: dict[str, Any]) -> None:
        self.target = target
        self._identity = json.dumps(identity, sort_keys=True, default=str)
        name = hashlib.sha256(self._identity.encode()).hexdigest()[:12]
        self.folder = target.parent / f".{target.name}.tmp-{name}"
        self.content = self.folder / "content"
        self.finished: dict[str, Any] = {}
        self.resumed = 0
        self._made: list[Path] = []
        self._lock = -1
        self._one_at_a_time = threading.Lock()

    def __enter__(self) -> WorkFolder:
        parent = self.target.parent
        self._made = [path for path in (parent, *parent.parents) if not path.exists()]
        parent.mkdir(parents=True, exist_ok=True)
        self._remove_others()
        restore_folder(self.target)
        self.folder.mkdir(exist_ok=True)
        self._lock = _lock(self.folder)
        self._read_journal()
        self.content.mkdir(exist_ok=True)
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        keep = kind is not None and self.finished and not issubclass(kind, ModelLinkError)
        if keep:
            print(
                f"modellink: {len(self.finished)} finished parts are kept in {self.folder}: run the same command again "
                "to go on from them, or remove it.",
                file=sys.stderr,
            )
        else:
            shutil.rmtree(self.folder, ignore_errors=True)
        os.close(self._lock)
        for folder in self._made if kind is not None and not keep else ():
            if folder.is_dir() and not any(folder.iterdir()):
                folder.rmdir()

    def record(self, part: str, report: Any) -> None:
        """Note that `part` is finished and durable; `report` is JSON."""
        with self._one_at_a_time, open(self.folder / _JOURNAL, "a", encoding="utf-8") as handle:
            handle.write(json.dumps([part, report]) + "\n")
            handle.flush()
            os.fsync(handle.fileno())
            self.finished[part] = report

    def publish(self, keep: Collection[str] = ()) -> None:
        """Give the content the target's name; of a folder that lies there, entries `keep` move over, others go."""
        sync_folder(self.content)
        replace_folder(self.content, self.target, keep)

    def _read_journal(self) -> None:
        path = self.folder / _JOURNAL
        lines = path.read_text(encoding="utf-8").splitlines() if path.is_file() else []
        if lines[:1] != [self._identity]:
            shutil.rmtree(self.content, ignore_errors=True)
            path.write_text(self._identity + "\n", encoding="utf-8")
            fsync_directory(self.folder)
            return
        for line in lines[1:]:
            try:
                part, report = json.loads(line)
            except ValueError:  # cut short by a crash: that part is done again
                break
            self.finished[part] = report
        self.resumed = len(self.finished)
        with open(path, "w", encoding="utf-8") as handle:  # without a last line that was cut short
            handle.writelines(f"{line}\n" for line in lines[: 1 + self.resumed])

    def _remove_others(self) -> None:
        for other in _siblings(self.target):
            if other != self.folder:
                os.close(_lock(other))
                shutil.rmtree(other, ignore_errors=True)
                print(
                    f"modellink: removed {other}, which an interrupted conversion of another source, or with other "
                    "options, left.",
                    file=sys.stderr,
                )


def _siblings(target: Path) -> Iterable[Path]:
    return (path for path in target.parent.glob(f".{glob.escape(target.name)}.tmp-*") if path.is_dir())


def _lock(folder: Path) -> int:
    """Lock `folder` for this process; the descriptor returned holds the lock."""
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        os.close(descriptor)
        raise ModelLinkError(f"another conversion is at work in {folder}: wait for it to end.") from None
    return descriptor
