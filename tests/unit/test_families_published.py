"""Published config.json files: read, counted, written and read again; what is not implemented is said in a sentence."""

from __future__ import annotations

import json
import math
import re
from pathlib import Path
from typing import Any

import pytest

from modellink.checkpoint.hf import expected_shapes, read_config, without_padding
from modellink.config.schema import ModelConfig
from modellink.errors import ModelLinkError
from modellink.models.count import count_parameters
from modellink.models.families import FAMILIES

_MIXTRAL = {
    **{"architectures": ["MixtralForCausalLM"], "model_type": "mixtral", "attention_dropout": 0.0, "bos_token_id": 1},
    **{"eos_token_id": 2, "hidden_act": "silu", "num_experts_per_tok": 2, "num_key_value_heads": 8},
    **{"num_local_experts": 8, "output_router_logits": False, "rms_norm_eps": 1e-5, "rope_theta": 1e6},
    **{"sliding_window": None, "tie_word_embeddings": False, "vocab_size": 32000},
}
_QWEN2_MOE = {
    **{"architectures": ["Qwen2MoeForCausalLM"], "model_type": "qwen2_moe", "attention_dropout": 0.0},
    **{"decoder_sparse_step": 1, "hidden_act": "silu", "norm_topk_prob": False, "output_router_logits": False},
    **{"rms_norm_eps": 1e-6, "rope_theta": 1e6, "router_aux_loss_coef": 0.001, "tie_word_embeddings": False},
    **{"use_sliding_window": False, "vocab_size": 151936},
}
_YARN40 = {"beta_fast": 32, "beta_slow": 1, "factor": 40, "original_max_position_embeddings": 4096, "type": "yarn"}
_DEEPSEEK = {
    **{"attention_bias": False, "attention_dropout": 0.0, "aux_loss_alpha": 0.001, "ep_size": 1, "hidden_act": "silu"},
    **{"auto_map": {"AutoConfig": "configuration_deepseek.DeepseekConfig"}, "kv_lora_rank": 512, "v_head_dim": 128},
    **{"max_position_embeddings": 163840, "moe_layer_freq": 1, "pretraining_tp": 1, "qk_nope_head_dim": 128},
    **{"qk_rope_head_dim": 64, "rms_norm_eps": 1e-6, "rope_theta": 10000, "seq_aux": True},
    **{"tie_word_embeddings": False, "use_cache": True},
}
_DEEPSEEK2 = _DEEPSEEK | {
    **{"architectures": ["DeepseekV2ForCausalLM"], "model_type": "deepseek_v2", "first_k_dense_replace": 1},
    **{"n_shared_experts": 2, "norm_topk_prob": False, "num_experts_per_tok": 6, "scoring_func": "softmax"},
    **{"rope_scaling": _YARN40 | {"mscale": 0.707, "mscale_all_dim": 0.707}, "vocab_size": 102400},
}

# published config.json files, shortened, and the number of parameters of their model cards
PUBLISHED: list[tuple[str, int, dict[str, Any]]] = [
    (
        "baichuan2-13b",
        13_896_668_160,
        {
            **{"architectures": ["BaichuanForCausalLM"], "model_type": "baichuan", "hidden_act": "silu"},
            **{"hidden_size": 5120, "intermediate_size": 13696, "num_attention_heads": 40, "num_hidden_layers": 40},
            **{"model_max_length": 4096, "rms_norm_eps": 1e-6, "tie_word_embeddings": False, "vocab_size": 125696},
            **{"_from_model_config": True, "gradient_checkpointing": [False], "tokenizer_class": "BaichuanTokenizer"},
        },
    ),
    (
        "chatglm3-6b",
        6_243_584_000,
        {
            **{"architectures": ["ChatGLMModel"], "model_type": "chatglm", "add_bias_linear": False, "num_layers": 28},
            **{"add_qkv_bias": True, "apply_query_key_layer_scaling": True, "attention_softmax_in_fp32": True},
            **{"apply_residual_connection_post_layernorm": False, "attention_dropout": 0.0, "hidden_dropout": 0.0},
            **{"bias_dropout_fusion": True, "ffn_hidden_size": 13696, "fp32_residual_connection": False},
            **{"hidden_size": 4096, "kv_channels": 128, "layernorm_epsilon": 1e-5, "multi_query_attention": True},
            **{"multi_query_group_num": 2, "num_attention_heads": 32, "original_rope": True, "post_layer_norm": True},
            **{"padded_vocab_size": 65024, "rmsnorm": True, "seq_length": 8192, "tie_word_embeddings": False},
            **{"pre_seq_len": None, "prefix_projection": False, "quantization_bit": 0, "classifier_dropout": None},
        },
    ),
    (
        "qwen-7b",
        7_721_324_544,
        {
            **{"architectures": ["QWenLMHeadModel"], "model_type": "qwen", "attn_dropout_prob": 0.0, "bf16": False},
            **{"emb_dropout_prob": 0.0, "fp16": False, "fp32": False, "hidden_size": 4096, "kv_channels": 128},
            **{"intermediate_size": 22016, "layer_norm_epsilon": 1e-6, "max_position_embeddings": 32768},
            **{"no_bias": True, "num_attention_heads": 32, "num_hidden_layers": 32, "onnx_safe": None},
            **{"rotary_emb_base": 10000, "rotary_pct": 1.0, "scale_attn_weights": True, "seq_length": 8192},
            **{"tie_word_embeddings": False, "use_dynamic_ntk": True, "use_flash_attn": "auto", "use_logn_attn": True},
            **{"vocab_size": 151936, "softmax_in_fp32": False, "use_cache_kernel": False},
        },
    ),
    (
        "bloom-7b1",
        7_069_016_064,
        {
            **{"architectures": ["BloomForCausalLM"], "model_type": "bloom", "attention_dropout": 0.0, "n_layer": 30},
            **{"apply_residual_connection_post_layernorm": False, "attention_softmax_in_fp32": True, "n_inner": None},
            **{"bias_dropout_fusion": True, "hidden_dropout": 0.0, "layer_norm_epsilon": 1e-5, "n_embed": 4096},
            **{"masked_softmax_fusion": True, "num_attention_heads": 32, "offset_alibi": 100, "seq_length": 2048},
            **{"skip_bias_add": True, "skip_bias_add_qkv": False, "slow_but_exact": False, "vocab_size": 250880},
        },
    ),
    (
        "gpt2",
        124_439_808,
        {
            **{"architectures": ["GPT2LMHeadModel"], "model_type": "gpt2", "activation_function": "gelu_new"},
            **{"attn_pdrop": 0.1, "embd_pdrop": 0.1, "resid_pdrop": 0.1, "layer_norm_epsilon": 1e-5, "n_ctx": 1024},
            **{"n_embd": 768, "n_head": 12, "n_layer": 12, "n_positions": 1024, "summary_type": "cls_index"},
            **{"summary_use_proj": True, "summary_first_dropout": 0.1, "summary_proj_to_labels": True},
            **{"vocab_size": 50257, "task_specific_params": {"text-generation": {"do_sample": True}}},
        },
    ),
    (
        "phi-3-mini-4k",
        3_821_079_552,
        {
            **{"architectures": ["Phi3ForCausalLM"], "model_type": "phi3", "attention_bias": False, "embd_pdrop": 0.0},
            **{"hidden_size": 3072, "intermediate_size": 8192, "max_position_embeddings": 4096, "resid_pdrop": 0.0},
            **{"num_attention_heads": 32, "num_hidden_layers": 32, "num_key_value_heads": 32, "rms_norm_eps": 1e-5},
            **{"original_max_position_embeddings": 4096, "rope_scaling": None, "rope_theta": 10000.0},
            **{"sliding_window": 2047, "tie_word_embeddings": False, "vocab_size": 32064, "hidden_act": "silu"},
        },
    ),
    (
        "olmo-2-7b",
        7_298_617_344,
        {
            **{"architectures": ["Olmo2ForCausalLM"], "model_type": "olmo2", "attention_bias": False},
            **{"hidden_size": 4096, "intermediate_size": 11008, "max_position_embeddings": 4096, "hidden_act": "silu"},
            **{"num_attention_heads": 32, "num_hidden_layers": 32, "num_key_value_heads": 32, "rms_norm_eps": 1e-6},
            **{"rope_scaling": None, "rope_theta": 500000, "tie_word_embeddings": False, "vocab_size": 100352},
        },
    ),
    (
        "minicpm-2b",
        2_724_880_896,
        {
            **{"architectures": ["MiniCPMForCausalLM"], "model_type": "minicpm", "hidden_size": 2304},
            **{"intermediate_size": 5760, "max_position_embeddings": 4096, "num_attention_heads": 36},
            **{"num_hidden_layers": 40, "num_key_value_heads": 36, "rms_norm_eps": 1e-5, "rope_scaling": None},
            **{"scale_depth": 1.4, "scale_emb": 12, "dim_model_base": 256, "vocab_size": 122753, "hidden_act": "silu"},
        },
    ),
    (
        "internlm2-20b",
        19_861_149_696,
        {
            **{"architectures": ["InternLM2ForCausalLM"], "model_type": "internlm2", "bias": False, "rope_theta": 1e6},
            **{"hidden_size": 6144, "intermediate_size": 16384, "max_position_embeddings": 32768, "vocab_size": 92544},
            **{"num_attention_heads": 48, "num_hidden_layers": 48, "num_key_value_heads": 8, "rms_norm_eps": 1e-5},
            **{"rope_scaling": {"factor": 1.0, "type": "dynamic"}, "tie_word_embeddings": False, "hidden_act": "silu"},
        },
    ),
    (
        "mixtral-8x7b",
        46_702_792_704,
        _MIXTRAL
        | {
            **{"hidden_size": 4096, "intermediate_size": 14336, "num_attention_heads": 32, "num_hidden_layers": 32},
            **{"max_position_embeddings": 32768, "router_aux_loss_coef": 0.02},
        },
    ),
    (
        "mixtral-8x22b",
        140_620_634_112,
        _MIXTRAL
        | {
            **{"hidden_size": 6144, "intermediate_size": 16384, "num_attention_heads": 48, "num_hidden_layers": 56},
            **{"max_position_embeddings": 65536, "router_aux_loss_coef": 0.001, "router_jitter_noise": 0.0},
        },
    ),
    (
        "qwen2-57b-a14b",
        57_408_658_944,
        _QWEN2_MOE
        | {
            **{"hidden_size": 3584, "intermediate_size": 18944, "max_position_embeddings": 131072, "num_experts": 64},
            **{"max_window_layers": 28, "moe_intermediate_size": 2560, "num_attention_heads": 28},
            **{"num_experts_per_tok": 8, "num_hidden_layers": 28, "num_key_value_heads": 4, "sliding_window": 65536},
            **{"shared_expert_intermediate_size": 20480},
        },
    ),
    (
        "qwen1.5-moe-a2.7b",
        14_315_784_192,
        _QWEN2_MOE
        | {
            **{"hidden_size": 2048, "intermediate_size": 5632, "max_position_embeddings": 8192, "num_experts": 60},
            **{"max_window_layers": 21, "moe_intermediate_size": 1408, "num_attention_heads": 16},
            **{"num_experts_per_tok": 4, "num_hidden_layers": 24, "num_key_value_heads": 16, "sliding_window": 32768},
            **{"shared_expert_intermediate_size": 5632},
        },
    ),
    (
        "qwen3-30b-a3b",
        30_532_122_624,
        {
            **{"architectures": ["Qwen3MoeForCausalLM"], "model_type": "qwen3_moe", "attention_bias": False},
            **{"attention_dropout": 0.0, "bos_token_id": 151643, "decoder_sparse_step": 1, "eos_token_id": 151645},
            **{"head_dim": 128, "hidden_act": "silu", "hidden_size": 2048, "intermediate_size": 6144},
            **{"max_position_embeddings": 40960, "max_window_layers": 48, "mlp_only_layers": [], "num_experts": 128},
            **{"moe_intermediate_size": 768, "norm_topk_prob": True, "num_attention_heads": 32, "vocab_size": 151936},
            **{"num_experts_per_tok": 8, "num_hidden_layers": 48, "num_key_value_heads": 4, "rms_norm_eps": 1e-6},
            **{"output_router_logits": False, "rope_scaling": None, "rope_theta": 1e6, "router_aux_loss_coef": 0.001},
            **{"sliding_window": None, "tie_word_embeddings": False, "use_sliding_window": False},
        },
    ),
    (
        "deepseek-v2",
        235_741_434_880,
        _DEEPSEEK2
        | {
            **{"hidden_size": 5120, "intermediate_size": 12288, "moe_intermediate_size": 1536, "n_group": 8},
            **{"n_routed_experts": 160, "num_attention_heads": 128, "num_hidden_layers": 60, "q_lora_rank": 1536},
            **{"num_key_value_heads": 128, "routed_scaling_factor": 16.0, "topk_group": 3},
            **{"topk_method": "group_limited_greedy"},
        },
    ),
    (
        "deepseek-v2-lite",
        15_706_484_224,
        _DEEPSEEK2
        | {
            **{"hidden_size": 2048, "intermediate_size": 10944, "moe_intermediate_size": 1408, "n_group": 1},
            **{"n_routed_experts": 64, "num_attention_heads": 16, "num_hidden_layers": 27, "q_lora_rank": None},
            **{"num_key_value_heads": 16, "routed_scaling_factor": 1.0, "topk_group": 1, "topk_method": "greedy"},
        },
    ),
    (
        "deepseek-v3",
        671_026_419_200,
        _DEEPSEEK
        | {
            **{"architectures": ["DeepseekV3ForCausalLM"], "model_type": "deepseek_v3", "first_k_dense_replace": 3},
            **{"hidden_size": 7168, "intermediate_size": 18432, "moe_intermediate_size": 2048, "n_group": 8},
            **{"n_routed_experts": 256, "n_shared_experts": 1, "norm_topk_prob": True, "num_attention_heads": 128},
            **{"num_experts_per_tok": 8, "num_hidden_layers": 61, "num_key_value_heads": 128, "q_lora_rank": 1536},
            **{"num_nextn_predict_layers": 1, "rope_scaling": _YARN40 | {"mscale": 1.0, "mscale_all_dim": 1.0}},
            **{"routed_scaling_factor": 2.5, "scoring_func": "sigmoid", "topk_group": 4, "topk_method": "noaux_tc"},
            **{"vocab_size": 129280},
        },
    ),
    (
        "minicpm-moe-8x2b",
        13_873_291_776,
        {
            **{"architectures": ["MiniCPMForCausalLM"], "model_type": "minicpm", "hidden_size": 2304},
            **{"intermediate_size": 5760, "max_position_embeddings": 4096, "num_attention_heads": 36},
            **{"num_hidden_layers": 40, "num_key_value_heads": 36, "rms_norm_eps": 1e-5, "rope_scaling": None},
            **{"scale_depth": 1.4, "scale_emb": 12, "dim_model_base": 256, "vocab_size": 122753, "hidden_act": "silu"},
            **{"num_experts": 8, "num_experts_per_tok": 2},
        },
    ),
    (
        "grok-1",
        315_684_820_992,
        {
            **{"architectures": ["Grok1ModelForCausalLM"], "model_type": "grok-1", "vocab_size": 131072},
            **{"hidden_size": 6144, "intermediate_size": 32768, "num_hidden_layers": 64, "num_attention_heads": 48},
            **{"num_key_value_heads": 8, "attn_output_multiplier": 0.08838834764831845, "max_attn_value": 30.0},
            **{"max_position_embeddings": 8192, "embedding_multiplier_scale": 78.38367176906169, "num_experts": 8},
            **{"output_multiplier_scale": 0.5773502691896257, "rms_norm_eps": 1e-5, "num_experts_per_tok": 2},
            **{"router_aux_loss_coef": 0.001, "output_router_logits": False, "tie_word_embeddings": True},
        },
    ),
    (
        "glm-4.5-air",
        106_852_251_264,
        {
            **{"architectures": ["Glm4MoeForCausalLM"], "model_type": "glm4_moe", "attention_bias": True},
            **{"attention_dropout": 0.0, "pad_token_id": 151329, "eos_token_id": [151329, 151336, 151338]},
            **{"head_dim": 128, "hidden_act": "silu", "hidden_size": 4096, "partial_rotary_factor": 0.5, "n_group": 1},
            **{"intermediate_size": 10944, "max_position_embeddings": 131072, "moe_intermediate_size": 1408},
            **{"norm_topk_prob": True, "num_attention_heads": 96, "topk_group": 1, "n_routed_experts": 128},
            **{"n_shared_experts": 1, "routed_scaling_factor": 1.0, "num_experts_per_tok": 8, "vocab_size": 151552},
            **{"first_k_dense_replace": 1, "num_hidden_layers": 46, "num_key_value_heads": 8, "rms_norm_eps": 1e-5},
            **{"num_nextn_predict_layers": 1, "rope_scaling": None, "rope_theta": 1000000, "use_qk_norm": False},
            **{"tie_word_embeddings": False, "use_cache": True},
        },
    ),
    (
        "gpt-oss-20b",
        20_914_757_184,
        {
            **{"architectures": ["GptOssForCausalLM"], "model_type": "gpt_oss", "attention_bias": True},
            **{"attention_dropout": 0.0, "eos_token_id": 200002, "experts_per_token": 4, "head_dim": 64},
            **{"hidden_act": "silu", "hidden_size": 2880, "initial_context_length": 4096, "intermediate_size": 2880},
            **{"layer_types": ["sliding_attention", "full_attention"] * 12, "max_position_embeddings": 131072},
            **{"num_attention_heads": 64, "num_experts_per_tok": 4, "num_hidden_layers": 24, "num_key_value_heads": 8},
            **{"num_local_experts": 32, "output_router_logits": False, "rms_norm_eps": 1e-5, "rope_theta": 150000},
            "rope_scaling": {
                **{"beta_fast": 32.0, "beta_slow": 1.0, "factor": 32.0, "original_max_position_embeddings": 4096},
                **{"rope_type": "yarn", "truncate": False},
            },
            **{"router_aux_loss_coef": 0.9, "sliding_window": 128, "swiglu_limit": 7.0, "tie_word_embeddings": False},
            **{"use_cache": True, "vocab_size": 201088},
        },
    ),
    (
        "gemma-3-1b",
        999_885_952,
        {
            **{"architectures": ["Gemma3ForCausalLM"], "model_type": "gemma3_text", "attention_bias": False},
            **{"attn_logit_softcapping": None, "cache_implementation": "hybrid", "eos_token_id": [1, 106]},
            **{"final_logit_softcapping": None, "head_dim": 256, "hidden_activation": "gelu_pytorch_tanh"},
            **{"hidden_size": 1152, "intermediate_size": 6912, "max_position_embeddings": 32768, "vocab_size": 262144},
            **{"num_attention_heads": 4, "num_hidden_layers": 26, "num_key_value_heads": 1, "rms_norm_eps": 1e-6},
            **{
                "query_pre_attn_scalar": 256,
                "rope_local_base_freq": 10000,
                "rope_scaling": None,
                "sliding_window": 512,
            },
            **{"rope_theta": 1000000, "sliding_window_pattern": 6},
        },
    ),
    (
        "gemma-3-4b",
        3_880_263_168,
        {
            **{"architectures": ["Gemma3ForConditionalGeneration"], "model_type": "gemma3", "eos_token_id": [1, 106]},
            **{"boi_token_index": 255999, "image_token_index": 262144, "mm_tokens_per_image": 256},
            "text_config": {
                **{"hidden_size": 2560, "intermediate_size": 10240, "model_type": "gemma3_text"},
                **{"num_hidden_layers": 34, "rope_scaling": {"factor": 8.0, "rope_type": "linear"}},
                "sliding_window": 1024,
            },
            "vision_config": {"hidden_size": 1152, "model_type": "siglip_vision_model", "num_hidden_layers": 27},
        },
    ),
]


@pytest.mark.parametrize(("name", "parameters", "content"), PUBLISHED, ids=[name for name, _, _ in PUBLISHED])
def test_published_files(name: str, parameters: int, content: dict[str, Any], tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text(json.dumps(content))
    config = read_config(tmp_path)
    assert count_parameters(config) == parameters == decoder_parameters(config)
    written = FAMILIES.get(config.family).write(config)
    (tmp_path / "config.json").write_text(json.dumps(written))
    assert read_config(tmp_path) == config


def test_the_documentation_lists_every_family(root: Path) -> None:
    table = (root / "docs" / "families.md").read_text(encoding="utf-8").split("## Reading")[0]
    rows = [line.split("|") for line in table.splitlines() if line.startswith("| `")]
    listed = {name for row in rows for name in re.findall(r"[\w.-]+", row[1] + row[2])}
    assert listed == set(FAMILIES)


def decoder_parameters(config: ModelConfig) -> int:
    """Of the decoder itself, built without storage."""
    return sum(math.prod(shape) for shape in expected_shapes(without_padding(config)).values())


def test_gpt_with_experts_has_no_published_format() -> None:
    """The block of GPT-3 with rotated heads and four experts, each with biases, is built and counted, not exported."""
    config = ModelConfig(
        **{"family": "gpt2", "num_layers": 8, "hidden_size": 12288, "num_attention_heads": 96, "vocab_size": 50257},
        **{"position_embedding": "rope", "num_experts": 4, "router_topk": 2, "max_position_embeddings": 131072},
        **{"activation": "gelu"},
    ).resolve()
    assert config.moe_ffn_hidden_size == 49152
    assert count_parameters(config) == decoder_parameters(config) == 44_107_272_192
    with pytest.raises(ModelLinkError, match="format of family 'gpt2' cannot express num_experts=4"):
        FAMILIES.get("gpt2").write(config)


def test_which_baichuan_it_is(tmp_path: Path) -> None:
    content = next(content for name, _, content in PUBLISHED if name == "baichuan2-13b")
    for change, normalised, position in (
        ({}, True, "alibi"),
        ({"vocab_size": 64000}, False, "alibi"),
        ({"vocab_size": 64000, "norm_head": True}, True, "alibi"),
        ({"max_position_embeddings": 4096}, True, "rope"),
        ({"architectures": ["BaiChuanForCausalLM"], "max_position_embeddings": 4096}, False, "rope"),
    ):
        (tmp_path / "config.json").write_text(json.dumps(content | change))
        config = read_config(tmp_path)
        assert (config.normalize_lm_head, config.position_embedding) == (normalised, position)


@pytest.mark.parametrize(
    ("name", "change", "sentence"),
    [
        ("chatglm3-6b", {"rmsnorm": False}, "rmsnorm = False is not implemented for this family; known: True"),
        ("chatglm3-6b", {"vocab_size": 3}, "contradicts"),
        ("bloom-7b1", {"n_head": 16}, "contradicts"),
        ("gpt2", {"n_ctx": 512}, "contradicts"),
        ("gpt2", {"scale_attn_by_inverse_layer_idx": True}, "scale_attn_by_inverse_layer_idx = True"),
        ("qwen-7b", {"intermediate_size": 11}, "intermediate_size = 11 should be an even number"),
        ("qwen-7b", {"no_bias": False}, "no_bias = False is not implemented"),
        ("minicpm-2b", {"num_experts": 8}, "num_experts_per_tok = None should be a whole number"),
        ("minicpm-2b", {"scale_emb": "12"}, "scale_emb = '12' should be a number"),
        ("phi-3-mini-4k", {"rope_scaling": {"type": "longrope", "factor": 2.0}}, "'longrope' is not implemented"),
        ("mixtral-8x7b", {"num_experts_per_tok": 9}, "config.json: a token cannot go to 9 of 8 experts"),
        ("mixtral-8x7b", {"num_local_experts": 0}, "num_experts = 0 must be at least 1"),
        ("qwen2-57b-a14b", {"decoder_sparse_step": 2}, "decoder_sparse_step = 2 is not implemented; known: 1"),
        ("qwen2-57b-a14b", {"mlp_only_layers": [0, 2]}, "dense layers must be the first ones"),
        ("qwen2-57b-a14b", {"use_sliding_window": True}, "use_sliding_window = True is not implemented"),
        ("qwen2-57b-a14b", {"shared_expert_intermediate_size": 20481}, "known: multiples of moe_intermediate_size"),
        ("qwen3-30b-a3b", {"num_local_experts": 64}, "contradicts"),
        ("deepseek-v2", {"topk_method": "noaux_tc"}, "topk_method = 'noaux_tc' is not implemented; known: greedy"),
        ("deepseek-v2", {"scoring_func": "sigmoid"}, "scoring_func = 'sigmoid' is not implemented"),
        ("deepseek-v2", {"n_group": 7}, "160 experts do not fall into 7 equal groups"),
        ("deepseek-v2", {"num_key_value_heads": 8}, "num_key_value_heads = 8 must be num_attention_heads = 128"),
        ("deepseek-v2", {"rope_scaling": _YARN40 | {"mscale": 0.707}}, "gives one of mscale and mscale_all_dim"),
        ("deepseek-v3", {"topk_method": "greedy"}, "topk_method = 'greedy' is not implemented"),
        ("deepseek-v3", {"quantization_config": {"quant_method": "fp8"}}, "the weights are quantised (fp8)"),
        ("gpt-oss-20b", {"quantization_config": {"quant_method": "mxfp4"}}, "Mxfp4Config(dequantize=True)"),
        ("gpt-oss-20b", {"rope_scaling": None}, "rope_scaling = None should be an object"),
        ("gpt-oss-20b", {"swiglu_alpha": 1.5}, "swiglu_alpha = 1.5 is not implemented"),
        ("grok-1", {"attn_output_multiplier": 0}, "attn_output_multiplier = 0 should be a number above 0"),
        ("gemma-3-1b", {"attn_logit_softcapping": 50.0}, "attn_logit_softcapping = 50.0 is not a key"),
        ("gemma-3-1b", {"use_bidirectional_attention": True}, "use_bidirectional_attention = True is not a key"),
        ("gemma-3-4b", {"text_config": None}, "text_config = None should be an object"),
        ("gemma-3-4b", {"quantization_config": {"quant_method": "awq"}}, "load it dequantised in transformers"),
    ],
)
def test_what_is_not_implemented_is_said(name: str, change: dict[str, Any], sentence: str, tmp_path: Path) -> None:
    content = next(content for each, _, content in PUBLISHED if each == name)
    (tmp_path / "config.json").write_text(json.dumps(content | change))
    with pytest.raises(ModelLinkError) as caught:
        read_config(tmp_path)
    assert sentence in str(caught.value)
