"""Whole-folder conversion between Hugging Face, Megatron's and native checkpoints, tensor by tensor.

Nothing is computed: names are mapped, rows of vocabulary padding come or go, bytes are copied. Tokenizer, model code
and the keys of config.json that no option holds travel with the weights, beside and inside the native step. A source is
a stream of tensors under canonical names with the architecture they belong to; every target takes such a stream.
Megatron's formats are spoken by their own module.
"""

from __future__ import annotations

import dataclasses
import json
import sys
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

import torch
from rich.progress import track
from torch import Tensor

from modellink.checkpoint.hf import (
    copy_companions,
    expected_shapes,
    is_hf_folder,
    read_config,
    read_extras,
    read_hf,
    save_hf,
)
from modellink.checkpoint.megatron import Layout, MegatronFolder, find_step, write_megatron
from modellink.checkpoint.store import (
    EXTRA,
    CheckpointStore,
    holds_native,
    is_native_step,
    load_full,
    read_tensor_names,
)
from modellink.config.architecture import read_native
from modellink.config.load import dump_config, load_config
from modellink.config.resolved import ResolvedConfig
from modellink.config.schema import Config, ModelConfig
from modellink.errors import ModelLinkError

FORMATS = ("hf", "native", "mcore", "legacy")
EXPORT = "mg2hf"  # where a conversion into the folder of the original Hugging Face model puts its result
_TOKENIZER = "tokenizer.tokenizer_name_or_path"


@dataclasses.dataclass
class _Source:
    """A checkpoint as a stream; `companions` is the folder that holds its tokenizer, where there is one."""

    kind: str
    config: ModelConfig
    tensors: Iterable[tuple[str, Tensor]]
    extras: dict[str, Any] | None
    companions: Path | None


def hf_to_native(source: Path, target: Path, dtype: torch.dtype | None = None) -> None:
    """Write step 1 of a native checkpoint with the weights of a Hugging Face folder, by default each in its dtype."""
    opened = _open_hf(source)
    resolved = load_config(["--hf-path", str(source)], program="generate")
    resolved.program = "train"  # what is written describes a run
    resolved.set("model.padded_vocab_size", opened.config.padded_vocab_size, "converted weights")
    _write_native(target, opened, resolved, dtype)


def native_to_hf(source: Path, target: Path, dtype: torch.dtype | None = None, *, progress: bool = False) -> None:
    """Write a Hugging Face folder from the newest complete step (or the step folder) `source`."""
    _write_hf(target, _open_native(source, progress), dtype)


def _write_native(target: Path, source: _Source, resolved: ResolvedConfig, dtype: torch.dtype | None) -> None:
    tensors = {f"model.{name}": tensor.to(dtype or tensor.dtype) for name, tensor in source.tensors}
    if resolved.get(_TOKENIZER):
        resolved.set(_TOKENIZER, str(target.absolute()), "converted tokenizer")
    target.mkdir(parents=True, exist_ok=True)
    if source.companions is not None:
        copy_companions(source.companions, target)
    extra = {"progress": {}, "layout": {}, "hf_extras": source.extras}
    CheckpointStore(target, local=True).save(1, tensors, extra=extra, per_rank={}, config_text=dump_config(resolved))


def _write_hf(target: Path, source: _Source, dtype: torch.dtype | None) -> None:
    save_hf(target, source.tensors, source.config, tokenizer_from=source.companions, extras=source.extras, dtype=dtype)


def _open_hf(source: Path) -> _Source:
    config = read_config(source)
    config.padded_vocab_size = config.vocab_size
    return _Source("hf", config, read_hf(source, config), read_extras(source), source)


def _open_native(source: Path, progress: bool) -> _Source:
    step = source if is_native_step(source) else CheckpointStore(source, local=True).resolve()
    config = read_native(step / "modellink.yaml").resolve()
    config.padded_vocab_size = read_tensor_names(step)["model.embed_tokens.weight"].shape[0]
    config.vocab_size = config.vocab_size or config.padded_vocab_size
    names = [f"model.{name}" for name in expected_shapes(config)]
    stored = track(load_full(step, names), "Reading weights", total=len(names), disable=not progress)
    tensors = ((name.removeprefix("model."), tensor) for name, tensor in stored)
    extras: dict[str, Any] | None = json.loads((step / EXTRA).read_text(encoding="utf-8")).get("hf_extras")
    return _Source("native", config, tensors, extras, _tokenizer_folder(step))


def _open_megatron(source: Path, original: Path | None, family: str | None, vocab_size: int | None) -> _Source:
    """`original`, a Hugging Face folder, says the architecture better than the files do."""
    folder = MegatronFolder(source)
    config = folder.config(family) if original is None else read_config(original)
    config.vocab_size = config.padded_vocab_size = vocab_size or config.vocab_size
    extras = folder.extras if original is None else read_extras(original)
    beside = next((place for place in (original, source) if place and _has_tokenizer(place)), None)
    stream = track(folder.tensors(config), "Reading weights", total=len(expected_shapes(config)))
    return _Source(folder.dialect, config, stream, extras, beside or original)


def _describe(source: _Source) -> ResolvedConfig:
    """A run's configuration that knows its architecture and nothing else."""
    config = Config()
    origins = {
        f"{section.name}.{option.name}": "default"
        for section in dataclasses.fields(config)
        for option in dataclasses.fields(getattr(config, section.name))
    }
    resolved = ResolvedConfig(config, origins, "train")
    for option in dataclasses.fields(source.config):
        resolved.set(f"model.{option.name}", getattr(source.config, option.name), "converted weights")
    if source.companions is not None and _has_tokenizer(source.companions):
        resolved.set("tokenizer.tokenizer_type", "PretrainedFromHF", "converted tokenizer")
        resolved.set(_TOKENIZER, str(source.companions), "converted tokenizer")
    return resolved


def _has_tokenizer(folder: Path) -> bool:
    return any(folder.glob("tokenizer*"))


def _tokenizer_folder(step: Path) -> Path | None:
    """The tokenizer that the run named, else what lies beside its steps; a warning when it named one that is gone."""
    named = read_native(step / "modellink.yaml", section="tokenizer").tokenizer_name_or_path
    beside = step.absolute().parent
    if named and Path(named).is_dir():
        return Path(named)
    if _has_tokenizer(beside):
        return beside
    if named:
        print(
            f"modellink: warning: the tokenizer {named} that {step} names is no folder here; the Hugging Face folder "
            "is written without a tokenizer.",
            file=sys.stderr,
        )
    return None


def convert(
    load_dir: str | Path,
    save_dir: str | Path,
    to: str,
    tensor_parallel: int = 1,
    pipeline_parallel: int = 1,
    dtype: torch.dtype | None = None,
    *,
    layers_per_stage: Sequence[int] | None = None,
    layers_per_virtual_stage: int | None = None,
    vocab_multiple: int = 1,
    vocab_size: int | None = None,
    family: str | None = None,
    config_from: str | Path | None = None,
) -> None:
    """Convert the checkpoint in `load_dir` to format `to` ("hf", "native", "mcore" or "legacy") in `save_dir`.

    What `load_dir` holds is found out. The parallel sizes, layers per stage (or per chunk of an interleaved pipeline)
    and the multiple that pads the vocabulary shape Megatron's files, "mcore" and "legacy"; the other formats load at
    every layout. Reading Megatron's files, the architecture comes from the Hugging Face folder `config_from` (default:
    a config.json in `load_dir` or `save_dir`), else from the files themselves, with `vocab_size` real rows and the
    Hugging Face spelling of `family`. Written as "hf" into a folder that holds the original model, the result lies in
    its subfolder mg2hf. `dtype` casts the weights (default: as stored). A run's folder that holds steps and an export
    counts as native. Raises ModelLinkError for what does not exist or cannot be expressed; nothing is left
    half-written.
    """
    source, target = Path(load_dir), Path(save_dir)
    if to not in FORMATS:
        raise ModelLinkError(f"the format {to!r} is unknown: give one of {', '.join(FORMATS)}.")
    if not source.is_dir():
        raise ModelLinkError(f"no checkpoint at {source}: give a Hugging Face, Megatron or native checkpoint folder.")
    layout = Layout(
        to,
        tensor_parallel,
        pipeline_parallel,
        tuple(layers_per_stage) if layers_per_stage else None,
        layers_per_virtual_stage,
        vocab_multiple,
    )
    if to in ("hf", "native") and layout != Layout(to):
        raise ModelLinkError(
            f"the format {to} loads at every layout: leave out the sizes, which shape Megatron's files."
        )
    native = holds_native(source)
    if not native and find_step(source) is not None:
        stated = Path(config_from) if config_from is not None else None
        original = stated or next((folder for folder in (source, target) if is_hf_folder(folder)), None)
        if to == "hf" and is_hf_folder(target):
            target = target / EXPORT
        opened = _open_megatron(source, original, family, vocab_size)
    elif not native and is_hf_folder(source):
        if to == "hf":
            raise ModelLinkError(f"{source} already is a Hugging Face folder: copy it, or convert to native.")
        if to == "native":
            _check_empty(target)
            hf_to_native(source, target, dtype)
            return
        opened = _open_hf(source)
    else:
        if to == "native":
            raise ModelLinkError(f"{source} already is native: it loads at every layout.")
        opened = _open_native(source, progress=True)
    if to == "hf":
        _write_hf(target, opened, dtype)
    elif to == "native":
        _check_empty(target)
        opened.tensors = _without_padding(opened.tensors, opened.config.vocab_size)
        _write_native(target, opened, _describe(opened), dtype)
    else:
        options: dict[str, Any] = {"extras": opened.extras, "tokenizer_from": opened.companions, "dtype": dtype}
        write_megatron(target, opened.tensors, opened.config, layout, **options)


def _without_padding(tensors: Iterable[tuple[str, Tensor]], rows: int | None) -> Iterable[tuple[str, Tensor]]:
    for name, tensor in tensors:
        yield name, tensor[:rows] if name.startswith(("embed_tokens.", "lm_head.")) else tensor


def _check_empty(target: Path) -> None:
    if target.exists() and not (target.is_dir() and not any(target.iterdir())):
        raise ModelLinkError(f"{target} exists and is not an empty folder: give another one or remove it yourself.")
