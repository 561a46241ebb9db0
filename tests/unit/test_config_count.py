"""The parameter count by formula against the model itself, built without memory."""

from __future__ import annotations

from typing import Any

import pytest

from modellink.config.schema import ModelConfig
from modellink.models.count import count_parameters
from modellink.models.presets import preset, presets

SIZES: dict[str, Any] = {"num_layers": 3, "hidden_size": 48, "num_attention_heads": 6, "padded_vocab_size": 130}


def built(config: ModelConfig) -> int:
    import torch

    from modellink.models.decoder import Decoder

    with torch.device("meta"):
        model = Decoder(config.resolve())
    return sum(parameter.numel() for parameter in model.parameters())


@pytest.mark.parametrize(
    "fields",
    [
        {"max_position_embeddings": 33},
        {"max_position_embeddings": 33, "qkv_bias": False, "mlp_bias": False, "tie_word_embeddings": False},
        {"position_embedding": "rope", "gated_mlp": True, "activation": "silu", "normalization": "RMSNorm"},
        {"position_embedding": "rope", "num_key_value_heads": 2, "head_dim": 10, "qk_norm": True, "gated_mlp": True},
        {"position_embedding": "alibi", "embedding_norm": True, "attention_output_bias": False},
        {"position_embedding": "rope", "sandwich_norm": True, "normalization": "RMSNorm", "ffn_hidden_size": 70},
        {"position_embedding": "rope", "pre_norm": False, "sandwich_norm": True, "num_key_value_heads": 2}
        | {"qk_norm": True, "qk_norm_all_heads": True, "normalize_lm_head": True, "tie_word_embeddings": False},
        {"position_embedding": "none", "lm_head_bias": True, "tie_word_embeddings": False, "qk_norm": True},
        {"position_embedding": "rope", "qk_norm": True, "normalization": "RMSNorm", "num_key_value_heads": 1},
    ],
)
def test_formula_equals_the_model(fields: dict[str, Any]) -> None:
    config = ModelConfig(**SIZES, **fields)
    assert count_parameters(config) == built(config)


@pytest.mark.parametrize("name", [name for name in presets if name.startswith(("tiny", "llama2-7b", "qwen2.5-0.5b"))])
def test_presets(name: str) -> None:
    config = preset(name)
    config.padded_vocab_size = config.vocab_size
    assert count_parameters(config) == built(config)
