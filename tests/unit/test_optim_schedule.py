"""Learning-rate and weight-decay curves against closed formulas in float64, and the rules of loading one."""

import math

import pytest

from modellink.errors import ModelLinkError
from modellink.optim.schedule import ParameterSchedule, schedule_lengths

LR, FLOOR, INIT, WARMUP, DECAY = 3e-4, 3e-5, 1e-6, 200, 1000


def schedule(**changes) -> ParameterSchedule:
    values = {"max_lr": LR, "min_lr": FLOOR, "lr_warmup_steps": WARMUP, "lr_warmup_init": INIT, "lr_decay_steps": DECAY}
    return ParameterSchedule(**{**values, **changes})


def ratio(n: int) -> float:
    return (n - WARMUP) / (DECAY - WARMUP)


DECAYS = {
    "constant": lambda n: LR,
    "linear": lambda n: LR - (LR - FLOOR) * ratio(n),
    "cosine": lambda n: FLOOR + (LR - FLOOR) * math.cos(math.pi * ratio(n) / 2) ** 2,
    "inverse-square-root": lambda n: max(FLOOR, LR * (WARMUP / n) ** 0.5),
}


@pytest.mark.parametrize("style", DECAYS)
def test_learning_rate_curve(style: str):
    curve = schedule(lr_decay_style=style)
    for n in range(0, WARMUP + 1):
        assert curve.learning_rate(n) == pytest.approx(INIT + (LR - INIT) * n / WARMUP, rel=1e-14)
    for n in range(WARMUP + 1, DECAY + 1):
        assert curve.learning_rate(n) == pytest.approx(DECAYS[style](n), rel=1e-12)
    after = LR if style == "constant" else FLOOR
    assert [curve.learning_rate(n) for n in (DECAY + 1, 10 * DECAY)] == [after, after]


def test_floor_holds_for_inverse_square_root():
    curve = schedule(lr_decay_style="inverse-square-root", min_lr=2e-4)
    assert curve.learning_rate(449) > 2e-4
    assert {curve.learning_rate(n) for n in (451, 800, 1000, 1001)} == {2e-4}


def test_no_warmup_starts_at_the_full_rate():
    assert schedule(lr_warmup_steps=0).learning_rate(0) == LR
    assert schedule(lr_warmup_steps=0, lr_decay_style="inverse-square-root").learning_rate(0) == LR
    assert schedule(lr_warmup_init=0.0).learning_rate(0) == 0.0


@pytest.mark.parametrize(("style", "at_quarter"), [("linear", 0.25), ("cosine", (1 - math.cos(math.pi / 4)) / 2)])
def test_weight_decay_curve(style: str, at_quarter: float):
    curve = schedule(start_wd=0.02, end_wd=0.1, wd_incr_steps=400, wd_incr_style=style)
    assert curve.weight_decay(0) == pytest.approx(0.02, rel=1e-14)
    assert curve.weight_decay(100) == pytest.approx(0.02 + 0.08 * at_quarter, rel=1e-14)
    assert curve.weight_decay(200) == pytest.approx(0.06, rel=1e-14)
    assert [curve.weight_decay(n) for n in (400, 401, 10_000)] == [0.1] * 3
    assert schedule(start_wd=0.1, end_wd=0.1).weight_decay(7) == 0.1


def test_groups_follow_and_iteration_one_runs_at_zero_samples():
    groups = [
        {"weight_decay_multiplier": 1.0, "decoupled_lr": False},
        {"weight_decay_multiplier": 0.0, "decoupled_lr": False},
        {"weight_decay_multiplier": 1.0, "decoupled_lr": True},
    ]
    curve = schedule(start_wd=0.1, end_wd=0.1, decoupled_lr=2 * LR, lr_decay_style="linear")
    curve.apply(groups)
    assert [g["lr"] for g in groups] == [INIT] * 3
    assert [g["weight_decay"] for g in groups] == [0.1, 0.0, 0.1]
    curve.step(WARMUP, groups)
    assert [g["lr"] for g in groups] == [LR, LR, 2 * LR]
    curve.step(10 * DECAY, groups)
    assert [g["lr"] for g in groups] == [FLOOR] * 3
    assert schedule(decoupled_lr=2 * LR, decoupled_min_lr=1e-9).learning_rate(2 * DECAY, decoupled=True) == 1e-9


def test_state_has_megatron_keys_and_resumes():
    curve = schedule()
    curve.step(345)
    state = curve.state_dict()
    assert set(state) == {
        "max_lr", "lr_warmup_steps", "num_steps", "lr_decay_style", "lr_decay_steps", "min_lr",
        "start_wd", "end_wd", "wd_incr_style", "wd_incr_steps",
    }  # fmt: skip
    again = schedule()
    again.load_state_dict(state)
    assert again.num_steps == 345
    assert again.state_dict() == state


def test_loading_a_different_schedule():
    saved = schedule(max_lr=1e-3, lr_decay_style="cosine")
    saved.step(50)
    with pytest.raises(ModelLinkError, match=r"max_lr is 0\.0003, was 0\.001, lr_decay_style is linear, was cosine"):
        schedule().load_state_dict(saved.state_dict())
    keep = schedule(override=True)
    keep.load_state_dict(saved.state_dict())
    assert (keep.max_lr, keep.lr_decay_style, keep.num_steps) == (LR, "linear", 50)
    take = schedule(use_checkpoint=True)
    take.load_state_dict(saved.state_dict())
    assert (take.max_lr, take.lr_decay_style, take.num_steps) == (1e-3, "cosine", 50)


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"lr_decay_style": "cosin"}, "Did you mean 'cosine'"),
        ({"wd_incr_style": "exponential"}, "weight-decay-incr-style"),
        ({"min_lr": 1.0}, "--min-lr"),
        ({"lr_warmup_steps": DECAY}, "shorter than decay"),
        ({"lr_warmup_init": 1.0}, "--lr-warmup-init"),
        ({"start_wd": 0.2, "end_wd": 0.1}, "--start-weight-decay"),
        ({"start_wd": 0.0, "end_wd": 0.1}, "constant needs equal"),
        ({"override": True, "use_checkpoint": True}, "exclude each other"),
    ],
)
def test_errors(changes, words):
    with pytest.raises(ModelLinkError, match=words):
        schedule(**changes)


def test_lengths_from_flags():
    assert schedule_lengths(8000, 16) == (8000, 0)
    assert schedule_lengths(8000, 16, decay_iters=100, warmup_iters=10) == (1600, 160)
    assert schedule_lengths(8000, 16, decay_samples=5000, warmup_samples=50) == (5000, 50)
    assert schedule_lengths(8000, 16, decay_iters=100, warmup_fraction=0.01) == (1600, 16.0)
    with pytest.raises(ModelLinkError, match="both given"):
        schedule_lengths(8000, 16, decay_iters=1, decay_samples=1)
    with pytest.raises(ModelLinkError, match="exclude each other"):
        schedule_lengths(8000, 16, warmup_iters=1, warmup_fraction=0.1)
