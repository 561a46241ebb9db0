"""AdamW with float32-exact masters, kept separately or as "bfloat16 weight plus 16 bits".

`--reuse-fp32-param` selects the second form. What it stores, why it cannot use torch's own rounding, and why the two
forms give the same bits is told on top of modellink/optim/rounding.py. The update itself is torch's functional AdamW,
the fused kernel where the device has one, so a float32 run has the bits of `torch.optim.AdamW(fused=True)`. In bytes a
parameter (weights + gradients + masters + moments):

    float32                                    4 + 4 + 0 + 8 = 16
    bfloat16, float32 gradients, separate      2 + 4 + 4 + 8 = 18
    bfloat16, bfloat16 gradients, separate     2 + 2 + 4 + 8 = 16
    bfloat16, bfloat16 gradients, split        2 + 2 + 2 + 8 = 14

With 8-bit moments (modellink/optim/states.py tells how) the last term is 2.03 instead of 8.
"""

from __future__ import annotations

import functools
from collections.abc import Iterable, Mapping
from functools import partial
from typing import Unpack

import torch
from torch import Tensor, nn
from torch.optim.adamw import adamw

from modellink.optim.mixed_precision import MixedPrecisionOptimizer, OptimizerOptions
from modellink.optim.states import BlockState, FullState, StateForm

# Tensors with fewer elements keep float32 moments: they are few, and norms and biases suffer most (as bitsandbytes).
EIGHT_BIT_ELEMENTS = 4096


class AdamWRule:
    """Decoupled weight decay (Loshchilov & Hutter 2019) with bias correction from one step count for all parameters."""

    whole_shards = False

    def __init__(self, betas: tuple[float, float], eps: float, eight_bits: bool = False) -> None:
        self.betas = betas
        self.eps = eps
        self.states: Mapping[str, StateForm] = {"exp_avg": FullState, "exp_avg_sq": FullState}
        if eight_bits:
            self.states = {"exp_avg": partial(BlockState, signed=True), "exp_avg_sq": partial(BlockState, signed=False)}

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
        fused = _has_fused_kernel(weights[0].device)
        # the unfused code reads the step on the host, so there it must not live on the device
        device = weights[0].device if fused else torch.device("cpu")
        steps = torch.full((len(weights),), step - 1, dtype=torch.float32, device=device)
        adamw(
            weights,
            grads,
            states[0],
            states[1],
            [],
            list(steps.unbind()),
            foreach=not fused,
            fused=fused,
            amsgrad=False,
            beta1=self.betas[0],
            beta2=self.betas[1],
            lr=lr,
            weight_decay=weight_decay,
            eps=self.eps,
            maximize=False,
        )


@functools.cache
def _has_fused_kernel(device: torch.device) -> bool:
    """Whether torch's fused AdamW runs on `device`, found by running it on one element."""
    weight = torch.zeros(1, device=device, requires_grad=True)
    weight.grad = torch.zeros_like(weight)
    try:
        torch.optim.AdamW([weight], fused=True).step()
    except RuntimeError:
        return False
    return True


class MixedPrecisionAdamW(MixedPrecisionOptimizer):
    """AdamW over named parameters; see MixedPrecisionOptimizer for masters, groups, sharding, state and errors.

    `eight_bits` keeps both moments of every parameter of at least 4096 elements in 8 bits.
    """

    def __init__(
        self,
        named_params: Iterable[tuple[str, nn.Parameter]],
        *,
        betas: tuple[float, float] = (0.9, 0.999),
        eps: float = 1e-8,
        weight_decay: float = 0.01,
        eight_bits: bool = False,
        **options: Unpack[OptimizerOptions],
    ) -> None:
        rule, packed = AdamWRule(betas, eps), AdamWRule(betas, eps, eight_bits=True)
        super().__init__(
            named_params,
            rule,
            weight_decay=weight_decay,
            # by the size of the whole parameter, so that every layout decides alike
            rule_for=lambda _, p: packed if eight_bits and p.numel() >= EIGHT_BIT_ELEMENTS else rule,
            **options,
        )
