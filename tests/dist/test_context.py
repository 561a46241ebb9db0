"""Sequences shared by ranks train like one process: every algorithm, mask and kind of attention, alone and in mixtures."""

from __future__ import annotations

from typing import Any

import pytest
from equivalence import run_cases, wrong_cases
from spawn import run_distributed

TOLERANCE = 1e-5
ULYSSES = {"context_parallel": 2}
RING = ULYSSES | {"context_parallel_algo": "megatron_cp_algo"}
OVERLAP = RING | {"use_cp_send_recv_overlap": True}
GATHER = ULYSSES | {"context_parallel_algo": "allgather_cp_algo"}
FULL = {"cp_attention_mask_type": "full"}
FOUR = {"context_parallel": 4}
HYBRID = FOUR | {"context_parallel_algo": "hybrid_cp_algo", "ulysses_degree_in_cp": 2}
SP, PP = {"tensor_parallel": 2, "sequence_parallel": True}, {"pipeline_parallel": 2}
CASES: dict[int, list[tuple[str, dict[str, Any], int]]] = {
    2: [
        ("llama", ULYSSES, 2),
        ("llama", RING, 2),
        ("llama", OVERLAP, 2),
        ("llama", GATHER, 2),
        ("llama", ULYSSES | FULL, 2),
        ("llama", OVERLAP | FULL, 2),
        ("llama packed", ULYSSES, 2),
        ("llama packed", RING, 2),
        ("llama packed", GATHER, 2),
        ("bloom", ULYSSES, 2),
        ("bloom", RING, 2),
        ("bloom packed", GATHER, 2),
        ("gemma2", ULYSSES, 2),
        ("gemma2", OVERLAP, 2),
        ("gpt", RING, 2),
        ("moe", RING, 2),
        ("deepseek", ULYSSES, 2),
        ("deepseek", OVERLAP, 2),
        ("sinks", RING, 2),
        ("sinks", ULYSSES, 2),
        ("sinks packed", OVERLAP, 2),
    ],
    4: [
        ("llama", HYBRID, 2),
        ("gemma2 packed", HYBRID | {"use_cp_send_recv_overlap": True}, 2),
        ("llama", OVERLAP | FOUR, 2),
        ("gemma2", RING | FOUR, 2),
        ("llama", ULYSSES | FOUR, 2),
        ("multiquery", ULYSSES | FOUR, 2),
        ("llama packed", RING | SP, 2),
        ("sinks", OVERLAP | SP | {"recompute_granularity": "selective"}, 2),
        ("tied", ULYSSES | PP, 2),
        ("tied packed", RING | PP | {"layers_per_virtual_stage": 1}, 2),
        ("deepseek", ULYSSES | {"zero_stage": 1}, 1),
        ("moe", RING | {"zero_stage": 3}, 1),
        ("gpt", GATHER | {"zero_stage": 0, "recompute_granularity": "full"}, 1),
    ],
    8: [
        ("deepseek", OVERLAP | SP | PP, 2),
        ("bloom", HYBRID | {"zero_stage": 2}, 1),
        ("llama packed", ULYSSES | SP | {"zero_stage": 1}, 1),
    ],
}  # fmt: skip


# eight processes on two cores take a minute: `make test-all` runs them
WORLDS = [2, 4, pytest.param(8, marks=pytest.mark.slow)]


@pytest.fixture(scope="module", params=WORLDS, ids=lambda world: f"{world}-ranks")
def results(request: pytest.FixtureRequest) -> tuple[int, list[list[dict[str, Any]]]]:
    world = request.param
    return world, run_distributed(run_cases, world, CASES[world], [], timeout=300)


@pytest.mark.dist
def test_shared_sequences_equal_one_process(results: tuple[int, list[list[dict[str, Any]]]]) -> None:
    world, per_rank = results
    assert not wrong_cases(CASES[world], per_rank, TOLERANCE)
