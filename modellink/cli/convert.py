"""`modellink convert` and `convert_ckpt.py`: weights between Hugging Face, Megatron's and native folders."""

from __future__ import annotations

import dataclasses
import sys
from collections.abc import Sequence
from typing import Any

from modellink.config.convert_schema import ConvertConfig
from modellink.config.load import load_section
from modellink.errors import ModelLinkError
from modellink.registry import suggest

# Every spelling of a format -> the format; Megatron's is Core or Legacy by further options.
FORMATS = {
    "hf": "hf",
    "llama2_hf": "hf",
    "save_huggingface_llama": "hf",
    "native": "native",
    "mg": "mg",
    "megatron": "mg",
    "mcore": "mcore",
    "legacy": "legacy",
}
DTYPES = {"fp16": "float16", "bf16": "bfloat16", "fp32": "float32"}
USED = (
    *("load_dir", "save_dir", "load_model_type", "save_model_type", "loader", "saver", "params_dtype"),
    *("model_type_hf", "config_from", "true_vocab_size", "load_from_legacy", "lora_load", "verify", "workers"),
)
# These describe the adapter that --lora-load names.
LORA = ("lora_r", "lora_alpha", "lora_target_modules")
# These shape Megatron's files.
LAYOUT = (
    *("tensor_parallel", "pipeline_parallel", "expert_parallel"),
    *("layers_per_stage", "layers_per_virtual_stage", "vocab_multiple"),
)
DIALECT = ("use_mcore_models", "save_to_legacy")
# These say again what the weights and their configuration say.
DESCRIBED = (
    *("tokenizer_model", "vocab_file", "qkv_bias", "attention_output_bias", "embedding_norm", "sandwich_norm"),
    *("moe_grouped_gemm", "w_pack"),
)


def run(argv: Sequence[str]) -> int:
    """Read the options, then convert."""
    config: ConvertConfig = load_section(argv, "convert")
    if not config.load_dir or not config.save_dir:
        raise ModelLinkError("convert needs --load-dir FOLDER and --save-dir FOLDER.")
    given = [f"--{name.replace('_', '-')}" for name in LORA if getattr(config, name) is not None]
    if given and not config.lora_load:
        raise ModelLinkError(
            f"{', '.join(given)} without --lora-load FOLDER: give the adapter to merge, or leave it out."
        )
    target = _format(config.save_model_type or config.saver, "--save-model-type")
    if target is None:
        raise ModelLinkError("--save-model-type is missing: give hf, native, mcore, legacy or mg.")
    _format(config.load_model_type or config.loader, "--load-model-type")
    if target == "mg":
        target = "mcore" if config.use_mcore_models and not config.save_to_legacy else "legacy"
    native = target in ("hf", "native")
    read = (*USED, *DESCRIBED, *LORA) if native else (*USED, *DESCRIBED, *LORA, *DIALECT, *LAYOUT)
    idle = [
        "--" + option.name.replace("_", "-")
        for option in dataclasses.fields(config)
        if option.name not in read and getattr(config, option.name) != option.default
    ]
    if idle:
        print(
            f"modellink: warning: {', '.join(idle)} shape Megatron's files: no effect on the format {target}",
            file=sys.stderr,
        )
    import torch

    from modellink.checkpoint.convert import convert

    layout: dict[str, Any] = {} if native else {name: getattr(config, name) for name in LAYOUT}
    if not native:
        layout["grouped_experts"] = config.moe_grouped_gemm
    convert(
        config.load_dir,
        config.save_dir,
        to=target,
        dtype=getattr(torch, DTYPES[config.params_dtype]) if config.params_dtype else None,
        vocab_size=config.true_vocab_size,
        family=config.model_type_hf,
        config_from=config.config_from,
        lora_load=config.lora_load,
        verify=config.verify,
        workers=config.workers,
        **{name: getattr(config, name) for name in LORA},
        **layout,
    )
    print(f"{config.save_dir}: written in the format {target}")
    return 0


def _format(name: str | None, flag: str) -> str | None:
    if name is not None and name not in FORMATS:
        raise ModelLinkError(f"{flag} {name} is unknown: use hf, native, mcore, legacy or mg.{suggest(name, FORMATS)}")
    return None if name is None else FORMATS[name]
