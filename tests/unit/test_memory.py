"""The memory estimate against what autograd and the optimizer really hold, and the search for a layout that fits."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from modellink.config.load import load_config
from modellink.config.resolved import ResolvedConfig
from modellink.errors import ModelLinkError
from modellink.models.count import count_parameters, layer_parameters, outer_parameters
from modellink.models.decoder import Decoder
from modellink.parallel.apply import build_model
from modellink.parallel.memory import check_memory, estimate_memory, nearest_fit
from modellink.parallel.meter import MemoryMeter
from modellink.parallel.plan import split_dimension
from modellink.parallel.topology import Topology
from modellink.train.engine import Engine

LLAMA = "--model tiny-llama".split()
SIZES = "--num-layers 3 --hidden-size 64 --num-attention-heads 4 --padded-vocab-size 512".split()
SHAPES: dict[str, list[str]] = {
    "llama": LLAMA,
    "gpt": [*SIZES, "--max-position-embeddings", "256", "--attention-dropout", "0", "--hidden-dropout", "0"],
    "gemma2": [
        *SIZES,
        *"--normalization RMSNorm --geglu --post-norm --attn-logit-softcapping 50".split(),
        *"--position-embedding-type rope --disable-bias-linear --ffn-hidden-size 160".split(),
        *"--attention-dropout 0 --hidden-dropout 0".split(),
    ],
}


def resolve(monkeypatch: pytest.MonkeyPatch, world: int, *flags: str) -> ResolvedConfig:
    monkeypatch.setenv("WORLD_SIZE", str(world))
    common = "--seq-length 128 --micro-batch-size 4 --train-iters 2 --lr 1e-3 --mock-data --eval-iters 0".split()
    return load_config([*common, *flags], "train")


def measured(resolved: ResolvedConfig) -> tuple[int, dict[str, float], int]:
    """(bytes that autograd keeps, bytes per parameter of each kind after a step, parameters)."""
    config = resolved.config
    topology = Topology(config.parallel, 1)
    dtype = getattr(torch, config.optimizer.dtype)
    model = build_model(config.model, config.parallel, topology, torch.device("cpu"), dtype, 1)
    engine = Engine(model, config)
    own = {parameter.untyped_storage().data_ptr() for _, parameter in model.named_parameters()}
    kept: dict[int, Any] = {}

    def pack(tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in own:
            kept[storage.data_ptr()] = storage  # held, so that no address is used twice
        return tensor

    tokens = torch.randint(0, 100, (4, 128))
    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        loss = engine.forward_backward({"tokens": tokens, "labels": tokens}, 4)
    assert torch.isfinite(loss)
    held = engine.optimizer.bytes_per_parameter()
    return sum(storage.nbytes() for storage in kept.values()), held, sum(p.numel() for _, p in model.named_parameters())


@pytest.mark.parametrize("precision", ["--bf16", "--fp32"])
@pytest.mark.parametrize("shape", SHAPES)
def test_the_estimate_is_close_to_what_is_held(monkeypatch: pytest.MonkeyPatch, shape: str, precision: str) -> None:
    flags = SHAPES[shape] + (["--bf16"] if precision == "--bf16" else [])
    resolved = resolve(monkeypatch, 1, *flags, "--global-batch-size", "8")  # two micro-batches: nothing is subtracted
    estimate = estimate_memory(resolved)
    activations, held, count = measured(resolved)
    assert count == count_parameters(resolved.config.model)
    assert estimate.weights == held["weights"] * count
    assert estimate.gradients == held["gradients"] * count
    assert estimate.optimizer == (held["masters"] + held["moments"]) * count
    beside = 4 * 128 * resolved.config.model.padded_vocab_size * 8  # of the logits autograd keeps the log-softmax only
    assert 0.88 * activations <= estimate.activations - beside <= 1.02 * activations


KINDS = [
    "--recompute-granularity full", "--recompute-granularity full --recompute-num-layers 2",
    "--recompute-granularity full --recompute-method block --recompute-num-layers 1", "--recompute-activation-function",
    "--recompute-granularity operators", "--recompute-modules layernorm", "--recompute-modules layernorm mlp moe",
    "--recompute-modules core_attn mla_up_proj moe_act mlp_act", "--recompute-layers 0:layer",
]  # fmt: skip


@pytest.mark.parametrize("preset", ["tiny-llama", "tiny-mixtral"])
def test_kinds_of_recomputation_are_estimated_from_below(monkeypatch: pytest.MonkeyPatch, preset: str) -> None:
    tokens = torch.randint(0, 100, (8, 128))
    found, ratios = {}, {}
    for kind in ["", *KINDS]:
        resolved = resolve(monkeypatch, 1, "--model", preset, "--global-batch-size", "8", *kind.split())
        config = resolved.config
        topology = Topology(config.parallel, 1)
        engine = Engine(
            build_model(config.model, config.parallel, topology, torch.device("cpu"), torch.float32, 1), config
        )
        with MemoryMeter(engine.held()) as meter:
            before = meter.live
            engine.forward_backward({"tokens": tokens, "labels": tokens}, 4)
            peak = meter.peak - before
        estimate = estimate_memory(resolved)
        found[kind] = estimate.activations
        ratios[kind] = (estimate.activations + estimate.gradients) / peak
    assert all(0.8 < ratio <= 1.0 for ratio in ratios.values()), list(ratios.values())
    plain = found.pop("")
    assert all(size < plain for kind, size in found.items() if "core_attn" not in kind)


@pytest.mark.parametrize("shape", SHAPES)
def test_parameters_of_a_tensor_rank_follow_the_plan(monkeypatch: pytest.MonkeyPatch, shape: str) -> None:
    model = resolve(monkeypatch, 2, *SHAPES[shape], "--tensor-model-parallel-size", "2").config.model
    with torch.device("meta"):
        parameters = Decoder(model).named_parameters()
    by_plan = sum(p.numel() // (1 if split_dimension(name) is None else 2) for name, p in parameters)
    layers = range(model.num_layers or 0)
    formula = outer_parameters(model, 2, True, True) + sum(layer_parameters(model, layer, 2) for layer in layers)
    assert by_plan == formula


def test_sharding_and_recomputation_lower_the_estimate(monkeypatch: pytest.MonkeyPatch) -> None:
    def total(world: int, *flags: str) -> int:
        common = ["--model", "llama2-7b", "--bf16", "--seq-length", "4096", "--global-batch-size", "64"]
        return estimate_memory(resolve(monkeypatch, world, *common, "--micro-batch-size", "1", *flags)).total

    plain = total(8)
    assert plain > total(8, "--zero-stage", "1") > total(8, "--zero-stage", "2") > total(8, "--zero-stage", "3")
    assert plain > total(8, "--recompute-granularity", "full")
    tensor = total(8, "--tensor-model-parallel-size", "2")
    assert plain > tensor > total(8, "--tensor-model-parallel-size", "2", "--sequence-parallel")
    assert plain > total(8, "--pipeline-model-parallel-size", "2")
    # 18 bytes a parameter of 6.7e9 on one device, without the activations
    one = estimate_memory(resolve(monkeypatch, 1, "--model", "llama2-7b", "--bf16"))
    assert one.weights + one.gradients + one.optimizer == 18 * 6738415616


def test_the_nearest_layout_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    common = ["--model", "llama2-7b", "--bf16", "--seq-length", "4096", "--global-batch-size", "64"]
    common += ["--micro-batch-size", "1"]
    resolved = resolve(monkeypatch, 8, *common)
    check_memory(resolved, 200 << 30, "H")
    with pytest.raises(ModelLinkError) as caught:
        check_memory(resolved, 80 << 30, "NVIDIA A100-SXM4-80GB")
    text = str(caught.value)
    assert "at least 137.2 GiB (weights 12.6 GiB" in text and "NVIDIA A100-SXM4-80GB has 80.0 GiB" in text
    assert "the nearest layout that fits is --zero-stage 1 (71.3 GiB)." in text
    for memory in (60 << 30, 40 << 30, 24 << 30):
        fit = nearest_fit(resolved, memory)
        assert fit is not None and fit.world_size == 8 and estimate_memory(fit).total <= memory
    with pytest.raises(ModelLinkError, match=r"nearest layout that fits needs 16 processes: --zero-stage 3"):
        check_memory(resolve(monkeypatch, 8, "--model", "llama2-70b", *common[2:]), 80 << 30, "H")


def test_a_layout_that_is_proposed_keeps_the_rules(monkeypatch: pytest.MonkeyPatch) -> None:
    # 6 heads and 3 layers: neither 4 tensor ranks nor 2 stages exist among 4 processes
    flags = "--num-layers 3 --hidden-size 6144 --num-attention-heads 6 --max-position-embeddings 128".split()
    resolved = resolve(monkeypatch, 4, *flags, "--padded-vocab-size", "512", "--global-batch-size", "16")
    smallest = 0
    for memory in range(100 << 20, 12 << 30, 300 << 20):
        fit = nearest_fit(resolved, memory)
        if fit is not None:
            smallest = smallest or memory
            assert fit.config.parallel.tensor_parallel in (1, 2) and fit.config.parallel.pipeline_parallel == 1
    assert smallest, "no layout ever fitted"


def test_contexts_share_activations_and_expert_ranks_share_experts(monkeypatch: pytest.MonkeyPatch) -> None:
    """Two ranks of one context hold half of the sequence each; two expert ranks hold half of the experts each."""

    def estimate(world: int, *flags: str) -> Any:
        return estimate_memory(resolve(monkeypatch, world, "--model", "tiny-mixtral", "--bf16", *flags))

    context = ("--context-parallel-size", "2", "--global-batch-size", "8")
    one, shared = estimate(1, "--global-batch-size", "8"), estimate(2, *context)
    assert 0.45 * one.activations < shared.activations < 0.55 * one.activations
    experts = 4 * 3 * 64 * 96 * 2  # of two layers
    apart = estimate(2, *context, "--expert-model-parallel-size", "2")
    assert shared.weights - apart.weights == experts / 2 * 2
    sharded = estimate(2, *context, "--zero-stage", "1")
    both = estimate(2, *context, "--zero-stage", "1", "--expert-model-parallel-size", "2")
    assert both.optimizer == sharded.optimizer and sharded.weights - both.weights == experts / 2 * 2
