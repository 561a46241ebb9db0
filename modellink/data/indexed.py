"""Megatron's token files: `PREFIX.bin` (tokens back to back) and `PREFIX.idx` (where each sequence starts).

Reading is a memory map: a sequence is a numpy view, nothing is copied or loaded ahead. Writing streams to temporary
files and renames them at the end, so a finished pair is always whole; memory does not depend on the number of
documents.

Layout of `.idx`, little endian: magic `MMIDIDX\\0\\0`, uint64 version 1, uint8 dtype code, uint64 N sequences, uint64
D document boundaries, int32[N] lengths in tokens, int64[N] byte offsets in `.bin`, int64[D] boundaries as sequence
indices (0 first, N last), and, in multimodal files only, int8[N] modes. An empty document is a repeated boundary.
"""

from __future__ import annotations

import contextlib
import os
import shutil
import struct
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from types import TracebackType
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt

from modellink.errors import ModelLinkError
from modellink.files import atomic_path, fsync_directory

MAGIC = b"MMIDIDX\x00\x00"
VERSION = 1
_HEADER = struct.Struct("<9sQBQQ")
DTYPE_OF_CODE = {
    code: np.dtype(name).newbyteorder("<")
    for code, name in enumerate(["u1", "i1", "i2", "i4", "i8", "f8", "f4", "u2"], start=1)
}
_CODE_OF_DTYPE = {dtype: code for code, dtype in DTYPE_OF_CODE.items()}
_BLOCK = 1 << 20


def best_dtype(vocab_size: int) -> np.dtype[Any]:
    """The token dtype Megatron picks for a vocabulary: uint16 below 65,500 entries, int32 otherwise."""
    return np.dtype("<u2") if vocab_size < 65500 else np.dtype("<i4")


def strip_suffix(prefix: str | os.PathLike[str]) -> str:
    """Return `prefix` without a trailing `.bin` or `.idx`, which users often leave on."""
    text = os.fspath(prefix)
    return text[:-4] if text.endswith((".bin", ".idx")) else text


class IndexedDataset:
    """Read-only sequences of one `.bin/.idx` pair.

    `ds[i]` is sequence i as a read-only 1-D view of the mapped file, in the file's own dtype. Raises ModelLinkError
    when a file is missing, truncated, or not of this format.

    Attributes:
        dtype: dtype of the tokens.
        sequence_lengths: int32 [N], tokens per sequence.
        document_indices: int64 [D], sequence index at which each document starts, then N.
        sequence_modes: int8 [N] in multimodal files, else None.
    """

    def __init__(self, prefix: str | os.PathLike[str]) -> None:
        self.prefix = strip_suffix(prefix)
        idx, bin_ = Path(self.prefix + ".idx"), Path(self.prefix + ".bin")
        for path in (idx, bin_):
            if not path.is_file():
                raise ModelLinkError(
                    f"dataset file {path} does not exist; give the prefix of a .bin/.idx pair that "
                    f"`modellink preprocess` made, such as out_text_document"
                )
        buffer = _map(idx, np.dtype("u1"))
        self.dtype, count, boundaries = _read_header(idx, buffer)
        body = _HEADER.size
        self.sequence_lengths: npt.NDArray[np.int32] = np.frombuffer(buffer, "<i4", count, body)
        self._offsets = np.frombuffer(buffer, "<i8", count, body + 4 * count)
        self.document_indices: npt.NDArray[np.int64] = np.frombuffer(buffer, "<i8", boundaries, body + 12 * count)
        modes_at = body + 12 * count + 8 * boundaries
        self.sequence_modes = np.frombuffer(buffer, "i1", count, modes_at) if count and len(buffer) > modes_at else None
        self._check_bin(bin_)
        self._tokens = _map(bin_, self.dtype)

    def _check_bin(self, path: Path) -> None:
        # Every writer lays sequences out in order, so the end of the last one is the size of the file.
        expected = 0
        if len(self.sequence_lengths):
            expected = int(self._offsets[-1]) + int(self.sequence_lengths[-1]) * self.dtype.itemsize
        found = path.stat().st_size
        if found != expected:
            problem = "is truncated" if found < expected else "does not belong to its .idx"
            raise ModelLinkError(
                f"dataset file {path} {problem}: it has {found:,} bytes, {self.prefix}.idx describes {expected:,}; "
                f"copy both files again or run preprocess again"
            )

    def __len__(self) -> int:
        return len(self.sequence_lengths)

    def __getitem__(self, index: int) -> npt.NDArray[Any]:
        return self.get(index)

    def __iter__(self) -> Iterator[npt.NDArray[Any]]:
        return (self.get(i) for i in range(len(self)))

    def get(self, index: int, offset: int = 0, length: int | None = None) -> npt.NDArray[Any]:
        """Return `length` tokens (all that follow when None) of sequence `index`, from its token `offset`, as a
        view."""
        size = int(self.sequence_lengths[index])
        length = size - offset if length is None else length
        if offset < 0 or length < 0 or offset + length > size:
            raise IndexError(f"tokens {offset}..{offset + length} of sequence {index}, which has {size}")
        start = int(self._offsets[index]) // self.dtype.itemsize + offset
        return self._tokens[start : start + length]

    def check_index(self) -> None:
        """Raise ModelLinkError when the index does not lay sequences out one after the other, as every writer does.

        Opening checks sizes alone; this reads the whole index, at about a second per hundred million sequences.
        """
        end = 0
        for start in range(0, len(self), _BLOCK):
            lengths = self.sequence_lengths[start : start + _BLOCK].astype(np.int64) * self.dtype.itemsize
            ends = end + np.cumsum(lengths)
            wrong = (lengths < 0) | (self._offsets[start : start + _BLOCK] != ends - lengths)
            if wrong.any():
                raise ModelLinkError(self._damaged(f"sequence {start + int(wrong.argmax())} is not where it should be"))
            end = int(ends[-1])
        documents = self.document_indices
        if len(documents) and (documents[0] != 0 or documents[-1] != len(self) or (np.diff(documents) < 0).any()):
            raise ModelLinkError(self._damaged("its documents do not follow each other"))

    def _damaged(self, how: str) -> str:
        return f"dataset file {self.prefix}.idx is damaged: {how}; copy it again or run preprocess again"

    @property
    def tokens(self) -> npt.NDArray[Any]:
        """The whole `.bin` as one 1-D view."""
        return self._tokens

    def __reduce__(self) -> tuple[Any, ...]:
        return IndexedDataset, (self.prefix,)


def _map(path: Path, dtype: np.dtype[Any]) -> npt.NDArray[Any]:
    """Map a file read-only; an empty file, which cannot be mapped, is an empty array."""
    if path.stat().st_size == 0:
        return np.empty(0, dtype)
    # a plain array over the map: slicing np.memmap itself is several times slower
    return np.memmap(path, dtype=dtype, mode="r").view(np.ndarray)


def _read_header(path: Path, buffer: npt.NDArray[np.uint8]) -> tuple[np.dtype[Any], int, int]:
    """Check an `.idx` and return (token dtype, sequences, document boundaries)."""
    if bytes(buffer[:9]) != MAGIC:
        raise ModelLinkError(
            f"{path} is not a Megatron .idx file (it does not start with MMIDIDX); run `modellink preprocess` on the "
            f"raw data"
        )
    if len(buffer) < _HEADER.size:
        raise ModelLinkError(
            f"dataset file {path} is truncated inside its header; copy it again or run preprocess again"
        )
    _, version, code, count, boundaries = _HEADER.unpack(bytes(buffer[: _HEADER.size]))
    if version != VERSION or code not in DTYPE_OF_CODE:
        raise ModelLinkError(
            f"{path} has version {version} and dtype code {code}; readable are version {VERSION} and codes 1 to 8, "
            f"so write it again with preprocess"
        )
    expected = _HEADER.size + 12 * count + 8 * boundaries
    if len(buffer) not in (expected, expected + count):
        problem = "is truncated" if len(buffer) < expected else "has bytes that do not belong to it"
        raise ModelLinkError(
            f"dataset file {path} {problem}: {len(buffer):,} bytes instead of {expected:,}; copy it again or run "
            f"preprocess again"
        )
    return DTYPE_OF_CODE[code], count, boundaries


class WriterState(NamedTuple):
    """How far a writer has got: tokens, sequences and documents. `IndexedDatasetWriter(..., resume=state)` goes on
    from there."""

    tokens: int = 0
    sequences: int = 0
    documents: int = 0


class IndexedDatasetWriter:
    """Write one `.bin/.idx` pair; the pair appears under its name when `finalize` returns, whole or not at all.

        with IndexedDatasetWriter(prefix, np.uint16) as writer:
            writer.add_document(ids)

    Until then the tokens lie in `{work}.bin`, lengths in `{work}.lengths`, document ends in `{work}.documents`, where
    `work` is a hidden name beside the output. With a `work` prefix of the caller's own the files survive the process:
    `flush` makes them durable, and a new writer given the `state` of that moment as `resume` cuts off what came later
    and goes on.
    """

    def __init__(
        self,
        prefix: str | os.PathLike[str],
        dtype: npt.DTypeLike = np.int32,
        *,
        work: str | os.PathLike[str] | None = None,
        resume: WriterState | None = None,
    ) -> None:
        self.prefix = strip_suffix(prefix)
        self.dtype = np.dtype(dtype).newbyteorder("<")
        if self.dtype not in _CODE_OF_DTYPE:
            raise ModelLinkError(f"dtype {self.dtype} cannot be stored in {self.prefix}.bin; use uint16 or int32")
        self.state = resume or WriterState()
        target = Path(self.prefix)
        target.parent.mkdir(parents=True, exist_ok=True)
        stem = os.fspath(work) if work is not None else str(target.parent / f".{target.name}.{os.getpid()}.tmp")
        self._paths = [Path(stem + suffix) for suffix in (".bin", ".lengths", ".documents")]
        widths = (self.dtype.itemsize, 4, 8)
        self._handles = []
        for path, width, done in zip(self._paths, widths, self.state, strict=True):
            if resume and path.stat().st_size < width * done:
                raise ModelLinkError(f"{path} is shorter than its journal says; delete the folder to start over")
            handle = open(path, "r+b" if resume else "wb", buffering=_BLOCK)  # noqa: SIM115 - closed in finalize/abort
            handle.truncate(width * done)
            handle.seek(width * done)
            self._handles.append(handle)

    def add_document(self, tokens: npt.ArrayLike, lengths: Sequence[int] | None = None) -> None:
        """Add one document of one sequence (none if it has no tokens), or of several whose `lengths` sum to its
        size."""
        flat = np.asarray(tokens)
        sizes = np.asarray(([len(flat)] if len(flat) else []) if lengths is None else lengths, np.int64)
        self.add_documents(flat, sizes, np.array([len(sizes)]))

    def add_documents(
        self, tokens: npt.NDArray[Any], lengths: npt.NDArray[Any], sequences: npt.NDArray[Any] | None = None
    ) -> None:
        """Add many documents at once.

        `tokens` holds them back to back, `lengths` the tokens of each sequence, `sequences` the number of sequences in
        each document (None: one each). Raises ModelLinkError when a token does not fit the file's dtype.
        """
        assert int(lengths.sum()) == len(tokens), "lengths must add up to the tokens given"
        if len(tokens) and self.dtype.kind in "iu" and tokens.dtype != self.dtype:
            info, low, high = np.iinfo(self.dtype), tokens.min(), tokens.max()
            if low < info.min or high > info.max:
                raise ModelLinkError(
                    f"token ids {low} to {high} do not fit {self.dtype.name}, the type of {self.prefix}.bin; "
                    f"the tokenizer gives ids beyond its own vocabulary size, or int32 is needed"
                )
        counts = np.ones(len(lengths), np.int64) if sequences is None else np.asarray(sequences, np.int64)
        ends = self.state.sequences + np.cumsum(counts)
        assert len(lengths) == int(counts.sum()), "sequences must add up to the lengths given"
        bin_, sizes, documents = self._handles
        bin_.write(np.ascontiguousarray(tokens, self.dtype).data)
        sizes.write(np.ascontiguousarray(lengths, "<i4").data)
        documents.write(np.ascontiguousarray(ends, "<i8").data)
        done = self.state
        self.state = WriterState(done.tokens + len(tokens), done.sequences + len(lengths), done.documents + len(counts))

    def add_index(self, prefix: str | os.PathLike[str]) -> None:
        """Append every document of another pair of the same dtype."""
        other = IndexedDataset(prefix)
        if other.dtype != self.dtype:
            raise ModelLinkError(
                f"{other.prefix}.bin holds {other.dtype.name}, {self.prefix}.bin {self.dtype.name}; "
                f"only files of one dtype can be merged, so preprocess both with the same tokenizer"
            )
        if other.sequence_modes is not None:
            raise ModelLinkError(f"{other.prefix}.idx is multimodal (it has sequence modes), which merging would lose")
        for start in range(0, len(other.tokens), _BLOCK * 8):
            self._handles[0].write(other.tokens[start : start + _BLOCK * 8].data)
        self._handles[1].write(other.sequence_lengths.data)
        self._handles[2].write((other.document_indices[1:] + self.state.sequences).data)
        done = self.state
        self.state = WriterState(
            done.tokens + len(other.tokens),
            done.sequences + len(other),
            done.documents + len(other.document_indices) - 1,
        )

    def flush(self) -> WriterState:
        """Put everything added so far on disk, durably, and return the state to resume from."""
        for handle in self._handles:
            handle.flush()
            os.fsync(handle.fileno())
        return self.state

    def finalize(self) -> None:
        """Write the index and move both files into place."""
        self.flush()
        for handle in self._handles:
            handle.close()
        bin_, idx = Path(self.prefix + ".bin"), Path(self.prefix + ".idx")
        with atomic_path(idx) as temporary:
            self._write_index(temporary)
            # an old index must never describe a new .bin, so it goes before the .bin changes and the new one comes last
            idx.unlink(missing_ok=True)
            os.replace(self._paths[0], bin_)
            fsync_directory(bin_.parent)
        self._remove()

    def _write_index(self, path: Path) -> None:
        _, lengths_path, documents_path = self._paths
        done = self.state
        with open(path, "wb") as out:
            code = _CODE_OF_DTYPE[self.dtype]
            out.write(_HEADER.pack(MAGIC, VERSION, code, done.sequences, done.documents + 1))
            with open(lengths_path, "rb") as lengths:
                shutil.copyfileobj(lengths, out, _BLOCK)
                lengths.seek(0)
                offset = 0
                while len(block := np.frombuffer(lengths.read(4 * _BLOCK), "<i4")):
                    ends = offset + np.cumsum(block, dtype=np.int64) * self.dtype.itemsize
                    out.write(np.concatenate([[offset], ends[:-1]]).astype("<i8").data)
                    offset = int(ends[-1])
            out.write(bytes(8))
            with open(documents_path, "rb") as documents:
                shutil.copyfileobj(documents, out, _BLOCK)

    def abort(self) -> None:
        """Drop everything; the files under the final name stay as they were."""
        for handle in self._handles:
            handle.close()
        self._remove()

    def close(self) -> None:
        """Close the work files without finishing, so that a later writer can resume from them."""
        for handle in self._handles:
            handle.close()

    def _remove(self) -> None:
        for path in self._paths:
            with contextlib.suppress(FileNotFoundError):
                path.unlink()

    def __enter__(self) -> IndexedDatasetWriter:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, tb: TracebackType | None) -> None:
        if kind is None:
            self.finalize()
        else:
            self.abort()


def merge(prefixes: Sequence[str | os.PathLike[str]], output: str | os.PathLike[str]) -> None:
    """Concatenate pairs of one dtype, in the order given, into the pair `output`; document boundaries are shifted."""
    if not prefixes:
        raise ModelLinkError(f"nothing to merge into {os.fspath(output)}: no .bin/.idx pair was given")
    with IndexedDatasetWriter(output, IndexedDataset(prefixes[0]).dtype) as writer:
        for prefix in prefixes:
            writer.add_index(prefix)


def check_vocabulary(datasets: Iterable[Any], vocab_size: int, limit: int = 1 << 27) -> None:
    """Raise ModelLinkError when a dataset holds a token id that a vocabulary of `vocab_size` entries does not have, or
    has a damaged index.

    Each is an IndexedDataset, or carries one as `.indexed` or several as `.datasets`; None and others are passed over.
    A file is looked at once, at about a second per thousand million tokens; of one with more than `limit` tokens
    evenly spread blocks are. The search stops at the first bad block.
    """
    for prefix, indexed in _token_files(datasets).items():
        indexed.check_index()
        if indexed.dtype.kind == "u" and np.iinfo(indexed.dtype).max < vocab_size:
            continue  # nothing too large can be stored
        tokens, stride = indexed.tokens, max(1, -(-len(indexed.tokens) // limit))
        for start in range(0, len(tokens), _BLOCK * stride):
            block = tokens[start : start + _BLOCK]
            low, high = int(block.min()), int(block.max())
            if low < 0 or high >= vocab_size:
                raise ModelLinkError(
                    f"the tokenizer disagrees with the data: {prefix}.bin holds token id {low if low < 0 else high}, "
                    f"the vocabulary has {vocab_size} entries; use the tokenizer, and for instructions the "
                    f"--prompt-type, that the data was preprocessed with, or preprocess again"
                )


def _token_files(datasets: Iterable[Any]) -> dict[str, IndexedDataset]:
    """Prefix -> file of everything that `datasets` read from."""
    found: dict[str, IndexedDataset] = {}
    for dataset in datasets:
        found |= _token_files(getattr(dataset, "datasets", ()))
        indexed = getattr(dataset, "indexed", dataset)
        if isinstance(indexed, IndexedDataset):
            found[indexed.prefix] = indexed
    return found
