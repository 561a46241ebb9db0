"""Published config.json files: read, counted, written and read again; what is not implemented is said in a sentence."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from modellink.checkpoint.hf import read_config
from modellink.errors import ModelLinkError
from modellink.models.count import count_parameters
from modellink.models.families import FAMILIES

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
]


@pytest.mark.parametrize(("name", "parameters", "content"), PUBLISHED, ids=[name for name, _, _ in PUBLISHED])
def test_published_files(name: str, parameters: int, content: dict[str, Any], tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text(json.dumps(content))
    config = read_config(tmp_path)
    assert count_parameters(config) == parameters
    written = FAMILIES.get(config.family).write(config)
    (tmp_path / "config.json").write_text(json.dumps(written))
    assert read_config(tmp_path) == config


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
    ],
)
def test_what_is_not_implemented_is_said(name: str, change: dict[str, Any], sentence: str, tmp_path: Path) -> None:
    content = next(content for each, _, content in PUBLISHED if each == name)
    (tmp_path / "config.json").write_text(json.dumps(content | change))
    with pytest.raises(ModelLinkError) as caught:
        read_config(tmp_path)
    assert sentence in str(caught.value)
