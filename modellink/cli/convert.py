"""`modellink convert` and `convert_ckpt.py`: Hugging Face folder <-> native checkpoint."""

from __future__ import annotations

import dataclasses
import sys
from collections.abc import Sequence

from modellink.config.convert_schema import ConvertConfig
from modellink.config.load import load_section
from modellink.errors import ModelLinkError

# Every spelling of a format -> the format. Megatron's files are named here to say that they come later.
FORMATS = {
    "hf": "hf",
    "llama2_hf": "hf",
    "save_huggingface_llama": "hf",
    "native": "native",
    "mg": "Megatron",
    "megatron": "Megatron",
    "mcore": "Megatron",
    "legacy": "Megatron",
}


DTYPES = {"fp16": "float16", "bf16": "bfloat16", "fp32": "float32"}
# The others describe Megatron's files.
USED = ("load_dir", "save_dir", "load_model_type", "save_model_type", "loader", "saver", "params_dtype")


def run(argv: Sequence[str]) -> int:
    """Read the options, then convert."""
    config: ConvertConfig = load_section(argv, "convert")
    if not config.load_dir or not config.save_dir:
        raise ModelLinkError("convert needs --load-dir FOLDER and --save-dir FOLDER.")
    if config.lora_load:
        raise ModelLinkError("--lora-load is refused: merging adapters is not built yet.")
    target = _format(config.save_model_type or config.saver, "--save-model-type")
    if target is None:
        raise ModelLinkError("--save-model-type is missing: give hf or native.")
    _format(config.load_model_type or config.loader, "--load-model-type")
    idle = [
        "--" + option.name.replace("_", "-")
        for option in dataclasses.fields(config)
        if option.name not in USED and getattr(config, option.name) != option.default
    ]
    if idle:
        print(
            f"modellink: warning: {', '.join(idle)} shape Megatron's files: no effect between hf and native",
            file=sys.stderr,
        )
    import torch

    from modellink.checkpoint.convert import convert

    dtype = getattr(torch, DTYPES[config.params_dtype]) if config.params_dtype else None
    convert(config.load_dir, config.save_dir, to=target, dtype=dtype)
    print(f"{config.save_dir}: written in the format {target}")
    return 0


def _format(name: str | None, flag: str) -> str | None:
    if name is None:
        return None
    if name not in FORMATS:
        raise ModelLinkError(f"{flag} {name} is unknown: use hf or native.")
    if FORMATS[name] == "Megatron":
        raise ModelLinkError(
            f"{flag} {name} is refused: Megatron's checkpoint files are not built yet; use hf or native."
        )
    return FORMATS[name]
