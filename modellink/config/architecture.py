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
from modellink.config.schema import Config, ModelConfig
from modellink.config.yaml_file import read_yaml
from modellink.errors import ModelLinkError

NATIVE = "modellink.yaml"
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
    "query_key_layer_scaling",
    *("router_input_jitter", "aux_loss_coeff", "device_aux_loss_coeff", "comm_aux_loss_coeff", "z_loss_coeff"),
    *("sequence_aux_loss", "expert_capacity_factor", "pad_experts_to_capacity", "token_drop_policy"),
    "moe_grouped_gemm",
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
    *("router_groups", "router_bias", "router_correction_bias", "swiglu_limit", "attention_sinks"),
    *("rope_theta_window", "latent_rope_interleaved", "latent_norm_epsilon"),
)
# None in a folder means that it does not say; in the other fields it means that the model has none.
MAY_BE_UNKNOWN = ("vocab_size", "padded_vocab_size", "max_position_embeddings", "rope_original_max_position")
_EXPERTS = "moe_ffn_hidden_size first_k_dense_replace moe_layer_freq n_shared_experts router_topk router_scoring"
_EXPERTS += " norm_topk_prob routed_scaling_factor router_groups topk_group router_bias router_correction_bias"
_LATENT = "q_lora_rank kv_lora_rank qk_nope_head_dim qk_rope_head_dim v_head_dim latent_rope_interleaved"
# Fields that mean something only when another field has one of these values (None: any but none).
ONLY_WITH: dict[str, tuple[str, tuple[Any, ...] | None]] = {
    **dict.fromkeys(_EXPERTS.split(), ("num_experts", None)),
    **dict.fromkeys(["shared_expert_gate", "shared_expert_gate_dimension"], ("n_shared_experts", None)),
    **dict.fromkeys([*_LATENT.split(), "latent_norm_epsilon"], ("multi_head_latent_attention", (True,))),
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
        stated = None if folder is None else _find(Path(folder), resolved.config.checkpoint.ckpt_step)
        if stated is None:
            continue
        native = stated.name == NATIVE
        model = read_native(stated) if native else _read_hf(stated.parent)
        where = f"checkpoint {stated}" if native else f"HF folder {folder}"
        by_hf_path = resolved.origins[path].endswith(("hf-path", "hf_path"))
        strict = complete and preset is None and not by_hf_path and not resolved.config.checkpoint.use_checkpoint_args
        known = {f.name for f in dataclasses.fields(model) if f.name not in MAY_BE_UNKNOWN or getattr(model, f.name)}
        _merge(resolved, model, known, where, strict)
        _take_tokenizer(resolved, stated, where)
        return
    if resolved.config.checkpoint.use_checkpoint_args:
        given = resolved.config.checkpoint.load or resolved.config.checkpoint.pretrained_checkpoint
        raise ModelLinkError(
            f"--use-checkpoint-args found no architecture in {given}: give --load with a folder that holds config.json "
            "or a checkpoint of this program, or give --num-layers, --hidden-size and --num-attention-heads."
        )


def _explicit(resolved: ResolvedConfig, path: str) -> bool:
    return resolved.origins[path] != "default"


def _find(folder: Path, step: int | None) -> Path | None:
    """The file that states the architecture: modellink.yaml of a step (by default the tracked, else the newest one), or
    config.json; None when there is neither."""
    tracker = folder / TRACKER
    text = tracker.read_text(encoding="utf-8").strip() if tracker.is_file() else ""
    wanted = int(text) if text.isdigit() else None
    wanted = wanted if step is None else step
    steps = sorted((path.name for path in folder.glob("iter_*")), reverse=True)
    tracked = [] if wanted is None else [f"iter_{wanted:07d}"]
    for file in (folder / NATIVE, *(folder / name / NATIVE for name in tracked + steps), folder / "config.json"):
        if file.is_file():
            return file
    return None


def _read_hf(folder: Path) -> ModelConfig:
    from modellink.checkpoint.hf_config import read_config

    return read_config(folder)


def read_native(path: Path, section: str = "model") -> Any:
    """One section of a `modellink.yaml`, as `dump_config` writes it; unknown keys raise ModelLinkError."""
    found = getattr(Config(), section)
    for item in read_yaml(str(path), "train", "checkpoint"):
        if item.flag.path and item.flag.path.startswith(f"{section}."):
            setattr(found, item.flag.path.split(".")[1], item.value)
    return found


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
        elif explicit and name == "vocab_size" and value < stated <= (theirs.padded_vocab_size or 0):
            # tokens that the tokenizer added took rows that padded the vocabulary
            resolved.set(path, stated, where)
        elif explicit:
            problems.append(f"{name} is {value} by {resolved.origins[path]} but {stated} in {where}")
            remedies.append(f"no {resolved.origins[path]}" if stated is None else spell(path, stated))
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
        flags = " ".join(remedy for remedy in remedies if remedy.startswith("--"))
        steps = " and ".join(filter(None, [flags, *(remedy for remedy in remedies if not remedy.startswith("--"))]))
        advice = f"give {steps}" + (", or leave out all architecture flags" if strict else "")
        raise ModelLinkError(f"{'; '.join(problems)}. To keep these weights, {advice}.")


def _matters(theirs: ModelConfig, name: str) -> bool:
    """Whether the folder's value changes any number, given its other fields."""
    if name not in ONLY_WITH:
        return True
    other, values = ONLY_WITH[name]
    value = getattr(theirs, other)
    return (bool(value) if values is None else value in values) and _matters(theirs, other)


def _equal(name: str, value: Any, stated: Any, mine: ModelConfig, theirs: ModelConfig) -> bool:
    if name == "window_layers" and mine.num_layers and mine.num_layers == theirs.num_layers:
        layers = range(mine.num_layers)
        return [mine.layer_has_window(i) for i in layers] == [theirs.layer_has_window(i) for i in layers]
    if name == "query_scale" and not (value is None and stated is None):  # both derived: heads are compared themselves
        value, stated = value or mine.head_dim, stated or theirs.head_dim
    if (isinstance(value, float) and isinstance(stated, float | int)) or (
        isinstance(stated, float) and isinstance(value, int)
    ):
        return math.isclose(value, stated, rel_tol=1e-6)
    return bool(value == stated)


def _changes(resolved: ResolvedConfig, name: str, value: Any, stated: Any, theirs: ModelConfig) -> bool:
    """Whether a value that flags leave at its default gives other numbers than the folder's."""
    if name == "sliding_window":
        return stated is not None and (resolved.config.data.seq_length or math.inf) > stated
    return not _equal(name, value, stated, resolved.config.model.resolve(), theirs)


def _take_tokenizer(resolved: ResolvedConfig, stated: Path, where: str) -> None:
    """Use the tokenizer of the folder, or the one its run used, when none was named."""
    tokenizer = resolved.config.tokenizer
    if tokenizer.tokenizer_name_or_path or tokenizer.tokenizer_model or tokenizer.vocab_file:
        return
    files = ("tokenizer.json", "tokenizer.model", "tokenizer_config.json")
    if any((stated.parent / name).is_file() for name in files):
        if tokenizer.tokenizer_type == "PretrainedFromHF":
            resolved.set("tokenizer.tokenizer_name_or_path", str(stated.parent), where)
    elif stated.name == NATIVE:
        theirs = read_native(stated, "tokenizer")
        for option in dataclasses.fields(theirs):
            path = f"tokenizer.{option.name}"
            if not _explicit(resolved, path):
                resolved.set(path, getattr(theirs, option.name), where)
