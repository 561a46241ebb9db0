"""SGD with momentum (`--optimizer sgd`) through the same masters, sharding and state as AdamW.

The update is torch's functional SGD; weight decay is the L2 term added to the gradient, as there.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Unpack

from torch import Tensor, nn
from torch.optim.sgd import sgd

from modellink.optim.mixed_precision import MixedPrecisionOptimizer, OptimizerOptions
from modellink.optim.states import FullState, StateForm


class SGDRule:
    """buffer = momentum * buffer + gradient; weight -= lr * buffer. A momentum of 0 keeps no buffer."""

    whole_shards = False

    def __init__(self, momentum: float) -> None:
        self.momentum = momentum
        self.states: Mapping[str, StateForm] = {"momentum_buffer": FullState} if momentum else {}

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
        buffers: list[Tensor | None] = list(states[0]) if states else [None] * len(weights)
        sgd(
            weights,
            grads,
            buffers,
            foreach=True,
            weight_decay=weight_decay,
            momentum=self.momentum,
            lr=lr,
            dampening=0.0,
            nesterov=False,
            maximize=False,
        )


class MixedPrecisionSGD(MixedPrecisionOptimizer):
    """SGD over named parameters; see MixedPrecisionOptimizer for masters, groups, sharding, state and errors."""

    def __init__(
        self,
        named_params: Iterable[tuple[str, nn.Parameter]],
        *,
        momentum: float = 0.9,
        weight_decay: float = 0.01,
        **options: Unpack[OptimizerOptions],
    ) -> None:
        super().__init__(
            named_params,
            SGDRule(momentum),
            weight_decay=weight_decay,
            **options,
        )
