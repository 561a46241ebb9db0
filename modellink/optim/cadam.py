"""cadam: steps by the sign of one momentum, which is kept as fp16 with a scale per row; no second moment.

    momentum = beta * momentum + (1 - beta) * gradient
    weight   = weight * (1 - lr * weight_decay) - lr * sign(momentum)

This is sign descent with momentum (signSGD, Bernstein et al. 2018; Lion, Chen et al. 2023, with one beta). Every
element moves by lr at each step, where AdamW moves by less, so lr is to be 3 to 10 times lower than AdamW's, and
weight_decay, which multiplies it, higher by the same factor. An element whose momentum is exactly zero rests.

In bytes a parameter (weights + gradients + masters + momentum; scales are 4 bytes a row):

    float32                                    4 + 4 + 0 + 2 = 10
    bfloat16, float32 gradients, separate      2 + 4 + 4 + 2 = 12
    bfloat16, float32 gradients, split         2 + 4 + 2 + 2 = 10
    bfloat16, bfloat16 gradients, split        2 + 2 + 2 + 2 = 8
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Unpack

import torch
from torch import Tensor, nn

from modellink.optim.mixed_precision import MixedPrecisionOptimizer, OptimizerOptions
from modellink.optim.states import RowScaledState, StateForm


class CAdamRule:
    """The formula on top of this module, in float32; the sign is that of the momentum before it is rounded to fp16."""

    states: Mapping[str, StateForm] = {"momentum": RowScaledState}
    whole_shards = False

    def __init__(self, beta: float) -> None:
        self.beta = beta

    def __call__(
        self,
        weights: list[Tensor],
        grads: list[Tensor],
        states: list[list[Tensor]],
        params: list[Tensor],
        *,
        step: int,
        lr: float,
        weight_decay: float,
    ) -> None:
        (momenta,) = states
        torch._foreach_lerp_(momenta, grads, 1 - self.beta)
        torch._foreach_mul_(weights, 1 - lr * weight_decay)
        torch._foreach_sub_(weights, torch._foreach_sign(momenta), alpha=lr)


class MixedPrecisionCAdam(MixedPrecisionOptimizer):
    """cadam over named parameters; see MixedPrecisionOptimizer for masters, groups, sharding, state and errors."""

    def __init__(
        self,
        named_params: Iterable[tuple[str, nn.Parameter]],
        *,
        beta: float = 0.9,
        weight_decay: float = 0.01,
        **options: Unpack[OptimizerOptions],
    ) -> None:
        super().__init__(
            named_params,
            CAdamRule(beta),
            weight_decay=weight_decay,
            **options,
        )
