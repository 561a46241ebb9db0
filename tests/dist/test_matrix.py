"""Every feature of the table in matrix.py, alone and mixed with the others, trains like one process.

The fast suite trains each feature alone and each pair of axes; `make test-all` also each feature in three mixtures with
others. Half precision is held to the error that one process makes in it. Cases of eight processes are in test_layouts,
test_context and test_expert.
"""

from __future__ import annotations

import dataclasses
import itertools
import sys
from collections.abc import Iterable
from typing import Any

import pytest
from equivalence import compare, train_config
from matrix import (
    ALL,
    AXES,
    ELSEWHERE,
    RANKS,
    Row,
    mixtures,
    model_of,
    name_of,
    options_of,
    ranks_of,
    refused,
    resolve,
    row_of,
    singles,
)
from spawn import run_distributed

from modellink.config.schema import Config, OptimizerConfig, ParallelConfig

TOLERANCE = 1e-5
# a moment at the edge between two 8-bit codes falls on either side, and codes are up to a sixth apart: with lr 1e-3 a
# weight of 0.1 moves by up to 2e-3 of itself more or less
LOOSER = {"adamw8bit": 5e-3}
CHANGES_NUMBERS = ("model", "documents", "optimizer", "precision")  # the other axes only lay out


def train_rows(rank: int, world_size: int, rows: list[Row]) -> list[dict[str, Any]]:
    done = []
    for row in rows:
        if rank == 0:
            print(name_of(row), file=sys.stderr, flush=True)  # shown when a rank dies: the row it died in
        done.append(train_row(row))
    return done


def train_row(row: Row) -> dict[str, Any]:
    resolved = resolve(row)
    assert not isinstance(resolved, str), resolved
    return train_config(resolved.config, 1, packed=model_of(row).endswith("packed"))


class Comparison:
    """Errors of rows against one process, which is run once for all rows that compute the same."""

    def __init__(self) -> None:
        self._alone: dict[tuple[Row, str], dict[str, Any]] = {}

    def alone(self, row: Row, exact: bool) -> dict[str, Any]:
        """What one process does with `row`; in fp32 if `exact`."""
        kept = [f for f in row if f[0] in CHANGES_NUMBERS and not (exact and f[0] == "precision")]
        mask = "full" if ("context", "full-mask") in row else "causal"
        key = (row_of(kept), mask)
        if key not in self._alone:
            resolved = resolve(key[0])
            assert not isinstance(resolved, str), resolved
            parallel = dataclasses.replace(resolved.config.parallel, cp_attention_mask_type=mask)
            config = dataclasses.replace(resolved.config, parallel=parallel)
            self._alone[key] = train_config(config, 1, packed=model_of(row).endswith("packed"))
        return self._alone[key]

    def wrong(self, rows: Iterable[Row], per_rank: list[list[dict[str, Any]]]) -> dict[str, Any]:
        """The rows that are too far from one process, with their errors."""
        found: dict[str, Any] = {}
        for place, row in enumerate(rows):
            errors = compare([rank[place] for rank in per_rank], self.alone(row, exact=True))
            bounds = dict.fromkeys(errors, max(LOOSER.get(value, TOLERANCE) for _, value in row))
            if "precision" in dict(row):
                own = compare([self.alone(row, exact=False)], self.alone(row, exact=True))
                bounds = {kind: 3 * error + 1e-3 for kind, error in own.items()}
            if any(errors[kind] > bounds[kind] for kind in errors):
                found[name_of(row)] = (errors, bounds)
        return found


def check(rows: list[Row], world_size: int) -> None:
    mine = [row for row in rows if ranks_of(row) == world_size]
    if world_size == 1:
        per_rank = [train_rows(0, 1, mine)]
    else:
        per_rank = run_distributed(train_rows, world_size, mine, timeout=2400)
    assert not Comparison().wrong(mine, per_rank)


@pytest.mark.dist
@pytest.mark.parametrize("world_size", [1, 2, RANKS])
def test_each_feature_and_each_pair_of_axes_trains_like_one_process(world_size: int) -> None:
    check([*singles(), *mixtures(at_least=0)], world_size)


@pytest.mark.dist
@pytest.mark.slow
@pytest.mark.timeout(3000)
def test_each_feature_in_three_mixtures_trains_like_one_process() -> None:
    check(mixtures(at_least=3), RANKS)


def missing_features(config: type, section: str, wanted: Iterable[str] | None = None) -> list[str]:
    """Options of `config` (the fields `wanted`, default all) that no feature sets to each of their values."""
    given: dict[str, set[Any]] = {}
    for feature in ALL:
        for path, value in options_of(feature).items():
            given.setdefault(path, set()).add(str(value))
    missing = []
    for field in dataclasses.fields(config):
        path = f"{section}.{field.name}"
        if path in ELSEWHERE or (wanted is not None and field.name not in wanted):
            continue
        values = {str(choice) for choice in field.metadata["choices"] or ()} - {str(field.default)}
        seen = given.get(path, set())
        missing += [path] if not seen else [f"{path} {value}" for value in sorted(values - seen)]
    return missing


NUMERIC_OPTIONS = ("optimizer", "bf16", "fp16", "split_master", "release_fp32_grad", "decoupled_lr", "cpu_optimizer")


def test_every_option_of_a_layout_is_a_feature_of_the_table() -> None:
    assert not missing_features(ParallelConfig, "parallel")
    assert not missing_features(OptimizerConfig, "optimizer", NUMERIC_OPTIONS)


def test_an_option_without_a_feature_is_noticed() -> None:
    grown = dataclasses.make_dataclass(
        "Grown", [("new_trick", bool, dataclasses.field(default=False, metadata={"choices": None}))]
    )
    assert missing_features(grown, "parallel") == ["parallel.new_trick"]
    assert {field.name for field in dataclasses.fields(Config)} >= {"parallel", "optimizer"}


def test_every_pair_of_axes_and_every_feature_three_times() -> None:
    for rows in (mixtures(at_least=0), mixtures(at_least=3)):
        together = {(one[0], other[0]) for row in rows for one, other in itertools.combinations(row, 2)}
        assert together == set(itertools.combinations(AXES, 2))
        assert all(ranks_of(row) == RANKS for row in rows)
    for feature in ALL:
        assert sum(feature in row for row in rows) >= 3, name_of((feature,))


def test_pairs_are_trained_or_refused_in_a_sentence() -> None:
    for pair, why in refused().items():
        assert len(why) > 20, name_of(pair)
