"""Every pipeline schedule trains like one process: loss, every gradient of every step, every updated weight, in fp32.

With both halves of a tied embedding on one rank (V-shaped schedules), with backward passes taken apart, with uneven
stages, micro-batches of other sizes and sequences of other lengths from step to step.
"""

from __future__ import annotations

from functools import cache
from typing import Any

import pytest
import torch
from equivalence import MODELS, VOCABULARY, compare, name_of, run_cases, train, whole, wrong_cases
from spawn import run_distributed

from modellink.config.schema import Config, ModelConfig, OptimizerConfig, ParallelConfig
from modellink.parallel.apply import build_model
from modellink.parallel.topology import Topology
from modellink.train.engine import Engine

pytestmark = pytest.mark.dist

TOLERANCE = 1e-5
PP = {"pipeline_parallel": 2}
SP = {"tensor_parallel": 2, "sequence_parallel": True}
CHUNKS = {"layers_per_virtual_stage": 1}
CP = {"context_parallel": 2, "context_parallel_algo": "megatron_cp_algo"}


def by(schedule: str, **parallel: Any) -> dict[str, Any]:
    return PP | {"pipeline_schedule": schedule} | parallel


CASES: dict[int, list[tuple[str, dict[str, Any], int]]] = {
    2: [
        ("tied", by("gpipe"), 2),
        ("tied", by("interleaved", **CHUNKS), 8),
        ("gpt", by("aiao", **CHUNKS), 2),
        ("gemma2", by("aiao", **CHUNKS, recompute_granularity="full"), 2),
        ("llama", by("zero_bubble"), 2),
        ("llama", by("zero_bubble"), 8),
        ("tied", by("zero_bubble", **CHUNKS), 2),
        ("sinks", by("zero_bubble", layers_per_stage=[1, 3]), 2),
        ("deepseek", by("zero_bubble"), 2),
        ("llama", by("zbv"), 2),
        ("tied", by("zbv"), 8),
        ("moe", by("zbv"), 2),
        ("deepseek", by("zbv", recompute_granularity="selective"), 2),
        ("tied", by("zbv", recompute_granularity="full"), 2),
        ("latent", by("zbv", layers_per_stage=[1, 1, 1, 1]), 2),
        ("tied", by("dualpipev"), 2),
        ("sigmoid", by("dualpipev"), 2),
        ("llama", by("1f1b", optimized_pipeline=True, manual_mbs="1,2,3,2"), 2),
    ],
    4: [
        ("tied", by("zbv", **SP), 1),
        ("deepseek", by("zero_bubble", **SP), 1),
        ("tied", by("zbv", zero_stage=1), 1),
        ("tied", by("zero_bubble", zero_stage=2), 1),
        ("gpt", by("aiao", **CHUNKS, zero_stage=0), 1),
        ("moe", by("dualpipev", zero_stage=1, expert_parallel=2), 1),
        ("llama", by("zbv", **CP), 1),
        ("llama", by("1f1b", optimized_pipeline=True, manual_mbs="1,2,1", zero_stage=1), 1),
        ("tied", by("zero_bubble", pipeline_parallel=4), 1),
    ],
}
HALF: dict[int, list[tuple[str, dict[str, Any], int]]] = {
    2: [("tied", by("zbv"), 2), ("sigmoid", by("zero_bubble"), 2)],
    4: [("tied", by("zbv", zero_stage=1), 1)],
}


def engine_of(model: str, parallel: dict[str, Any], **optimizer: Any) -> Engine:
    config = Config(
        model=ModelConfig(**MODELS[model]).resolve(),
        parallel=ParallelConfig(**parallel),
        optimizer=OptimizerConfig(lr=1e-3, adam_eps=1e-5, **optimizer),
    )
    dtype = getattr(torch, config.optimizer.dtype)
    topology = Topology(config.parallel)
    return Engine(build_model(config.model, config.parallel, topology, torch.device("cpu"), dtype, seed=7), config)


def train_lengths(parallel: dict[str, Any]) -> dict[str, Any]:
    """Steps of ever other length, twelve of them, then an evaluation; 4 or 8 rows."""
    engine = engine_of("tied", parallel)
    draw = torch.Generator().manual_seed(3)
    losses = []
    for step in range(12):
        text = torch.randint(0, VOCABULARY, (4 * (1 + step % 2), 5 + step), generator=draw)
        batch = {"tokens": text[:, :-1].contiguous(), "labels": text[:, 1:].contiguous()}
        losses.append(engine.step(batch, 1).loss.item())
    loss, count = engine.evaluate(batch, 1)
    pipeline = engine.model.pipeline
    schedules = 0 if pipeline is None else len(pipeline._schedules)
    weights = {name: whole(p) for name, p in engine.model.named_parameters()}
    return {"losses": [*losses, (loss / count).item()], "weights": weights, "schedules": schedules}


def half_gradients(schedule: str) -> list[str]:
    """Weights whose bf16 gradients did not all gather in fp32."""
    engine = engine_of("tied", by(schedule), bf16=True)
    tokens = torch.arange(64).view(8, 8) % VOCABULARY
    engine.forward_backward({"tokens": tokens, "labels": tokens}, 1)
    engine.reduce_gradients()
    found = [(n, p.grad, getattr(p, "main_grad", None)) for n, p in engine.model.named_parameters()]
    return [n for n, grad, main in found if grad is not None or main is None or main.dtype != torch.float32]


def tied_bits(schedule: str) -> bool:
    """Whether the copy of the embedding on the same rank has its bits when it is used, after steps and a load."""
    engine = engine_of("tied", by(schedule))
    model = engine.model
    if model.tied_pair is None:
        return True
    original, follower = model.tied_pair
    with torch.no_grad():
        original.mul_(1.5)
    model.follow_ties()
    names = [name for name, _ in model.named_parameters()]
    return torch.equal(original, follower) and names.count("embed_tokens.weight") == 1


def reductions_of_aiao() -> list[str]:
    """Names of what a rank does in one step, without communication."""
    pipeline = engine_of("gpt", by("aiao", **CHUNKS)).model.pipeline
    assert pipeline is not None
    schedule: Any = pipeline._schedule(2, training=True)[0]
    actions = schedule.pipeline_order_with_comms[pipeline.topology.coordinate("pp")]
    return [str(action) for action in actions if str(action.computation_type.value) in ("F", "B", "REDUCE_GRAD")]


def everything(rank: int, world: int) -> dict[str, Any]:
    results: dict[str, Any] = {"cases": run_cases(rank, world, CASES[world], HALF[world])}
    if world == 2:
        shapes = [PP, by("zbv"), by("interleaved", layers_per_virtual_stage=1)]
        results["lengths"] = [train_lengths(parallel) for parallel in shapes]
        results["half"] = [half_gradients(schedule) for schedule in ("1f1b", "zero_bubble", "zbv")]
        results["tied"] = [tied_bits(schedule) for schedule in ("1f1b", "zbv", "dualpipev")]
        results["aiao"] = reductions_of_aiao()
    return results


@cache
def results(world: int) -> list[dict[str, Any]]:
    return run_distributed(everything, world, timeout=400)


@pytest.mark.parametrize("world", sorted(CASES))
def test_schedules_equal_one_process(world: int) -> None:
    assert not wrong_cases(CASES[world], [rank["cases"] for rank in results(world)], TOLERANCE)


@pytest.mark.parametrize("world", sorted(HALF))
def test_half_precision_is_no_further_from_fp32_than_one_process(world: int) -> None:
    wrong = {}
    for place, case in enumerate(HALF[world], start=len(CASES[world])):
        model, _, micro_batch = case
        exact = train(model, {}, micro_batch)
        own = compare([train(model, {}, micro_batch, bf16=True)], exact)
        errors = compare([rank["cases"][place] for rank in results(world)], exact)
        if any(errors[kind] > 3 * own[kind] + 1e-3 for kind in errors):
            wrong[name_of(case)] = (errors, own)
    assert not wrong


def test_sequences_and_batches_of_any_length_go_through() -> None:
    reference = train_lengths({})
    for rank in results(2):
        for run in rank["lengths"]:
            errors = [abs(a - b) / b for a, b in zip(run["losses"], reference["losses"], strict=True)]
            assert max(errors) < TOLERANCE
            for name, weight in run["weights"].items():
                torch.testing.assert_close(weight, reference["weights"][name], rtol=1e-4, atol=1e-6)
            # two numbers of micro-batches in training, one in evaluation, twelve lengths
            assert run["schedules"] == 3


def test_gradients_gather_in_float32_however_backward_is_split() -> None:
    assert [rank["half"] for rank in results(2)] == [[[], [], []]] * 2


def test_a_tied_pair_on_one_rank_is_one_parameter_and_its_copy() -> None:
    assert all(all(rank["tied"]) for rank in results(2))


def test_aiao_passes_chunk_by_chunk_and_reduces_each_at_once() -> None:
    assert results(2)[0]["aiao"] == [
        *("0F0", "0F1", "2F0", "2F1"),
        *("2B1", "2B0", "2REDUCE_GRAD", "0B1", "0B0", "0REDUCE_GRAD"),
    ]
