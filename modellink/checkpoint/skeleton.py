"""A decoder without values: its names, shapes and structure at no cost.

On the meta device nothing is allocated, but PyTorch still runs the initialisation of every parameter, and the first
random function on that device imports its compiler: more than a second before a conversion has begun. Here those calls
return at once.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor
from torch.overrides import TorchFunctionMode

from modellink.config.schema import ModelConfig
from modellink.models.decoder import Decoder

_RANDOM = (Tensor.normal_, Tensor.uniform_)
_KEPT = 16
_shapes: dict[str, dict[str, tuple[int, ...]]] = {}


class _NoInitialisation(TorchFunctionMode):
    def __torch_function__(
        self, func: Callable[..., Any], types: Any, args: tuple[Any, ...] = (), kwargs: Mapping[str, Any] | None = None
    ) -> Any:
        kwargs = kwargs or {}
        if func in _RANDOM or getattr(func, "__module__", None) == "torch.nn.init":
            return args[0] if args else kwargs["tensor"]
        return func(*args, **kwargs)


def skeleton(config: ModelConfig) -> Decoder:
    """The whole model on the meta device."""
    with _NoInitialisation(), torch.device("meta"):
        return Decoder(config)


def expected_shapes(config: ModelConfig) -> dict[str, tuple[int, ...]]:
    """Canonical name -> full shape of every parameter of the whole model (the vocabulary padded as `config` says)."""
    key = repr(config)
    if key not in _shapes:
        while len(_shapes) >= _KEPT:
            _shapes.pop(next(iter(_shapes)), None)
        _shapes[key] = {name: tuple(parameter.shape) for name, parameter in skeleton(config).named_parameters()}
    return dict(_shapes[key])
