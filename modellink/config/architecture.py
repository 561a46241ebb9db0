"""The architecture from a preset, a checkpoint or a Hugging Face folder, and its agreement with what the user gave.

Explicit values must equal the folder's. When flags describe a whole architecture, as Megatron's launch lines do, an
absent flag says Megatron's default, so a folder with another value is a contradiction too; otherwise the folder fills
what was not given.
"""

from __future__ import annotations

import dataclasses
import math
from pathlib import Path
from typing import Any

from modellink.config.flags import flag_of, spell
from modellink.config.resolved import ResolvedConfig
from modellink.config.schema import ModelConfig
from modellink.config.yaml_file import read_yaml
from modellink.errors import ModelLinkError

TRACKER = "latest_checkpointed_iteration.txt"
SIZES = ("num_layers", "hidden_size", "num_attention_heads")
# These may differ from a folder: they change training or padding, not what the weights compute.
FREE = (
    "family",
    "attention_dropout",
    "hidden_dropout",
    "init_std",
    "vocab_multiple",
    "padded_vocab_size",
    "fp32_residual",
)
# Megatron's launch lines have no flag for these, so an absent flag says nothing.
UNSPOKEN = (
    "max_position_embeddings",
    "norm_weight_in_fp32",
    "lm_head_bias",
    "rope_attention_factor",
    "rope_truncate",
    "vocab_size",
    "window_layers",
    "query_key_layer_scaling",
)
# Fields that mean something only when another field has one of these values.
ONLY_WITH: dict[str, tuple[str, tuple[Any, ...]]] = {
    "rope_theta": ("position_embedding", ("rope",)),
    "rope_fraction": ("position_embedding", ("rope",)),
    "rope_interleaved": ("position_embedding", ("rope",)),
    "rope_scaling": ("position_embedding", ("rope",)),
    "rope_scaling_factor": ("rope_scaling", ("linear", "dynamic", "llama3", "yarn")),
    "rope_low_freq_factor": ("rope_scaling", ("llama3",)),
    "rope_high_freq_factor": ("rope_scaling", ("llama3",)),
    "rope_original_max_position": ("rope_scaling", ("dynamic", "llama3", "yarn")),
    "rope_beta_fast": ("rope_scaling", ("yarn",)),
    "rope_beta_slow": ("rope_scaling", ("yarn",)),
    "rope_mscale": ("rope_scaling", ("yarn",)),
    "rope_mscale_all_dim": ("rope_scaling", ("yarn",)),
}


def fill(resolved: ResolvedConfig, preset: str | None) -> None:
    """Take model fields from the preset and the folder, or raise ModelLinkError naming both values and both places."""
    if preset is not None:
        from modellink.models.presets import preset_fields

        fields = preset_fields(preset)
        _merge(resolved, ModelConfig(**fields), set(fields), f"preset {preset}", strict=False)
    complete = all(_explicit(resolved, f"model.{name}") for name in SIZES)
    for path in ("checkpoint.load", "checkpoint.pretrained_checkpoint"):
        folder = resolved.get(path)
        if folder is None:
            continue
        found = _read(Path(folder), resolved)
        if found is None:
            continue
        model, where = found
        by_hf_path = resolved.origins[path].endswith("hf-path") or resolved.origins[path].endswith("hf_path")
        strict = complete and preset is None and not by_hf_path and not resolved.config.checkpoint.use_checkpoint_args
        known = {f.name for f in dataclasses.fields(model) if getattr(model, f.name) is not None}
        _merge(resolved, model, known, where, strict)
        _tokenizer_from(resolved, Path(folder))
        return
    if resolved.config.checkpoint.use_checkpoint_args:
        given = resolved.config.checkpoint.load or resolved.config.checkpoint.pretrained_checkpoint
        raise ModelLinkError(
            f"--use-checkpoint-args found no architecture in {given}: give --load with a folder that holds "
            "config.json or a "
            "checkpoint of this program, or give --num-layers, --hidden-size and --num-attention-heads."
        )


def _explicit(resolved: ResolvedConfig, path: str) -> bool:
    return resolved.origins[path] != "default"


def _read(folder: Path, resolved: ResolvedConfig) -> tuple[ModelConfig, str] | None:
    """The architecture a folder states and where it stands; None when the folder states none."""
    tracker = folder / TRACKER
    if tracker.is_file():
        step = resolved.config.checkpoint.ckpt_step
        text = str(step) if step is not None else tracker.read_text(encoding="utf-8").strip()
        stated = folder / (f"iter_{int(text):07d}" if text.isdigit() else text) / "modellink.yaml"
        return (read_native(stated), f"checkpoint {stated}") if stated.is_file() else None
    if (folder / "config.json").is_file():
        from modellink.checkpoint.hf_config import read_config

        return read_config(folder), f"HF folder {folder}"
    return None


def read_native(path: Path) -> ModelConfig:
    """The architecture in a `modellink.yaml`, as `dump_config` writes it; unknown keys raise ModelLinkError."""
    model = ModelConfig()
    for item in read_yaml(str(path), "train"):
        if item.flag.path and item.flag.path.startswith("model."):
            setattr(model, item.flag.path.split(".")[1], item.value)
    return model


def _merge(resolved: ResolvedConfig, other: ModelConfig, known: set[str], where: str, strict: bool) -> None:
    """Compare `other`'s `known` fields with what was given, then take those that were not."""
    mine, theirs = resolved.config.model.resolve(), other.resolve()
    problems: list[str] = []
    remedies: list[str] = []
    for name in sorted(known):
        path, value, stated = f"model.{name}", getattr(mine, name), getattr(theirs, name)
        explicit = _explicit(resolved, path)
        if explicit and (name in FREE or not _matters(theirs, name) or _equal(name, value, stated, mine, theirs)):
            continue
        if explicit and name == "max_position_embeddings" and theirs.position_embedding != "learned_absolute":
            resolved.warnings.append(
                f"{resolved.origins[path]} {value} differs from {stated} in {where}: taking {value}"
            )
        elif explicit:
            problems.append(f"{name} is {value} by {resolved.origins[path]} but {stated} in {where}")
            remedies.append(spell(path, stated))
        elif (
            strict
            and name not in FREE + UNSPOKEN
            and _matters(theirs, name)
            and _changes(resolved, name, value, stated, theirs)
        ):
            problems.append(
                f"{name} is {value} by default, as {flag_of(path, stated)} is absent, but {stated} in {where}"
            )
            remedies.append(spell(path, stated))
        else:
            resolved.set(path, getattr(other, name), where)
    if problems:
        advice = f"give {' '.join(remedies)}" + (", or leave out all architecture flags" if strict else "")
        raise ModelLinkError(f"{'; '.join(problems)}. To use {where}, {advice}.")


def _matters(theirs: ModelConfig, name: str) -> bool:
    """Whether the folder's value changes any number, given its other fields."""
    if name not in ONLY_WITH:
        return True
    other, values = ONLY_WITH[name]
    return getattr(theirs, other) in values and _matters(theirs, other)


def _equal(name: str, value: Any, stated: Any, mine: ModelConfig, theirs: ModelConfig) -> bool:
    if name == "query_scale":
        value, stated = value or mine.head_dim, stated or theirs.head_dim
    if (
        isinstance(value, float)
        and isinstance(stated, float | int)
        or isinstance(stated, float)
        and isinstance(value, int)
    ):
        return math.isclose(value, stated, rel_tol=1e-6)
    return bool(value == stated)


def _changes(resolved: ResolvedConfig, name: str, value: Any, stated: Any, theirs: ModelConfig) -> bool:
    """Whether a value that flags leave at its default gives other numbers than the folder's."""
    if name == "sliding_window":
        return (resolved.config.data.seq_length or math.inf) > stated
    return not _equal(name, value, stated, resolved.config.model.resolve(), theirs)


def _tokenizer_from(resolved: ResolvedConfig, folder: Path) -> None:
    """Use the folder's own tokenizer when none was named."""
    tokenizer = resolved.config.tokenizer
    named = tokenizer.tokenizer_name_or_path or tokenizer.tokenizer_model or tokenizer.vocab_file
    files = ("tokenizer.json", "tokenizer.model", "tokenizer_config.json")
    if named is None and tokenizer.tokenizer_type == "PretrainedFromHF" and any((folder / f).is_file() for f in files):
        resolved.set("tokenizer.tokenizer_name_or_path", str(folder), f"HF folder {folder}")
