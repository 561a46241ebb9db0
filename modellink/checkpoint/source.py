"""A checkpoint of any format as a source of full tensors under canonical names, any few of them at a time.

Opening reads headers only, and checks that names and shapes are the architecture's. Tensors are backed by the pages of
their files where the format allows; nothing stays in memory once a tensor has been dropped. NaN and infinity are
refused with the name of the file when a tensor's turn comes.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Callable, Collection, Iterable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from modellink.checkpoint.digest import is_finite
from modellink.checkpoint.hf import (
    HFReader,
    cut_vocabulary,
    expected_shapes,
    is_hf_folder,
    read_config,
    read_extras,
    without_padding,
)
from modellink.checkpoint.lora import AdaptedFolder, Adapter
from modellink.checkpoint.shards import iterate_tensors, read_index
from modellink.checkpoint.store import EXTRA, read_tensor_names, sound_step
from modellink.config.architecture import read_native
from modellink.config.schema import ModelConfig
from modellink.errors import ModelLinkError

Change = Callable[[str, Tensor], Tensor]
_EMBEDDING = "embed_tokens.weight"


@dataclass
class Source:
    """An opened checkpoint.

    `groups` lists the canonical names with their stored dtypes, those that are read together in one; `fetch` yields
    the full tensors of the groups that hold the given names. `changes` are functions of (canonical name, full tensor)
    that alter tensors on their way, one after the other. `companions` is the folder of the tokenizer, where there is
    one, `folder` the one whose files are read.
    """

    kind: str
    folder: Path
    config: ModelConfig
    groups: list[dict[str, torch.dtype]]
    fetch: Callable[[Sequence[str]], Iterable[tuple[str, Tensor]]]
    extras: dict[str, Any] | None
    companions: Path | None
    changes: list[Change] = field(default_factory=list)

    @property
    def dtypes(self) -> dict[str, torch.dtype]:
        return {name: dtype for group in self.groups for name, dtype in group.items()}

    @property
    def shapes(self) -> dict[str, tuple[int, ...]]:
        """Canonical name -> shape, without rows that pad the vocabulary."""
        return expected_shapes(without_padding(self.config))

    def read(self, names: Sequence[str]) -> dict[str, Tensor]:
        """The tensors of the groups that hold `names`, changed, without rows that pad the vocabulary."""
        found = {}
        for name, tensor in self.fetch(names):
            for change in self.changes:
                tensor = change(name, tensor)
            found[name] = cut_vocabulary(name, tensor, self.config)
        return found


def open_hf(folder: Path) -> Source:
    """A Hugging Face folder, safetensors or PyTorch files."""
    config = read_config(folder)
    config.padded_vocab_size = config.vocab_size
    reader = HFReader(folder, config)
    groups = [{name: dtype} for name, dtype in reader.dtypes.items()]
    return Source("hf", folder, config, groups, reader.read, read_extras(folder), folder)


def open_native(path: Path, *, verify: bool = True) -> Source:
    """The newest complete step in `path`, or the step `path`; with `verify` the SHA-256 sums are checked first."""
    step = sound_step(path, verify=verify)
    config = read_native(step / "modellink.yaml").resolve()
    stored = read_tensor_names(step)
    config.padded_vocab_size = stored[f"model.{_EMBEDDING}"].shape[0]
    config.vocab_size = config.vocab_size or config.padded_vocab_size
    index = read_index(step)

    def fetch(names: Collection[str]) -> Iterable[tuple[str, Tensor]]:
        for stored_name, tensor in iterate_tensors(step, [f"model.{name}" for name in names], index):
            if not is_finite(tensor):
                raise ModelLinkError(f"{step}: tensor {stored_name!r} holds NaN or infinity.")
            yield stored_name.removeprefix("model."), tensor

    groups = []
    for name, shape in expected_shapes(config).items():
        info = stored.get(f"model.{name}")
        if info is None or info.shape != shape:
            found = "is not there" if info is None else f"has shape {list(info.shape)}, not {list(shape)}"
            raise ModelLinkError(f"{step}: the tensor 'model.{name}' of its own configuration {found}.")
        groups.append({name: info.dtype})
    extras: dict[str, Any] | None = json.loads((step / EXTRA).read_text(encoding="utf-8")).get("hf_extras")
    return Source("native", step, config, groups, fetch, extras, _tokenizer_folder(step))


def open_megatron(
    path: Path,
    original: Path | None,
    family: str | None,
    vocab_size: int | None,
    adapter: Adapter | None = None,
) -> Source:
    """A Megatron folder; `original`, a Hugging Face folder, says the architecture better than the files do.

    It may hold the `adapter` that will be merged, and no other.
    """
    folder = AdaptedFolder(path)
    if folder.pairs and (adapter is None or adapter.folder.resolve() != path.resolve()):
        raise ModelLinkError(f"{path} holds LoRA adapters beside its weights: give --lora-load {path} to merge them.")
    config = folder.config(family) if original is None else read_config(original)
    config.vocab_size = config.padded_vocab_size = vocab_size or config.vocab_size
    extras = folder.extras if original is None else read_extras(original)
    beside = next((place for place in (original, path) if place and has_tokenizer(place)), None)

    def fetch(names: Collection[str]) -> Iterable[tuple[str, Tensor]]:
        return folder.tensors(config, names)

    return Source(folder.dialect, folder.step, config, folder.contents(config), fetch, extras, beside or original)


def has_tokenizer(folder: Path) -> bool:
    return any(folder.glob("tokenizer*"))


def find_original(stated: str | Path | None, *places: Path) -> Path | None:
    """The Hugging Face folder that says the architecture: the `stated` one, else the first of `places` that is one."""
    return Path(stated) if stated is not None else next((place for place in places if is_hf_folder(place)), None)


def _tokenizer_folder(step: Path) -> Path | None:
    """The tokenizer that the run named, else what lies beside its steps; a warning when it named one that is gone."""
    named = read_native(step / "modellink.yaml", section="tokenizer").tokenizer_name_or_path
    beside = step.absolute().parent
    if named and Path(named).is_dir():
        return Path(named)
    if has_tokenizer(beside):
        return beside
    if named:
        print(
            f"modellink: warning: the tokenizer {named} that {step} names is no folder here; the Hugging Face folder "
            "is written without a tokenizer.",
            file=sys.stderr,
        )
    return None
