"""Experts shared by ranks train like one process: both dispatchers, all routers, alone and with every other axis."""

from __future__ import annotations

from typing import Any

import pytest
from equivalence import run_cases, wrong_cases
from spawn import run_distributed

TOLERANCE = 1e-5
EP = {"expert_parallel": 2}
ASYNC = EP | {"moe_permutation_async_comm": True}
GATHER = EP | {"moe_token_dispatcher_type": "allgather"}
SP, PP = {"tensor_parallel": 2, "sequence_parallel": True}, {"pipeline_parallel": 2}
RING = {"context_parallel": 2, "context_parallel_algo": "megatron_cp_algo"}
CASES: dict[int, list[tuple[str, dict[str, Any], int]]] = {
    2: [
        ("moe", EP, 2),
        ("moe", GATHER, 2),
        ("moe", EP | {"zero_stage": 1}, 2),
        ("moe", EP | {"zero_stage": 3, "recompute_granularity": "full"}, 2),
        ("deepseek", GATHER | {"zero_stage": 3}, 2),
        ("sigmoid", EP, 2),
        ("sigmoid", EP | {"zero_stage": 1}, 2),
        ("deepseek", EP | RING, 2),
        ("moe", ASYNC | {"zero_stage": 3, "recompute_granularity": "full"}, 1),
        ("deepseek", ASYNC | {"zero_stage": 2}, 2),
        ("sigmoid", ASYNC | {"recompute_granularity": "selective"}, 2),
        ("padded", ASYNC, 2),
        ("deepseek", ASYNC | GATHER, 2),
    ],
    4: [
        ("moe", EP | {"zero_stage": 3}, 1),
        ("deepseek", {"expert_parallel": 4, "zero_stage": 1}, 1),
        ("sigmoid", EP | SP, 2),
        ("deepseek", EP | SP | {"zero_stage": 1}, 2),
        ("moe", GATHER | SP | {"zero_stage": 3}, 2),
        ("moe", EP | PP | {"zero_stage": 1}, 2),
        ("sigmoid", EP | {"zero_stage": 1, "data_parallel_replicas": 2}, 1),
        ("deepseek", {"expert_parallel": 4, "zero_stage": 0} | RING, 2),
        ("odd", {"expert_parallel": 2, "zero_stage": 1}, 1),
        ("sigmoid", ASYNC | SP | {"zero_stage": 1}, 2),
        ("deepseek", ASYNC | SP | RING, 2),
        ("deepseek", ASYNC | PP | RING | {"layers_per_virtual_stage": 1}, 2),
    ],
    8: [
        ("deepseek", EP | SP | PP | {"zero_stage": 1}, 2),
        ("moe", EP | SP | RING | {"zero_stage": 3}, 2),
        ("deepseek", EP | PP | RING | {"zero_stage": 2, "layers_per_virtual_stage": 1}, 2),
        ("deepseek", ASYNC | SP | PP | RING, 2),
        ("moe", ASYNC | SP | PP | RING | {"async_tensor_parallel": True, "recompute_granularity": "full"}, 2),
    ],
}


# eight processes on two cores take a minute: `make test-all` runs them
WORLDS = [2, 4, pytest.param(8, marks=pytest.mark.slow)]


@pytest.fixture(scope="module", params=WORLDS, ids=lambda world: f"{world}-ranks")
def results(request: pytest.FixtureRequest) -> tuple[int, list[list[dict[str, Any]]]]:
    world = request.param
    return world, run_distributed(run_cases, world, CASES[world], [], timeout=300)


@pytest.mark.dist
def test_shared_experts_equal_one_process(results: tuple[int, list[list[dict[str, Any]]]]) -> None:
    world, per_rank = results
    assert not wrong_cases(CASES[world], per_rank, TOLERANCE)
