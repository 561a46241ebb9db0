"""The correction bias of a router follows the load of its experts, and gradients can stay in the compute dtype."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from modellink.config.schema import Config, ModelConfig, OptimizerConfig, ParallelConfig
from modellink.parallel.apply import build_model
from modellink.parallel.topology import Topology
from modellink.train.engine import Engine

MODEL: dict[str, Any] = {
    "num_layers": 3, "hidden_size": 16, "num_attention_heads": 2, "vocab_size": 40, "padded_vocab_size": 40,
    "position_embedding": "rope", "gated_mlp": True, "activation": "silu", "attention_dropout": 0.0,
    "hidden_dropout": 0.0, "num_experts": 4, "moe_ffn_hidden_size": 8, "router_scoring": "sigmoid",
    "router_correction_bias": True, "first_k_dense_replace": 1,
}  # fmt: skip


def engine_of(dtype: torch.dtype = torch.float32, **optimizer: Any) -> Engine:
    half = {"bf16": True} if dtype == torch.bfloat16 else {}
    config = Config(model=ModelConfig(**MODEL).resolve(), optimizer=OptimizerConfig(lr=1e-3, **half, **optimizer))
    topology = Topology(ParallelConfig(), 1)
    built = build_model(config.model, config.parallel, topology, torch.device("cpu"), dtype, seed=3)
    return Engine(built, config)


def batch() -> dict[str, torch.Tensor]:
    tokens = torch.randint(0, 40, (6, 8), generator=torch.Generator().manual_seed(1))
    return {"tokens": tokens, "labels": tokens.roll(-1, 1)}


@pytest.mark.parametrize("rate", [0.0, 0.25])
def test_bias_moves_against_the_load(rate: float) -> None:
    """Three micro-batches: one move by the load of all of them, counted from outside; and it is in the weights."""
    engine = engine_of(router_bias_update_rate=rate)
    chosen: dict[str, list[torch.Tensor]] = {}
    layers = {name: layer for name, layer in engine.model.chunks[0].layers.items() if name != "0"}
    for name, layer in layers.items():
        layer.mlp.gate.register_forward_hook(
            lambda module, inputs, routing, name=name: chosen.setdefault(name, []).append(routing.experts_Tk)
        )
    engine.step(batch(), micro_batch_size=2)
    assert list(layers) == ["1", "2"]
    for name, layer in layers.items():
        count = torch.cat(chosen[name]).flatten().bincount(minlength=4)
        assert int(count.sum()) == 6 * 8 * 2 and count.max() > count.min()
        expected = rate * torch.sign(count.float().mean() - count)
        torch.testing.assert_close(layer.mlp.gate.e_score_correction_bias.detach(), expected, rtol=0, atol=1e-7)


@pytest.mark.parametrize("release", [False, True])
def test_gradients_may_stay_in_half_precision(release: bool) -> None:
    engine = engine_of(torch.bfloat16, release_fp32_grad=release)
    engine.forward_backward(batch(), 2)
    held = engine.optimizer.bytes_per_parameter()["gradients"]
    assert held == pytest.approx(2 if release else 4, rel=0.01)
