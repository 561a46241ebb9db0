"""The tensors of a Hugging Face folder by name, read a region at a time.

One safetensors file, several with an index, or PyTorch files (`pytorch_model.bin`, of which nothing is executed) look
the same from outside. Opening reads headers only and fails, naming the file, where one is
missing, cut short or damaged; a region read later costs the bytes of that region.
"""

from __future__ import annotations

import dataclasses
import functools
import json
import pickle
import zipfile
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from modellink.checkpoint.digest import map_tensor
from modellink.checkpoint.megatron_files import FileTensor, read_torch_file
from modellink.errors import ModelLinkError

SAFE_SINGLE, SAFE_INDEX = "model.safetensors", "model.safetensors.index.json"
TORCH_SINGLE, TORCH_INDEX = "pytorch_model.bin", "pytorch_model.bin.index.json"
_FLOATS = {"F64": torch.float64, "F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16}


@dataclass(frozen=True)
class StoredTensor:
    """One tensor in a file. Indexing by a tuple of slices reads that region.

    `rows` may exceed the stored ones (a padded vocabulary): rows beyond the last repeat it.
    """

    file: Path
    name: str
    source: Any
    shape: tuple[int, ...]
    dtype: torch.dtype
    rows: int | None = None

    def padded(self, rows: int) -> StoredTensor:
        """The same tensor seen with `rows` rows."""
        return StoredTensor(self.file, self.name, self.source, self.shape, self.dtype, rows)

    def __getitem__(self, region: tuple[slice, ...]) -> Tensor:
        first, *others = region
        start, end, _ = first.indices(self.rows or self.shape[0])
        stored = min(end, self.shape[0])
        low = min(start, self.shape[0] - 1)  # a region of padding alone still needs the last row
        try:
            piece: Tensor = self.source[(slice(low, max(stored, low + 1)), *others)]
        except (SafetensorError, OSError) as error:
            raise ModelLinkError(
                f"{self.file}: tensor {self.name!r} cannot be read ({error}); fetch the file again."
            ) from None
        if end <= self.shape[0]:
            return piece
        padding = piece[-1:].expand(end - max(start, self.shape[0]), *piece.shape[1:])
        return padding if start >= self.shape[0] else torch.cat((piece, padding))


class HFWeights:
    """All tensors of one folder. Raises ModelLinkError for files that are missing, damaged or of an unknown kind.

    Files of a model saved without its head leave out the `prefix` that all other names have; here it is always there.
    Files of a model of several parts hold the one of interest under names that begin as `inner` says (there, here); the
    others are left out.
    """

    def __init__(self, folder: str | Path, prefix: str = "", inner: Sequence[tuple[str, str]] = ()) -> None:
        self.folder = Path(folder)
        self._tensors: dict[str, StoredTensor] = {}
        files, index = self._files()
        for file in files:
            found = _open_safetensors(file) if file.suffix == ".safetensors" else _open_torch(file)
            for tensor in found:
                if tensor.name in self._tensors:
                    raise ModelLinkError(
                        f"{file}: tensor {tensor.name!r} is also in {self._tensors[tensor.name].file.name}."
                    )
                self._tensors[tensor.name] = tensor
        for name, listed in index.items():
            if name not in self._tensors:
                raise ModelLinkError(
                    f"{self.folder / listed} lacks the tensor {name!r} that the index promises; fetch the file again."
                )
        if not any(name.startswith(prefix) for name in self._tensors):
            self._tensors = {prefix + name: tensor for name, tensor in self._tensors.items()}
        renamed = {
            here + name.removeprefix(there): tensor
            for name, tensor in self._tensors.items()
            for there, here in inner
            if name.startswith(there)
        }
        self._tensors = renamed or self._tensors

    def __iter__(self) -> Iterator[str]:
        return iter(self._tensors)

    def __contains__(self, name: str) -> bool:
        return name in self._tensors

    def __getitem__(self, name: str) -> StoredTensor:
        return self._tensors[name]

    def _files(self) -> tuple[list[Path], dict[str, str]]:
        """The weight files, and the index's tensor name -> file name (empty without an index)."""
        for single, index_name in ((SAFE_SINGLE, SAFE_INDEX), (TORCH_SINGLE, TORCH_INDEX)):
            if (self.folder / single).is_file():
                return [self.folder / single], {}
            index_path = self.folder / index_name
            if index_path.is_file():
                index = _read_index(index_path)
                files = [self.folder / name for name in sorted(set(index.values()))]
                for file in files:
                    if not file.is_file():
                        raise ModelLinkError(f"{file} is missing; {index_path.name} lists it. Fetch the file.")
                return files, index
        raise ModelLinkError(
            f"{self.folder} holds no weights:"
            f" none of {SAFE_SINGLE}, {SAFE_INDEX}, {TORCH_SINGLE}, {TORCH_INDEX} exists."
        )


def _read_index(path: Path) -> dict[str, str]:
    try:
        index = json.loads(path.read_text(encoding="utf-8"))["weight_map"]
    except (json.JSONDecodeError, UnicodeDecodeError, KeyError, TypeError) as error:
        raise ModelLinkError(f"{path} is not a weight index ({error!r}); fetch the file again.") from None
    for name, file in index.items():
        if not isinstance(file, str) or Path(file).name != file:
            raise ModelLinkError(f"{path}: {name!r} points to {file!r}, which is not a file of this folder.")
    return index


@dataclass(frozen=True)
class _Region:
    """What slices of one tensor are read from: `whole` maps it from its file anew each time.

    Pages of the file count as memory of the process while they are mapped, so nothing stays mapped between two reads.
    """

    whole: Callable[[], Tensor]

    def __getitem__(self, region: tuple[slice, ...]) -> Tensor:
        return self.whole()[region]


def _open_safetensors(file: Path) -> list[StoredTensor]:
    try:
        with safe_open(file, framework="pt", device="cpu") as handle:  # checks the header, and the size of the file
            names = set(handle.keys())
        with open(file, "rb") as content:
            start = 8 + int.from_bytes(content.read(8), "little")
            header = json.loads(content.read(start - 8))
    except (SafetensorError, OSError) as error:
        raise ModelLinkError(f"{file} is damaged or cut short ({error}); fetch the file again.") from None
    found = []
    for name in sorted(names):
        entry = header[name]
        shape, dtype = tuple(entry["shape"]), _FLOATS.get(entry["dtype"])
        checked = _checked(file, name, None, shape, dtype, entry["dtype"])
        whole = functools.partial(map_tensor, file, start + entry["data_offsets"][0], shape, checked.dtype)
        found.append(dataclasses.replace(checked, source=_Region(whole)))
    return found


def _open_torch(file: Path) -> list[StoredTensor]:
    floats = set(_FLOATS.values())
    if zipfile.is_zipfile(file):
        state = read_torch_file(file)
    else:  # the format before torch 1.6, which cannot be mapped
        try:
            state = torch.load(file, map_location="cpu", weights_only=True)
        except (pickle.UnpicklingError, RuntimeError, EOFError, OSError, ValueError, KeyError) as error:
            reason = str(error).splitlines()[0] if str(error) else repr(error)
            raise ModelLinkError(
                f"{file} is damaged, or holds more than tensors ({reason}); fetch it as safetensors."
            ) from None
    if not isinstance(state, dict) or not all(isinstance(value, Tensor | FileTensor) for value in state.values()):
        raise ModelLinkError(
            f"{file} is damaged, or holds more than tensors (no plain dictionary of them); fetch it as safetensors."
        )
    found = []
    for name, value in state.items():
        source = _Region(value.read) if isinstance(value, FileTensor) else value
        dtype = value.dtype if value.dtype in floats else None
        found.append(_checked(file, name, source, tuple(value.shape), dtype, value.dtype))
    return found


def _checked(
    file: Path, name: str, source: Any, shape: tuple[int, ...], dtype: torch.dtype | None, stored: object
) -> StoredTensor:
    if dtype is None:
        raise ModelLinkError(
            f"{file}: tensor {name!r} is stored as {stored}; quantised weights are not read, take the float version."
        )
    return StoredTensor(file, name, source, shape, dtype)
