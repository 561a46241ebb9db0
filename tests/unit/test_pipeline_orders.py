"""What is said of schedules (placement, live micro-batches, sizes) against the orders that torch runs."""

from __future__ import annotations

import itertools

import pipeline as benchmark
import pytest

from modellink.config.load import load_config
from modellink.config.pipeline import (
    MANUAL_SIZES,
    SPLIT,
    chunks_per_rank,
    live_micro_batches,
    micro_batch_sizes,
    stage_layers,
    stages_of,
)
from modellink.config.schema import ModelConfig, ParallelConfig
from modellink.errors import ModelLinkError
from modellink.parallel.pipeline import stage_specs


def layout(name: str, ranks: int) -> ParallelConfig:
    looped = name in ("interleaved", "aiao") or name.endswith("2 chunks")
    return ParallelConfig(
        pipeline_parallel=ranks,
        pipeline_schedule=name.split(",")[0],
        layers_per_virtual_stage=1 if looped else None,
    )


def test_live_micro_batches_and_placement_are_those_of_the_orders() -> None:
    for name, (ranks, count) in itertools.product(benchmark.ROWS, ((2, 4), (4, 8), (4, 16))):
        parallel = layout(name, ranks)
        layers = 2 * ranks if benchmark.CHUNKS.get(name) else ranks
        timeline = benchmark.play(name, ranks, count)
        for rank in range(ranks):
            stages = {each.stage for each in timeline.passes[rank]}
            assert stages == set(stages_of(rank, layers, parallel)), (name, rank)
            expected = live_micro_batches(rank, count, layers, parallel)
            # where the first stages keep their backward pass whole, weight gradients come with those of inputs
            slack = 1 if parallel.schedule in SPLIT else 0
            assert expected - slack <= timeline.live(rank) <= expected, (name, ranks, count, rank)


def test_idle_shares_follow_the_formulas() -> None:
    for ranks, count in ((2, 4), (4, 8), (4, 16)):
        assert benchmark.play("gpipe", ranks, count).idle == pytest.approx((ranks - 1) / (count + ranks - 1))
        assert benchmark.play("1f1b", ranks, count).idle == pytest.approx((ranks - 1) / (count + ranks - 1))
        for name in ("interleaved", "aiao"):
            assert benchmark.play(name, ranks, count).idle == pytest.approx((ranks - 1) / (2 * count + ranks - 1))
        assert benchmark.play("zbv", ranks, count).idle < benchmark.play("interleaved", ranks, count).idle


@pytest.mark.parametrize("schedule", ["zbv", "dualpipev"])
def test_a_v_has_both_ends_on_rank_0(schedule: str) -> None:
    parallel = ParallelConfig(pipeline_parallel=3, pipeline_schedule=schedule)
    model = ModelConfig(num_layers=12)
    specs = [stage_specs(model, parallel, rank) for rank in range(3)]
    assert [[list(spec.layers) for spec in held] for held in specs] == [
        [[0, 1], [10, 11]],
        [[2, 3], [8, 9]],
        [[4, 5], [6, 7]],
    ]
    assert [(spec.first, spec.last) for spec in specs[0]] == [(True, False), (False, True)]
    assert not any(spec.first or spec.last for held in specs[1:] for spec in held)


def test_uneven_stages_of_a_v_go_down_and_up() -> None:
    parallel = ParallelConfig(pipeline_parallel=2, pipeline_schedule="zbv", layers_per_stage=[1, 2, 3, 4])
    assert [list(layers) for layers in stage_layers(10, parallel)] == [[0], [1, 2], [3, 4, 5], [6, 7, 8, 9]]
    assert stages_of(0, 10, parallel) == [0, 3] and chunks_per_rank(10, parallel) == 2


def test_named_lists_have_the_published_sums_and_ramps() -> None:
    for name, count, total in (("example-config-1", 16, 64), ("example-config-2", 24, 96)):
        sizes = MANUAL_SIZES[name]
        assert (len(sizes), sum(sizes), max(sizes)) == (count, total, 5)
        top = sizes.index(5)
        assert sorted(set(sizes[:top])) == [1, 2, 3, 4] and sizes[:top] == sorted(sizes[:top])
        rest = sizes[top:]
        assert rest == sorted(rest, reverse=True)


def test_lists_are_read_or_refused() -> None:
    assert micro_batch_sizes(ParallelConfig()) is None
    assert micro_batch_sizes(ParallelConfig(manual_mbs="1, 2,3")) == [1, 2, 3]
    for bad in ("1,0", "a", "1;2", ""):
        with pytest.raises(ModelLinkError, match="example-config-1"):
            micro_batch_sizes(ParallelConfig(manual_mbs=bad))


RUN = "--model tiny-llama --seq-length 64 --micro-batch-size 2 --train-iters 4 --lr 1e-3 --mock-data".split()
CHUNKS = "--pipeline-model-parallel-size 2 --num-layers-per-virtual-pipeline-stage 1 --global-batch-size 8".split()


def test_schedules_without_a_pipeline_say_that_they_change_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("WORLD_SIZE", "1")
    warnings = load_config([*RUN, "--pipeline-schedule", "zbv", "--fold-mode", "none"]).warnings
    assert [w for w in warnings if "zbv" in w and "no effect" in w]


@pytest.mark.parametrize(
    "words", ["--fold-mode aiao aiao", "--foldx-mode fifo interleaved", "--fold-mode none interleaved"]
)
def test_fold_modes_are_schedules(monkeypatch: pytest.MonkeyPatch, words: str) -> None:
    monkeypatch.setenv("WORLD_SIZE", "2")
    flag, value, schedule = words.split()
    assert load_config([*RUN, *CHUNKS, flag, value]).config.parallel.schedule == schedule
