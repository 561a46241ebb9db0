"""Hugging Face -> native -> Hugging Face: the same tensors byte for byte, and a config.json with the same meaning."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor

import modellink
from modellink.checkpoint.hf import read_config
from modellink.checkpoint.store import read_tensor_names

SIZES: dict[str, Any] = {
    **{"vocab_size": 211, "hidden_size": 48, "intermediate_size": 80, "num_hidden_layers": 3},
    **{"num_attention_heads": 4, "max_position_embeddings": 96, "bos_token_id": 1, "eos_token_id": 2},
}
LLAMA3_ROPE: dict[str, Any] = {
    **{"rope_type": "llama3", "rope_theta": 5e5, "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0},
    "original_max_position_embeddings": 32,
}
LATENT: dict[str, Any] = {
    **{"num_key_value_heads": 4, "kv_lora_rank": 16, "qk_nope_head_dim": 10, "qk_rope_head_dim": 6, "v_head_dim": 12},
    **{"n_routed_experts": 6, "num_experts_per_tok": 3, "moe_intermediate_size": 24, "first_k_dense_replace": 1},
    **{"n_group": 3, "topk_group": 2},
}
YARN = {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 24, "rope_theta": 10000.0}
# name -> (configuration class, its options)
NATIVE: dict[str, tuple[type, dict[str, Any]]] = {
    "llama": (transformers.LlamaConfig, {"num_key_value_heads": 4}),
    "llama3.1": (
        transformers.LlamaConfig,
        {"num_key_value_heads": 2, "rope_parameters": LLAMA3_ROPE, "eos_token_id": [2, 7, 9], "rms_norm_eps": 1e-5},
    ),
    "codellama": (
        transformers.LlamaConfig,
        {"num_key_value_heads": 1, "rope_parameters": {"rope_type": "default", "rope_theta": 1e6}},
    ),
    "yi": (
        transformers.LlamaConfig,
        {"num_key_value_heads": 1, "rope_parameters": {"rope_type": "default", "rope_theta": 5e6}, "pad_token_id": 0},
    ),
    "mistral": (transformers.MistralConfig, {"num_key_value_heads": 2, "sliding_window": 16, "head_dim": 8}),
    "qwen1.5": (transformers.Qwen2Config, {"num_key_value_heads": 4, "use_sliding_window": False}),
    "qwen2": (transformers.Qwen2Config, {"num_key_value_heads": 2, "tie_word_embeddings": True}),
    "qwen3": (transformers.Qwen3Config, {"num_key_value_heads": 2, "tie_word_embeddings": True, "head_dim": 16}),
    "gemma": (transformers.GemmaConfig, {"num_key_value_heads": 1, "head_dim": 16}),
    "phi3": (transformers.Phi3Config, {"num_key_value_heads": 2, "sliding_window": 16, "pad_token_id": 0}),
    "olmo2": (transformers.Olmo2Config, {"num_key_value_heads": 2, "pad_token_id": 0}),
    "mixtral": (transformers.MixtralConfig, {"num_key_value_heads": 2, "num_local_experts": 5, "head_dim": 16}),
    "qwen2_moe": (
        transformers.Qwen2MoeConfig,
        {
            **{"num_key_value_heads": 2, "num_experts": 6, "num_experts_per_tok": 3, "mlp_only_layers": [0]},
            **{"moe_intermediate_size": 24, "shared_expert_intermediate_size": 48},
        },
    ),
    "deepseek_v2": (
        transformers.DeepseekV2Config,
        LATENT
        | {
            **{"q_lora_rank": 20, "topk_method": "group_limited_greedy"},
            "rope_parameters": YARN | {"mscale": 0.7, "mscale_all_dim": 0.7},
        },
    ),
    "deepseek_v3": (
        transformers.DeepseekV3Config,
        LATENT | {"q_lora_rank": None, "rope_interleave": False, "num_nextn_predict_layers": 0},
    ),
    "gpt_oss": (
        transformers.GptOssConfig,
        {
            **{"num_key_value_heads": 2, "num_local_experts": 5, "num_experts_per_tok": 3, "head_dim": 10},
            **{"sliding_window": 16, "rope_parameters": YARN | {"truncate": False}},
        },
    ),
    "gemma3": (transformers.Gemma3TextConfig, {"num_key_value_heads": 2, "head_dim": 16, "sliding_window": 16}),
    "gemma2": (transformers.Gemma2Config, {"num_key_value_heads": 2, "head_dim": 16, "sliding_window": 16}),
}
# families whose code is beside their weights; config.json as published but for the sizes
OWN_CODE: dict[str, dict[str, Any]] = {
    "internlm": {
        **{"architectures": ["InternLMForCausalLM"], "model_type": "internlm", "bias": True, "hidden_act": "silu"},
        "auto_map": {"AutoConfig": "configuration_internlm.InternLMConfig"},
        **{"rms_norm_eps": 1e-6, "tie_word_embeddings": False, "use_cache": True, "initializer_range": 0.02},
        **{"pad_token_id": 2, "rotary": {"base": 10000, "type": "dynamic"}, "transformers_version": "4.33.2"},
    },
    "aquila": {
        **{"architectures": ["AquilaForCausalLM"], "model_type": "aquila", "hidden_act": "silu", "pad_token_id": 0},
        "auto_map": {"AutoConfig": "configuration_aquila.AquilaConfig"},
        **{"num_key_value_heads": 2, "rms_norm_eps": 1e-5, "rope_scaling": None, "rope_theta": 10000.0},
        **{"tie_word_embeddings": False, "use_cache": True, "initializer_range": 0.02, "pretraining_tp": 1},
    },
}
# written afresh: the version belongs to the writer; of rotary, defaults are spelled out (`read_config` compares it)
REWRITTEN = ("transformers_version", "rotary")
TOKENS = torch.randint(0, 211, (2, 40), generator=torch.Generator().manual_seed(1))
TOKENIZER = {
    "tokenizer.json": '{"version": "1.0"}\n',
    "tokenizer_config.json": '{"tokenizer_class": "PreTrainedTokenizerFast"}\n',
    "special_tokens_map.json": '{"eos_token": "</s>"}\n',
    "chat_template.jinja": "{{ messages }}",
}


def write_json(path: Path, content: dict[str, Any]) -> None:
    path.write_text(json.dumps(content, indent=2))


def published(content: dict[str, Any]) -> dict[str, Any]:
    """A config.json of transformers 5 in the spelling of the files on the hub."""
    old = {key: value for key, value in content.items() if key not in ("rope_parameters", "dtype", "layer_types")}
    rope = dict(content["rope_parameters"])
    if "sliding_attention" in rope:
        old["rope_local_base_freq"] = rope["sliding_attention"]["rope_theta"]
        rope = dict(rope["full_attention"])
    old |= {"torch_dtype": content["dtype"], "rope_theta": rope.pop("rope_theta")}
    old["rope_scaling"] = None if rope["rope_type"] == "default" else rope
    return old


def files_state(folder: Path) -> dict[str, Tensor]:
    state: dict[str, Tensor] = {}
    for file in sorted(folder.glob("*.safetensors")):
        state |= load_file(file)
    return state


def bytes_of(tensor: Tensor) -> Tensor:
    return tensor.contiguous().view(-1).view(torch.uint8)


def assert_same_tensors(before: Path, after: Path) -> None:
    theirs, ours = files_state(before), files_state(after)
    assert ours.keys() == theirs.keys()
    for name, value in theirs.items():
        assert (ours[name].dtype, ours[name].shape) == (value.dtype, value.shape), name
        assert torch.equal(bytes_of(ours[name]), bytes_of(value)), name


def make_source(name: str, folder: Path, dtype: torch.dtype, spelling: str, shard: str) -> None:
    torch.manual_seed(0)
    if name in NATIVE:
        kind, options = NATIVE[name]
        model = transformers.AutoModelForCausalLM.from_config(kind(**SIZES | options))
    else:
        own = OWN_CODE[name]
        kv_heads = own.get("num_key_value_heads", SIZES["num_attention_heads"])
        options = {"num_key_value_heads": kv_heads, "attention_bias": own.get("bias", False)}
        model = transformers.LlamaForCausalLM(transformers.LlamaConfig(**SIZES | options))
    for parameter in model.parameters():
        parameter.data.add_(torch.randn(parameter.shape) * 0.2)
    model.to(dtype).save_pretrained(folder, max_shard_size=shard)
    for file, text in TOKENIZER.items():
        (folder / file).write_text(text)
    path = folder / "config.json"
    if name in OWN_CODE:
        write_json(path, SIZES | OWN_CODE[name] | {"torch_dtype": str(dtype).removeprefix("torch.")})
        code = OWN_CODE[name]["auto_map"]["AutoConfig"].split(".")[0]
        (folder / f"{code}.py").write_text("# the family's own code\n")
    elif spelling == "published":
        write_json(path, published(json.loads(path.read_text())))


def round_trip(source: Path, native: Path, target: Path) -> None:
    modellink.convert(source, native, to="native")
    modellink.convert(native, target, to="hf")


VARIANTS = [(torch.float32, "transformers 5", "1GB"), (torch.bfloat16, "published", "60KB")]


@pytest.mark.parametrize(("dtype", "spelling", "shard"), VARIANTS, ids=["float32", "bfloat16 sharded"])
@pytest.mark.parametrize("name", [*NATIVE, *OWN_CODE])
def test_round_trip(name: str, dtype: torch.dtype, spelling: str, shard: str, tmp_path: Path) -> None:
    source, target = tmp_path / "source", tmp_path / "target"
    make_source(name, source, dtype, spelling, shard)
    assert (source / "model.safetensors.index.json").exists() == (shard == "60KB")
    round_trip(source, tmp_path / "native", target)
    assert_same_tensors(source, target)
    assert read_config(target) == read_config(source)
    for file in sorted(source.glob("*.py")) + [source / file for file in TOKENIZER]:
        assert (target / file.name).read_bytes() == file.read_bytes()
    before, after = (json.loads((folder / "config.json").read_text()) for folder in (source, target))
    assert after["torch_dtype"] == str(dtype).removeprefix("torch.")
    kept = ["bos_token_id", "eos_token_id", "pad_token_id", "auto_map", "tie_word_embeddings"]
    if name in OWN_CODE:
        kept += [key for key in before if key not in REWRITTEN]
    for key in kept:
        assert after.get(key) == before.get(key), key
    if name in NATIVE:
        assert_transformers_agrees(source, target, dtype)


def assert_transformers_agrees(source: Path, target: Path, dtype: torch.dtype) -> None:
    """The two folders mean the same to transformers: configuration and logits."""
    theirs, ours = (transformers.AutoConfig.from_pretrained(folder).to_dict() for folder in (source, target))
    for key, value in theirs["rope_parameters"].items():  # ours may name the rule in the older spelling as well
        assert ours["rope_parameters"].get(key) == value, key
    written_by_the_writer = {"transformers_version", "_name_or_path", "max_window_layers", "rope_parameters"}
    # the early Gemma key, of which transformers has used the newer one alone
    different = {key for key in theirs if ours.get(key) != theirs[key]} - written_by_the_writer - {"hidden_activation"}
    assert not different, {key: (theirs[key], ours.get(key)) for key in different}
    models = [transformers.AutoModelForCausalLM.from_pretrained(folder) for folder in (source, target)]
    assert all(model.dtype == dtype for model in models)
    with torch.no_grad():
        expected, found = (model(TOKENS).logits for model in models)
    assert torch.equal(found, expected)
    assert models[1].generation_config.eos_token_id == models[0].generation_config.eos_token_id


def test_tensors_of_several_dtypes_keep_theirs(tmp_path: Path) -> None:
    source, target = tmp_path / "source", tmp_path / "target"
    make_source("llama", source, torch.bfloat16, "published", "1GB")
    state = files_state(source)
    state |= {name: value.float() + 1e-5 for name, value in state.items() if name.endswith("norm.weight")}
    save_file(state, source / "model.safetensors", metadata={"format": "pt"})
    round_trip(source, tmp_path / "native", target)
    assert_same_tensors(source, target)
    assert json.loads((target / "config.json").read_text())["torch_dtype"] == "bfloat16"


def test_pytorch_files_become_safetensors(tmp_path: Path) -> None:
    source, target = tmp_path / "source", tmp_path / "target"
    make_source("qwen2", source, torch.bfloat16, "published", "1GB")
    state = files_state(source)
    (source / "model.safetensors").unlink()
    torch.save(state, source / "pytorch_model.bin")
    round_trip(source, tmp_path / "native", target)
    found = files_state(target)
    assert found.keys() == state.keys()
    assert all(torch.equal(bytes_of(found[name]), bytes_of(value)) for name, value in state.items())


def test_a_native_folder_needs_nothing_beside_it(tmp_path: Path) -> None:
    """Tokenizer, code and token ids come back after source and native folder have moved."""
    source, kept = tmp_path / "source", tmp_path / "kept"
    make_source("internlm", source, torch.float32, "published", "1GB")
    modellink.convert(source, tmp_path / "native", to="native")
    source.rename(kept)
    (tmp_path / "native").rename(tmp_path / "moved")
    modellink.convert(tmp_path / "moved", tmp_path / "target", to="hf")
    assert_same_tensors(kept, tmp_path / "target")
    for file in (*TOKENIZER, "configuration_internlm.py"):
        assert (tmp_path / "target" / file).read_bytes() == (kept / file).read_bytes()
    before, after = (json.loads((folder / "config.json").read_text()) for folder in (kept, tmp_path / "target"))
    assert all(after[key] == value for key, value in before.items() if key not in REWRITTEN)


def run_convert(root: Path, cwd: Path, *arguments: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-m", "modellink", "convert", *arguments],
        cwd=cwd,
        env=os.environ | {"PYTHONPATH": str(root)},
        capture_output=True,
        text=True,
        timeout=120,
    )


def test_command_line(root: Path, tmp_path: Path) -> None:
    make_source("llama3.1", tmp_path / "source", torch.bfloat16, "published", "60KB")
    for source, target, to in (("source", "native", "native"), ("native", "out/target", "hf")):
        done = run_convert(root, tmp_path, "--load-dir", source, "--save-dir", target, "--save-model-type", to)
        assert done.returncode == 0, done.stderr
    assert_same_tensors(tmp_path / "source", tmp_path / "out" / "target")
    with safe_open(tmp_path / "out" / "target" / "model.safetensors", framework="pt") as file:
        assert file.metadata()["format"] == "pt"  # transformers refuses files without it


def test_command_line_casts_and_says_what_has_no_effect(root: Path, tmp_path: Path) -> None:
    make_source("llama", tmp_path / "source", torch.float32, "published", "1GB")
    flags = ["--save-model-type", "native", "--params-dtype", "bf16", "--target-tensor-parallel-size", "2"]
    done = run_convert(root, tmp_path, "--load-dir", "source", "--save-dir", "native", *flags)
    assert done.returncode == 0 and "--tensor-parallel shape Megatron's files: no effect" in done.stderr
    dtypes = {info.dtype for info in read_tensor_names(tmp_path / "native" / "iter_0000001").values()}
    assert dtypes == {torch.bfloat16}


def test_what_cannot_be_converted_is_said_in_one_line(root: Path, tmp_path: Path) -> None:
    make_source("llama", tmp_path / "source", torch.float32, "published", "1GB")
    shutil.copytree(tmp_path / "source", tmp_path / "cut")
    weights = tmp_path / "cut" / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-100])
    for load, to, sentence in (
        ("source", "hf", "already is a Hugging Face folder"),
        ("nowhere", "native", "no checkpoint at nowhere"),
        ("cut", "native", "model.safetensors is damaged or cut short"),
        ("source", "nativ", "nativ is unknown"),
    ):
        done = run_convert(root, tmp_path, "--load-dir", load, "--save-dir", "out", "--save-model-type", to)
        assert done.returncode == 2
        assert done.stderr.startswith("modellink: error: ") and sentence in done.stderr
        assert len(done.stderr.splitlines()) == 1
        assert not (tmp_path / "out").exists()
