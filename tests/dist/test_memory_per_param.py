"""Bytes per parameter, measured during a step of several micro-batches, stay within the reference's table."""

from __future__ import annotations

from typing import Any

import memory_per_param as table
import pytest
from spawn import run_distributed

pytestmark = pytest.mark.dist

# (weights and what is gathered of them, gradients, masters and moments) where only one layout explains the figure
EXPECTED = {
    ("fp32", 0, 1): (4, 4, 8), ("bf16", 0, 2): (2, 4, 12), ("bf16, bf16 gradients, split master", 0, 2): (2, 2, 10),
    ("cadam", 0, 1): (2, 2, 4), ("bf16", 1, 2): (2 + 4 / 2, 4, 8 / 2), ("fp32", 2, 2): (4 + 4 / 2, 4 / 2, 8 / 2),
    ("bf16, bf16 gradients, split master", 1, 2): (2 + 2 / 2, 2, 10 / 2),
}  # fmt: skip


def figures(rank: int, world_size: int) -> list[list[Any]]:
    return [list(row) for row in table.measure_all(list(table.MODES), steps=1)]


@pytest.mark.parametrize("world", [1, 2])
def test_bytes_per_parameter_are_within_the_table(world: int) -> None:
    seen = set()
    for rank in run_distributed(figures, world, timeout=300):
        for name, stage, found in rank:
            seen.add((name, stage, world))
            assert found["held"] <= table.limit(table.MODES[name], stage, world) + 5e-3, (name, stage, found)
            # what passes is of one layer: its own gradients, and two buffers of collectives
            assert found["of a layer"] <= 16, (name, stage, found)
            want = EXPECTED.get((name, stage, world))
            if want is not None:
                weights = found["weights"] + found["gathered"]
                have = (weights, found["gradients"], found["masters"] + found["moments"])
                assert have == pytest.approx(want, rel=0.02), (name, stage, found)
    assert seen >= {key for key in EXPECTED if key[2] == world}
