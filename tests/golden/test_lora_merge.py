"""Adapters of PEFT: its own merge is the reference, and the formula for families it cannot load."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from adapters import (
    LLAMA_LIKE,
    TOKENS,
    make_peft,
    random_model,
    refusal,
)
from safetensors.torch import load_file, save_file
from torch import Tensor

from modellink.checkpoint.hf import read_config, read_extras, read_hf, save_hf
from modellink.checkpoint.lora import merged, open_adapter

LLAMA = transformers.LlamaConfig(**LLAMA_LIKE)


QWEN2 = transformers.Qwen2Config(**LLAMA_LIKE)


PHI3 = transformers.Phi3Config(**LLAMA_LIKE)


GPT2 = transformers.GPT2Config(vocab_size=71, n_embd=32, n_layer=2, n_head=4, n_positions=64)


GEMMA = transformers.GemmaConfig(**LLAMA_LIKE, head_dim=8)


SPARSE = LLAMA_LIKE | {"num_experts_per_tok": 2}


MIXTRAL = transformers.MixtralConfig(**SPARSE, num_local_experts=4)


QWEN3_MOE = transformers.Qwen3MoeConfig(**SPARSE, num_experts=5, moe_intermediate_size=20, head_dim=8)


GPT_OSS = transformers.GptOssConfig(
    **SPARSE | {"layer_types": ["sliding_attention", "full_attention"]}, num_local_experts=4, head_dim=8
)


EXPERTS = {"target_modules": ["q_proj"], "target_parameters": ["mlp.experts.gate_up_proj", "mlp.experts.down_proj"]}


ATTENTION = ["q_proj", "k_proj", "v_proj", "o_proj"]


# name -> (configuration of the model, options of the adapter)
CASES: dict[str, tuple[Any, dict[str, Any]]] = {
    "llama": (LLAMA, {"target_modules": [*ATTENTION, "gate_proj", "up_proj", "down_proj"]}),
    "all linear": (LLAMA, {"target_modules": "all-linear", "lora_alpha": 3}),
    "regular expression": (LLAMA, {"target_modules": r".*\.1\..*(q|o)_proj"}),
    "layers": (LLAMA, {"target_modules": ["v_proj"], "layers_to_transform": [1]}),
    "layers by name": (LLAMA, {"target_modules": ["model.layers.0.self_attn.q_proj", "layers.1.mlp.up_proj"]}),
    "biases": (QWEN2, {"target_modules": ATTENTION, "bias": "all"}),
    "rank-stabilised": (QWEN2, {"target_modules": ATTENTION, "use_rslora": True, "r": 6}),
    "patterns": (
        QWEN2,
        {
            "target_modules": [*ATTENTION, "down_proj"],
            "rank_pattern": {"k_proj": 3, r"layers\.1\.self_attn\.v_proj": 5},
            "alpha_pattern": {"down_proj": 32, "layers.0.self_attn.q_proj": 1},
        },
    ),
    "whole modules": (LLAMA, {"target_modules": ["q_proj"], "modules_to_save": ["lm_head", "embed_tokens", "norm"]}),
    "embedding and output": (LLAMA, {"target_modules": ["q_proj", "embed_tokens", "lm_head"]}),
    "fused": (PHI3, {"target_modules": ["qkv_proj", "o_proj", "gate_up_proj", "down_proj"]}),
    "transposed": (GPT2, {"target_modules": ["c_attn", "c_proj", "c_fc"], "fan_in_fan_out": True, "bias": "lora_only"}),
    "whole transposed": (GPT2, {"target_modules": ["c_fc"], "modules_to_save": ["c_attn"], "fan_in_fan_out": True}),
    "experts": (MIXTRAL, EXPERTS),
    "experts and ranks": (QWEN3_MOE, EXPERTS | {"rank_pattern": {"experts.down_proj": 3}, "use_rslora": False}),
    "experts by their old names": (MIXTRAL, {"target_modules": ["v_proj", "w1", "w2", "w3"]}),
    "experts of alternating rows": (GPT_OSS, EXPERTS | {"target_modules": ["o_proj", "q_proj"]}),
    "tied": (GEMMA, {"target_modules": ["q_proj", "up_proj"]}),
}


def merge_hf(base: Path, adapter: Path, target: Path, **known: Any) -> None:
    config = read_config(base)
    config.padded_vocab_size = config.vocab_size
    tensors = merged(read_hf(base, config, progress=False), config, open_adapter(adapter, **known))
    save_hf(target, tensors, config, extras=read_extras(base))


@pytest.mark.parametrize("name", CASES)
def test_logits_are_those_of_the_merge_of_peft(name: str, tmp_path: Path) -> None:
    kind, options = CASES[name]
    expected = make_peft(kind, options, tmp_path)
    merge_hf(tmp_path / "base", tmp_path / "adapter", tmp_path / "merged", rank=options.get("r", 4))
    model = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "merged").eval()
    before = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "base").eval()
    with torch.no_grad():
        torch.testing.assert_close(model(TOKENS).logits, expected, atol=1e-5, rtol=0)
        assert (before(TOKENS).logits - expected).abs().max() > 1e-2


def test_torch_file_raw_names_and_one_rounding(tmp_path: Path) -> None:
    """The .bin of older versions, names with the adapter's, bfloat16 weights: the float64 sum rounded once."""
    kind, options = CASES["llama"]
    make_peft(kind, options, tmp_path)
    base = {name: value.bfloat16() for name, value in load_file(tmp_path / "base" / "model.safetensors").items()}
    save_file(base, tmp_path / "base" / "model.safetensors", metadata={"format": "pt"})
    file = tmp_path / "adapter" / "adapter_model.safetensors"
    factors = {name.replace(".weight", ".default.weight"): value for name, value in load_file(file).items()}
    torch.save(factors, file.with_suffix(".bin"))
    file.unlink()
    merge_hf(tmp_path / "base", tmp_path / "adapter", tmp_path / "merged")
    found = load_file(tmp_path / "merged" / "model.safetensors")
    assert found.keys() == base.keys()
    for name, value in base.items():
        stem = "base_model.model." + name.removesuffix(".weight")
        assert found[name].dtype == torch.bfloat16
        if f"{stem}.lora_A.default.weight" not in factors:
            assert torch.equal(found[name], value), name
            continue
        a, b = (factors[f"{stem}.lora_{side}.default.weight"].double() for side in "AB")
        exact = value.double() + 2.0 * b @ a
        # float32 sums round as exact ones do but for ties within their error
        assert (found[name] != exact.bfloat16()).float().mean() < 0.01
        torch.testing.assert_close(found[name].double(), exact, rtol=2**-8, atol=1e-6)


FUSED: dict[str, dict[str, Any]] = {
    "internlm2": {"num_key_value_heads": 2},
    "baichuan": {"num_key_value_heads": 4},
    "chatglm": {
        **{"num_key_value_heads": 2, "qkv_bias": True, "rope_fraction": 0.5, "rope_interleaved": True},
        "norm_weight_in_fp32": True,
    },
    "qwen": {"num_key_value_heads": 4, "qkv_bias": True},
    "mixtral": {"num_experts": 3, "moe_ffn_hidden_size": 48},
    "deepseek_v2": {
        "router_scoring": "softmax",
        **{"multi_head_latent_attention": True, "num_key_value_heads": 4, "kv_lora_rank": 6, "q_lora_rank": 10},
        **{"qk_rope_head_dim": 4, "qk_nope_head_dim": 8, "v_head_dim": 8, "qk_norm": True, "rope_interleaved": True},
        **{"num_experts": 4, "moe_ffn_hidden_size": 12, "n_shared_experts": 2, "first_k_dense_replace": 1},
    },
}


@pytest.mark.parametrize("family", FUSED)
def test_fused_matrices_of_every_layout(family: str, tmp_path: Path) -> None:
    """Families with code of their own: their files merged matrix by matrix mean what ours mean."""
    config, state = random_model(family=family, **FUSED[family])
    save_hf(tmp_path / "base", state.items(), config)
    theirs = load_file(tmp_path / "base" / "model.safetensors")
    factors, generator = {}, torch.Generator().manual_seed(3)
    for name, value in theirs.items():
        if value.dim() == 2 and "embed" not in name and "wte" not in name:
            a = torch.randn(3, value.shape[1], generator=generator)
            b = torch.randn(value.shape[0], 3, generator=generator)
            theirs[name] = (value.double() + 5 / 3 * b.double() @ a.double()).float()
            stem = "base_model.model." + name.removesuffix(".weight")
            factors |= {f"{stem}.lora_A.weight": a, f"{stem}.lora_B.weight": b}
    write_peft(tmp_path / "adapter", factors, r=3, lora_alpha=5)
    merge_hf(tmp_path / "base", tmp_path / "adapter", tmp_path / "merged")
    found = load_file(tmp_path / "merged" / "model.safetensors")
    assert found.keys() == theirs.keys()
    assert len(factors) >= 2 * 4 * 4
    for name, value in theirs.items():
        torch.testing.assert_close(found[name], value, atol=1e-5, rtol=1e-5)


def write_peft(folder: Path, factors: dict[str, Tensor], **settings: Any) -> None:
    folder.mkdir(exist_ok=True)
    save_file(factors, folder / "adapter_model.safetensors")
    (folder / "adapter_config.json").write_text(json.dumps({"peft_type": "LORA"} | settings))


def pair(module: str, rows: int, columns: int, rank: int = 4) -> dict[str, Tensor]:
    stem = f"base_model.model.model.layers.{module}"
    return {f"{stem}.lora_A.weight": torch.ones(rank, columns), f"{stem}.lora_B.weight": torch.ones(rows, rank)}


Q = [pair(f"{layer}.self_attn.q_proj", 32, 32) for layer in range(4)]


ALL_Q = {name: value for layer in Q for name, value in layer.items()}


GOOD = {"r": 4, "lora_alpha": 8, "target_modules": ["q_proj"]}


B0 = "base_model.model.model.layers.0.self_attn.q_proj.lora_B.weight"


HEAD = "base_model.model.lm_head.weight"


BAD_PEFT: dict[str, tuple[dict[str, Tensor], dict[str, Any], dict[str, Any], str]] = {
    "shape": (
        ALL_Q | pair("0.self_attn.q_proj", 32, 40),
        GOOD,
        {},
        r"has shape \[4, 40\].*wants \[4, 32\].*another mod",
    ),
    "module": (
        ALL_Q | pair("0.self_attn.q_prj", 32, 32),
        GOOD,
        {},
        r"fits nowhere in a llama model.*Did you mean .*q_proj",
    ),
    "layer": (ALL_Q | pair("4.self_attn.q_proj", 32, 32), GOOD, {}, "fits nowhere in a llama model of 4 layers"),
    "fewer layers": (Q[0] | Q[1], GOOD, {}, "changes other layers but has no lora_A and lora_B of 'model.layers.2"),
    "flag": (ALL_Q, GOOD, {"rank": 8}, "--lora-r 8 contradicts .*says r 4"),
    "target": (
        ALL_Q,
        GOOD,
        {"targets": ["k_proj"]},
        "--lora-target-modules k_proj: .* changes no such module, but q_proj",
    ),
    "rank": (ALL_Q, GOOD | {"rank_pattern": {r"layers\.3.*": 2}}, {}, "has rank 4, but should have 2"),
    "no B": ({name: value for name, value in ALL_Q.items() if name != B0}, GOOD, {}, "lacks lora_B of 'model.layers.0"),
    "no alpha": (ALL_Q, {"r": 4}, {}, "does not say lora_alpha"),
    "empty": ({}, GOOD, {}, "holds no weights of an adapter"),
    "not a number": (ALL_Q | {B0: torch.full((32, 4), float("nan"))}, GOOD, {}, "q_proj.lora_B.weight' holds NaN"),
    "integers": (ALL_Q | {B0: torch.ones(32, 4, dtype=torch.int8)}, GOOD, {}, "quantised adapters are not read"),
    "two": (ALL_Q | {B0.replace("B.", "B.b."): torch.ones(32, 4)}, GOOD, {}, "holds more than one adapter"),
    "dora": (ALL_Q, GOOD | {"use_dora": True}, {}, "sets use_dora: DoRA is not merged"),
    "kind": (ALL_Q, GOOD | {"peft_type": "IA3"}, {}, "of the kind IA3 is not merged"),
    "start": (
        ALL_Q,
        GOOD | {"init_lora_weights": "pissa_niter_4"},
        {},
        "'pissa_niter_4' changed the base's weights too",
    ),
    "pattern": (ALL_Q, GOOD | {"alpha_pattern": {"(": 2}}, {}, "is no regular expression"),
    "vocabulary": (ALL_Q | {HEAD: torch.ones(73, 32)}, GOOD, {}, "has 73 rows, the base's vocabulary 71"),
}


@pytest.mark.parametrize("name", BAD_PEFT)
def test_peft_folders_that_do_not_fit_are_refused(name: str, tmp_path: Path) -> None:
    factors, settings, known, sentence = BAD_PEFT[name]
    write_peft(tmp_path / "adapter", factors, **settings)
    config, state = random_model()
    assert re.search(sentence, refusal(config, state, tmp_path / "adapter", **known))


def test_a_shared_output_matrix_cannot_change_alone(tmp_path: Path) -> None:
    config, state = random_model(tie_word_embeddings=True)
    for name in ("lm_head", "model.embed_tokens"):
        write_peft(tmp_path / "adapter", ALL_Q | {f"base_model.model.{name}.weight": torch.ones(71, 32)}, **GOOD)
        assert "a model that shares one for both" in refusal(config, state, tmp_path / "adapter")
    both = {f"base_model.model.{name}.weight": torch.ones(71, 32) for name in ("lm_head", "model.embed_tokens")}
    write_peft(tmp_path / "adapter", ALL_Q | both, **GOOD, ensure_weight_tying=True)
    found = dict(merged(state.items(), config, open_adapter(tmp_path / "adapter")))
    assert torch.equal(found["embed_tokens.weight"], torch.ones(71, 32))


def test_damaged_adapter_files_are_refused(tmp_path: Path) -> None:
    config, state = random_model()
    write_peft(tmp_path / "adapter", ALL_Q, **GOOD)
    file = tmp_path / "adapter" / "adapter_model.safetensors"
    file.write_bytes(file.read_bytes()[:-9])
    assert "is damaged or cut short" in refusal(config, state, tmp_path / "adapter")
    file.unlink()
    assert "neither adapter_model.safetensors nor adapter_model.bin" in refusal(config, state, tmp_path / "adapter")
    torch.save({"weight": print}, file.with_suffix(".bin"))
    assert "wants to build" in refusal(config, state, tmp_path / "adapter")
    (tmp_path / "adapter" / "adapter_config.json").write_text("{")
    assert "is no JSON" in refusal(config, state, tmp_path / "adapter")
