"""Trajectories of the float16 loss scale, worked out by hand from Megatron's rules."""

import pytest

from modellink.errors import ModelLinkError
from modellink.optim.scaler import LossScaler


def trajectory(scaler: LossScaler, overflows: str) -> list[float]:
    scales = []
    for letter in overflows:
        scaler.update(letter == "x")
        scales.append(scaler.scale)
    return scales


def test_defaults():
    scaler = LossScaler()
    assert (scaler.scale, scaler.minimum, scaler.window, scaler.hysteresis) == (2.0**32, 1.0, 1000, 2)
    assert scaler.inverse == 2.0**-32


def test_hysteresis_absorbs_the_first_overflow_only():
    # the second and every later overflow halves: the tolerance comes back after a full window, not after one good step
    assert trajectory(LossScaler(initial=16, window=3), "x.x.x") == [16, 16, 8, 8, 4]


def test_growth_after_a_window_gives_tolerance_back():
    assert trajectory(LossScaler(initial=16, window=3), "xx...x.x") == [16, 8, 8, 8, 16, 16, 16, 8]


def test_an_overflow_restarts_the_window():
    assert trajectory(LossScaler(initial=4, window=3), "..x..." + "...") == [4, 4, 4, 4, 4, 8, 8, 8, 16]


def test_minimum():
    assert trajectory(LossScaler(initial=4, minimum=2, hysteresis=1), "xxxx") == [2, 2, 2, 2]


def test_constant_never_moves():
    scaler = LossScaler(128)
    assert trajectory(scaler, "xxxx" + "." * 2000) == [128] * 2004
    assert scaler.state_dict() == {}


def test_resume_continues_the_trajectory():
    overflows = "x..x....x.....xx...x"
    straight = trajectory(LossScaler(initial=64, window=3), overflows)
    first = LossScaler(initial=64, window=3)
    begun = trajectory(first, overflows[:9])
    second = LossScaler(initial=2, window=3)
    second.load_state_dict(first.state_dict())
    assert begun + trajectory(second, overflows[9:]) == straight
    assert set(first.state_dict()) == {"scale", "growth_tracker", "hysteresis_tracker"}


@pytest.mark.parametrize(
    "options",
    [{"constant": 0.0}, {"constant": -1.0}, {"initial": 1.0, "minimum": 2.0}, {"window": 0}, {"hysteresis": 0}],
)
def test_errors_name_the_flag(options):
    with pytest.raises(ModelLinkError, match=r"--(loss-scale|initial-loss-scale|hysteresis)"):
        LossScaler(**options)
