"""Activation recomputation: what is dropped in forward and rebuilt in backward (Chen et al., arXiv:1604.06174)."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

from torch import Tensor
from torch.utils.checkpoint import checkpoint

from modellink.config.schema import ParallelConfig
from modellink.models.decoder import Decoder, LayerCall, run_layers_plainly

_recompute = partial(checkpoint, use_reentrant=False)


def _run_groups(layers: list[LayerCall], x_BSD: Tensor, size: int) -> Tensor:
    """uniform: every `size` layers form one group that keeps only its input."""
    for start in range(0, len(layers), size):
        x_BSD = _recompute(run_layers_plainly, layers[start : start + size], x_BSD)
    return x_BSD


def _run_block(layers: list[LayerCall], x_BSD: Tensor, count: int) -> Tensor:
    """block: the first `count` layers of the stage are recomputed one by one, the others keep everything."""
    for layer in layers[:count]:
        x_BSD = _recompute(layer, x_BSD)
    return run_layers_plainly(layers[count:], x_BSD)


class RecomputedCall:
    """A module's forward that keeps only its inputs; plain when no gradient is wanted."""

    def __init__(self, forward: Callable[..., Tensor]) -> None:
        self.forward = forward

    def __call__(self, *inputs: Any) -> Tensor:
        return _recompute(self.forward, *inputs)


def apply_recompute(model: Decoder, parallel: ParallelConfig) -> None:
    """Set up what `parallel` asks for; nothing otherwise."""
    if parallel.recompute_granularity == "selective":
        layers: Any = model.layers.values()
        for layer in layers:
            attention = layer.self_attn
            attention.run_core = RecomputedCall(attention.run_core or attention.core)
    elif parallel.recompute_granularity == "full":
        count = parallel.recompute_num_layers
        if parallel.recompute_method == "block":
            model.run_layers = partial(_run_block, count=len(model.layers) if count is None else count)
        else:
            model.run_layers = partial(_run_groups, size=count or 1)
