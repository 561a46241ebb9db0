"""Baichuan: Llama with query, key and value in one tensor; ALiBi in the 13B models, a normalised head in version 2.

All four models but the first 7B call themselves `BaichuanForCausalLM`. Rotary models state `max_position_embeddings`,
ALiBi ones only `model_max_length`. Nothing in the published files tells version 2 but the size of its vocabulary; a
file may say `norm_head` (and those written here do).
"""

from __future__ import annotations

from typing import Any

from modellink.config.schema import ModelConfig
from modellink.models.families.family import ACTIVATION, LLAMA_NAMES, Family, add, size_keys
from modellink.models.families.spelling import Group, Keys, constant, renamed

_FIRST_7B = "BaiChuanForCausalLM"
_VOCABULARY_1, _VOCABULARY_2 = 64000, 125696


def _read_generation(keys: Keys) -> dict[str, Any]:
    normalised = keys.take("norm_head")
    if normalised is None:
        vocabulary = int(keys.content["vocab_size"])
        if _FIRST_7B in (keys.content.get("architectures") or []):
            normalised = False
        elif vocabulary >= _VOCABULARY_1:
            normalised = vocabulary >= _VOCABULARY_2
        else:  # small test models: files of the first generation often lack the key
            normalised = keys.content.get("model_type") == "baichuan"
    if not isinstance(normalised, bool):
        raise keys.fail("norm_head", normalised, "should be true or false.")
    rotary, longest = keys.take("max_position_embeddings"), keys.take("model_max_length")
    if rotary is None and longest is None:
        raise keys.fail("max_position_embeddings", None, "is missing; ALiBi models give model_max_length instead.")
    return {
        "normalize_lm_head": normalised,
        "position_embedding": "alibi" if rotary is None else "rope",
        "max_position_embeddings": int(longest if rotary is None else rotary),
    }


def _write_generation(config: ModelConfig) -> dict[str, Any]:
    rotary = config.position_embedding == "rope"
    written: dict[str, Any] = {"norm_head": config.normalize_lm_head}
    if rotary and not config.normalize_lm_head:
        written["architectures"] = [_FIRST_7B]
    return written | {"max_position_embeddings" if rotary else "model_max_length": config.max_position_embeddings}


BAICHUAN = add(
    Family(
        name="baichuan",
        covers="Baichuan and Baichuan2 7B and 13B",
        architecture="BaichuanForCausalLM",
        other_architectures=(_FIRST_7B,),
        model_type="baichuan",
        keys=(
            *renamed(size_keys(), num_key_value_heads=None, head_dim=None, max_position_embeddings=None),
            ACTIVATION,
        ),
        groups=(Group(_read_generation, _write_generation), constant("z_loss_weight", 0)),
        names=LLAMA_NAMES
        | {f"layers.{{}}.self_attn.{part}_proj": "model.layers.{}.self_attn.W_pack" for part in "qkv"},
    ),
    "baichuan2",
)
