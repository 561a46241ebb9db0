"""Every layout trains like one process: loss, every gradient of every step, every updated weight, in fp32.

The families that differ in their layers, and up to eight processes; test_matrix.py has each feature and their mixtures.
One spawn per world size runs all its cases. Adam's epsilon is raised to 1e-5: at 1e-8 it turns gradients that are zero
up to rounding (a key bias without rotation) into full steps of random sign, in any program.
"""

from __future__ import annotations

from typing import Any

import pytest
from equivalence import compare, name_of, run_cases, train, wrong_cases
from spawn import run_distributed

TOLERANCE = 1e-5
TP, SP = {"tensor_parallel": 2}, {"tensor_parallel": 2, "sequence_parallel": True}
PP = {"pipeline_parallel": 2}
CASES: dict[int, list[tuple[str, dict[str, Any], int]]] = {
    2: [
        ("tied", SP, 2),
        ("gpt", TP, 2),
        ("gpt", SP, 2),
        ("bloom", SP, 2),
        ("gemma2", SP, 2),
        ("tied", {"zero_stage": 3}, 2),
        ("tied", PP, 2),
        ("gpt", PP | {"layers_per_stage": [1, 3]}, 2),
        ("tied", PP | {"layers_per_virtual_stage": 1}, 2),
        ("gemma2", PP | {"recompute_granularity": "full", "recompute_method": "block", "recompute_num_layers": 1}, 2),
        ("llama", SP | {"recompute_granularity": "selective"}, 2),
        ("moe", TP, 2),
        ("moe", SP, 2),
        ("moe", {"zero_stage": 3}, 2),
        ("moe", PP | {"recompute_granularity": "full"}, 2),
        ("deepseek", TP, 2),
        ("deepseek", SP | {"recompute_granularity": "selective"}, 2),
        ("deepseek", PP | {"layers_per_stage": [1, 3]}, 2),
        ("deepseek", PP | {"layers_per_virtual_stage": 1}, 2),
        ("deepseek", {"zero_stage": 1}, 2),
        ("sigmoid", SP | {"recompute_granularity": "selective"}, 2),
        ("sigmoid", PP, 2),
        ("sigmoid", {"zero_stage": 2}, 2),
        ("latent", TP, 2),
    ],
    4: [
        ("llama", SP | PP, 1),
        ("tied", SP | {"zero_stage": 1}, 1),
        ("gemma2", SP | {"zero_stage": 3}, 1),
        ("tied", PP | {"zero_stage": 1}, 1),
        ("gpt", TP | PP | {"layers_per_virtual_stage": 1}, 1),
        ("llama", {"zero_stage": 3, "data_parallel_replicas": 2}, 1),
        ("bloom", TP | {"zero_stage": 0}, 1),
        ("llama", PP | {"zero_stage": 0, "layers_per_stage": [3, 1]}, 1),
        ("llama", {"pipeline_parallel": 4}, 2),
        ("deepseek", SP | PP | {"layers_per_virtual_stage": 1}, 1),
        ("deepseek", SP | {"zero_stage": 3}, 1),
        ("sigmoid", SP | {"zero_stage": 1}, 1),
        ("moe", {"tensor_parallel": 4}, 1),
        ("llama", {"tensor_parallel": 4, "sequence_parallel": True}, 2),
    ],
    8: [
        ("tied", SP | PP | {"zero_stage": 1}, 1),
        ("llama", TP | PP | {"zero_stage": 0, "recompute_granularity": "full"}, 1),
        ("gemma2", SP | {"zero_stage": 3, "data_parallel_replicas": 2}, 1),
        ("deepseek", SP | PP | {"zero_stage": 1, "recompute_granularity": "full"}, 1),
        ("gpt", SP | PP | {"zero_stage": 2, "layers_per_virtual_stage": 1}, 1),
    ],
}

# In bf16 gradients gather in fp32 beside the parameters, over several micro-batches.
HALF: dict[int, list[tuple[str, dict[str, Any], int]]] = {
    2: [
        ("llama", TP, 2),
        ("tied", SP, 2),
        ("deepseek", SP, 2),
        ("sigmoid", TP, 2),
        ("gpt", PP, 2),
        ("moe", {"zero_stage": 1}, 2),
        ("deepseek", {"zero_stage": 1, "expert_parallel": 2}, 2),
        ("llama", {"context_parallel": 2, "context_parallel_algo": "megatron_cp_algo"}, 2),
    ],
    4: [("tied", SP | PP, 2), ("deepseek", SP | {"zero_stage": 1}, 2)],
    8: [("llama", SP | PP | {"zero_stage": 2}, 1)],
}


@pytest.fixture(scope="module", params=sorted(CASES), ids=lambda world: f"{world}-ranks")
def results(request: pytest.FixtureRequest) -> tuple[int, list[list[dict[str, Any]]]]:
    world = request.param
    return world, run_distributed(run_cases, world, CASES[world], HALF[world], timeout=300)


@pytest.mark.dist
def test_layouts_equal_one_process(results: tuple[int, list[list[dict[str, Any]]]]) -> None:
    world, per_rank = results
    assert not wrong_cases(CASES[world], per_rank, TOLERANCE)


@pytest.mark.dist
def test_half_precision_is_no_further_from_fp32_than_one_process(
    results: tuple[int, list[list[dict[str, Any]]]],
) -> None:
    world, per_rank = results
    wrong = {}
    for place, case in enumerate(HALF[world], start=len(CASES[world])):
        model, _, micro_batch = case
        exact = train(model, {}, micro_batch)
        own = compare([train(model, {}, micro_batch, bf16=True)], exact)
        errors = compare([rank[place] for rank in per_rank], exact)
        if any(errors[kind] > 3 * own[kind] + 1e-3 for kind in errors):
            wrong[name_of(case)] = (errors, own)
    assert not wrong
