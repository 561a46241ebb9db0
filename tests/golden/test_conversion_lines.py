"""Every conversion line of the reference, run as it stands on a tiny model of its family: same flags, other folders.

A tiny model is the preset with small sizes: as many layers as the lines have pipeline stages (at least two), head
counts that the lines' tensor-parallel size divides, sixteen experts, and a vocabulary that needs padding. No line has
a list of layers for its stages; those are under test with the layouts.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import math
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from adapters import expected_state, make_factors, write_adapter
from safetensors.torch import load_file
from torch import Tensor

import modellink
from modellink.checkpoint.hf import expected_shapes, save_hf
from modellink.checkpoint.megatron import Layout, MegatronFolder
from modellink.cli import main as cli
from modellink.config.convert_schema import ConvertConfig
from modellink.config.load import load_section
from modellink.config.schema import ModelConfig
from modellink.models.presets import preset

STEP, FILE = "iter_0000001", "model_optim_rng.pt"
VOCAB = 203
DTYPES = {"fp16": torch.float16, "bf16": torch.bfloat16, "fp32": torch.float32, None: torch.float32}
# folder of the scripts (or name of one) -> the model it is for
MODELS = {
    **{"aquila": "aquila-7b", "aquila2": "aquila2-7b", "baichuan": "baichuan-7b", "baichuan2": "baichuan2-7b"},
    **{"ckpt_convert_baichuan2_13b_hf2mcore.sh": "baichuan2-13b", "bloom": "bloom-7b1", "chatglm3": "chatglm3-6b"},
    **{"codellama": "codellama-34b", "deepseek2": "deepseek-v2", "deepseek2_coder": "deepseek-v2"},
    **{"deepseek2_lite": "deepseek-v2-lite", "gemma": "gemma-2b", "gemma2": "gemma2-9b", "glm4": "glm4-9b"},
    **{"intern": "internlm-7b", "internlm2": "internlm2-20b", "llama": "llama-7b", "llama2": "llama2-7b"},
    **{"llama3": "llama3-8b", "llama31": "llama3.1-8b", "minicpm": "minicpm-2b", "mistral": "mistral-7b"},
    **{"ckpt_convert_minicpm_moe_hf2mcore.sh": "minicpm-moe-8x2b", "mixtral": "mixtral-8x7b", "qwen": "qwen-7b"},
    **{"qwen15": "qwen1.5-7b", "qwen2": "qwen2-7b", "qwen2_moe": "qwen2-57b-a14b", "yi": "yi-34b"},
}
NOT_IN_TRANSFORMERS = {"aquila", "baichuan", "chatglm", "internlm", "internlm2", "minicpm", "qwen"}
PATHS = ("--load-dir", "--save-dir", "--tokenizer-model", "--lora-load")


def model_of(line: dict[str, Any]) -> str:
    folder, script = line["script"].split("/")[-2:]
    return MODELS.get(script) or MODELS[folder]


@pytest.fixture(scope="module")
def lines(shared: Path) -> dict[str, list[dict[str, Any]]]:
    """The lines of each model; of those equal up to their folders, the first."""
    text = (shared / "reference" / "launch_args.jsonl").read_text(encoding="utf-8")
    found = [line for line in map(json.loads, text.splitlines()) if line["kind"] == "ckpt_convert"]
    assert len(found) == 59
    chosen: dict[str, dict[str, dict[str, Any]]] = {}
    for line in found:
        options = {flag: value for flag, value in line["args"].items() if flag not in PATHS}
        chosen.setdefault(model_of(line), {}).setdefault(json.dumps([options, "lora" in str(options)]), line)
    assert set(chosen) == set(MODELS.values())
    return {name: list(of_model.values()) for name, of_model in chosen.items()}


def words(line: dict[str, Any], **folders: Path) -> list[str]:
    """The command line, with other folders."""
    argv: list[str] = []
    for flag, value in line["args"].items():
        name = flag.removeprefix("--").replace("-", "_")
        value = str(folders[name]) if name in folders else "no/such/tokenizer.model" if flag in PATHS else value
        argv += [flag, *(value if isinstance(value, list) else [] if value is True else [value])]
    return argv


def run(line: dict[str, Any], **folders: Path) -> None:
    assert cli.guard(cli.PROGRAMS["convert_ckpt"], words(line, **folders)) == 0, line["script"]


def tiny(name: str, layers: int) -> ModelConfig:
    """The preset `name` with sizes that every line of it can cut."""
    whole = preset(name)
    grouped = whole.num_key_value_heads < whole.num_attention_heads
    groups = min(whole.num_key_value_heads, 8)
    heads = 16 if grouped and groups == 8 else 8
    square = whole.num_attention_heads * whole.head_dim == whole.hidden_size
    sizes: dict[str, Any] = {"num_layers": layers, "num_attention_heads": heads, "num_key_value_heads": groups}
    sizes |= {"hidden_size": heads * 8 if square else heads * 8 + 16, "head_dim": 8}
    sizes["ffn_hidden_size"] = 48 if whole.ffn_hidden_size != 4 * whole.hidden_size else 4 * sizes["hidden_size"]
    if whole.num_experts:
        sizes |= {"num_experts": 16, "moe_ffn_hidden_size": 16}
    if whole.multi_head_latent_attention:
        sizes |= {"kv_lora_rank": 12, "qk_nope_head_dim": 6, "qk_rope_head_dim": 4, "v_head_dim": 5, "hidden_size": 64}
        sizes |= {"q_lora_rank": whole.q_lora_rank and 10, "num_key_value_heads": heads}
    if whole.residual_multiplier != 1:  # the files say it times the root of the layers
        sizes["residual_multiplier"] = round(whole.residual_multiplier * math.sqrt(whole.num_layers), 12) / layers**0.5
    return dataclasses.replace(whole, vocab_size=VOCAB, padded_vocab_size=VOCAB, **sizes).resolve()


def random_state(config: ModelConfig) -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(5)
    shapes = expected_shapes(config)
    return {name: torch.randn(shape, generator=generator) * 0.2 for name, shape in shapes.items()}


def tensors(folder: Path) -> dict[str, Tensor]:
    return {name: value for file in folder.glob("*.safetensors") for name, value in load_file(file).items()}


def assert_same(found: dict[str, Tensor], wanted: dict[str, Tensor], dtype: torch.dtype) -> None:
    assert found.keys() == wanted.keys()
    for name, value in wanted.items():
        assert found[name].dtype == dtype and torch.equal(found[name], value.to(dtype)), name


def places(tensor: int, pipeline: int, experts: int) -> Iterator[str]:
    """The folders of the ranks, as Megatron calls them."""
    for rank in range(tensor):
        for stage in range(pipeline):
            for expert in range(experts):
                parts = [f"mp_rank_{rank:02d}"]
                parts += [f"{stage:03d}"] if pipeline > 1 else []
                parts += [f"{expert:03d}"] if experts > 1 else []
                yield "_".join(parts)


def check_written(line: dict[str, Any], folder: Path, config: ModelConfig) -> None:
    """Directories, the run's options in the files, their dialect and dtype: what the flags asked for."""
    args, impl = line["args"], line["model_impl"]
    sizes = [int(args.get(f"--target-{kind}-parallel-size", 1)) for kind in ("tensor", "pipeline", "expert")]
    assert sorted(path.name for path in (folder / STEP).iterdir()) == sorted(places(*sizes))
    assert (folder / "latest_checkpointed_iteration.txt").read_text() == "1"
    opened = MegatronFolder(folder)
    stated = opened.arguments
    names = ("tensor_model_parallel_size", "pipeline_model_parallel_size", "expert_model_parallel_size")
    assert [stated[name] for name in names] == sizes
    assert stated["params_dtype"] == DTYPES[args.get("--params-dtype")]
    assert stated["padded_vocab_size"] == -(-VOCAB // sizes[0]) * sizes[0]
    assert (stated["num_layers"], stated["hidden_size"]) == (config.num_layers, config.hidden_size)
    assert bool(stated["add_qkv_bias"] or stated["add_bias_linear"]) == config.qkv_bias
    assert config.qkv_bias or "--add-qkv-bias" not in args
    assert config.sandwich_norm == ("--post-norm" in args)
    assert opened.dialect == impl
    with torch.serialization.safe_globals([argparse.Namespace]):
        first = torch.load(next((folder / STEP).glob(f"mp_rank_00*/{FILE}")), weights_only=True)
    model = first["model"]
    assert ("language_model" in model) == (impl == "legacy")
    assert any("mlp.experts.weight1" in name for name in model) == ("--moe-grouped-gemm" in args)


def check_resolved(line: dict[str, Any]) -> None:
    """The line as it stands, its own folders included."""
    argv, args = words(line), line["args"]
    for flag in PATHS:
        if flag in args:
            argv[argv.index(flag) + 1] = args[flag]
    config: ConvertConfig = load_section(argv, "convert")
    assert (config.load_dir, config.save_dir, config.lora_load) == ("CKPT", "CKPT_SAVE", args.get("--lora-load"))
    assert config.model_type_hf == args.get("--model-type-hf", "llama2")
    assert config.w_pack == args.get("--w-pack", "False")
    assert config.lora_target_modules == args.get("--lora-target-modules")
    assert [config.lora_r, config.lora_alpha] == ([8, 16] if "--lora-load" in args else [None, None])
    assert config.use_mcore_models == (line["model_impl"] == "mcore")


@pytest.mark.parametrize("name", sorted(set(MODELS.values())))
def test_lines_do_what_they_say(name: str, lines: dict[str, list[dict[str, Any]]], tmp_path: Path) -> None:
    own = [line for line in lines[name] if "--lora-load" not in line["args"]]
    inward = [line for line in own if line["args"].get("--save-model-type") == "mg" or "--loader" in line["args"]]
    inward = [line for line in inward if line["args"].get("--save-model-type") != "save_huggingface_llama"]
    outward = [line for line in own if line not in inward]
    stages = max((int(line["args"].get("--target-pipeline-parallel-size", 1)) for line in inward), default=1)
    config = tiny(name, max(stages, 2))
    source = tmp_path / "hf"
    save_hf(source, random_state(config).items(), config)
    wanted, written = tensors(source), {}
    for number, line in enumerate(inward):
        check_resolved(line)
        folder, back = tmp_path / f"mg{number}", tmp_path / f"back{number}"
        run(line, load_dir=source, save_dir=folder)
        check_written(line, folder, config)
        dtype = DTYPES[line["args"].get("--params-dtype")]
        written[line["model_impl"]] = folder, dtype
        if not any(other["model_impl"] == line["model_impl"] for other in outward):
            modellink.convert(folder, back, "hf", family=line["args"].get("--model-type-hf"), verify=False)
            assert_same(tensors(back), wanted, dtype)
    for number, line in enumerate(outward):
        check_resolved(line)
        impl, target = line["model_impl"], tmp_path / f"out{number}"
        if impl not in written:  # there is no script for the way in
            modellink.convert(source, tmp_path / impl, impl, verify=False)
            written[impl] = tmp_path / impl, torch.float32
        shutil.copytree(source, target)
        run(line, load_dir=written[impl][0], save_dir=target)
        asked = line["args"].get("--params-dtype")
        assert_same(tensors(target / "mg2hf"), wanted, DTYPES[asked] if asked else written[impl][1])
        assert tensors(target).keys() == wanted.keys()
        report = json.loads((target / "mg2hf" / "conversion_report.json").read_text())
        assert report["verification"]["logits_max_difference"] == 0
        if config.family not in NOT_IN_TRANSFORMERS:
            loaded = transformers.AutoModelForCausalLM.from_pretrained(target / "mg2hf", output_loading_info=True)
            assert not any(loaded[1][kind] for kind in ("missing_keys", "unexpected_keys", "mismatched_keys"))
    assert inward or outward


@pytest.mark.parametrize("to", ["hf", "legacy"])
def test_lines_that_merge_an_adapter(to: str, lines: dict[str, list[dict[str, Any]]], tmp_path: Path) -> None:
    """LLaMA2 in Megatron-Legacy: the formula with the rank and alpha of the line, on the four fused matrices."""
    adapting = [line for line in lines["llama2-7b"] if "--lora-load" in line["args"]]
    (line,) = (line for line in adapting if ("--save-model-type" in line["args"]) == (to == "hf"))
    check_resolved(line)
    config = tiny("llama2-7b", 2)
    state = random_state(config)
    save_hf(tmp_path / "hf", state.items(), config)
    modellink.convert(tmp_path / "hf", tmp_path / "base", "legacy", verify=False)
    generator = torch.Generator().manual_seed(6)
    shapes = {key: (a.shape[1], b.shape[0]) for key, (a, b) in make_factors(config).items()}
    factors = {
        key: (torch.randn(8, ins, generator=generator) * 0.1, torch.randn(outs, 8, generator=generator) * 0.1)
        for key, (ins, outs) in shapes.items()
    }
    write_adapter(tmp_path / "lora", config, state, factors, Layout("legacy"))
    target = tmp_path / "out"
    if to == "hf":
        shutil.copytree(tmp_path / "hf", target)
    run(line, load_dir=tmp_path / "base", save_dir=target, lora_load=tmp_path / "lora")
    scaled = {key: (a, b * (16 / 8) / (8 / 3)) for key, (a, b) in factors.items()}  # the formula there has alpha/r 8/3
    expected = expected_state(config, state, scaled)
    if to == "legacy":
        modellink.convert(target, tmp_path / "exported", "hf", verify=False)
        found = tensors(tmp_path / "exported")
    else:
        found = tensors(target / "mg2hf")
    save_hf(tmp_path / "expected", ((name, value.float()) for name, value in expected.items()), config)
    wanted, before = tensors(tmp_path / "expected"), tensors(tmp_path / "hf")
    assert found.keys() == wanted.keys()
    for key, value in wanted.items():
        torch.testing.assert_close(found[key], value, atol=1e-6, rtol=1e-6)
    changed = {key for key in found if not torch.equal(found[key], before[key])}
    assert changed == {key for key in found if key.endswith("_proj.weight")}
