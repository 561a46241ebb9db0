"""Qwen 1, 1.5, 2, 2.5 and 3, dense and with experts, and CodeQwen1.5."""

from __future__ import annotations

from modellink.models.presets.bases import LLAMA, TIED, Row, Rows, experts, sizes, tokens

_BIASED = LLAMA | {"qkv_bias": True, "norm_epsilon": 1e-6}
_2 = _BIASED | {"family": "qwen2"}
_3 = LLAMA | {"family": "qwen3", "norm_epsilon": 1e-6, "qk_norm": True, "head_dim": 128}
_3_MOE = _3 | tokens(151936, 40960, 1000000.0) | {"family": "qwen3_moe"}


def _qwen(layers: int, hidden: int, heads: int, ffn: int, vocabulary: int, positions: int, trained: int) -> Row:
    """The first generation; beyond `trained` positions it stretches its rotation and its queries."""
    row = _BIASED | {"family": "qwen"} | sizes(layers, hidden, heads, heads, ffn) | tokens(vocabulary, positions)
    stretch = {"rope_scaling": "dynamic_doubling", "rope_original_max_position": trained, "query_log_window": trained}
    return row | stretch


def _qwen15(layers: int, hidden: int, heads: int, groups: int, ffn: int, vocabulary: int = 152064) -> Row:
    return _2 | sizes(layers, hidden, heads, groups, ffn) | tokens(vocabulary, 32768, 1000000.0)


def _qwen2(layers: int, hidden: int, heads: int, groups: int, ffn: int, tied: bool = False, positions: int = 0) -> Row:
    vocabulary = tokens(151936 if tied else 152064, positions or 131072, 1000000.0)
    return _2 | sizes(layers, hidden, heads, groups, ffn) | vocabulary | (TIED if tied else {})


def _qwen3(layers: int, hidden: int, heads: int, ffn: int, tied: bool = False) -> Row:
    row = _3 | sizes(layers, hidden, heads, 8, ffn) | tokens(151936, 40960, 1000000.0)
    return row | (TIED if tied else {})


ROWS: Rows = {
    "qwen-7b": _qwen(32, 4096, 32, 11008, 151936, 32768, 8192),
    "qwen-14b": _qwen(40, 5120, 40, 13696, 152064, 8192, 2048),
    "qwen-72b": _BIASED | {"family": "qwen"} | sizes(80, 8192, 64, 64, 24576) | tokens(152064, 32768, 1000000.0),
    "qwen1.5-0.5b": _qwen15(24, 1024, 16, 16, 2816, 151936) | TIED,
    "qwen1.5-1.8b": _qwen15(24, 2048, 16, 16, 5504, 151936),
    "qwen1.5-4b": _qwen15(40, 2560, 20, 20, 6912, 151936) | {"rope_theta": 5000000.0},
    "qwen1.5-7b": _qwen15(32, 4096, 32, 32, 11008, 151936),
    "qwen1.5-14b": _qwen15(40, 5120, 40, 40, 13696),
    "qwen1.5-32b": _qwen15(64, 5120, 40, 8, 27392),
    "qwen1.5-72b": _qwen15(80, 8192, 64, 64, 24576),
    "qwen1.5-110b": _qwen15(80, 8192, 64, 8, 49152),
    "codeqwen1.5-7b": _2 | sizes(32, 4096, 32, 4, 13440) | tokens(92416, 65536, 1000000.0) | {"norm_epsilon": 1e-5},
    "qwen2-0.5b": _qwen2(24, 896, 14, 2, 4864, tied=True),
    "qwen2-1.5b": _qwen2(28, 1536, 12, 2, 8960, tied=True),
    "qwen2-7b": _qwen2(28, 3584, 28, 4, 18944),
    "qwen2-72b": _qwen2(80, 8192, 64, 8, 29568),
    "qwen2.5-0.5b": _qwen2(24, 896, 14, 2, 4864, tied=True, positions=32768),
    "qwen2.5-1.5b": _qwen2(28, 1536, 12, 2, 8960, tied=True),
    "qwen2.5-3b": _qwen2(36, 2048, 16, 2, 11008, tied=True, positions=32768),
    "qwen2.5-7b": _qwen2(28, 3584, 28, 4, 18944),
    "qwen2.5-14b": _qwen2(48, 5120, 40, 8, 13824),
    "qwen2.5-32b": _qwen2(64, 5120, 40, 8, 27648),
    "qwen2.5-72b": _qwen2(80, 8192, 64, 8, 29568),
    "tiny-qwen2": _2 | sizes(2, 64, 4, 2, 96) | tokens(512, 512, 1000000.0) | TIED,
    "qwen2-57b-a14b": _2
    | {"family": "qwen2_moe"}
    | sizes(28, 3584, 28, 4, 18944)
    | tokens(151936, 131072, 1000000.0)
    | experts(64, 8, 2560, "softmax", n_shared_experts=8, shared_expert_gate=True, aux_loss_coeff=0.001),
    "qwen3-0.6b": _qwen3(28, 1024, 16, 3072, tied=True),
    "qwen3-1.7b": _qwen3(28, 2048, 16, 6144, tied=True),
    "qwen3-4b": _qwen3(36, 2560, 32, 9728, tied=True),
    "qwen3-8b": _qwen3(36, 4096, 32, 12288),
    "qwen3-14b": _qwen3(40, 5120, 40, 17408),
    "qwen3-32b": _qwen3(64, 5120, 64, 25600),
    "qwen3-30b-a3b": _3_MOE
    | sizes(48, 2048, 32, 4, 6144)
    | experts(128, 8, 768, "softmax", norm_topk_prob=True, aux_loss_coeff=0.001),
    "qwen3-235b-a22b": _3_MOE
    | sizes(94, 4096, 64, 4, 12288)
    | experts(128, 8, 1536, "softmax", norm_topk_prob=True, aux_loss_coeff=0.001),
}
