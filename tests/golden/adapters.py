"""Models with adapters for the tests: of PEFT itself, and in Megatron checkpoints as its training leaves them."""

from __future__ import annotations

import argparse
from collections.abc import Callable
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
import transformers
from torch import Tensor

from modellink.checkpoint.hf import expected_shapes
from modellink.checkpoint.lora import merged, open_adapter
from modellink.checkpoint.megatron import Layout, write_megatron
from modellink.config.schema import ModelConfig
from modellink.errors import ModelLinkError

TOKENS = torch.randint(0, 71, (2, 20), generator=torch.Generator().manual_seed(1))


LLAMA_LIKE: dict[str, Any] = {
    **{"vocab_size": 71, "hidden_size": 32, "intermediate_size": 52, "num_hidden_layers": 2, "num_attention_heads": 4},
    **{"num_key_value_heads": 2, "max_position_embeddings": 64, "pad_token_id": 0},
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


def refusal(config: ModelConfig, state: dict[str, Tensor], folder: Path, **known: Any) -> str:
    with pytest.raises(ModelLinkError) as caught:
        for _ in merged(state.items(), config, open_adapter(folder, **known)):
            pass
    assert "\n" not in str(caught.value)
    return str(caught.value)
