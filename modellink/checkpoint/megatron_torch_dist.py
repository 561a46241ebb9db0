"""Steps of Megatron-Core's distributed checkpointing (format torch_dist), read without it and without running anything.

    iter_0000500/.metadata           pickle: shape and dtype of every tensor, and where its chunks lie
    iter_0000500/__R_N.distcp        chunks, each a file of torch.save within this one
    iter_0000500/common.pt           everything that is no tensor, with the run's options

Tensors are those of the whole model, whatever layout wrote them, cut as for one rank, but for three things undone here:
equal layers lie in one tensor whose first dimension counts layers; experts lie in one whose next dimension counts them;
and the two halves of a gated projection may be two tensors. Optimizer and random states are passed over.
"""

from __future__ import annotations

import io
import itertools
import math
import re
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from modellink.checkpoint.megatron_files import FileTensor, Inert, SafeUnpickler, read_torch_file
from modellink.checkpoint.megatron_layout import COMMON, INDEX
from modellink.checkpoint.megatron_names import normalised
from modellink.errors import ModelLinkError

_OTHERS = ("optimizer", "chained_", "rng_state", "rerun_state", "opt_param_scheduler")
_WRAPPERS = ("model.", "module.")
_HALVES = re.compile(r"(.*\.linear_fc1\.(?:weight|bias))_([wv])")
_EXPERTS = re.compile(r"\.mlp\.experts\.experts\.(?:(\d+)\.)?")


class _Record:
    """An object of the index: its attributes, which some versions store by name and others in order."""

    order: tuple[str, ...] = ()

    def __setstate__(self, state: Any) -> None:
        self.__dict__.update(state if isinstance(state, dict) else zip(self.order, state, strict=False))


class _Index(SafeUnpickler):
    """Knows the classes of torch's index by name; nothing of torch or Megatron is built."""

    _ORDER = {
        "Metadata": ("state_dict_metadata", "planner_data", "storage_data"),
        "TensorStorageMetadata": ("properties", "size", "chunks"),
        "ChunkStorageMetadata": ("offsets", "sizes"),
        "TensorProperties": ("dtype",),
        "MetadataIndex": ("fqn", "offset", "index"),
        "_StorageInfo": ("relative_path", "offset", "length", "transform_descriptors"),
    }

    def find_class(self, module: str, name: str) -> Any:
        if module.startswith("torch.distributed.checkpoint."):
            order = self._ORDER.get(name)
            if order is None:
                return type(name, (Inert,), {})
            return type(name, (_Record,), {"order": order, **dict.fromkeys(order)})  # what is not stored is None
        if module in ("torch.serialization", "torch._utils") and name.startswith("_get_"):
            return Inert
        return super().find_class(module, name)


@dataclass(frozen=True)
class _Chunk:
    """Values of a tensor from `offsets` on, `sizes` of them; a file of torch.save at `start` in `file`."""

    file: Path
    start: int
    length: int
    offsets: tuple[int, ...]
    sizes: tuple[int, ...]

    def read(self) -> Tensor:
        stored = read_torch_file(self.file, self.start, self.length)
        if not isinstance(stored, FileTensor) or stored.shape != self.sizes:
            raise ModelLinkError(f"{self.file} is damaged: its chunk at byte {self.start} is not what the index says.")
        return stored.read()


@dataclass(frozen=True)
class DistributedTensor:
    """A tensor in chunks over files, with the attributes of a FileTensor."""

    file: Path
    dtype: torch.dtype
    shape: tuple[int, ...]
    # the leading indices that select it in each chunk, and the row where what the chunk holds begins
    parts: tuple[tuple[_Chunk, tuple[int, ...], int], ...]

    def read(self) -> Tensor:
        """The tensor, mapped from its file where it is one chunk."""
        whole = None
        for chunk, at, row in self.parts:
            piece = chunk.read()[tuple(i - o for i, o in zip(at, chunk.offsets, strict=False))]
            if piece.shape == self.shape:
                return piece
            whole = torch.empty(self.shape, dtype=self.dtype) if whole is None else whole
            starts = list(chunk.offsets[len(at) :])
            starts[0] += row
            place = tuple(slice(start, start + size) for start, size in zip(starts, piece.shape, strict=True))
            whole[place] = piece
        assert whole is not None
        return whole


class _Stored:
    """A tensor as the index describes it."""

    def __init__(self, name: str, record: Any, chunks: list[_Chunk]) -> None:
        self.name, self.chunks = name, chunks
        self.dtype, self.shape = record.properties.dtype, tuple(record.size)

    def split(self, index: Path, leading: int) -> dict[tuple[int, ...], DistributedTensor]:
        """The tensors at all indices of the first `leading` dimensions (layers, experts)."""
        places: dict[tuple[int, ...], list[_Chunk]] = {}
        for chunk in self.chunks:
            held = zip(chunk.offsets[:leading], chunk.sizes[:leading], strict=True)
            for at in itertools.product(*(range(offset, offset + size) for offset, size in held)):
                places.setdefault(at, []).append(chunk)
        shape, found = self.shape[leading:], {}
        for at in itertools.product(*map(range, self.shape[:leading])):
            parts = tuple((chunk, at, 0) for chunk in places.get(at, ()))
            if sum(math.prod(chunk.sizes[leading:]) for chunk, *_ in parts) != math.prod(shape):
                raise ModelLinkError(f"{index}: {self.name!r} is not whole; copy the files of this step again.")
            found[at] = DistributedTensor(index, self.dtype, shape, parts)
        return found


def read_step(step: Path) -> tuple[dict[str, DistributedTensor], dict[str, Any]]:
    """The tensors of a model under the names of Megatron-Core, layers and experts numbered, and the run's options.

    Raises ModelLinkError for what is damaged, missing, or wants to run.
    """
    common = read_torch_file(step / COMMON)
    options = common.get("args") if isinstance(common, dict) else None
    found: dict[str, DistributedTensor] = {}
    for stored in _read_index(step / INDEX):
        names = _names(stored)
        tensors = stored.split(step / INDEX, len(names[0][1]) if names else 0)
        found |= {name: tensors[at] for name, at in names}
    return _joined(found), dict(vars(options)) if hasattr(options, "__dict__") else {}


def _read_index(index: Path) -> list[_Stored]:
    try:
        root = _Index(io.BytesIO(index.read_bytes()), index).load()
        places: dict[str, list[_Chunk]] = {}
        for key, info in root.storage_data.items():
            if getattr(info, "transform_descriptors", None):
                raise ModelLinkError(f"{index}: the chunks are compressed, which Megatron never does.")
            if key.offset is None:
                continue
            path = index.parent / str(info.relative_path)
            if path.parent != index.parent:
                raise ModelLinkError(f"{index} points outside of its folder, to {info.relative_path}: do not trust it.")
            places.setdefault(key.fqn, []).append(_Chunk(path, info.offset, info.length, tuple(key.offset), ()))
        return [
            _Stored(name, record, _sized(index, name, record, places.get(name, [])))
            for name, record in root.state_dict_metadata.items()
            if isinstance(record, _Record) and not name.startswith(_OTHERS)
        ]
    except ModelLinkError:
        raise
    except Exception as error:  # a damaged pickle fails in any way there is
        reason = str(error).partition("\n")[0] or repr(error)
        raise ModelLinkError(f"{index} is damaged or cut short ({reason}); copy the file again.") from None


def _sized(index: Path, name: str, record: Any, chunks: list[_Chunk]) -> list[_Chunk]:
    """The chunks of a tensor with their sizes; every one that the index announces must be stored."""
    sizes = {tuple(chunk.offsets): tuple(chunk.sizes) for chunk in record.chunks}
    if sizes.keys() != {chunk.offsets for chunk in chunks}:
        raise ModelLinkError(f"{index}: {name!r} is not whole; copy the files of this step again.")
    for chunk in chunks:
        if not chunk.file.is_file():
            raise ModelLinkError(f"{chunk.file} is missing: copy all files of this step.")
    return [_Chunk(each.file, each.start, each.length, each.offsets, sizes[each.offsets]) for each in chunks]


def _names(stored: _Stored) -> list[tuple[str, tuple[int, ...]]]:
    """The tensors of single layers and experts that lie in one stored tensor: name and leading indices."""
    name = stored.name
    for wrapper in _WRAPPERS:
        name = name.removeprefix(wrapper)
    stacked = re.match(r"decoder\.layers\.(?!\d)", name)
    patterns: list[tuple[str, tuple[int, ...]]] = [(name, ())]
    if stacked is not None:
        patterns = [(f"decoder.layers.{i}.{name[stacked.end() :]}", (i,)) for i in range(stored.shape[0])]
    found: list[tuple[str, tuple[int, ...]]] = []
    for pattern, at in patterns:
        match = _EXPERTS.search(pattern)
        if match is None:
            found.append((pattern, at))
            continue
        numbers = range(stored.shape[len(at)]) if match[1] is None else [int(match[1])]
        for expert in numbers:
            each = f"{pattern[: match.start()]}.mlp.experts.local_experts.{expert}.{pattern[match.end() :]}"
            found.append((each, (*at, expert) if match[1] is None else at))
    return found


def _joined(found: dict[str, DistributedTensor]) -> dict[str, DistributedTensor]:
    """The spelling of the other files, and the halves of gated projections one below the other."""
    names: dict[str, DistributedTensor] = {}
    for name, tensor in found.items():
        half = _HALVES.fullmatch(name)
        if half is None:
            names[normalised(name)] = tensor
        elif half[2] == "w" and (other := found.get(f"{half[1]}_v")) is not None:
            rows, *rest = tensor.shape
            lower = tuple((chunk, at, rows) for chunk, at, _ in other.parts)
            shape = (rows + other.shape[0], *rest)
            names[normalised(half[1])] = DistributedTensor(tensor.file, tensor.dtype, shape, tensor.parts + lower)
        elif half[2] == "v" and f"{half[1]}_w" in found:
            continue
        else:
            raise ModelLinkError(f"{tensor.file}: {name!r} is there without its other half.")
    return names
