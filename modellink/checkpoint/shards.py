"""The tensor files of one native step: ``torch.distributed.checkpoint`` shards, written and read without trust.

PyTorch's checkpoint format keeps its index, ``.metadata``, as a pickle, and its stock reader unpickles it freely. Here
the index goes through an unpickler that builds nothing but the index's own record types, the shards through
``torch.load(weights_only=True)`` or the equally strict reader of `megatron_files`, and an index that points outside the
folder or holds anything but tensors is refused.
"""

from __future__ import annotations

import contextlib
import dataclasses
import enum
import importlib
import os
import pickle
import sys
import warnings
from collections.abc import Collection, Iterable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from torch.distributed.checkpoint.api import CheckpointException
from torch.distributed.checkpoint.default_planner import DefaultLoadPlanner, DefaultSavePlanner
from torch.distributed.checkpoint.filesystem import _StorageInfo
from torch.distributed.checkpoint.metadata import (
    Metadata,
    MetadataIndex,
    StorageMeta,
    TensorStorageMetadata,
)
from torch.distributed.tensor import DTensor

from modellink import device
from modellink.checkpoint.megatron_files import FileTensor, read_torch_file
from modellink.errors import ModelLinkError, RunFailure

INDEX = ".metadata"
_ALIGNMENT = 64  # values can be mapped where they lie at a multiple of their size

_RECORDS = {
    "torch.distributed.checkpoint.metadata": {
        "Metadata", "MetadataIndex", "StorageMeta", "TensorStorageMetadata", "TensorProperties",
        "ChunkStorageMetadata", "BytesStorageMetadata", "_MEM_FORMAT_ENCODING",
    },
    "torch.distributed.checkpoint.filesystem": {"_StorageInfo"},
    "torch": {"Size"},
    "torch.serialization": {"_get_layout"},
}  # fmt: skip


@dataclass(frozen=True)
class TensorInfo:
    """Global shape and dtype of one stored tensor."""

    shape: tuple[int, ...]
    dtype: torch.dtype


def _member(kind: type, name: str) -> Any:
    """What `getattr` may do here: some Python versions (3.11.0 to 3.11.3) store a member of an enumeration by name."""
    if isinstance(kind, enum.EnumMeta) and name in kind.__members__:
        return kind[name]
    raise pickle.UnpicklingError(f"it asks for attribute {name!r} of {kind!r}")


class _IndexUnpickler(pickle.Unpickler):
    """Builds the record types of a checkpoint index and refuses every other name, so that no code can run."""

    def find_class(self, module: str, name: str) -> Any:
        if name in _RECORDS.get(module, ()):
            return getattr(importlib.import_module(module), name)
        if module == "torch" and isinstance(constant := getattr(torch, name, None), torch.dtype | torch.memory_format):
            return constant
        if (module, name) == ("builtins", "getattr"):
            return _member
        raise pickle.UnpicklingError(f"it refers to {module}.{name}")


def read_index(step: Path) -> Metadata:
    """Return the index of the step folder `step`; raises ModelLinkError when it is damaged or holds foreign objects."""
    path = step / INDEX
    try:
        with open(path, "rb") as handle:
            index = _IndexUnpickler(handle).load()
    except OSError as error:
        raise ModelLinkError(f"the checkpoint index {path} cannot be read: {error.strerror}.") from error
    except Exception as error:  # a malformed pickle can raise any exception
        raise ModelLinkError(
            f"the checkpoint index {path} is refused: {error}; use a checkpoint that ModelLink wrote."
        ) from error
    if not isinstance(index, Metadata) or not isinstance(index.storage_data, dict):
        raise ModelLinkError(f"the checkpoint index {path} is refused: it is a {type(index).__name__}, not an index.")
    for name, entry in index.state_dict_metadata.items():
        if not isinstance(entry, TensorStorageMetadata):
            raise ModelLinkError(f"the checkpoint index {path} is refused: {name!r} is not a tensor.")
    for place in index.storage_data.values():
        if Path(place.relative_path).name != place.relative_path:
            raise ModelLinkError(f"the checkpoint index {path} is refused: it points to {place.relative_path!r}.")
    if index.storage_meta is None:
        index.storage_meta = StorageMeta()
    return index


def tensor_infos(index: Metadata) -> dict[str, TensorInfo]:
    """Return name -> shape and dtype of everything that `index` lists."""
    return {
        name: TensorInfo(tuple(entry.size), entry.properties.dtype)
        for name, entry in index.state_dict_metadata.items()
        if isinstance(entry, TensorStorageMetadata)
    }


class _Reader(dcp.FileSystemReader):
    # a parameter called `kwargs` would tell the loader to retry with an index per rank, which these steps do not have
    def read_metadata(self, *_: Any, **__: Any) -> Metadata:
        index = read_index(Path(self.path))
        assert index.storage_meta is not None
        index.storage_meta.load_id = self.load_id
        return index


class _Writer(dcp.FileSystemWriter):
    def storage_meta(self) -> StorageMeta:
        # the stock record holds the folder's absolute path, at this moment a temporary one
        return StorageMeta(save_id=self.save_id)


class _StagedPlanner(DefaultSavePlanner):
    """Plans with the live tensors' layout, and writes the copies in `staged`: the live ones may change meanwhile."""

    def __init__(self, staged: Mapping[str, torch.Tensor] | None) -> None:
        super().__init__()
        self.staged = staged

    def lookup_object(self, index: MetadataIndex) -> Any:
        return super().lookup_object(index) if self.staged is None else self.staged[index.fqn]


def stage(tensors: Mapping[str, torch.Tensor], buffers: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """Return host copies of every tensor (of a DTensor: its local shard); complete when this returns.

    `buffers` keeps the page-locked memory from one save to the next; nobody may be reading it any more.
    """
    staged = {}
    for name, tensor in tensors.items():
        local = (tensor.to_local() if isinstance(tensor, DTensor) else tensor).detach()
        buffer = buffers.get(name)
        if buffer is None or buffer.shape != local.shape or buffer.dtype != local.dtype:
            pin = local.device.type != "cpu"
            buffer = buffers[name] = torch.empty(local.shape, dtype=local.dtype, pin_memory=pin)
        staged[name] = buffer.copy_(local, non_blocking=True)
    if any(tensor.device.type != "cpu" for tensor in tensors.values()):
        device.synchronize()
    return staged


@contextlib.contextmanager
def _failures(action: str, group: dist.ProcessGroup | None) -> Iterator[None]:
    """Turn a failure that the checkpoint library gathered from all ranks into one sentence."""
    try:
        with warnings.catch_warnings():
            if group is None:
                warnings.filterwarnings("ignore", message="torch.distributed is disabled")
            yield
    except CheckpointException as error:
        rank, (cause, _) = min(error.failures.items())
        if isinstance(cause, ModelLinkError):
            raise cause from error
        raise RunFailure(f"{action} failed on rank {rank}: {type(cause).__name__}: {cause}.") from error


def write_shards(
    step: Path,
    tensors: Mapping[str, torch.Tensor],
    group: dist.ProcessGroup | None,
    staged: Mapping[str, torch.Tensor] | None = None,
) -> None:
    """Write this rank's share of `tensors` into `step`, synced to disk, and on rank 0 the index.

    Collective over `group`. A tensor that several ranks hold is written once. A failure on any rank is raised on every
    rank as RunFailure.
    """
    with _failures(f"writing {step}", group):
        dcp.save(
            dict(tensors),
            storage_writer=_Writer(step, sync_files=True),
            planner=_StagedPlanner(staged),
            process_group=group,
            no_dist=group is None,
        )


def read_shards(step: Path, tensors: Mapping[str, torch.Tensor], group: dist.ProcessGroup | None) -> None:
    """Fill `tensors`, of any layout, from `step`; a rank reads what its shards need. Collective over `group`."""
    with _failures(f"reading {step}", group):
        dcp.load(
            dict(tensors),
            storage_reader=_Reader(step),
            planner=DefaultLoadPlanner(),
            process_group=group,
            no_dist=group is None,
        )


@dataclass(frozen=True)
class Written:
    """Where `write_shard` put one whole tensor: length bytes from offset of a file of the step."""

    name: str
    shape: tuple[int, ...]
    dtype: str
    file: str
    offset: int
    length: int


def write_shard(path: Path, tensors: Iterable[tuple[str, torch.Tensor]]) -> list[Written]:
    """Write one file of a step from whole CPU tensors, one in memory at a time, synced; the index comes later."""
    written = []
    with open(path, "wb") as handle:
        for name, tensor in tensors:
            handle.write(bytes(-handle.tell() % _ALIGNMENT))
            offset = handle.tell()
            if tensor.untyped_storage().nbytes() != tensor.nbytes or not tensor.is_contiguous():
                tensor = tensor.clone(memory_format=torch.contiguous_format)  # torch.save stores all of a storage
            try:
                torch.save(tensor.detach(), handle)
            except RuntimeError as error:  # torch's writer hides what the file said
                if isinstance(error.__context__, OSError):
                    raise error.__context__ from None
                raise
            dtype = str(tensor.dtype).removeprefix("torch.")
            written.append(Written(name, tuple(tensor.shape), dtype, path.name, offset, handle.tell() - offset))
        handle.flush()
        os.fsync(handle.fileno())
    return written


def write_index(step: Path, written: Iterable[Written]) -> None:
    """Write the index of the files that `write_shard` wrote, in the order of `written`."""
    # equal strings become one object, as a pickle shows the difference
    places = {sys.intern(each.name): dataclasses.replace(each, file=sys.intern(each.file)) for each in written}
    planner = DefaultSavePlanner()
    state = {
        name: torch.empty(each.shape, dtype=getattr(torch, each.dtype), device="meta") for name, each in places.items()
    }
    planner.set_up_planner(state, StorageMeta(), is_coordinator=True)
    plan, index = planner.create_global_plan([planner.create_local_plan()])
    index.storage_data = {
        item.index: _StorageInfo(
            places[item.index.fqn].file, places[item.index.fqn].offset, places[item.index.fqn].length
        )
        for item in plan[0].items
    }
    index.storage_meta = StorageMeta()
    with open(step / INDEX, "wb") as handle:
        pickle.dump(index, handle)
        handle.flush()
        os.fsync(handle.fileno())


def _read_chunk(step: Path, place: Any) -> torch.Tensor:
    """The tensor at `place`, backed by the file's own pages where it lies at a multiple of its element size."""
    try:
        stored = read_torch_file(step / place.relative_path, place.offset, place.length)
    except ModelLinkError as error:
        raise ModelLinkError(f"the shard {place.relative_path} in {step} is refused: {error}") from error
    if not isinstance(stored, FileTensor):
        raise ModelLinkError(f"the shard {place.relative_path} in {step} is refused: it holds more than tensors.")
    return stored.read()


def iterate_tensors(
    step: Path, names: Collection[str] | None = None, index: Metadata | None = None
) -> Iterator[tuple[str, torch.Tensor]]:
    """Yield (name, whole CPU tensor) one by one, in the index's order or that of `names`; needs no process group."""
    index = index or read_index(step)
    storage: dict[MetadataIndex, Any] = index.storage_data
    for name in index.state_dict_metadata if names is None else names:
        entry = index.state_dict_metadata.get(name)
        if not isinstance(entry, TensorStorageMetadata):
            raise ModelLinkError(f"the checkpoint {step} holds no tensor {name!r}.")
        places = [storage[MetadataIndex(name, chunk.offsets)] for chunk in entry.chunks]
        if len(places) == 1:
            whole = _read_chunk(step, places[0])
            if whole.shape != entry.size or whole.dtype != entry.properties.dtype:
                raise ModelLinkError(f"the checkpoint {step} is refused: {name!r} is not what its index says.")
        else:
            whole = torch.empty(entry.size, dtype=entry.properties.dtype)
            for chunk, place in zip(entry.chunks, places, strict=True):
                region = tuple(slice(o, o + s) for o, s in zip(chunk.offsets, chunk.sizes, strict=True))
                whole[region].copy_(_read_chunk(step, place))
        yield name, whole
