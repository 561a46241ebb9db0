"""Dense families with a block of their own: Baichuan, Bloom, ChatGLM, InternLM, MiniCPM, Gemma, GPT-3."""

from __future__ import annotations

from modellink.models.presets.bases import GPT, LLAMA, TIED, Row, Rows, experts, sizes, tokens

_BAICHUAN = LLAMA | {"family": "baichuan", "norm_epsilon": 1e-6}
_BAICHUAN_7B, _BAICHUAN_13B = sizes(32, 4096, 32, 32, 11008), sizes(40, 5120, 40, 40, 13696)
_ALIBI: Row = {"position_embedding": "alibi"}
_BLOOM = GPT | _ALIBI | {"family": "bloom", "embedding_norm": True} | tokens(250880, 2048)
_GLM = LLAMA | {
    "family": "chatglm",
    "qkv_bias": True,
    "rope_fraction": 0.5,
    "rope_interleaved": True,
    "norm_weight_in_fp32": True,
}
_INTERNLM = (
    LLAMA
    | tokens(103168, 2048)
    | {"family": "internlm", "norm_epsilon": 1e-6, "qkv_bias": True, "attention_output_bias": True}
)
_MINICPM = (
    LLAMA
    | TIED
    | sizes(40, 2304, 36, 36, 5760)
    | tokens(122753, 4096)
    | {
        "family": "minicpm",
        "embedding_multiplier": 12.0,
        "residual_multiplier": 1.4 / 40**0.5,
        "hidden_divisor": 2304 / 256,
        "init_std": 0.1,
    }
)
_GEMMA = (
    LLAMA
    | TIED
    | tokens(256000, 8192)
    | {
        "family": "gemma",
        "norm_epsilon": 1e-6,
        "norm_offset": True,
        "norm_weight_in_fp32": True,
        "embedding_times_sqrt_hidden": True,
        "activation": "gelu_tanh",
        "head_dim": 256,
    }
)
_GEMMA2 = _GEMMA | {
    "family": "gemma2",
    "query_scale": 256.0,
    "sandwich_norm": True,
    "attention_logit_softcap": 50.0,
    "output_logit_softcap": 30.0,
    "sliding_window": 4096,
    "window_layers": "even",
}
_GEMMA3 = _GEMMA | {
    "family": "gemma3",
    "query_scale": 256.0,
    "sandwich_norm": True,
    "qk_norm": True,
    "rope_theta_window": 10000.0,
}
_GPT3 = GPT | {"activation": "gelu", "position_embedding": "learned_absolute", "init_std": 0.006} | tokens(50257, 2048)


def _five_of_six(layers: int, window: int) -> Row:
    """Gemma-3: a window on five layers, none on the sixth."""
    flags = ["0" if layer % 6 == 5 else "1" for layer in range(layers)]
    return {"sliding_window": window, "window_layers": ",".join(flags)}


ROWS: Rows = {
    "baichuan-7b": _BAICHUAN | _BAICHUAN_7B | tokens(64000, 4096),
    "baichuan-13b": _BAICHUAN | _BAICHUAN_13B | tokens(64000, 4096) | _ALIBI,
    "baichuan2-7b": _BAICHUAN | _BAICHUAN_7B | tokens(125696, 4096) | {"normalize_lm_head": True},
    "baichuan2-13b": _BAICHUAN | _BAICHUAN_13B | tokens(125696, 4096) | _ALIBI | {"normalize_lm_head": True},
    "bloom-7b1": _BLOOM | sizes(30, 4096, 32, 32, 16384),
    "bloom-176b": _BLOOM | sizes(70, 14336, 112, 112, 57344),
    "chatglm3-6b": _GLM | sizes(28, 4096, 32, 2, 13696) | tokens(65024, 8192),
    "chatglm3-6b-32k": _GLM | sizes(28, 4096, 32, 2, 13696) | tokens(65024, 32768, 500000.0),
    "glm4-9b": _GLM | sizes(40, 4096, 32, 2, 13696) | tokens(151552, 8192) | {"norm_epsilon": 1.5625e-07},
    "glm4-9b-chat": _GLM
    | sizes(40, 4096, 32, 2, 13696)
    | tokens(151552, 131072, 5000000.0)
    | {"norm_epsilon": 1.5625e-07},
    "internlm-7b": _INTERNLM | sizes(32, 4096, 32, 32, 11008),
    "internlm-65b": _INTERNLM | sizes(80, 8192, 64, 64, 22016),
    "internlm2-20b": LLAMA
    | {"family": "internlm2", "rope_scaling": "dynamic", "rope_original_max_position": 32768}
    | sizes(48, 6144, 48, 8, 16384)
    | tokens(92544, 32768, 1000000.0),
    "minicpm-2b": _MINICPM,
    "minicpm-moe-8x2b": _MINICPM | experts(8, 2, 5760, aux_loss_coeff=0.01),
    "gemma-2b": _GEMMA | sizes(18, 2048, 8, 1, 16384),
    "gemma-7b": _GEMMA | sizes(28, 3072, 16, 16, 24576),
    "gemma2-2b": _GEMMA2 | sizes(26, 2304, 8, 4, 9216),
    "gemma2-9b": _GEMMA2 | sizes(42, 3584, 16, 8, 14336),
    "gemma2-27b": _GEMMA2 | sizes(46, 4608, 32, 16, 36864) | {"head_dim": 128, "query_scale": 144.0},
    "gemma3-1b": _GEMMA3 | sizes(26, 1152, 4, 1, 6912) | tokens(262144, 32768, 1000000.0) | _five_of_six(26, 512),
    "gemma3-4b": _GEMMA3
    | sizes(34, 2560, 8, 4, 10240)
    | tokens(262208, 131072, 1000000.0)
    | _five_of_six(34, 1024)
    | {"rope_scaling": "linear", "rope_scaling_factor": 8.0},
    "gpt3-15b": _GPT3 | sizes(8, 12288, 96, 96, 49152),
    "gpt3-175b": _GPT3 | sizes(96, 12288, 96, 96, 49152),
}
