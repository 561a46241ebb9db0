"""Every launch line that has a model builds it, with the parameters of the published model that it is for.

Flags that are refused today (`LATER`) say nothing about an architecture: they are left out. A line leaves the size of
the vocabulary to the tokenizer, so it gets that of the preset.
"""

from __future__ import annotations

import dataclasses
from typing import Any

import pytest
import torch
from test_config_launch_lines import LATER, MISSPELT, PROGRAM, later_flags, resolve
from test_config_launch_lines import lines as lines
from test_presets import FOLDERS

from modellink.config.flags import by_name
from modellink.config.schema import ModelConfig
from modellink.models.count import count_parameters
from modellink.models.decoder import Decoder
from modellink.models.presets import preset, presets

KINDS = {"pretrain": 84, "evaluate": 69, "generate": 66, "tune": 16, "chat": 14, "dpo": 2}
SIZES = ("num_layers", "hidden_size", "ffn_hidden_size", "num_attention_heads", "num_key_value_heads", "num_experts")
# models shortened for a test of speed -> what they shorten, and to what
SHORTENED: dict[str, tuple[str, dict[str, int]]] = {
    "llama31/pretrain_llama31_50b": ("llama3.1-405b", {"num_layers": 14, "num_key_value_heads": 16}),
    "llama31/pretrain_llama31_200b": ("llama3.1-405b", {"num_layers": 62, "num_key_value_heads": 16}),
    "deepseek2/pretrain_deepseek2_ptd_8p": ("deepseek-v2", {"num_layers": 2}),
    "deepseek2_coder/pretrain_deepseek2_ptd_8p": ("deepseek-v2", {"num_layers": 2}),
}
# lines with another number of parameters than the published model -> the field, and the difference
OUTPUT_MATRIX = "tie_word_embeddings"
DIFFERENT = {
    "mcore/grok1/pretrain_grok1_40b_ptd.sh": (OUTPUT_MATRIX, 131072 * 6144),  # untied, by --untie-embeddings-...
    "mcore/qwen15/evaluation_codeqwen_7b_ptd.sh": (OUTPUT_MATRIX, -92416 * 4096),  # tied, as that flag is absent
}


def model_of(line: dict[str, Any], written: ModelConfig) -> ModelConfig:
    """The published model of a line: by its folder and sizes."""
    for script, (name, sizes) in SHORTENED.items():
        if script in line["script"]:
            return dataclasses.replace(preset(name), **sizes)
    prefix = FOLDERS[line["script"].split("/")[-2]]
    named = (preset(name) for name in presets if name.startswith(prefix))
    return next(model for model in named if all(getattr(model, size) == getattr(written, size) for size in SIZES))


def test_lines_build_the_published_model(lines: list[dict[str, Any]], monkeypatch: pytest.MonkeyPatch) -> None:
    counts, built = dict.fromkeys(KINDS, 0), {}
    different = set()
    for line in lines:
        if PROGRAM[line["program"]] in ("preprocess", "convert"):
            continue
        without = (*later_flags(line), MISSPELT)
        written = resolve(line, monkeypatch, without).config.model
        published = model_of(line, written)
        vocabulary = {"vocab_size": published.vocab_size, "padded_vocab_size": published.vocab_size}
        written = dataclasses.replace(written, **vocabulary)
        shape = str(dataclasses.asdict(written))
        if shape not in built:
            with torch.device("meta"):
                built[shape] = sum(parameter.numel() for parameter in Decoder(written).parameters())
        expected = count_parameters(published)
        script = line["script"].removeprefix("examples/")
        if script in DIFFERENT:
            field, difference = DIFFERENT[script]
            assert getattr(written, field) != getattr(published, field)
            expected += difference
            different.add(script)
        assert built[shape] == count_parameters(written) == expected, script
        counts[line["kind"]] += 1
    assert counts == KINDS
    assert different == set(DIFFERENT)
    assert len(built) > 100


def test_what_a_line_loses_is_no_part_of_the_model(lines: list[dict[str, Any]]) -> None:
    """The flags that are left out set no option of the architecture."""
    table = by_name("train")
    for flag in LATER:
        assert not any(path.startswith("model.") for path in (table[flag].path or "", *table[flag].sets)), flag
