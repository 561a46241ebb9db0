"""What optimizers and norms need to know about a parameter's shard.

A parameter is either a plain tensor or a DTensor. Everything in `modellink.optim` computes on local shards, which are
plain tensors and may be empty, and wraps its own state as DTensors of the parameter's mesh and placements, so that
`torch.distributed.checkpoint` can save them and load them into another layout.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor
from torch.distributed.tensor._dtensor_spec import DTensorSpec, TensorMeta


def local_tensor(tensor: Tensor) -> Tensor:
    """This rank's shard of `tensor` (the tensor itself when it is plain), detached, sharing storage."""
    # under no_grad, to_local() hands out the shard itself instead of a differentiable view of it
    with torch.no_grad():
        return (tensor.to_local() if isinstance(tensor, DTensor) else tensor).detach()


def shard_count(tensor: Tensor) -> int:
    """Into how many shards `tensor` is cut; 1 when it is plain."""
    if not isinstance(tensor, DTensor):
        return 1
    cut = [not place.is_replicate() for place in tensor.placements]
    return math.prod(size for size, is_cut in zip(tensor.device_mesh.shape, cut, strict=True) if is_cut)


def gradient_of(param: Tensor) -> Tensor | None:
    """The accumulated gradient: `param.main_grad` (float32 accumulation) when set, else `param.grad`."""
    buffer = main_gradient_of(param)
    return param.grad if buffer is None else buffer


def main_gradient_of(param: Tensor) -> Tensor | None:
    """The float32 buffer `param.main_grad` into which a trainer accumulates, if there is one."""
    return getattr(param, "main_grad", None)


def set_gradient(param: nn.Parameter, grad: Tensor) -> None:
    """Replace what `gradient_of` returns."""
    if main_gradient_of(param) is not None:
        param.main_grad = grad  # type: ignore[attr-defined]
    else:
        param.grad = grad


def drop_gradient(param: Tensor) -> None:
    """Forget `param.grad` and `param.main_grad`."""
    param.grad = None
    if main_gradient_of(param) is not None:
        param.main_grad = None  # type: ignore[attr-defined]


def like_parameter(param: Tensor, local: Tensor) -> Tensor:
    """Wrap `local`, shaped as the local shard of `param`, with the mesh and placements of `param`; any dtype, and any
    device: `DTensor.from_local` would move it to that of the mesh."""
    if not isinstance(param, DTensor):
        return local
    meta = TensorMeta(param.shape, param.stride(), local.dtype)
    return DTensor(local, DTensorSpec(param.device_mesh, param.placements, tensor_meta=meta), requires_grad=False)
