"""Files of torch.save, read without running what they hold and written piece by piece.

Such a file is an uncompressed zip: one pickle that describes the objects, and one record of raw bytes per storage. A
pickle can call anything, so this reader looks names up in a short list: tensors become references that are mapped from
the file when they are read, numbers and containers become themselves, and the enumerations, random states and
extension states that Megatron keeps beside its weights become inert objects. Every other name is refused, and nothing
is ever imported for a file. The writer appends storages as they come and the pickle at the end, so a file of any size
costs the memory of one tensor.
"""

from __future__ import annotations

import collections
import io
import math
import os
import pickle
import struct
import zipfile
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO, NamedTuple

import torch
from torch import Tensor

from modellink.checkpoint.digest import byte_pieces
from modellink.errors import ModelLinkError

_FLOATS = {"FloatStorage": torch.float32, "HalfStorage": torch.float16, "BFloat16Storage": torch.bfloat16}
_STORAGES = _FLOATS | {
    "DoubleStorage": torch.float64,
    "LongStorage": torch.int64,
    "IntStorage": torch.int32,
    "ShortStorage": torch.int16,
    "CharStorage": torch.int8,
    "ByteStorage": torch.uint8,
    "BoolStorage": torch.bool,
}
# what a checkpoint holds beside weights: enumerations of the program, numpy's random state, extension states
_INERT_PACKAGES = ("megatron", "modellink", "mindspeed", "numpy", "signal", "enum", "_codecs", "_io", "io", "pathlib")
_UNUSED = ("getattr", "bytearray")
_INERT_NAMES = (("torch", "device"), *((module, name) for module in ("builtins", "__builtin__") for name in _UNUSED))
_ALIGNMENT = 64
_NONE: Mapping[str, int] = {}


class _Storage(NamedTuple):
    dtype: torch.dtype
    key: str
    numel: int


def _strides(shape: tuple[int, ...]) -> tuple[int, ...]:
    return tuple(math.prod(shape[dim + 1 :]) for dim in range(len(shape)))


@dataclass(frozen=True)
class FileTensor:
    """A tensor in a file; `read` maps it. `offset` and `stride` count elements within `storage`."""

    file: Path
    start: int
    storage: _Storage
    offset: int
    shape: tuple[int, ...]
    stride: tuple[int, ...]

    @property
    def dtype(self) -> torch.dtype:
        return self.storage.dtype

    @property
    def is_contiguous(self) -> bool:
        return self.stride == _strides(self.shape)

    def read(self) -> Tensor:
        """The tensor, backed by the file's own pages; writing to it changes neither file nor other tensors."""
        size = self.storage.numel * self.dtype.itemsize
        if size and self.start % self.dtype.itemsize:  # a file within a file may lie anywhere
            with open(self.file, "rb") as handle:
                handle.seek(self.start)
                copied = torch.frombuffer(bytearray(handle.read(size)), dtype=self.dtype)
            return copied.as_strided(self.shape, self.stride, self.offset)
        mapped = torch.UntypedStorage.from_file(str(self.file), False, self.file.stat().st_size)
        flat = torch.empty(0, dtype=self.dtype)
        flat.set_(mapped[self.start : self.start + size])
        return flat.as_strided(self.shape, self.stride, self.offset)


class Inert:
    """Stands for an object that is not needed: takes any construction, remembers nothing, does nothing."""

    def __init__(self, *values: object) -> None:
        pass

    def __setstate__(self, state: object) -> None:
        pass

    def __setitem__(self, key: object, value: object) -> None:
        pass

    def append(self, value: object) -> None:
        pass

    def extend(self, values: object) -> None:
        pass

    def __hash__(self) -> int:
        return id(self)


class SafeUnpickler(pickle.Unpickler):
    """Unpickles with the names of `find_class` alone; classes are made per file, so that none can be changed."""

    def __init__(
        self, handle: Any, file: Path, starts: Mapping[str, int] = _NONE, sizes: Mapping[str, int] = _NONE
    ) -> None:
        super().__init__(handle)
        self.file, self.starts, self.sizes = file, starts, sizes
        self.known: dict[tuple[str, str], Any] = {
            ("collections", "OrderedDict"): collections.OrderedDict,
            ("argparse", "Namespace"): type("Namespace", (), {}),
            ("torch", "Size"): tuple,
            ("torch._utils", "_rebuild_tensor_v2"): self._tensor,
            ("torch._utils", "_rebuild_parameter"): lambda data, *_: data,
            **{("torch", name): dtype for name, dtype in _STORAGES.items()},
            **{("builtins", kind.__name__): kind for kind in (set, frozenset, complex, slice)},
            **{("__builtin__", kind.__name__): kind for kind in (set, frozenset, complex, slice)},
        }

    def find_class(self, module: str, name: str) -> Any:
        if (module, name) in self.known:
            return self.known[module, name]
        if module == "torch" and isinstance(dtype := getattr(torch, name, None), torch.dtype):
            return dtype
        if module.split(".")[0] in _INERT_PACKAGES or (module, name) in _INERT_NAMES:
            return type("Inert", (Inert,), {})
        raise ModelLinkError(
            f"{self.file} wants to build {module}.{name}, which no checkpoint needs: nothing in it was run; do not "
            "trust this file, or save the weights again without that object."
        )

    def persistent_load(self, pid: Any) -> _Storage:
        _, dtype, key, _, numel = pid
        if not isinstance(dtype, torch.dtype) or self.sizes.get(key, -1) < numel * dtype.itemsize or numel < 0:
            raise ModelLinkError(f"{self.file} is damaged: the storage {key} is missing or short; copy the file again.")
        return _Storage(dtype, key, numel)

    def _tensor(
        self, storage: _Storage, offset: int, shape: tuple[int, ...], stride: tuple[int, ...], *_: object
    ) -> FileTensor:
        extent = offset + sum((size - 1) * step for size, step in zip(shape, stride, strict=True)) + 1
        if (0 not in shape and extent > storage.numel) or min((0, offset, *stride)) < 0:
            raise ModelLinkError(f"{self.file} is damaged: a tensor reaches beyond its storage; copy the file again.")
        return FileTensor(self.file, self.starts[storage.key], storage, offset, tuple(shape), tuple(stride))


class _Window(io.RawIOBase):
    """The bytes `start` .. `start + length` of a file, as a file of their own."""

    def __init__(self, handle: BinaryIO, start: int, length: int) -> None:
        self.handle, self.start, self.length, self.place = handle, start, length, 0

    def readable(self) -> bool:
        return True

    def seekable(self) -> bool:
        return True

    def tell(self) -> int:
        return self.place

    def seek(self, offset: int, whence: int = io.SEEK_SET) -> int:
        self.place = max(0, offset + {io.SEEK_SET: 0, io.SEEK_CUR: self.place, io.SEEK_END: self.length}[whence])
        return self.place

    def readinto(self, buffer: Any) -> int:
        self.handle.seek(self.start + self.place)
        data = self.handle.read(max(0, min(len(buffer), self.length - self.place)))
        buffer[: len(data)] = data
        self.place += len(data)
        return len(data)


def read_torch_file(file: Path, start: int = 0, length: int | None = None) -> Any:
    """The content of a file of torch.save (or of the one that lies in `file` from `start` on), tensors as FileTensor.

    Raises ModelLinkError, naming the file, when it is cut short or damaged, or holds more than data.
    """
    try:
        with open(file, "rb") as handle:
            size = file.stat().st_size - start if length is None else length
            if start + size > file.stat().st_size:
                raise ModelLinkError(f"{file} is cut short: {start + size} bytes are needed; copy the file again.")
            with zipfile.ZipFile(io.BufferedReader(_Window(handle, start, size))) as archive:
                return _read_archive(archive, handle, file, start)
    except ModelLinkError:
        raise
    except Exception as error:  # a damaged pickle fails in any way there is
        reason = str(error).partition("\n")[0] or repr(error)
        raise ModelLinkError(f"{file} is damaged or cut short ({reason}); copy the file again.") from None


def _read_archive(archive: zipfile.ZipFile, handle: BinaryIO, file: Path, start: int) -> Any:
    entries = {info.filename.partition("/")[2]: info for info in archive.infolist()}
    if "byteorder" in entries and archive.read(entries["byteorder"]) != b"little":
        raise ModelLinkError(f"{file} was written on a big-endian machine: save it again on another one.")
    records = {name.removeprefix("data/"): info for name, info in entries.items() if name.startswith("data/")}
    starts = {key: _start(handle, info, start) for key, info in records.items()}
    sizes = {key: info.file_size for key, info in records.items()}
    with archive.open(entries["data.pkl"]) as pickled:
        return SafeUnpickler(pickled, file, starts, sizes).load()


def _start(handle: BinaryIO, info: zipfile.ZipInfo, archive: int) -> int:
    """Where the bytes of an entry of the zip at `archive` begin; its header repeats the name and may hold padding."""
    if info.compress_type != zipfile.ZIP_STORED:
        raise ModelLinkError(f"{handle.name} is a compressed zip, not a file of torch.save.")
    header = archive + info.header_offset
    handle.seek(header)
    *_, name, extra = struct.unpack("<4s5H3L2H", handle.read(30))
    return int(header + 30 + name + extra)


class _Writer(pickle.Pickler):
    def persistent_id(self, obj: Any) -> Any:
        if not isinstance(obj, _Storage):
            return None
        kind = next(name for name, dtype in _STORAGES.items() if dtype == obj.dtype)
        return ("storage", getattr(torch, kind), obj.key, "cpu", obj.numel)

    def reducer_override(self, obj: Any) -> Any:
        if not isinstance(obj, FileTensor):
            return NotImplemented
        rebuild: Callable[..., Tensor] = torch._utils._rebuild_tensor_v2
        hooks: collections.OrderedDict[str, Any] = collections.OrderedDict()
        return rebuild, (obj.storage, obj.offset, obj.shape, obj.stride, False, hooks)


class TorchFileWriter:
    """Writes one file that torch.load reads: `add` tensors, then `close` with the object that refers to them."""

    def __init__(self, file: Path) -> None:
        self.file = file
        self._handle = open(file, "wb")  # noqa: SIM115
        self._archive = zipfile.ZipFile(self._handle, "w")
        self._count = 0

    def add(self, tensor: Tensor) -> FileTensor:
        """Write the values of `tensor`; the reference returned takes its place in the content."""
        return self.add_pieces(tuple(tensor.shape), tensor.dtype, [tensor])

    def add_pieces(self, shape: tuple[int, ...], dtype: torch.dtype, pieces: Iterable[Tensor]) -> FileTensor:
        """Write a tensor whose values come in `pieces`, one after the other."""
        storage = _Storage(dtype, str(self._count), math.prod(shape))
        self._count += 1
        flat = (bytes_N.numpy() for piece in pieces for bytes_N in byte_pieces(piece))
        start = self._write(f"data/{storage.key}", storage.numel * dtype.itemsize, flat)
        return FileTensor(self.file, start, storage, 0, shape, _strides(shape))

    def close(self, content: Any) -> None:
        """Write the pickle and make the file durable."""
        # a ZipInfo made here tells no time: the same content gives the same bytes
        with self._archive.open(zipfile.ZipInfo(f"{self.file.stem}/data.pkl"), "w") as handle:
            _Writer(handle, protocol=2).dump(content)
        for name, text in (("byteorder", b"little"), ("version", b"3\n")):
            self._archive.writestr(zipfile.ZipInfo(f"{self.file.stem}/{name}"), text)
        self.abandon()

    def abandon(self) -> None:
        """Let go of the file, whatever state it is in."""
        self._archive.close()
        self._handle.flush()
        os.fsync(self._handle.fileno())
        self._handle.close()

    def _write(self, name: str, size: int, pieces: Iterable[Any]) -> int:
        info = zipfile.ZipInfo(f"{self.file.stem}/{name}")
        large = size * 1.05 > zipfile.ZIP64_LIMIT
        header = self._handle.tell() + 30 + len(info.filename) + (20 if large else 0) + 4
        padding = -header % _ALIGNMENT  # mapped tensors want aligned bytes: the rest of the header is a void field
        info.extra = struct.pack("<2sH", b"FB", padding) + bytes(padding)
        with self._archive.open(info, "w", force_zip64=large) as handle:
            written = sum(handle.write(piece) for piece in pieces)
        assert written == size
        return header + padding
