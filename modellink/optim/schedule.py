"""Learning rate and weight decay as functions of the samples consumed so far (spec a.8, e.2).

Counting samples instead of steps keeps a curve the same when the batch size changes, also while it ramps up. The
trainer steps the schedule after the optimizer and only for steps that were not skipped, so iteration 1 runs at the rate
of 0 samples.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any, Literal

from modellink.errors import ModelLinkError
from modellink.registry import suggest

DecayStyle = Literal["constant", "linear", "cosine", "inverse-square-root"]
WeightDecayStyle = Literal["constant", "linear", "cosine"]
DECAY_STYLES: tuple[DecayStyle, ...] = ("constant", "linear", "cosine", "inverse-square-root")
WEIGHT_DECAY_STYLES: tuple[WeightDecayStyle, ...] = ("constant", "linear", "cosine")


@dataclass
class ParameterSchedule:
    """Rates in the optimizer's unit, lengths in samples; `num_steps` is the samples consumed.

    The rate rises linearly from `lr_warmup_init` to `max_lr` over `lr_warmup_steps`, then follows `lr_decay_style` down
    to `min_lr` at `lr_decay_steps` and stays there. Inverse square root is lr * sqrt(warm-up / n), never below
    `min_lr`. Weight decay goes from `start_wd` to `end_wd` over `wd_incr_steps`. Groups marked `decoupled_lr` use
    `decoupled_lr` and `decoupled_min_lr` (default: `min_lr`) instead. `lr_decay_steps` may be 0 for the constant style.

    Raises ModelLinkError for values that cannot make a schedule.
    """

    max_lr: float
    lr_decay_steps: int
    min_lr: float = 0.0
    lr_warmup_steps: float = 0
    lr_warmup_init: float = 0.0
    lr_decay_style: DecayStyle = "linear"
    start_wd: float = 0.01
    end_wd: float = 0.01
    wd_incr_steps: int = 0
    wd_incr_style: WeightDecayStyle = "constant"
    decoupled_lr: float | None = None
    decoupled_min_lr: float | None = None
    override: bool = False
    use_checkpoint: bool = False
    num_steps: int = 0

    def __post_init__(self) -> None:
        _check_style("lr-decay-style", self.lr_decay_style, DECAY_STYLES)
        _check_style("weight-decay-incr-style", self.wd_incr_style, WEIGHT_DECAY_STYLES)
        checks = [
            (0 <= self.min_lr <= self.max_lr, f"--min-lr {self.min_lr} must lie between 0 and --lr {self.max_lr}"),
            (0 <= self.lr_warmup_init <= self.max_lr, "--lr-warmup-init must lie between 0 and --lr"),
            (
                self.lr_decay_style == "constant" or 0 <= self.lr_warmup_steps < self.lr_decay_steps,
                f"warm-up ({self.lr_warmup_steps} samples) must be shorter than decay ({self.lr_decay_steps} samples);"
                " lower --lr-warmup-* or raise --lr-decay-*",
            ),
            (
                0 <= self.start_wd <= self.end_wd,
                "--start-weight-decay must not be below 0 or above --end-weight-decay",
            ),
            (
                self.wd_incr_style != "constant" or self.start_wd == self.end_wd,
                f"--weight-decay-incr-style constant needs equal --start-weight-decay and --end-weight-decay, not "
                f"{self.start_wd} and {self.end_wd}; choose linear or cosine",
            ),
            (
                not (self.override and self.use_checkpoint),
                "--override-opt_param-scheduler and --use-checkpoint-opt_param-scheduler exclude each other; keep one",
            ),
        ]
        for fine, message in checks:
            if not fine:
                raise ModelLinkError(f"{message}.")

    def learning_rate(self, samples: int, *, decoupled: bool = False) -> float:
        """The rate after `samples` samples, for ordinary or for decoupled groups."""
        max_lr, min_lr = self.max_lr, self.min_lr
        if decoupled and self.decoupled_lr is not None:
            max_lr = self.decoupled_lr
            min_lr = self.min_lr if self.decoupled_min_lr is None else self.decoupled_min_lr
        warmup = self.lr_warmup_steps
        if warmup > 0 and samples <= warmup:
            return self.lr_warmup_init + (max_lr - self.lr_warmup_init) * samples / warmup
        if self.lr_decay_style == "constant":
            return max_lr
        if samples > self.lr_decay_steps:
            return min_lr
        if self.lr_decay_style == "inverse-square-root":
            return max(min_lr, max_lr * math.sqrt(max(warmup, 1)) / math.sqrt(max(samples, 1)))
        ratio = (samples - warmup) / (self.lr_decay_steps - warmup)
        left = 1 - ratio if self.lr_decay_style == "linear" else (1 + math.cos(math.pi * ratio)) / 2
        return min_lr + left * (max_lr - min_lr)

    def weight_decay(self, samples: int) -> float:
        """The weight decay after `samples` samples."""
        if self.wd_incr_style == "constant" or samples >= self.wd_incr_steps:
            return self.end_wd
        ratio = samples / self.wd_incr_steps
        done = ratio if self.wd_incr_style == "linear" else (1 - math.cos(math.pi * ratio)) / 2
        return self.start_wd + done * (self.end_wd - self.start_wd)

    def apply(self, param_groups: Iterable[dict[str, Any]]) -> None:
        """Set `lr` and `weight_decay` of optimizer groups to their values at `num_steps`."""
        for group in param_groups:
            group["lr"] = self.learning_rate(self.num_steps, decoupled=group.get("decoupled_lr", False))
            group["weight_decay"] = self.weight_decay(self.num_steps) * group.get("weight_decay_multiplier", 1.0)

    def step(self, increment: int, param_groups: Iterable[dict[str, Any]] = ()) -> None:
        """Count `increment` more samples and set the groups; do not call it for a skipped step."""
        self.num_steps += increment
        self.apply(param_groups)

    def state_dict(self) -> dict[str, float | int | str]:
        """The keys of spec c.2, Megatron's `opt_param_scheduler`."""
        return {key: getattr(self, key) for key in (*_COMPARED, "num_steps")}

    def load_state_dict(self, state: Mapping[str, float | int | str]) -> None:
        """Continue from `state`: the sample count always, the shape of the schedule if both sides agree on it.

        With `override` this run's values stay, with `use_checkpoint` those of the checkpoint are taken; with neither, a
        difference raises ModelLinkError. Keys that an older checkpoint lacks keep this run's values.
        """
        taken = {key: state[key] for key in _COMPARED if key in state and state[key] != getattr(self, key)}
        if taken and not (self.override or self.use_checkpoint):
            differences = ", ".join(f"{key} is {getattr(self, key)}, was {value}" for key, value in taken.items())
            raise ModelLinkError(
                f"the schedule differs from the checkpoint's ({differences}); repeat the old flags, or pass "
                "--override-opt_param-scheduler to keep the new values or --use-checkpoint-opt_param-scheduler "
                "for the old."
            )
        if self.use_checkpoint:
            for key, value in taken.items():
                setattr(self, key, value)
            self.__post_init__()
        self.num_steps = int(state["num_steps"])


_COMPARED = (
    "max_lr",
    "lr_warmup_steps",
    "lr_decay_style",
    "lr_decay_steps",
    "min_lr",
    "start_wd",
    "end_wd",
    "wd_incr_style",
    "wd_incr_steps",
)


def _check_style(flag: str, value: str, known: tuple[str, ...]) -> None:
    if value not in known:
        raise ModelLinkError(f"--{flag} {value!r} is not one of {', '.join(known)}.{suggest(value, known)}")


def schedule_lengths(
    train_samples: int,
    global_batch_size: int,
    *,
    decay_iters: int | None = None,
    decay_samples: int | None = None,
    warmup_iters: int = 0,
    warmup_samples: int = 0,
    warmup_fraction: float | None = None,
) -> tuple[int, float]:
    """(decay, warm-up) in samples from the flags; decay defaults to the length of training.

    Iterations count as `global_batch_size` samples each. `warmup_fraction` multiplies the decay length. Raises
    ModelLinkError when one length is given twice.
    """
    if decay_iters is not None and decay_samples is not None:
        raise ModelLinkError("--lr-decay-iters and --lr-decay-samples are both given; keep one.")
    if sum((bool(warmup_iters), bool(warmup_samples), warmup_fraction is not None)) > 1:
        raise ModelLinkError("--lr-warmup-iters, -samples and -fraction exclude each other; keep one.")
    decay = train_samples if decay_iters is None else decay_iters * global_batch_size
    if decay_samples is not None:
        decay = decay_samples
    if warmup_fraction is not None:
        return decay, warmup_fraction * decay
    return decay, warmup_iters * global_batch_size + warmup_samples
