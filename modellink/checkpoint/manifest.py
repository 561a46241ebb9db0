"""The manifest: what makes a checkpoint step complete.

A step folder counts as complete when its ``manifest.json`` is there and every file the manifest lists exists with the
listed size; it is sound when the SHA-256 sums agree too. The manifest is written last, inside a folder that still has a
temporary name, so a step that carries its final name has always been whole once; what the manifest finds afterwards is
damage: a deleted shard, a truncated copy, a flipped bit.
"""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Iterable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

MANIFEST = "manifest.json"
FORMAT = 1


class DamagedStep(Exception):
    """A step folder is incomplete or its content is not what was written; the message says which file and how."""


@dataclass(frozen=True)
class FileRecord:
    """One file of a step: its size in bytes and its SHA-256 in hexadecimal."""

    size: int
    sha256: str


@dataclass(frozen=True)
class Manifest:
    """What one step consists of; `saved_at` in seconds since 1970, `world_size` the number of ranks that wrote it."""

    iteration: int
    world_size: int
    saved_at: float
    files: dict[str, FileRecord]

    def dump(self) -> str:
        return json.dumps({"format": FORMAT, **asdict(self)}, indent=1)


def hash_file(path: Path) -> FileRecord:
    """Return size and SHA-256 of `path`, read as a stream."""
    with open(path, "rb") as handle:
        digest = hashlib.file_digest(handle, "sha256")
        return FileRecord(handle.tell(), digest.hexdigest())


def write_synced(path: Path, content: bytes | str) -> None:
    """Write a file of a folder that is not published yet: durable, but without a rename of its own."""
    with open(path, "wb") as handle:
        handle.write(content.encode() if isinstance(content, str) else content)
        handle.flush()
        os.fsync(handle.fileno())


def read_manifest(step: Path) -> Manifest:
    """Return the manifest of the step folder `step`; raises DamagedStep when it is missing or not a manifest."""
    try:
        content: Any = json.loads((step / MANIFEST).read_bytes())
        if content["format"] != FORMAT:
            raise DamagedStep(f"{MANIFEST} has format {content['format']!r}; this version reads format {FORMAT}")
        files = {str(name): FileRecord(int(f["size"]), str(f["sha256"])) for name, f in content["files"].items()}
        manifest = Manifest(int(content["iteration"]), int(content["world_size"]), float(content["saved_at"]), files)
    except FileNotFoundError:
        raise DamagedStep(f"{MANIFEST} is missing") from None
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise DamagedStep(f"{MANIFEST} is not readable ({type(error).__name__}: {error})") from error
    if strays := [name for name in files if Path(name).name != name]:
        raise DamagedStep(f"{MANIFEST} lists {strays[0]!r}, which is not a file of the step's own folder")
    return manifest


def check_sizes(step: Path) -> Manifest:
    """Return the manifest of a complete step; raises DamagedStep for a missing file or one of another size."""
    manifest = read_manifest(step)
    for name, record in manifest.files.items():
        try:
            size = (step / name).stat().st_size
        except FileNotFoundError:
            raise DamagedStep(f"{name} is missing") from None
        if size != record.size:
            raise DamagedStep(f"{name} has {size} bytes instead of {record.size}")
    return manifest


def check_hashes(step: Path, records: Iterable[tuple[str, FileRecord]]) -> None:
    """Raise DamagedStep for the first of the files in `records` whose content is not what the manifest says."""
    for name, record in records:
        try:
            found = hash_file(step / name)
        except OSError as error:
            raise DamagedStep(f"{name} cannot be read ({error.strerror})") from error
        if found != record:
            raise DamagedStep(f"{name} does not have the SHA-256 that its manifest lists")
