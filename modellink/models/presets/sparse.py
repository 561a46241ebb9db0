"""Models with many experts, or of latent attention: DeepSeek-V2 and V3, GLM-4.5, gpt-oss, Grok-1, GPT-4-like."""

from __future__ import annotations

from modellink.models.presets.bases import GPT, LLAMA, TIED, Row, Rows, experts, sizes, tokens, yarn

_LATENT: Row = (
    LLAMA
    | {
        "multi_head_latent_attention": True,
        "q_lora_rank": 1536,
        "kv_lora_rank": 512,
        "qk_nope_head_dim": 128,
        "qk_rope_head_dim": 64,
        "v_head_dim": 128,
        "qk_norm": True,
        "norm_epsilon": 1e-6,
        "latent_norm_epsilon": 1e-6,
    }
    | {"first_k_dense_replace": 1, "sequence_aux_loss": True}
)
_V2 = (
    _LATENT
    | tokens(102400, 163840)
    | yarn(40.0, 4096, beta_fast=32.0, beta_slow=1.0, mscale=0.707, mscale_all_dim=0.707)
    | {"family": "deepseek_v2", "n_shared_experts": 2}
)
_V2_LARGE = (
    _V2
    | sizes(60, 5120, 128, 128, 12288)
    | experts(160, 6, 1536, "softmax", router_groups=8, topk_group=3, routed_scaling_factor=16.0)
    | {"aux_loss_coeff": 0.003, "device_aux_loss_coeff": 0.05, "comm_aux_loss_coeff": 0.02}
)
_GLM45 = LLAMA | tokens(151552, 131072, 1000000.0) | {"family": "glm4_moe", "qkv_bias": True, "rope_fraction": 0.5}
_UNBIASED_ROUTER = {"router_correction_bias": True, "norm_topk_prob": True}
_GPT_OSS = (
    LLAMA
    | tokens(201088, 131072, 150000.0)
    | yarn(32.0, 4096, beta_fast=32.0, beta_slow=1.0, truncate=False)
    | {
        "family": "gpt_oss",
        "norm_weight_in_fp32": True,
        "head_dim": 64,
        "qkv_bias": True,
        "attention_output_bias": True,
        "mlp_bias": True,
    }
    | {"attention_sinks": True, "sliding_window": 128, "window_layers": "even"}
)
_GROK = (
    LLAMA
    | sizes(64, 6144, 48, 8, 32768)
    | tokens(131072, 8192)
    | experts(8, 2, 32768, "softmax", aux_loss_coeff=0.01)
    | TIED
    | {
        "family": "grok1",
        "activation": "gelu_tanh",
        "sandwich_norm": True,
        "attention_logit_softcap": 30.0,
        "embedding_multiplier": 78.38367176906169,
        "logits_multiplier": 0.5773502691896257,
    }
)
_GPT4 = (
    GPT
    | {"activation": "gelu", "position_embedding": "rope", "init_std": 0.006}
    | tokens(50257, 131072)
    | experts(4, 2, 49152, aux_loss_coeff=0.01)
)

ROWS: Rows = {
    "deepseek-v2": _V2_LARGE,
    "deepseek-v2-100b": _V2_LARGE | {"num_layers": 24},
    "deepseek-v2-60b": _V2_LARGE | {"num_layers": 16},
    "deepseek-v2-lite": _V2
    | sizes(27, 2048, 16, 16, 10944)
    | experts(64, 6, 1408, "softmax", aux_loss_coeff=0.001)
    | {"q_lora_rank": None},
    "tiny-deepseek-v2": _V2
    | sizes(3, 64, 4, 4, 96)
    | experts(8, 3, 48, "softmax", router_groups=4, topk_group=2, routed_scaling_factor=4.0, aux_loss_coeff=0.001)
    | tokens(512, 512)
    | yarn(4.0, 128)
    | {"q_lora_rank": 48, "kv_lora_rank": 32, "qk_nope_head_dim": 16, "qk_rope_head_dim": 8, "v_head_dim": 16},
    "deepseek-v3": _LATENT
    | sizes(61, 7168, 128, 128, 18432)
    | tokens(129280, 163840)
    | yarn(40.0, 4096, beta_fast=32.0, beta_slow=1.0, mscale=1.0, mscale_all_dim=1.0)
    | experts(256, 8, 2048, "sigmoid", router_groups=8, topk_group=4, routed_scaling_factor=2.5, **_UNBIASED_ROUTER)
    | {"family": "deepseek_v3", "first_k_dense_replace": 3, "n_shared_experts": 1, "aux_loss_coeff": 0.0001},
    "glm-4.5-air": _GLM45
    | sizes(46, 4096, 96, 8, 10944)
    | experts(128, 8, 1408, "sigmoid", n_shared_experts=1, first_k_dense_replace=1, **_UNBIASED_ROUTER)
    | {"head_dim": 128},
    "glm-4.5": _GLM45
    | sizes(92, 5120, 96, 8, 12288)
    | experts(160, 8, 1536, "sigmoid", n_shared_experts=1, first_k_dense_replace=3, **_UNBIASED_ROUTER)
    | {"head_dim": 128, "routed_scaling_factor": 2.5, "qk_norm": True},
    "gpt-oss-20b": _GPT_OSS
    | sizes(24, 2880, 64, 8, 2880)
    | experts(32, 4, 2880, router_bias=True, swiglu_limit=7.0, aux_loss_coeff=0.001),
    "gpt-oss-120b": _GPT_OSS
    | sizes(36, 2880, 64, 8, 2880)
    | experts(128, 4, 2880, router_bias=True, swiglu_limit=7.0, aux_loss_coeff=0.001),
    "grok1": _GROK,
    "grok1-8x5b": _GROK | {"num_layers": 12},
    "gpt4-4x13b": _GPT4 | sizes(8, 12288, 96, 96, 49152),
    "gpt4-4x16b": _GPT4
    | sizes(10, 12288, 96, 96, 49152)
    | {"qkv_bias": False, "attention_output_bias": False, "mlp_bias": False}
    | {"expert_capacity_factor": 1.1, "pad_experts_to_capacity": True},
}
