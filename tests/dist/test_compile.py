"""Compiled layers train like plain ones of one process, at every layout that takes them.

Compiling takes a minute or more, so these cases are no features of the matrix and run with the slow tests.
"""

from __future__ import annotations

from typing import Any

import pytest
from equivalence import run_cases, train, wrong_cases
from spawn import run_distributed

TOLERANCE = 1e-5
COMPILE = {"compile": True}
CASES: list[tuple[str, dict[str, Any], int]] = [
    ("gemma2", COMPILE | {"zero_stage": 3, "recompute_granularity": "full"}, 2),
    ("tied", COMPILE | {"pipeline_parallel": 2, "layers_per_virtual_stage": 1}, 2),
    ("moe", COMPILE | {"expert_parallel": 2, "zero_stage": 1}, 2),
    ("deepseek", COMPILE | {"context_parallel": 2, "context_parallel_algo": "megatron_cp_algo"}, 2),
]

pytestmark = [pytest.mark.dist, pytest.mark.slow]


def test_compiled_layouts_equal_one_plain_process() -> None:
    per_rank = run_distributed(run_cases, 2, CASES, [], timeout=900)
    assert not wrong_cases(CASES, per_rank, TOLERANCE)


def test_compiled_layers_of_one_process_equal_plain_ones() -> None:
    case = ("llama", COMPILE, 2)
    assert not wrong_cases([case], [[train(*case)]], TOLERANCE)
