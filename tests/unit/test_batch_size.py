"""Batch sizes, constant and ramping, against a step-by-step count."""

import pytest

from modellink.errors import ModelLinkError
from modellink.train.batch_size import BatchSizeSchedule

RAMP = BatchSizeSchedule(32, 2, 2, rampup=(8, 8, 300))


def test_constant():
    sizes = BatchSizeSchedule(32, 2, 4)
    assert [sizes.at(n) for n in (0, 1, 10**9)] == [32] * 3
    assert sizes.micro_batches(0) == 4
    assert (sizes.samples_for(10), sizes.iterations_for(335)) == (320, 10)


def test_ramp_rises_at_every_third_of_its_samples():
    wants = {0: 8, 99: 8, 100: 16, 199: 16, 200: 24, 299: 24, 300: 32, 10_000: 32}
    assert {n: RAMP.at(n) for n in wants} == wants
    assert [RAMP.micro_batches(n) for n in (0, 150, 250, 400)] == [2, 4, 6, 8]


def test_boundaries_that_floats_would_miss():
    # 3 increments over 10 samples: the boundaries 10/3 and 20/3 are no floats
    sizes = BatchSizeSchedule(4, 1, 1, rampup=(1, 1, 10))
    assert [sizes.at(n) for n in range(12)] == [1, 1, 1, 1, 2, 2, 2, 3, 3, 3, 4, 4]


@pytest.mark.parametrize("sizes", [RAMP, BatchSizeSchedule(4, 1, 1, rampup=(1, 1, 10)), BatchSizeSchedule(8, 2, 2)])
def test_totals_equal_a_loop(sizes: BatchSizeSchedule):
    consumed = [0]
    for _ in range(60):
        consumed.append(consumed[-1] + sizes.at(consumed[-1]))
    assert [sizes.samples_for(n) for n in range(61)] == consumed
    for samples in range(consumed[-1]):
        assert sizes.iterations_for(samples) == sum(total <= samples for total in consumed[1:])


def test_trivial_ramps_are_constant():
    assert BatchSizeSchedule(8, 2, 2, rampup=(8, 3, 100)).at(50) == 8
    assert BatchSizeSchedule(8, 2, 2, rampup=(4, 4, 0)).at(0) == 8


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ((30, 2, 4), r"--global-batch-size 30 is not a multiple of .* 2 \* .* 4 = 8; use 24 or 32"),
        ((4, 2, 4), r"= 8; use 8\."),
        ((0, 2, 4), "--global-batch-size 0 must be at least 1"),
        ((8, 0, 4), "--micro-batch-size 0 must be at least 1"),
        ((32, 2, 2, (8, 7, 100)), "32 - 8 is not a multiple of the increment 7"),
        ((32, 2, 2, (6, 2, 100)), "start 6 is not a multiple"),
        ((32, 2, 2, (8, 6, 100)), "increment 6 is not a multiple"),
        ((32, 2, 2, (64, 8, 100)), "start <= --global-batch-size 32"),
    ],
)
def test_errors(options, words):
    with pytest.raises(ModelLinkError, match=words):
        BatchSizeSchedule(*options)
