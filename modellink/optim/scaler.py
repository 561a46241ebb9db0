"""Loss scaling for float16, with Megatron's rules.

The loss is multiplied by `scale` before the backward pass, so that small gradients survive float16; the optimizer
multiplies them by `inverse`. A dynamic scale starts high, is halved when gradients overflow (that step is skipped) and
doubled after a window of good steps. bfloat16 and float32 use a constant scale of 1.
"""

from __future__ import annotations

from collections.abc import Mapping

from modellink.errors import ModelLinkError


class LossScaler:
    """`constant` fixes the scale; None makes it dynamic.

    Dynamic: every overflow uses up one unit of `hysteresis`, and once none is left each overflow halves the scale
    (never below `minimum`); `window` good steps in a row double the scale and give the hysteresis back (spec e.2).
    """

    def __init__(
        self,
        constant: float | None = None,
        *,
        initial: float = 2.0**32,
        minimum: float = 1.0,
        window: int = 1000,
        hysteresis: int = 2,
    ) -> None:
        for name, value in (("loss-scale", constant), ("initial-loss-scale", initial), ("min-loss-scale", minimum)):
            if value is not None and not value > 0:
                raise ModelLinkError(f"--{name} is {value} but must be above 0; leave it out for the default.")
        if initial < minimum:
            raise ModelLinkError(
                f"--initial-loss-scale {initial} is below --min-loss-scale {minimum}; raise the one or lower the other."
            )
        if window < 1 or hysteresis < 1:
            raise ModelLinkError(
                f"--loss-scale-window {window} and --hysteresis {hysteresis} must be at least 1; "
                "leave them out for the defaults."
            )
        self.dynamic = constant is None
        self.scale = float(initial if constant is None else constant)
        self.minimum = minimum
        self.window = window
        self.hysteresis = hysteresis
        self._good_steps = 0
        self._tolerance = hysteresis

    @property
    def inverse(self) -> float:
        return 1.0 / self.scale

    def update(self, found_inf: bool) -> None:
        """Adapt the scale after a step whose gradients had (`found_inf`) or had not an inf or NaN on any rank."""
        if not self.dynamic:
            return
        if found_inf:
            self._good_steps = 0
            self._tolerance -= 1
            if self._tolerance <= 0:
                self.scale = max(self.scale / 2, self.minimum)
            return
        self._good_steps += 1
        if self._good_steps == self.window:
            self._good_steps = 0
            self._tolerance = self.hysteresis
            self.scale *= 2

    def state_dict(self) -> dict[str, float | int]:
        """Empty for a constant scale; else Megatron's `grad_scaler` keys."""
        if not self.dynamic:
            return {}
        return {"scale": self.scale, "growth_tracker": self._good_steps, "hysteresis_tracker": self._tolerance}

    def load_state_dict(self, state: Mapping[str, float | int]) -> None:
        """Continue from `state`; a constant scale stays what it is, and an empty state changes nothing."""
        if self.dynamic and state:
            self.scale = float(state["scale"])
            self._good_steps = int(state["growth_tracker"])
            self._tolerance = int(state["hysteresis_tracker"])
