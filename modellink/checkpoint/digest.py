"""Tensors as bytes: mapped from a file, written to one, checked for NaN, and a digest that shows any accidental change.

A conversion reads and writes at the speed of memory, so its checks must too. The digest multiplies the 64-bit words of
a block by fixed odd random numbers and adds them up modulo 2^64 (several GB/s on one core, no temporary copies); the
sums of all blocks, the dtype and the shape go through SHA-256. It guards against accidents, not against forgery.
"""

from __future__ import annotations

import functools
import hashlib
import math
import os
from collections.abc import Iterator, Sequence
from pathlib import Path

import torch
from torch import Tensor

_WORDS = 1 << 16  # of a block: 512 KiB, which stay in a core's cache
_PIECE = 4 << 20  # bytes of rows that are made contiguous, or written, at a time


def is_finite(tensor: Tensor) -> bool:
    """Whether no value is NaN or infinite; the extremes show both, at a tenth of the cost of `torch.isfinite`."""
    if not tensor.numel():
        return True
    low, high = torch.aminmax(tensor)
    return bool(torch.isfinite(low) and torch.isfinite(high))


def digest(tensor: Tensor) -> str:
    """Hexadecimal digest of a CPU tensor: its dtype, its shape and its values in row-major order, however it lies."""
    found = hashlib.sha256(f"{tensor.dtype} {list(tensor.shape)}".encode())
    multipliers = _multipliers()
    for bytes_N in byte_pieces(tensor):
        whole = bytes_N.numel() // 8 * 8
        words_N = _words(bytes_N[:whole])
        sums = [torch.dot(block, multipliers[: block.numel()]) for block in words_N.split(_WORDS)]
        found.update(torch.stack(sums).numpy().tobytes())
        found.update(bytes_N[whole:].numpy().tobytes())
    return found.hexdigest()


def map_tensor(file: Path, start: int, shape: Sequence[int], dtype: torch.dtype) -> Tensor:
    """The contiguous tensor whose bytes begin at `start` of `file`, backed by the file's own pages.

    Writing to it does not change the file. The pages are let go with the last view of the tensor.
    """
    end = start + math.prod(shape) * dtype.itemsize
    storage = torch.UntypedStorage.from_file(str(file), False, file.stat().st_size)
    return torch.empty(0, dtype=dtype).set_(storage[start:end]).view(shape)


def write_at(descriptor: int, tensor: Tensor, offset: int) -> int:
    """Write the values of a CPU tensor, in row-major order, at `offset` of an open file; return where they end."""
    for bytes_N in byte_pieces(tensor):
        content = bytes_N.numpy().data
        while content:
            written = os.pwrite(descriptor, content, offset)
            content, offset = content[written:], offset + written
    return offset


def byte_pieces(tensor: Tensor) -> Iterator[Tensor]:
    """The bytes of a tensor in row-major order, some rows at a time: a copy of a strided tensor is never whole."""
    tensor = tensor.detach()
    rows = tensor.reshape(1) if tensor.dim() == 0 else tensor
    if rows.numel():
        for piece in rows.split(max(1, _PIECE // (rows[0].numel() * rows.element_size()))):
            yield piece.contiguous().flatten().view(torch.uint8)


def _words(bytes_N: Tensor) -> Tensor:
    # a tensor mapped from a file may begin at any multiple of its element size
    aligned = bytes_N if bytes_N.data_ptr() % 8 == 0 and bytes_N.storage_offset() % 8 == 0 else bytes_N.clone()
    return aligned.view(torch.int64)


@functools.cache
def _multipliers() -> Tensor:
    words = hashlib.shake_256(b"modellink").digest(_WORDS * 8)
    return torch.frombuffer(bytearray(words), dtype=torch.int64) | 1
