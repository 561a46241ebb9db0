"""Weights from and to Hugging Face folders, streamed tensor by tensor into and out of models that may be sharded.

Loading checks the whole folder against the architecture (names and shapes, from file headers) before it writes the
first value, on every rank alike, so a model is never half loaded; then each rank reads only the rows and columns it
holds. Saving writes shards as tensors arrive, in a temporary folder that takes the final name once it is complete.
Names come from the family's row, in both directions from the same table.
"""

from __future__ import annotations

import dataclasses
import json
import os
import shutil
import tempfile
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

import torch
from rich.progress import track
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

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
from modellink.checkpoint.mapping import HFTensor, is_ignored, layout_of, to_hf
from modellink.config.schema import ModelConfig
from modellink.errors import ModelLinkError
from modellink.files import fsync_directory
from modellink.models.decoder import Decoder
from modellink.models.families import FAMILIES
from modellink.parallel.shard import copy_full_into, local_tensor

__all__ = ["HFWeights", "family_of", "is_hf_folder", "load_hf", "read_config", "read_extras", "read_hf", "save_hf"]

_VOCABULARY = ("embed_tokens.weight", "lm_head.weight", "lm_head.bias")
_EMBEDDING, _HEAD = _VOCABULARY[:2]
_WRITER = {
    "format": "pt",
    "writer": "modellink",
}  # transformers wants "format"; "writer" says that a folder is ours to replace
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
    weights = HFWeights(folder, FAMILIES.get(model.config.family).prefix)
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


def read_hf(folder: str | Path, config: ModelConfig, *, progress: bool = True) -> Iterator[tuple[str, Tensor]]:
    """Yield (canonical name, full CPU tensor, its dtype as stored) of every parameter of the whole model.

    Raises ModelLinkError as `load_hf` does, before the first tensor is read.
    """
    weights = HFWeights(folder, FAMILIES.get(config.family).prefix)
    shapes = expected_shapes(config)
    layout = _check_folder(weights, config, shapes)
    for canonical, shape in track(shapes.items(), "Reading weights", disable=not progress):
        view = layout[canonical].view([weights[each] for each in layout[canonical].names], canonical)
        yield canonical, view[tuple(slice(None) for _ in shape)]


def expected_shapes(config: ModelConfig) -> dict[str, tuple[int, ...]]:
    """Canonical name -> full shape of every parameter of the whole model (the vocabulary padded as `config` says)."""
    with torch.device("meta"):
        return {name: tuple(parameter.shape) for name, parameter in Decoder(config).named_parameters()}


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
        if name in needed or is_ignored(family, name):
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

    One shard at a time is held in memory. `dtype` casts (default: as they come); `vocab_size` (default: the config's)
    cuts the padding of the vocabulary. `tokenizer_from`, a folder, gives tokenizer, generation settings and model code
    files, and the keys of its config.json that no option holds unless `extras` gives them. The folder appears complete
    or not at all; one that exists is replaced only if it is empty or was written by this function. Raises
    ModelLinkError when the family cannot express the model, or tensors are missing, surplus or misshapen.
    """
    target = Path(folder)
    check_replaceable(target)
    source = Path(tokenizer_from) if tokenizer_from is not None else None
    if extras is None:
        extras = read_extras(source) if source is not None and is_hf_folder(source) else {}
    vocab = vocab_size or config.vocab_size or config.padded_vocab_size
    config = dataclasses.replace(config, vocab_size=vocab)
    write_config(config, extras, "float32")  # fails now, not after hours of gathering, if the family cannot express it
    target.parent.mkdir(parents=True, exist_ok=True)
    temporary = Path(tempfile.mkdtemp(prefix=f".{target.name}.", suffix=".tmp", dir=target.parent))
    try:
        written = _write_shards(temporary, _translated(tensors, config, dtype), max_shard_bytes)
        if source is not None:
            copy_companions(source, temporary)
        ids = token_ids(extras)
        if ids and not (temporary / "generation_config.json").exists():
            _write_json(temporary / "generation_config.json", ids)
        _write_json(temporary / CONFIG_NAME, write_config(config, extras, str(written).removeprefix("torch.")))
        _publish(temporary, target)
    finally:
        shutil.rmtree(temporary, ignore_errors=True)


def _translated(
    tensors: Iterable[tuple[str, Tensor]], config: ModelConfig, dtype: torch.dtype | None
) -> Iterable[tuple[str, Tensor]]:
    """Tensors of the files as soon as all their parts came by, padding cut, dtype cast; raises unless exactly the
    tensors of the model came.
    """
    family = FAMILIES.get(config.family)
    missing = expected_shapes(dataclasses.replace(config, padded_vocab_size=config.vocab_size))
    layout = layout_of(config, missing)
    waiting: dict[str, dict[str, Tensor]] = {}
    for canonical, tensor in tensors:
        if canonical not in missing:
            raise ModelLinkError(
                f"cannot export {canonical!r}: a {family.name} model of this shape has none, or has it once."
            )
        shape = missing.pop(canonical)
        if canonical in _VOCABULARY:
            tensor = tensor[: config.vocab_size]
        if tuple(tensor.shape) != shape:
            raise ModelLinkError(
                f"cannot export {canonical!r}: its shape is {list(tensor.shape)}, the model's {list(shape)}."
            )
        whole = layout[canonical]
        parts = waiting.setdefault(whole.name, {})
        parts[canonical] = tensor.detach().to(dtype or tensor.dtype)
        if len(parts) == len(whole.parts):
            yield from whole.assemble(waiting.pop(whole.name))
    if missing:
        raise ModelLinkError(f"cannot export: {len(missing)} tensors never came, the first is {next(iter(missing))!r}.")


def _write_shards(folder: Path, tensors: Iterable[tuple[str, Tensor]], max_shard_bytes: int) -> torch.dtype:
    """Write safetensors files of at most `max_shard_bytes` (but whole tensors), their index; return the main dtype."""
    shards: list[list[str]] = []
    held: dict[str, Tensor] = {}
    total = size = 0
    dtypes: dict[torch.dtype, int] = {}

    def flush() -> None:
        save_file(held, folder / f"{len(shards)}.part", metadata=_WRITER)
        shards.append(list(held))
        held.clear()

    for name, tensor in tensors:
        bytes_ = tensor.numel() * tensor.element_size()
        if held and size + bytes_ > max_shard_bytes:
            flush()
            size = 0
        held[name] = tensor
        size, total = size + bytes_, total + bytes_
        dtypes[tensor.dtype] = dtypes.get(tensor.dtype, 0) + bytes_
    flush()
    weight_map = {}
    for number, names in enumerate(shards):
        file = f"model-{number + 1:05d}-of-{len(shards):05d}.safetensors" if len(shards) > 1 else "model.safetensors"
        (folder / f"{number}.part").rename(folder / file)
        weight_map.update(dict.fromkeys(names, file))
    if len(shards) > 1:
        _write_json(folder / SAFE_INDEX, {"metadata": {"total_size": total}, "weight_map": weight_map})
    return max(dtypes, key=lambda dtype: dtypes[dtype])


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
                return (handle.metadata() or {}).get("writer") == _WRITER["writer"]
        except (SafetensorError, OSError):
            return False
    return False


def _publish(temporary: Path, target: Path) -> None:
    """Make the finished folder durable and give it its name; an older one steps aside and is removed afterwards."""
    for file in temporary.iterdir():
        file.chmod(0o644)  # safetensors writes files that only their owner may read
        with open(file, "rb") as handle:
            os.fsync(handle.fileno())
    fsync_directory(temporary)
    temporary.chmod(0o755)
    old = temporary.with_suffix(".old")
    if target.exists():
        target.rename(old)
    temporary.rename(target)
    fsync_directory(target.parent)
    shutil.rmtree(old, ignore_errors=True)
