"""The final weights of a run as a Hugging Face folder, in the run's own folder, beside its native steps.

`config.json` is what makes a folder a Hugging Face one, so it is removed first and written last: whoever looks in
between sees native steps alone. Resuming always takes the steps, which hold the optimizer too.
"""

from __future__ import annotations

import os
import shutil
from pathlib import Path

import torch

from modellink.checkpoint.convert import native_to_hf
from modellink.checkpoint.hf import check_replaceable
from modellink.checkpoint.hf_config import CONFIG_NAME, write_config
from modellink.config.schema import ModelConfig
from modellink.files import fsync_directory

_WEIGHTS = ("model*.safetensors", "model.safetensors.index.json")


def check_export(folder: Path, config: ModelConfig) -> None:
    """Raise ModelLinkError, before training, if the family cannot express the model or foreign weights lie there."""
    write_config(config, {}, "float32")
    if (folder / CONFIG_NAME).exists() or any(folder.glob("model*.safetensors")):
        check_replaceable(folder)


def export_step(step: Path, folder: Path, dtype: torch.dtype) -> None:
    """Write the weights of the native step `step` into `folder`, cast to `dtype`, replacing an earlier export."""
    finished = folder / ".export.tmp"
    shutil.rmtree(finished, ignore_errors=True)
    try:
        native_to_hf(step, finished, dtype)
        (folder / CONFIG_NAME).unlink(missing_ok=True)
        for pattern in _WEIGHTS:
            for stale in folder.glob(pattern):
                stale.unlink()
        for file in sorted(finished.iterdir(), key=lambda file: file.name == CONFIG_NAME):
            os.replace(file, folder / file.name)
        fsync_directory(folder)
    finally:
        shutil.rmtree(finished, ignore_errors=True)
