"""Whole-folder conversion between Hugging Face and native checkpoints, tensor by tensor.

Nothing is computed: names are mapped, rows of vocabulary padding come or go, bytes are copied. Tokenizer, model code
and the keys of config.json that no option holds travel with the weights, beside and inside the native step. Megatron's
formats are spoken by their own module; asking for them here is an error that says so.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import torch
from rich.progress import track

from modellink.checkpoint.hf import (
    copy_companions,
    expected_shapes,
    is_hf_folder,
    read_config,
    read_extras,
    read_hf,
    save_hf,
)
from modellink.checkpoint.store import EXTRA, CheckpointStore, is_native_step, load_full, read_tensor_names
from modellink.config.architecture import read_native
from modellink.config.load import dump_config, load_config
from modellink.errors import ModelLinkError

FORMATS = ("hf", "native")
_TOKENIZER = "tokenizer.tokenizer_name_or_path"


def hf_to_native(source: Path, target: Path, dtype: torch.dtype | None = None) -> None:
    """Write step 1 of a native checkpoint with the weights of a Hugging Face folder, by default each in its dtype."""
    config = read_config(source)
    config.padded_vocab_size = config.vocab_size
    tensors = {f"model.{name}": tensor.to(dtype or tensor.dtype) for name, tensor in read_hf(source, config)}
    resolved = load_config(["--hf-path", str(source)], program="generate")
    resolved.program = "train"  # what is written describes a run
    resolved.set("model.padded_vocab_size", config.padded_vocab_size, "converted weights")
    if resolved.get(_TOKENIZER):
        resolved.set(_TOKENIZER, str(target.absolute()), "converted tokenizer")
    target.mkdir(parents=True, exist_ok=True)
    copy_companions(source, target)
    extra = {"progress": {}, "layout": {}, "hf_extras": read_extras(source)}
    CheckpointStore(target, local=True).save(1, tensors, extra=extra, per_rank={}, config_text=dump_config(resolved))


def native_to_hf(source: Path, target: Path, dtype: torch.dtype | None = None, *, progress: bool = False) -> None:
    """Write a Hugging Face folder from the newest complete step (or the step folder) `source`."""
    step = source if is_native_step(source) else CheckpointStore(source, local=True).resolve()
    config = read_native(step / "modellink.yaml").resolve()
    config.padded_vocab_size = read_tensor_names(step)["model.embed_tokens.weight"].shape[0]
    config.vocab_size = config.vocab_size or config.padded_vocab_size
    names = [f"model.{name}" for name in expected_shapes(config)]
    stored = track(load_full(step, names), "Reading weights", total=len(names), disable=not progress)
    tensors = ((name.removeprefix("model."), tensor) for name, tensor in stored)
    extras: dict[str, Any] | None = json.loads((step / EXTRA).read_text(encoding="utf-8")).get("hf_extras")
    save_hf(target, tensors, config, tokenizer_from=_tokenizer_folder(step), extras=extras, dtype=dtype)


def _tokenizer_folder(step: Path) -> Path | None:
    """The tokenizer that the run named, else what lies beside its steps; a warning when it named one that is gone."""
    named = read_native(step / "modellink.yaml", section="tokenizer").tokenizer_name_or_path
    beside = step.absolute().parent
    if named and Path(named).is_dir():
        return Path(named)
    if any(beside.glob("tokenizer*")):
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
) -> None:
    """Convert the checkpoint in `load_dir` to format `to` ("hf" or "native") in `save_dir`.

    A native checkpoint loads at every layout, so the parallel sizes matter to Megatron's formats only. `dtype` casts
    the weights (default: as stored). A run's folder that holds steps and an export counts as native. Raises
    ModelLinkError for what does not exist or cannot be expressed; nothing is left half-written.
    """
    source, target = Path(load_dir), Path(save_dir)
    if to not in FORMATS or tensor_parallel != 1 or pipeline_parallel != 1:
        raise ModelLinkError(
            f"converting to {to} with tensor parallel {tensor_parallel} and pipeline parallel {pipeline_parallel} is "
            f"not built yet: give one of {', '.join(FORMATS)} with parallel sizes 1."
        )
    if not source.is_dir():
        raise ModelLinkError(f"no checkpoint at {source}: give a Hugging Face or native checkpoint folder.")
    if is_hf_folder(source) and not CheckpointStore(source, local=True).iterations():
        if to == "hf":
            raise ModelLinkError(f"{source} already is a Hugging Face folder: copy it, or convert to native.")
        if target.exists() and not (target.is_dir() and not any(target.iterdir())):
            raise ModelLinkError(f"{target} exists and is not an empty folder: give another one or remove it yourself.")
        hf_to_native(source, target, dtype)
    elif to == "native":
        raise ModelLinkError(f"{source} already is native: it loads at every layout.")
    else:
        native_to_hf(source, target, dtype, progress=True)
