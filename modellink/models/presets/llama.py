"""Llama 1 to 3.2 and its relatives: CodeLlama, Yi, Aquila, Mistral and Mixtral, Phi-3, OLMo-2."""

from __future__ import annotations

from modellink.models.presets.bases import LLAMA, TIED, Rows, experts, sizes, tokens

_1 = LLAMA | tokens(32000, 2048) | {"norm_epsilon": 1e-6}
_2 = LLAMA | tokens(32000, 4096)
_3 = LLAMA | tokens(128256, 8192, 500000.0)
_31 = (
    LLAMA
    | tokens(128256, 131072, 500000.0)
    | {
        "rope_scaling": "llama3",
        "rope_scaling_factor": 8.0,
        "rope_low_freq_factor": 1.0,
        "rope_high_freq_factor": 4.0,
        "rope_original_max_position": 8192,
    }
)
_32 = _31 | TIED | {"rope_scaling_factor": 32.0}
_8B, _34B, _70B = (
    sizes(32, 4096, 32, 8, 14336),
    sizes(48, 8192, 64, 8, 22016),
    sizes(80, 8192, 64, 8, 28672),
)
_AQUILA = LLAMA | tokens(100008, 2048) | {"family": "aquila"}
_MISTRAL = LLAMA | {"family": "mistral"} | _8B
_MIXTRAL = LLAMA | {"family": "mixtral"}

ROWS: Rows = {
    "llama-7b": _1 | sizes(32, 4096, 32, 32, 11008),
    "llama-13b": _1 | sizes(40, 5120, 40, 40, 13824),
    "llama-33b": _1 | sizes(60, 6656, 52, 52, 17920),
    "llama-65b": _1 | sizes(80, 8192, 64, 64, 22016),
    "llama2-7b": _2 | sizes(32, 4096, 32, 32, 11008),
    "llama2-13b": _2 | sizes(40, 5120, 40, 40, 13824),
    "llama2-34b": _2 | _34B | {"rope_theta": 1000000.0},
    "llama2-70b": _2 | _70B,
    "codellama-34b": LLAMA | _34B | tokens(32000, 16384, 1000000.0),
    "llama3-8b": _3 | _8B,
    "llama3-70b": _3 | _70B,
    "llama3.1-8b": _31 | _8B,
    "llama3.1-70b": _31 | _70B,
    "llama3.1-405b": _31 | sizes(126, 16384, 128, 8, 53248),
    "llama3.2-1b": _32 | sizes(16, 2048, 32, 8, 8192),
    "llama3.2-3b": _32 | sizes(28, 3072, 24, 8, 8192),
    "yi-34b": LLAMA | sizes(60, 7168, 56, 8, 20480) | tokens(64000, 4096, 5000000.0),
    "tiny-llama": LLAMA | sizes(2, 64, 4, 2, 96) | tokens(512, 512),
    "aquila-7b": _AQUILA | sizes(32, 4096, 32, 32, 11008) | {"norm_epsilon": 1e-6},
    "aquila2-7b": _AQUILA | sizes(32, 4096, 32, 32, 11008),
    "aquila2-34b": _AQUILA | sizes(60, 6144, 48, 8, 24576) | {"max_position_embeddings": 4096},
    "mistral-7b": _MISTRAL | tokens(32000, 32768) | {"sliding_window": 4096, "window_layers": "all"},
    "mistral-7b-v0.3": _MISTRAL | tokens(32768, 32768, 1000000.0),
    "mixtral-8x7b": _MIXTRAL | _8B | tokens(32000, 32768, 1000000.0) | experts(8, 2, 14336, aux_loss_coeff=0.02),
    "mixtral-8x22b": _MIXTRAL
    | sizes(56, 6144, 48, 8, 16384)
    | tokens(32000, 65536, 1000000.0)
    | experts(8, 2, 16384, aux_loss_coeff=0.001),
    "tiny-mixtral": _MIXTRAL | sizes(2, 64, 4, 2, 96) | tokens(512, 512) | experts(4, 2, 96, aux_loss_coeff=0.01),
    "phi-3-mini": LLAMA
    | {"family": "phi3", "sliding_window": 2047, "window_layers": "all"}
    | sizes(32, 3072, 32, 32, 8192)
    | tokens(32064, 4096),
    "olmo2-7b": LLAMA
    | sizes(32, 4096, 32, 32, 11008)
    | tokens(100352, 4096, 500000.0)
    | {
        "family": "olmo2",
        "norm_epsilon": 1e-6,
        "norm_weight_in_fp32": True,
        "pre_norm": False,
        "sandwich_norm": True,
        "qk_norm": True,
        "qk_norm_all_heads": True,
    },
}
