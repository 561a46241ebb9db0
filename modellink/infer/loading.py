"""Weights, tokenizer and stop tokens from a folder: Hugging Face's format, or a native checkpoint."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path
from typing import Any

import torch

from modellink.checkpoint.hf import is_hf_folder, load_hf, read_config
from modellink.checkpoint.store import CheckpointStore, holds_native, is_native_step, load_full, read_tensor_names
from modellink.config.architecture import read_native
from modellink.config.load import read_yaml
from modellink.config.schema import ModelConfig, TokenizerConfig
from modellink.data.tokenizer import HFTokenizer
from modellink.errors import ModelLinkError
from modellink.models.decoder import Decoder

_TOKENIZER_FILES = ("tokenizer.json", "tokenizer.model", "vocab.json", "tokenizer_config.json")
_CONFIG = "modellink.yaml"


def load_pretrained(
    path: Path, dtype: torch.dtype, device: torch.device, tokenizer: Any = None
) -> tuple[Decoder, Any, list[int]]:
    """The decoder on `device` in `dtype`, its tokenizer (None when there is none), and the ids that end an answer."""
    if not path.is_dir():
        why = "it is a file" if path.is_file() else "there is no such folder"
        raise ModelLinkError(f"no model at {path}: {why}; give a Hugging Face folder or a checkpoint folder.")
    # a run's folder may hold both: its steps are at least as new as its export
    if is_hf_folder(path) and not holds_native(path):
        decoder = _empty(read_config(path), dtype, device)
        load_hf(decoder, path, progress=False)
        return decoder, load_tokenizer(tokenizer or path, required=tokenizer is not None), _stop_ids(path)
    step = path if is_native_step(path) else _newest(path)
    config = read_native(step / _CONFIG)
    # the rows that were stored, whatever layout padded them
    config.padded_vocab_size = read_tensor_names(step)["model.embed_tokens.weight"].shape[0]
    decoder = _empty(config, dtype, device)
    parameters = {f"model.{decoder.canonical_name(name)}": p for name, p in decoder.named_parameters()}
    with torch.no_grad():
        for name, value in load_full(step, parameters):
            parameters[name].copy_(value)
    return decoder, _native_tokenizer(step, tokenizer), _stop_ids(step.parent)


def _empty(config: ModelConfig, dtype: torch.dtype, device: torch.device) -> Decoder:
    """A decoder whose weights are still to be read."""
    config = config.resolve()
    if config.padded_vocab_size is None:
        config = dataclasses.replace(config, padded_vocab_size=config.vocab_size)
    with torch.device("meta"):
        decoder = Decoder(config)
    decoder = decoder.cast(dtype).to_empty(device=device)
    decoder.tie_weights()
    return decoder.eval()


def _newest(path: Path) -> Path:
    steps = [child for child in path.iterdir() if is_native_step(child)]
    if not steps:
        raise ModelLinkError(
            f"{path} holds no model: neither config.json (Hugging Face) nor a complete step with {_CONFIG} lies in "
            "it; give the folder that does."
        )
    return CheckpointStore(path, local=True).resolve(verify=False)


def _stop_ids(path: Path) -> list[int]:
    """End-of-text ids that generation_config.json and config.json name; chat models list several."""
    for name in ("generation_config.json", "config.json"):
        file = path / name
        if file.is_file():
            found = json.loads(file.read_text(encoding="utf-8")).get("eos_token_id")
            if found is not None:
                return list(found) if isinstance(found, list) else [found]
    return []


def load_tokenizer(source: Any, required: bool = True) -> Any:
    """A tokenizer object as it is, or the one in a folder; None when the folder holds none and it is not `required`."""
    if not isinstance(source, str | Path):
        return getattr(source, "hf", source)
    folder = Path(source)
    if not any((folder / name).is_file() for name in _TOKENIZER_FILES):
        if required:
            raise ModelLinkError(
                f"no tokenizer at {folder}: give a folder that holds one of {', '.join(_TOKENIZER_FILES)}."
            )
        return None
    return HFTokenizer(str(folder)).hf


def _native_tokenizer(step: Path, tokenizer: Any) -> Any:
    """The tokenizer handed in, the one beside the checkpoint, or the one its run was configured with."""
    if tokenizer is not None:
        return load_tokenizer(tokenizer)
    for folder in (step, step.parent):
        if (found := load_tokenizer(folder, required=False)) is not None:
            return found
    config = TokenizerConfig()
    for item in read_yaml(str(step / _CONFIG), "train"):
        if item.flag.path and item.flag.path.startswith("tokenizer."):
            setattr(config, item.flag.path.split(".")[1], item.value)
    named = config.tokenizer_name_or_path
    return load_tokenizer(named, required=False) if named else None
