"""The architecture in the `args` of Megatron's files: ModelConfig to and from the run's options.

An option's attribute is its flag with underscores, so the flag table says most names. What is left are the few
places where one of our fields is several of Megatron's options. Fields that Megatron has no option for are stored
under our name, which its own reader passes over; its own files lack them, and then they keep their defaults.
"""

from __future__ import annotations

import argparse
import dataclasses
from typing import Any

from modellink.config.flags_table import SPELLINGS
from modellink.config.schema import ModelConfig
from modellink.errors import ModelLinkError
from modellink.models.families import FAMILIES
from modellink.models.families.family import all_families

_EXTRAS = "hf_extras"
_SIZES = ("num_layers", "hidden_size", "num_attention_heads")
_DERIVED = ("num_key_value_heads", "tie_word_embeddings")


def _attributes(field: str) -> list[str]:
    """The attributes that may hold a field, the one that is written first."""
    flags = [flag for flag in SPELLINGS.get(f"model.{field}", "").split() if not flag.startswith("!")]
    names = [flag.removeprefix("--").replace("-", "_") for flag in flags]
    return [*names, field] if field not in names else names


def read_arguments(arguments: dict[str, Any], where: str, family: str | None = None) -> ModelConfig:
    """The ModelConfig that `arguments` describe; `family` (default: the first that can) is the Hugging Face spelling.

    Raises ModelLinkError when sizes are missing or the model is not a dense decoder.
    """
    lacking = [name for name in _SIZES if not arguments.get(name)]
    if lacking:
        raise ModelLinkError(
            f"{where} does not say {', '.join(lacking)}: give --save-dir a folder that holds the model's config.json."
        )
    if arguments.get("num_experts") or arguments.get("multi_latent_attention"):
        raise ModelLinkError(f"{where} describes a model with experts or latent attention: only dense models are read.")
    found: dict[str, Any] = {}
    for option in dataclasses.fields(ModelConfig):
        for name in _attributes(option.name):
            if arguments.get(name) is not None and option.name not in _DERIVED:
                value = arguments[name]
                found[option.name] = float(value) if type(value) is int and "float" in str(option.type) else value
                break
    found |= _special(arguments, found)
    config = ModelConfig(**found).resolve()
    config.vocab_size = config.vocab_size or config.padded_vocab_size
    config.family = _family(config, found.get("family"), family)
    return config


def _special(arguments: dict[str, Any], found: dict[str, Any]) -> dict[str, Any]:
    """Fields that several options decide together."""
    given = arguments.get
    bias = bool(given("add_bias_linear", True))
    special: dict[str, Any] = {
        "qkv_bias": bias or found.get("qkv_bias", False),
        "attention_output_bias": bias or found.get("attention_output_bias", False),
        "mlp_bias": found.get("mlp_bias", bias),
        "tie_word_embeddings": not given("untie_embeddings_and_output_weights", False),
        "norm_offset": bool(found.get("norm_offset") or given("apply_layernorm_1p", False)),
    }
    if given("group_query_attention") and given("num_query_groups"):
        special["num_key_value_heads"] = given("num_query_groups")
    if "norm_epsilon" not in found and given("layernorm_epsilon") is not None:
        special["norm_epsilon"] = given("layernorm_epsilon")
    if "activation" not in found:
        special["gated_mlp"] = bool(given("swiglu", False))
        tanh = given("bias_gelu_fusion", True) or given("openai_gelu", False)
        plain = "squared_relu" if given("squared_relu", False) else "gelu_tanh" if tanh else "gelu"
        special["activation"] = "silu" if given("swiglu", False) else plain
    if given("use_rope_scaling", False):
        special |= {"rope_scaling": "llama3", "rope_original_max_position": 8192}
    return special


def _family(config: ModelConfig, stored: str | None, asked: str | None) -> str:
    if stored in FAMILIES:
        return str(stored)
    # the plainest spelling first: many families share an architecture
    wanted = [FAMILIES.get(name) for name in (asked, "llama", "qwen2") if name is not None and name in FAMILIES]
    able = (row.name for row in (*wanted, *all_families()) if not row.lost(config))
    return next(able, "llama")


def read_extras(arguments: dict[str, Any]) -> dict[str, Any]:
    """The keys of config.json that no field holds, when the files were written here."""
    extras = arguments.get(_EXTRAS)
    return dict(extras) if isinstance(extras, dict) else {}


def write_arguments(
    config: ModelConfig, extras: dict[str, Any] | None, layout: dict[str, Any], dtype: object
) -> argparse.Namespace:
    """The options of a run of Megatron that has this architecture and `layout` (further attributes)."""
    config = config.resolve()
    values: dict[str, Any] = {}
    for option in dataclasses.fields(ModelConfig):
        if option.name not in _DERIVED:
            values[_attributes(option.name)[0]] = getattr(config, option.name)
    biases = config.qkv_bias and config.attention_output_bias and config.mlp_bias
    rope, length = config.position_embedding, config.max_position_embeddings or 0
    grouped = config.num_key_value_heads != config.num_attention_heads
    return argparse.Namespace(
        **values
        | layout
        | {
            "add_bias_linear": biases,
            "add_position_embedding": rope == "learned_absolute",
            "apply_layernorm_1p": config.norm_offset,
            "consumed_train_samples": 0,
            "consumed_valid_samples": 0,
            "encoder_num_layers": config.num_layers,
            "group_query_attention": grouped,
            "layernorm_epsilon": config.norm_epsilon,  # the newer name
            "max_position_embeddings": length,
            "num_query_groups": config.num_key_value_heads if grouped else 1,
            "params_dtype": dtype,
            "seq_length": length,
            "squared_relu": config.activation == "squared_relu",
            "swiglu": config.gated_mlp and config.activation == "silu",
            "tokenizer_type": "PretrainedFromHF",
            "untie_embeddings_and_output_weights": not config.tie_word_embeddings,
            "use_rotary_position_embeddings": rope == "rope",
            _EXTRAS: extras or {},
        }
    )
