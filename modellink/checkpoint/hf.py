"""Weights from and to Hugging Face folders, streamed tensor by tensor into and out of models that may be sharded.

Loading checks the whole folder against the architecture (names and shapes, from file headers) before it writes the
first value, on every rank alike, so a model is never half loaded; then each rank reads only the rows and columns it
holds. Saving writes shards as tensors arrive, in a temporary folder that takes the final name once it is complete.
Names come from the family's row, in both directions from the same table.
"""

from __future__ import annotations

import dataclasses
import functools
import json
import shutil
import tempfile
from collections.abc import Collection, Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
from rich.progress import track
from safetensors import SafetensorError, safe_open
from torch import Tensor

from modellink.checkpoint.digest import is_finite
from modellink.checkpoint.hf_config import (
    CONFIG_NAME,
    family_of,
    is_hf_folder,
    read_config,
    read_extras,
    token_ids,
    write_config,
)
from modellink.checkpoint.hf_files import SAFE_INDEX, HFWeights, StoredTensor
from modellink.checkpoint.hf_shards import WRITER, Entry, ShardFiles
from modellink.checkpoint.mapping import HFTensor, is_ignored, layout_of, to_hf
from modellink.checkpoint.skeleton import expected_shapes
from modellink.config.schema import ModelConfig
from modellink.errors import ModelLinkError
from modellink.files import replace_folder, sync_folder
from modellink.models.decoder import Decoder
from modellink.models.families import FAMILIES
from modellink.parallel.shard import copy_full_into, local_tensor

__all__ = [
    "HFReader",
    "HFWeights",
    "HFWriter",
    "expected_shapes",
    "family_of",
    "is_hf_folder",
    "load_hf",
    "read_config",
    "read_extras",
    "read_hf",
    "save_hf",
]

_VOCABULARY = ("embed_tokens.weight", "lm_head.weight", "lm_head.bias")
_EMBEDDING, _HEAD = _VOCABULARY[:2]
_COMPANIONS = (
    *(
        "tokenizer*",
        "special_tokens_map.json",
        "added_tokens.json",
        "vocab.*",
        "merges.txt",
        "*.tiktoken",
        "chat_template*",
    ),
    *("generation_config.json", "configuration_*.py", "modeling_*.py", "tokenization_*.py", "LICENSE*"),
)


def load_hf(model: Decoder, folder: str | Path, *, progress: bool = True, check_finite: bool = False) -> None:
    """Fill the parameters that `model` holds (all, a pipeline stage's, or shards of them) from a Hugging Face folder.

    Values are cast to each parameter's dtype; rows that pad the vocabulary repeat the last real one. Raises
    ModelLinkError, before anything is written, for missing, surplus or misshapen tensors and damaged files; with
    `check_finite` also, while reading, for NaN and infinity.
    """
    weights = _open(folder, model.config)
    shapes = expected_shapes(model.config)
    layout = _check_folder(weights, model.config, shapes)
    parameters = list(model.named_parameters())
    for name, parameter in track(parameters, "Loading weights", disable=not progress):
        canonical = model.canonical_name(name)
        sources = [weights[each] for each in layout[canonical].names]
        if canonical in _VOCABULARY:
            sources = [sources[0].padded(shapes[canonical][0])]
        copy_full_into(layout[canonical].view(sources, canonical), parameter)
        if check_finite and not torch.isfinite(local_tensor(parameter)).all():
            raise ModelLinkError(f"{sources[0].file}: tensor {sources[0].name!r} holds NaN or infinity.")


class HFReader:
    """A Hugging Face folder as full tensors under canonical names, its headers checked, no value read.

    `dtypes` says the stored dtype of each. Raises ModelLinkError as `load_hf` does.
    """

    def __init__(self, folder: str | Path, config: ModelConfig) -> None:
        self._weights = _open(folder, config)
        self._shapes = expected_shapes(config)
        self._layout = _check_folder(self._weights, config, self._shapes)
        self.dtypes = {name: self._weights[whole.names[0]].dtype for name, whole in self._layout.items()}

    def read(self, names: Collection[str] | None = None) -> Iterator[tuple[str, Tensor]]:
        """Yield (canonical name, full CPU tensor, its dtype as stored) of `names`, in their order (default: all).

        Raises ModelLinkError for NaN and infinity.
        """
        for canonical in self._shapes if names is None else names:
            sources = [self._weights[each] for each in self._layout[canonical].names]
            tensor = self._layout[canonical].view(sources, canonical)[(slice(None),) * len(self._shapes[canonical])]
            if not is_finite(tensor):
                raise ModelLinkError(f"{sources[0].file}: tensor {sources[0].name!r} holds NaN or infinity.")
            yield canonical, tensor


def read_hf(folder: str | Path, config: ModelConfig, *, progress: bool = True) -> Iterator[tuple[str, Tensor]]:
    """Yield (canonical name, full CPU tensor, its dtype as stored) of every parameter of the whole model.

    Raises ModelLinkError as `load_hf` does, before the first tensor is read, and for NaN and infinity.
    """
    reader = HFReader(folder, config)
    yield from track(reader.read(), "Reading weights", total=len(reader.dtypes), disable=not progress)


def _open(folder: str | Path, config: ModelConfig) -> HFWeights:
    family = FAMILIES.get(config.family)
    return HFWeights(folder, family.prefix, family.inner)


def _check_folder(weights: HFWeights, config: ModelConfig, shapes: dict[str, tuple[int, ...]]) -> dict[str, HFTensor]:
    """Where each tensor lies, once every one that is needed is there in the right shape, and no other one is."""
    family, folder = FAMILIES.get(config.family), weights.folder
    declared = read_config(folder).vocab_size
    layout = layout_of(config, shapes)
    needed = {name: (tensor, canonical) for canonical, tensor in layout.items() for name in tensor.names}
    for name, (tensor, canonical) in needed.items():
        if name not in weights:
            hint = " It would be the embedding if tie_word_embeddings were true." if canonical == _HEAD else ""
            raise ModelLinkError(f"{folder} lacks the tensor {name!r} of a {family.name} model of this shape.{hint}")
        stored, shape = weights[name], tensor.shape
        if canonical in _VOCABULARY:
            _check_vocabulary(stored, config.padded_vocab_size or 0, declared)
            shape = (stored.shape[0], *shape[1:])
        if stored.shape != shape:
            raise ModelLinkError(
                f"{stored.file}: tensor {name!r} has shape {list(stored.shape)}, the model wants {list(shape)};"
                " its configuration does not belong to these weights."
            )
    for name in weights:
        if name in needed or is_ignored(config, name):
            continue
        if name == to_hf(family, _HEAD) and config.tie_word_embeddings:
            _check_tied(weights[name], weights[to_hf(family, _EMBEDDING)])
            continue
        raise ModelLinkError(
            f"{weights[name].file}: {name!r} fits nowhere in a {family.name} model of {config.num_layers} layers:"
            " its configuration does not belong to these weights."
        )
    return layout


def _check_vocabulary(stored: StoredTensor, padded: int, declared: int | None) -> None:
    """`declared` is the vocabulary of the folder's own config.json; the model's may be larger, for added tokens."""
    rows = stored.shape[0]
    if rows > padded:
        raise ModelLinkError(
            f"{stored.file}: tensor {stored.name!r} has {rows} rows, more than the model's vocabulary of {padded};"
            f" set the padded vocabulary size to at least {rows}."
        )
    if declared is not None and rows < declared:
        raise ModelLinkError(
            f"{stored.file}: tensor {stored.name!r} has {rows} rows, fewer than the vocabulary of {declared};"
            " its configuration does not belong to these weights."
        )


def _check_tied(head: StoredTensor, embedding: StoredTensor) -> None:
    """A tied model's file may repeat the embedding as output matrix, but not hold another one."""
    same = head.shape == embedding.shape
    for start in range(0, head.shape[0], 8192):
        if not same:
            break
        region = (slice(start, min(start + 8192, head.shape[0])), slice(0, head.shape[1]))
        same = torch.equal(head[region], embedding[region])
    if not same:
        raise ModelLinkError(
            f"{head.file}: {head.name!r} differs from {embedding.name!r} although tie_word_embeddings is true;"
            " set it to false in config.json if the output matrix is its own."
        )


class HFWriter:
    """The weights of a Hugging Face folder, written group by group of canonical tensors, in any order.

    `dtypes` says the dtype that each tensor will have. `groups` are the canonical names that must come together, those
    of one tensor of the files. Raises ModelLinkError when the family cannot express the model.
    """

    def __init__(
        self,
        folder: Path,
        config: ModelConfig,
        dtypes: Mapping[str, torch.dtype],
        extras: dict[str, Any] | None = None,
        max_shard_bytes: int = 5_000_000_000,
    ) -> None:
        self.folder, self.config, self.extras = folder, config, extras or {}
        write_config(config, self.extras, "float32")  # fails now, not after hours, if the family cannot express it
        self._layout = layout_of(config, expected_shapes(without_padding(config)))
        wholes = {whole.name: whole for whole in self._layout.values()}.values()
        self.groups = [list(whole.parts) for whole in wholes]
        entries = [
            Entry(name, whole.shape, functools.reduce(torch.promote_types, (dtypes[part] for part in whole.parts)))
            for whole in wholes
            for name in whole.names
        ]
        self._files = ShardFiles(folder, entries, max_shard_bytes)

    def create(self) -> None:
        """Make the files, as yet without values."""
        self._files.create()

    def write(self, groups: Iterable[Mapping[str, Tensor]]) -> None:
        """Write one group after the other, without vocabulary padding, and make them durable."""
        self._files.write(self._translated(groups))

    def _translated(self, groups: Iterable[Mapping[str, Tensor]]) -> Iterator[tuple[str, Tensor]]:
        for parts in groups:
            wholes = {self._layout[canonical].name: self._layout[canonical] for canonical in parts}
            for whole in wholes.values():
                yield from whole.assemble(parts)

    def finish(self, companions: Path | None) -> None:
        """Add the index, configuration, and the files that belong to a model from the folder `companions`."""
        if len(self._files.headers) > 1:
            index = {"metadata": {"total_size": self._files.total_bytes}, "weight_map": self._files.weight_map}
            _write_json(self.folder / SAFE_INDEX, index)
        if companions is not None:
            copy_companions(companions, self.folder)
        ids = token_ids(self.extras)
        if ids and not (self.folder / "generation_config.json").exists():
            _write_json(self.folder / "generation_config.json", ids)
        dtype = str(self._files.main_dtype).removeprefix("torch.")
        _write_json(self.folder / CONFIG_NAME, write_config(self.config, self.extras, dtype))


def save_hf(
    folder: str | Path,
    tensors: Iterable[tuple[str, Tensor]],
    config: ModelConfig,
    *,
    tokenizer_from: str | Path | None = None,
    extras: dict[str, Any] | None = None,
    dtype: torch.dtype | None = None,
    max_shard_bytes: int = 5_000_000_000,
    vocab_size: int | None = None,
) -> None:
    """Write a Hugging Face folder that transformers loads from `tensors`, pairs of canonical name and full CPU tensor.

    For a model that is in memory; converting files holds one tensor at a time. `dtype` casts (default: as they come);
    `vocab_size` (default: the config's) cuts the padding of the vocabulary. `tokenizer_from`, a folder, gives
    tokenizer, generation settings and model code files, and the keys of its config.json that no option holds unless
    `extras` gives them. The folder appears complete or not at all; one that exists is replaced only if it is empty or
    was written by this function. Raises ModelLinkError when the family cannot express the model, or tensors are
    missing, surplus or misshapen.
    """
    target = Path(folder)
    check_replaceable(target)
    source = Path(tokenizer_from) if tokenizer_from is not None else None
    if extras is None:
        extras = read_extras(source) if source is not None and is_hf_folder(source) else {}
    vocab = vocab_size or config.vocab_size or config.padded_vocab_size
    config = dataclasses.replace(config, vocab_size=vocab)
    write_config(config, extras, "float32")  # a family that cannot express the model is named first
    parts = _checked(dict(tensors), config)
    target.parent.mkdir(parents=True, exist_ok=True)
    temporary = Path(tempfile.mkdtemp(prefix=f".{target.name}.", suffix=".tmp", dir=target.parent))
    try:
        dtypes = {name: dtype or tensor.dtype for name, tensor in parts.items()}
        writer = HFWriter(temporary, config, dtypes, extras, max_shard_bytes)
        writer.create()
        writer.write({name: parts[name].detach().to(dtypes[name]) for name in group} for group in writer.groups)
        writer.finish(source)
        sync_folder(temporary)
        replace_folder(temporary, target)
    finally:
        shutil.rmtree(temporary, ignore_errors=True)


def without_padding(config: ModelConfig) -> ModelConfig:
    """The same architecture with the real rows of the vocabulary alone."""
    return dataclasses.replace(config, padded_vocab_size=config.vocab_size)


def cut_vocabulary(name: str, tensor: Tensor, config: ModelConfig) -> Tensor:
    """`tensor` without the rows that pad the vocabulary, if it has a row per token."""
    return tensor[: config.vocab_size] if name in _VOCABULARY else tensor


def _checked(tensors: Mapping[str, Tensor], config: ModelConfig) -> dict[str, Tensor]:
    """The tensors of the model, padding cut; raises unless they are all of them and no others."""
    shapes = expected_shapes(without_padding(config))
    parts = {name: cut_vocabulary(name, tensor, config) for name, tensor in tensors.items()}
    for name, tensor in parts.items():
        if name not in shapes:
            raise ModelLinkError(
                f"cannot export {name!r}: a {config.family} model of this shape has none, or has it once."
            )
        if tuple(tensor.shape) != shapes[name]:
            raise ModelLinkError(
                f"cannot export {name!r}: its shape is {list(tensor.shape)}, the model's {list(shapes[name])}."
            )
    if missing := [name for name in shapes if name not in parts]:
        raise ModelLinkError(f"cannot export: {len(missing)} tensors never came, the first is {missing[0]!r}.")
    return parts


def copy_companions(source: Path, target: Path) -> None:
    """Copy tokenizer, generation settings and model code, the files that belong to a model beside its weights."""
    if not source.is_dir():
        raise ModelLinkError(f"{source} is no folder to take a tokenizer from.")
    for pattern in _COMPANIONS:
        for file in sorted(source.glob(pattern)):
            if file.is_file():
                shutil.copyfile(file, target / file.name)


def _write_json(path: Path, content: dict[str, Any]) -> None:
    path.write_text(json.dumps(content, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")


def check_replaceable(target: Path) -> None:
    """Refuse to replace what this module did not write."""
    if target.is_dir() and not any(target.iterdir()):
        return
    if target.exists() and not (target.is_dir() and _is_ours(target)):
        raise ModelLinkError(
            f"{target} exists and was not written by ModelLink; give another folder or remove it yourself."
        )


def _is_ours(folder: Path) -> bool:
    for file in folder.glob("model*.safetensors"):
        try:
            with safe_open(file, framework="pt") as handle:
                return (handle.metadata() or {}).get("writer") == WRITER["writer"]
        except (SafetensorError, OSError):
            return False
    return False
