"""Safetensors files of a known content, written tensor by tensor, in any order and from several threads.

Names, shapes and dtypes of all tensors are known before the first value is, so every file begins with its final header
and its final size, and each tensor goes straight to its place: no more than one is ever in memory, and what an
interrupted run finished stays where it is.
"""

from __future__ import annotations

import json
import math
import os
from collections.abc import Iterable
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

from modellink.checkpoint.digest import write_at

# transformers wants "format"; "writer" says that a folder is ours to replace
WRITER = {"format": "pt", "writer": "modellink"}
_DTYPES = {torch.float64: "F64", torch.float32: "F32", torch.float16: "F16", torch.bfloat16: "BF16"}


class Entry(NamedTuple):
    """One tensor to be written."""

    name: str
    shape: tuple[int, ...]
    dtype: torch.dtype

    @property
    def nbytes(self) -> int:
        return math.prod(self.shape) * self.dtype.itemsize


class _Place(NamedTuple):
    file: str
    offset: int
    entry: Entry


class ShardFiles:
    """The files in `folder` for `entries`, in their order, of at most `max_bytes` each (but whole tensors)."""

    def __init__(self, folder: Path, entries: Iterable[Entry], max_bytes: int) -> None:
        self.folder = folder
        shards: list[list[Entry]] = [[]]
        size = 0
        for entry in entries:
            if shards[-1] and size + entry.nbytes > max_bytes:
                shards.append([])
                size = 0
            shards[-1].append(entry)
            size += entry.nbytes
        self.headers: dict[str, tuple[bytes, int]] = {}
        self.places: dict[str, _Place] = {}
        for number, shard in enumerate(shards):
            many = len(shards) > 1
            file = f"model-{number + 1:05d}-of-{len(shards):05d}.safetensors" if many else "model.safetensors"
            self._lay_out(file, shard)

    def _lay_out(self, file: str, shard: list[Entry]) -> None:
        header: dict[str, Any] = {"__metadata__": WRITER}
        offsets, end = {}, 0
        # wide types first: every tensor then begins at a multiple of its element size, as mapped readers want
        for entry in sorted(shard, key=lambda entry: -entry.dtype.itemsize):
            offsets[entry.name] = end
            end += entry.nbytes
            described = {"dtype": _DTYPES[entry.dtype], "shape": list(entry.shape)}
            header[entry.name] = described | {"data_offsets": [offsets[entry.name], end]}
        text = json.dumps(header, separators=(",", ":"), ensure_ascii=False).encode()
        text += b" " * (-len(text) % 8)
        start = 8 + len(text)
        self.headers[file] = (len(text).to_bytes(8, "little") + text, start + end)
        self.places |= {entry.name: _Place(file, start + offsets[entry.name], entry) for entry in shard}

    @property
    def weight_map(self) -> dict[str, str]:
        return {name: place.file for name, place in self.places.items()}

    @property
    def total_bytes(self) -> int:
        return sum(place.entry.nbytes for place in self.places.values())

    @property
    def main_dtype(self) -> torch.dtype:
        """The dtype of most bytes."""
        sizes: dict[torch.dtype, int] = {}
        for place in self.places.values():
            sizes[place.entry.dtype] = sizes.get(place.entry.dtype, 0) + place.entry.nbytes
        return max(sizes, key=lambda dtype: sizes[dtype])

    def create(self) -> None:
        """Make the files, each with its header and its final size; those of an interrupted run keep their content."""
        for file, (header, size) in self.headers.items():
            with open(os.open(self.folder / file, os.O_RDWR | os.O_CREAT, 0o644), "r+b") as handle:
                handle.write(header)
                handle.truncate(size)

    def write(self, tensors: Iterable[tuple[str, Tensor]]) -> None:
        """Put tensors into their places and make them durable."""
        opened: dict[str, int] = {}
        try:
            for name, tensor in tensors:
                place = self.places[name]
                assert (tuple(tensor.shape), tensor.dtype) == place.entry[1:], f"{name} is not what was announced"
                if place.file not in opened:
                    opened[place.file] = os.open(self.folder / place.file, os.O_WRONLY)
                write_at(opened[place.file], tensor, place.offset)
                del tensor  # the next one is made before this name would let go of it
            for descriptor in opened.values():
                os.fsync(descriptor)
        finally:
            for descriptor in opened.values():
                os.close(descriptor)
