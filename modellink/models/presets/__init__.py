"""Architectures with a name (`--model llama2-7b`): rows of data over the decoder, from the published config files.

A row states every field that changes a number the model computes; what it leaves out is the default of `ModelConfig`.
Models that no file was published for (GPT-3, the GPT-4-like ones, shortened models) follow the reference's launch
lines; docs/models.md says where those and the published files differ.
"""

from __future__ import annotations

import dataclasses

from modellink.config.schema import ModelConfig
from modellink.models.presets import dense, llama, qwen, sparse
from modellink.models.presets.bases import Row
from modellink.registry import Registry

presets: Registry[Row] = Registry("preset")
for _module in (llama, qwen, dense, sparse):
    for _name, _row in _module.ROWS.items():
        presets.add(_name, _row)

# what a name does not say
NOTES = {
    "llama2-34b": "not published; as the CodeLlama-34B weights that stand in for it",
    "qwen-72b": "stretches neither rotation nor queries, unlike the smaller ones",
    "internlm-65b": "not published; the 7B block at the sizes of the launch line",
    "gpt3-15b": "8 of the 96 layers of GPT-3 175B",
    "gpt3-175b": "no weights were published; block of the launch line",
    "gpt4-4x13b": "not a published model: 8 layers of GPT-3's width, 4 experts, no dropping",
    "gpt4-4x16b": "not a published model: 10 layers of GPT-3's width, 4 experts, capacity factor 1.1",
    "grok1-8x5b": "12 of the 64 layers of Grok-1",
    "deepseek-v2-60b": "16 of the 60 layers of DeepSeek-V2",
    "deepseek-v2-100b": "24 of the 60 layers of DeepSeek-V2",
    "deepseek-v3": "without the layer that predicts a second token",
    "glm-4.5-air": "without the layer that predicts a second token",
    "glm-4.5": "without the layer that predicts a second token",
    "gemma3-4b": "the language model; the published one also sees",
}


def preset_fields(name: str) -> Row:
    """The fields that the preset states; unknown names raise ModelLinkError with the nearest ones."""
    return dict(presets.get(name))


def preset(name: str) -> ModelConfig:
    """The architecture called `name`, sizes resolved, its vocabulary unpadded."""
    model = ModelConfig(**preset_fields(name)).resolve()
    return dataclasses.replace(model, padded_vocab_size=model.vocab_size)
