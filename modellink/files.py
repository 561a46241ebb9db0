"""Files that are either the old version or the new one, never half of each.

Everything ModelLink writes goes through a temporary file in the target's own folder, an fsync and a rename, so a
process that dies at any moment leaves the previous file in place.
"""

from __future__ import annotations

import contextlib
import glob
import os
import secrets
import shutil
import tempfile
from collections.abc import Collection, Iterator
from pathlib import Path


def fsync_directory(folder: Path) -> None:
    """Make renames inside `folder` durable (a rename lives in the directory, not in the file)."""
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


@contextlib.contextmanager
def atomic_path(path: str | os.PathLike[str]) -> Iterator[Path]:
    """Yield a temporary path beside `path`; on a clean exit it replaces `path`, on an exception it is removed."""
    target = Path(path)
    target.parent.mkdir(parents=True, exist_ok=True)
    descriptor, name = tempfile.mkstemp(prefix=f".{target.name}.", suffix=".tmp", dir=target.parent)
    os.close(descriptor)
    temporary = Path(name)
    try:
        yield temporary
        # mkstemp creates mode 0600; a finished file follows the user's umask as any other file does
        umask = os.umask(0)
        os.umask(umask)
        os.chmod(temporary, 0o666 & ~umask)
        with open(temporary, "rb") as handle:
            os.fsync(handle.fileno())
        os.replace(temporary, target)
        fsync_directory(target.parent)
    finally:
        temporary.unlink(missing_ok=True)


def atomic_write(path: str | os.PathLike[str], content: bytes | str) -> None:
    """Replace `path` by `content` (str is written as UTF-8) in one step."""
    with atomic_path(path) as temporary:
        temporary.write_bytes(content.encode() if isinstance(content, str) else content)


def sync_folder(folder: Path) -> None:
    """Make every file in `folder`, however deep, durable and readable as any new file is."""
    umask = os.umask(0)
    os.umask(umask)
    for parent, _, names in os.walk(folder):
        for name in names:
            with open(os.path.join(parent, name), "rb") as handle:
                os.fchmod(handle.fileno(), 0o666 & ~umask)  # safetensors and mkstemp make files only their owner reads
                os.fsync(handle.fileno())
        os.chmod(parent, 0o777 & ~umask)
        fsync_directory(Path(parent))


def replace_folder(finished: Path, target: Path, keep: Collection[str] = ()) -> None:
    """Give the synced folder `finished` the name `target`; what lay there is removed, but for `keep`, which moves over.

    A process that dies between the two renames leaves the old folder as `.NAME.old-...`; see `restore_folder`.
    """
    old = target.with_name(f".{target.name}.old-{secrets.token_hex(4)}")
    if target.exists():
        for name in keep:
            if (target / name).exists() and not (finished / name).exists():
                _copy(target / name, finished / name)
        target.rename(old)
    finished.rename(target)
    fsync_directory(target.parent)
    shutil.rmtree(old, ignore_errors=True)


def restore_folder(target: Path) -> None:
    """Undo a replacement of `target` that was cut short between its two renames, and clear up after a finished one."""
    for old in target.parent.glob(f".{glob.escape(target.name)}.old-*"):
        if target.exists():
            shutil.rmtree(old, ignore_errors=True)
        else:
            old.rename(target)


def _copy(source: Path, target: Path) -> None:
    if source.is_dir():
        shutil.copytree(source, target, copy_function=_link)
    else:
        _link(source, target)


def _link(source: str | os.PathLike[str], target: str | os.PathLike[str]) -> None:
    try:
        os.link(source, target)  # the old folder keeps its file until it is removed: no byte is copied
    except OSError:
        shutil.copy2(source, target)
