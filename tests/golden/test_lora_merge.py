"""Merged adapters: PEFT's own merge, and the formula in float64 for adapters of Megatron's fused, sharded modules."""

from __future__ import annotations

import argparse
import json
import re
import zlib
from collections.abc import Callable
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
import transformers
from safetensors.torch import load_file, save_file
from torch import Tensor

from modellink.checkpoint.hf import expected_shapes, read_config, read_extras, read_hf, save_hf
from modellink.checkpoint.lora import AdaptedFolder, Merge, merged, open_adapter
from modellink.checkpoint.megatron import Layout, MegatronFolder, write_megatron
from modellink.config.schema import ModelConfig
from modellink.errors import ModelLinkError

TOKENS = torch.randint(0, 71, (2, 20), generator=torch.Generator().manual_seed(1))
LLAMA_LIKE: dict[str, Any] = {
    **{"vocab_size": 71, "hidden_size": 32, "intermediate_size": 52, "num_hidden_layers": 2, "num_attention_heads": 4},
    **{"num_key_value_heads": 2, "max_position_embeddings": 64, "pad_token_id": 0},
}
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


def shaken(model: torch.nn.Module, scale: float = 0.05) -> None:
    for parameter in model.parameters():
        parameter.data.add_(torch.randn(parameter.shape) * scale)


def make_peft(kind: Any, options: dict[str, Any], folder: Path) -> Tensor:
    """Write a base model and an adapter that training has moved; the logits of PEFT's merge of the two."""
    torch.manual_seed(0)
    model = transformers.AutoModelForCausalLM.from_config(kind)
    shaken(model)
    model.save_pretrained(folder / "base")
    model = peft.get_peft_model(model, peft.LoraConfig(**{"r": 4, "lora_alpha": 8} | options)).eval()
    for parameter in model.parameters():
        if parameter.requires_grad:
            parameter.data.add_(torch.randn(parameter.shape) * 0.1)
    model.save_pretrained(folder / "adapter")
    with torch.no_grad():
        return model.merge_and_unload()(TOKENS).logits


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


def random_model(**fields: Any) -> tuple[ModelConfig, dict[str, Tensor]]:
    sizes = {"num_layers": 4, "hidden_size": 32, "num_attention_heads": 4, "num_key_value_heads": 2}
    common = {"ffn_hidden_size": 48, "vocab_size": 71, "padded_vocab_size": 71, "max_position_embeddings": 64}
    kind = {"family": "llama", "gated_mlp": True, "activation": "silu", "normalization": "RMSNorm"}
    switches = {"qkv_bias": False, "attention_output_bias": False, "mlp_bias": False, "tie_word_embeddings": False}
    rest = {"position_embedding": "rope", "attention_dropout": 0.0, "hidden_dropout": 0.0}
    config = ModelConfig(**(sizes | common | kind | switches | rest | fields)).resolve()
    generator = torch.Generator().manual_seed(7)
    state = {name: torch.randn(shape, generator=generator) for name, shape in expected_shapes(config).items()}
    return config, state


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


NAMES = {
    "mcore": ("decoder.layers.{}.", ("self_attention.linear_qkv", "self_attention.linear_proj"), "mlp.linear_fc"),
    "legacy": ("layers.{}.", ("self_attention.query_key_value", "self_attention.dense"), "mlp.dense_"),
}
RANK, ALPHA = 3, 8
STEP, FILE, TRACKER = "iter_0000001", "model_optim_rng.pt", "latest_checkpointed_iteration.txt"


def module_names(dialect: str) -> dict[str, str]:
    prefix, (qkv, proj), mlp = NAMES[dialect]
    fc1, fc2 = ("1", "2") if dialect == "mcore" else ("h_to_4h", "4h_to_h")
    return {"qkv": prefix + qkv, "proj": prefix + proj, "fc1": prefix + mlp + fc1, "fc2": prefix + mlp + fc2}


def make_factors(config: ModelConfig) -> dict[tuple[int, str], tuple[Tensor, Tensor]]:
    """(layer, module) -> A [r, in] and B [out, r] of the whole fused matrix, in Megatron's order of rows."""
    width = (config.num_attention_heads + 2 * config.num_key_value_heads) * config.head_dim
    hidden, inner, ffn = config.hidden_size, config.num_attention_heads * config.head_dim, config.ffn_hidden_size
    sizes = {"qkv": (width, hidden), "proj": (hidden, inner), "fc2": (hidden, ffn)}
    sizes["fc1"] = (2 * ffn if config.gated_mlp else ffn, hidden)
    generator = torch.Generator().manual_seed(11)
    return {
        (layer, module): (torch.randn(RANK, columns, generator=generator), torch.randn(rows, RANK, generator=generator))
        for layer in range(config.num_layers)
        for module, (rows, columns) in sizes.items()
    }


def expected_state(
    config: ModelConfig, state: dict[str, Tensor], factors: dict[tuple[int, str], tuple[Tensor, Tensor]]
) -> dict[str, Tensor]:
    """The merged weights by the formula, in float64."""
    exact = {name: value.double() for name, value in state.items()}
    size, groups = config.head_dim, config.num_key_value_heads
    heads = config.num_attention_heads // groups
    for (layer, module), (a, b) in factors.items():
        delta, place = ALPHA / RANK * b.double() @ a.double(), f"layers.{layer}."
        if module == "qkv":
            for group, rows in enumerate(delta.split((heads + 2) * size)):
                query, key, value = rows.split([heads * size, size, size])
                exact[place + "self_attn.q_proj.weight"][group * heads * size : (group + 1) * heads * size] += query
                exact[place + "self_attn.k_proj.weight"][group * size : (group + 1) * size] += key
                exact[place + "self_attn.v_proj.weight"][group * size : (group + 1) * size] += value
        elif module == "fc1" and config.gated_mlp:
            exact[place + "mlp.gate_proj.weight"] += delta[: config.ffn_hidden_size]
            exact[place + "mlp.up_proj.weight"] += delta[config.ffn_hidden_size :]
        else:
            ours = {"proj": "self_attn.o_proj", "fc1": "mlp.up_proj", "fc2": "mlp.down_proj"}[module]
            exact[f"{place}{ours}.weight"] += delta
    return exact


def share_of(module: str, gated: bool, a: Tensor, b: Tensor, rank: int, ranks: int) -> tuple[Tensor, Tensor]:
    """What one tensor-parallel rank holds of a pair."""
    if module in ("proj", "fc2"):
        return a.chunk(ranks, dim=1)[rank].clone(), b
    if module == "fc1" and gated:
        return a, torch.cat([half.chunk(ranks)[rank] for half in b.chunk(2)])
    return a, b.chunk(ranks)[rank].clone()


def write_adapter(
    folder: Path,
    config: ModelConfig,
    state: dict[str, Tensor],
    factors: dict[tuple[int, str], tuple[Tensor, Tensor]],
    layout: Layout,
    options: dict[str, Any] | None = None,
    change: Callable[[dict[str, Any], int, int], None] = lambda model, tensor, stage: None,
) -> None:
    """An adapter checkpoint as the training program leaves it: Core with the base, Legacy without."""
    write_megatron(folder, state.items(), config, layout)
    dialect, modules = layout.dialect, module_names(layout.dialect)
    for stage, chunks in enumerate(layout.chunks(config.num_layers)):
        for tensor in range(layout.tensor_parallel):
            name = f"mp_rank_{tensor:02d}" + (f"_{stage:03d}" if layout.pipeline_parallel > 1 else "")
            file = folder / STEP / name / FILE
            with torch.serialization.safe_globals([argparse.Namespace]):
                content = torch.load(file, weights_only=True)
            for number, layers in enumerate(chunks):
                model = content["model" if layout.layers_per_chunk is None else f"model{number}"]
                flat = model if dialect == "mcore" else model["language_model"]["encoder"]
                if dialect == "legacy":
                    flat.clear()
                for place, layer in enumerate(layers):
                    for module, stem in modules.items():
                        stem = stem.format(place)
                        pair = share_of(
                            module, config.gated_mlp, *factors[layer, module], tensor, layout.tensor_parallel
                        )
                        for side, value in zip("AB", pair, strict=True):
                            flat[f"{stem}.lora_{side}.default.weight"] = value
                        if dialect == "mcore":
                            for key in [key for key in flat if key.startswith(f"{stem}.") and "lora" not in key]:
                                flat[key.replace(stem, f"{stem}.base_layer")] = flat.pop(key)
                            flat[f"{stem}.lora_B.default._extra_state"] = None
                change(flat, tensor, stage)
            content["args"] = argparse.Namespace(**(vars(content["args"]) | (options or {})))
            torch.save(content, file)


LAYOUTS = {
    "one file": Layout("mcore"),
    "mcore": Layout("mcore", 2, 2),
    "mcore interleaved": Layout("mcore", 2, 2, layers_per_chunk=1),
    "mcore uneven": Layout("mcore", 1, 3, (1, 2, 1), vocab_multiple=16),
    "legacy": Layout("legacy", 2, 2),
    "legacy one file": Layout("legacy"),
    "legacy interleaved": Layout("legacy", 1, 2, layers_per_chunk=1),
}


@pytest.mark.parametrize("fields", [{}, {"gated_mlp": False, "activation": "gelu", "qkv_bias": True, "mlp_bias": True}])
@pytest.mark.parametrize("name", LAYOUTS)
def test_fused_sharded_adapters(name: str, fields: dict[str, Any], tmp_path: Path) -> None:
    config, state = random_model(**fields)
    factors = make_factors(config)
    write_adapter(tmp_path / "adapter", config, state, factors, LAYOUTS[name], {"lora_alpha": ALPHA})
    targets = [stem.rpartition(".")[2] for stem in module_names(LAYOUTS[name].dialect).values()]
    adapter = open_adapter(tmp_path / "adapter", rank=RANK, alpha=ALPHA, targets=targets)
    found, exact = dict(merged(state.items(), config, adapter)), expected_state(config, state, factors)
    assert found.keys() == exact.keys()
    for key, value in exact.items():
        torch.testing.assert_close(found[key].double(), value, atol=1e-5, rtol=1e-6)
        changed = key.endswith("proj.weight")
        assert torch.equal(found[key], state[key]) != changed, key
    if LAYOUTS[name].dialect == "mcore":  # the base is there as well
        base = dict(AdaptedFolder(tmp_path / "adapter").tensors(config))
        assert all(torch.equal(base[key][: len(value)], value) for key, value in state.items())
    merge = Merge(config, adapter, torch.bfloat16)
    key = "layers.2.self_attn.k_proj.weight"
    for _ in range(2):  # any tensor, as often as it is asked
        torch.testing.assert_close(merge(key, state[key]).double(), exact[key], atol=1e-5, rtol=2**-8)


def seeded(text: str, *shape: int) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(zlib.crc32(text.encode())))


def add_to_every_shard(folder: Path, adapter: Path) -> None:
    """Change the weights of a step, rank by rank, by factors of its own, which go into the files of `adapter`."""
    for file in sorted((folder / STEP).rglob(FILE)):
        tensor, *others = file.parent.name.removeprefix("mp_rank_").split("_")
        with torch.serialization.safe_globals([argparse.Namespace]):
            content = torch.load(file, weights_only=True)
        model = content["model"]
        factors: dict[str, Tensor] = {}
        for name in [name for name in model if ".linear_" in name and name.endswith(".weight")]:
            whole = "linear_qkv" in name  # the projections into latents are not split
            columns = name.endswith(("linear_proj.weight", "linear_fc2.weight"))
            # each expert-parallel rank has other experts; all else is the same in all of them
            place = f"{name} {others[-1] if 'local_experts' in name else others[0]}"
            a = seeded(place if not columns else f"{place} {tensor}", RANK, model[name].shape[1])
            b = seeded(place if columns or whole else f"{place} {tensor}", model[name].shape[0], RANK)
            stem = name.removesuffix(".weight")
            factors |= {f"{stem}.lora_A.default.weight": a, f"{stem}.lora_B.default.weight": b}
            model[name] = (model[name].double() + ALPHA / RANK * b.double() @ a.double()).float()
        torch.save(content, file)
        kept = {name: model[name] for name in model if name.startswith("embedding.")}
        target = adapter / file.relative_to(folder)
        target.parent.mkdir(parents=True)
        torch.save({"args": content["args"], "model": kept | factors}, target)
    (adapter / TRACKER).write_text("1")


def test_adapters_of_experts_and_latents(tmp_path: Path) -> None:
    latent = {"multi_head_latent_attention": True, "kv_lora_rank": 6, "q_lora_rank": 10, "num_key_value_heads": 4}
    heads = {"qk_rope_head_dim": 4, "qk_nope_head_dim": 8, "v_head_dim": 8, "qk_norm": True}
    experts = {"num_experts": 4, "moe_ffn_hidden_size": 12, "n_shared_experts": 2, "first_k_dense_replace": 1}
    config, state = random_model(
        **latent, **heads, **experts, shared_expert_gate=True, vocab_size=72, padded_vocab_size=72
    )
    write_megatron(tmp_path / "after", state.items(), config, Layout("mcore", 2, 2, expert_parallel=2))
    add_to_every_shard(tmp_path / "after", tmp_path / "adapter")
    found = dict(merged(state.items(), config, open_adapter(tmp_path / "adapter", alpha=ALPHA, rank=RANK)))
    changed = 0
    for name, value in MegatronFolder(tmp_path / "after").tensors(config):
        torch.testing.assert_close(found[name], value, atol=1e-5, rtol=1e-5)
        changed += not torch.equal(value, state[name])
    assert changed == 4 * 5 + 3 + 3 * (3 + 3)


def refusal(config: ModelConfig, state: dict[str, Tensor], folder: Path, **known: Any) -> str:
    with pytest.raises(ModelLinkError) as caught:
        for _ in merged(state.items(), config, open_adapter(folder, **known)):
            pass
    assert "\n" not in str(caught.value)
    return str(caught.value)


def test_adapters_of_megatron_that_do_not_fit_are_refused(tmp_path: Path) -> None:
    config, state = random_model()
    factors = make_factors(config)
    layout, options = Layout("mcore", 2, 1), {"lora_alpha": ALPHA, "lora_r": RANK}
    key = "decoder.layers.1.mlp.linear_fc2.lora_{}.default.weight"

    def written(name: str, change: Any = lambda model, tensor, stage: None, **settings: Any) -> Path:
        write_adapter(tmp_path / name, config, state, factors, layout, settings or options, change)
        return tmp_path / name

    good = written("good")
    assert "--lora-r 4 contradicts" in refusal(config, state, good, rank=4)
    assert "--lora-alpha 16 contradicts" in refusal(config, state, good, alpha=16)
    message = refusal(config, state, good, targets=["linear_qvk"])
    assert "--lora-target-modules linear_qvk" in message and "Did you mean 'linear_qkv'" in message
    assert "also changes 'decoder.layers.0.mlp.linear_fc1'" in refusal(
        config, state, good, targets=["linear_qkv", "linear_proj", "linear_fc2"]
    )
    silent = written("silent", unrelated=1)
    assert "does not say lora_alpha" in refusal(config, state, silent)
    assert "has rank 3, not the 4 of --lora-r" in refusal(config, state, silent, alpha=1, rank=4)
    half = written("half", lambda model, tensor, stage: model.pop(key.format("B")))
    assert "lacks lora_B of 'decoder.layers.1.mlp.linear_fc2'" in refusal(config, state, half)

    def drop(model: dict[str, Any], tensor: int, stage: int) -> None:
        for side in "AB":
            model.pop(key.format(side))

    assert "changes other layers but has no lora_A and lora_B of" in refusal(config, state, written("gap", drop))
    nan = written("nan", lambda model, tensor, stage: model[key.format("A")].fill_(float("nan")))
    assert "holds NaN or infinity" in refusal(config, state, nan)
    mixed = written(
        "mixed", lambda model, tensor, stage: model.update({key.format("B"): model[key.format("B")] + tensor})
    )
    assert "files were mixed up" in refusal(config, state, mixed)
    for fields, sentence in (
        ({"num_layers": 5}, "num_layers 4, but the base has 5"),
        ({"num_attention_heads": 8, "num_key_value_heads": 4, "head_dim": 4}, "num_attention_heads 4, but the base"),
        ({"ffn_hidden_size": 32}, "the adapter belongs to another model"),
    ):
        assert sentence in refusal(*random_model(**fields), good)
    other = state | {"embed_tokens.weight": state["embed_tokens.weight"].flip(0)}
    assert "trained on other weights" in refusal(config, other, good)
    huge = state | {"layers.0.self_attn.o_proj.weight": state["layers.0.self_attn.o_proj.weight"] * float("inf")}
    assert "merged holds NaN or infinity" in refusal(config, huge, good)
    lacking = {name: value for name, value in state.items() if name != "layers.3.mlp.up_proj.weight"}
    assert "'layers.3.mlp.up_proj.weight' that it changes never came" in refusal(config, lacking, good)
    write_megatron(tmp_path / "plain", state.items(), config, layout)
    assert "holds no adapter" in refusal(config, state, tmp_path / "plain")
    (tmp_path / "empty").mkdir()
    assert "holds no adapter" in refusal(config, state, tmp_path / "empty")


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
