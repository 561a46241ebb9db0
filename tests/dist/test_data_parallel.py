"""Data parallelism, whole and sharded: overlap on and off, gradients summed in float32 and in bfloat16."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from equivalence import MODELS, batches, compare, name_of, train, wrong_cases
from spawn import run_distributed

from modellink.config.schema import ModelConfig, ParallelConfig
from modellink.parallel.apply import build_model
from modellink.parallel.replicate import ReplicatedGradients
from modellink.parallel.topology import Topology

pytestmark = pytest.mark.dist

Case = tuple[str, dict[str, Any], int]
WHOLE, EP = {"zero_stage": 0}, {"expert_parallel": 2}
AHEAD = {"overlap_param_gather": True}
CASES: list[Case] = [
    ("tied", WHOLE, 1),
    ("llama", WHOLE | {"overlap_grad_reduce": False}, 1),
    ("moe", WHOLE | EP, 2),
    ("llama", {"zero_stage": 1} | AHEAD, 1),
    ("moe", {"zero_stage": 3} | EP | AHEAD, 1),
    ("gemma2", {"zero_stage": 3, "recompute_granularity": "full"} | AHEAD, 1),
]
HALF: dict[str, Any] = {"bf16": True, "release_fp32_grad": True}
RELEASED: list[tuple[str, dict[str, Any], int, dict[str, Any]]] = [
    ("llama", WHOLE, 1, HALF | {"split_master": True}),
    ("llama", {"zero_stage": 1}, 1, HALF),
    ("moe", {"zero_stage": 3} | EP, 2, HALF | {"split_master": True}),
]


def run(rank: int, world_size: int) -> dict[str, Any]:
    return {
        "cases": [train(model, parallel, size) for model, parallel, size in CASES],
        "released": [train(model, parallel, size, **options) for model, parallel, size, options in RELEASED],
        "started": [started(overlap) for overlap in (True, False)],
    }


def started(overlap: bool) -> list[int]:
    """How many sums of gradients have begun after each of the backward passes of a step."""
    model, parallel = ModelConfig(**MODELS["llama"]).resolve(), ParallelConfig(zero_stage=0)
    topology = Topology(parallel)
    built = build_model(model, parallel, topology, torch.device("cpu"), torch.float32, seed=7)
    sums = ReplicatedGradients(built.chunks, topology, overlap)
    sums.begin(2)
    counts = []
    for _ in range(2):
        built.chunks[0](batches()[0]["tokens"]).sum().backward()
        counts.append(sums.started)
    sums.finish()
    return [*counts, sums.started]


@pytest.fixture(scope="module")
def per_rank() -> list[dict[str, Any]]:
    return run_distributed(run, 2, timeout=300)


def test_equals_one_process(per_rank: list[dict[str, Any]]) -> None:
    assert not wrong_cases(CASES, [rank["cases"] for rank in per_rank], 1e-5)


def test_bfloat16_gradients_are_no_further_from_float32_than_in_one_process(per_rank: list[dict[str, Any]]) -> None:
    wrong = {}
    for place, (model, parallel, size, options) in enumerate(RELEASED):
        exact = train(model, {}, size)
        own = compare([train(model, {}, size, **options)], exact)
        errors = compare([rank["released"][place] for rank in per_rank], exact)
        if any(errors[kind] > 2 * own[kind] + 1e-3 for kind in errors):
            wrong[name_of((model, parallel, size))] = (errors, own)
    assert not wrong


def test_sums_begin_in_the_last_backward_pass_or_after_it(per_rank: list[dict[str, Any]]) -> None:
    everything = 4 + 3  # layers, output matrix, norm before it, embedding
    for rank in per_rank:
        assert rank["started"] == [[0, everything, everything], [0, 0, everything]]
