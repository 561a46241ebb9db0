"""Architectures with a name (`--model llama2-7b`): rows of data over the decoder, from the published config files."""

from __future__ import annotations

from typing import Any

from modellink.config.schema import ModelConfig
from modellink.registry import Registry

_LLAMA: dict[str, Any] = {
    "family": "llama",
    "normalization": "RMSNorm",
    "activation": "silu",
    "gated_mlp": True,
    "qkv_bias": False,
    "attention_output_bias": False,
    "mlp_bias": False,
    "tie_word_embeddings": False,
    "position_embedding": "rope",
    "attention_dropout": 0.0,
    "hidden_dropout": 0.0,
}
_LLAMA31: dict[str, Any] = _LLAMA | {
    "vocab_size": 128256,
    "max_position_embeddings": 131072,
    "rope_theta": 500000.0,
    "rope_scaling": "llama3",
    "rope_scaling_factor": 8.0,
    "rope_low_freq_factor": 1.0,
    "rope_high_freq_factor": 4.0,
    "rope_original_max_position": 8192,
}
_QWEN2: dict[str, Any] = _LLAMA | {"family": "qwen2", "qkv_bias": True, "norm_epsilon": 1e-6, "rope_theta": 1000000.0}


def _sizes(layers: int, hidden: int, heads: int, key_value_heads: int, ffn: int) -> dict[str, int]:
    return {
        "num_layers": layers,
        "hidden_size": hidden,
        "num_attention_heads": heads,
        "num_key_value_heads": key_value_heads,
        "ffn_hidden_size": ffn,
    }


_LLAMA2 = _LLAMA | {"vocab_size": 32000, "max_position_embeddings": 4096}
_QWEN25_SMALL = _QWEN2 | {"vocab_size": 151936, "max_position_embeddings": 32768, "tie_word_embeddings": True}
_TINY = _sizes(2, 64, 4, 2, 96) | {"vocab_size": 512, "max_position_embeddings": 512}

presets: Registry[dict[str, Any]] = Registry("preset")
for _name, _fields in {
    "llama2-7b": _LLAMA2 | _sizes(32, 4096, 32, 32, 11008),
    "llama2-13b": _LLAMA2 | _sizes(40, 5120, 40, 40, 13824),
    "llama2-70b": _LLAMA2 | _sizes(80, 8192, 64, 8, 28672),
    "llama3-8b": _LLAMA
    | _sizes(32, 4096, 32, 8, 14336)
    | {"vocab_size": 128256, "max_position_embeddings": 8192, "rope_theta": 500000.0},
    "llama3.1-8b": _LLAMA31 | _sizes(32, 4096, 32, 8, 14336),
    "llama3.1-70b": _LLAMA31 | _sizes(80, 8192, 64, 8, 28672),
    "llama3.2-1b": _LLAMA31
    | _sizes(16, 2048, 32, 8, 8192)
    | {"rope_scaling_factor": 32.0, "tie_word_embeddings": True},
    "llama3.2-3b": _LLAMA31
    | _sizes(28, 3072, 24, 8, 8192)
    | {"rope_scaling_factor": 32.0, "tie_word_embeddings": True},
    "qwen2.5-0.5b": _QWEN25_SMALL | _sizes(24, 896, 14, 2, 4864),
    "qwen2.5-1.5b": _QWEN25_SMALL | _sizes(28, 1536, 12, 2, 8960),
    "qwen2.5-7b": _QWEN2 | _sizes(28, 3584, 28, 4, 18944) | {"vocab_size": 152064, "max_position_embeddings": 131072},
    "tiny-llama": _LLAMA | _TINY,
    "tiny-qwen2": _QWEN2 | _TINY | {"tie_word_embeddings": True},
}.items():
    presets.add(_name, _fields)


def preset_fields(name: str) -> dict[str, Any]:
    """The fields that the preset states; unknown names raise with the nearest ones."""
    return dict(presets.get(name))


def preset(name: str) -> ModelConfig:
    """The architecture called `name`, sizes resolved."""
    return ModelConfig(**preset_fields(name)).resolve()
