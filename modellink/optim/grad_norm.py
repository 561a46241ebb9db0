"""Sums over all gradients of a sharded model: the global L2 norm, counts of zeros, a check for inf and NaN.

Every parameter counts once. A rank sums over its local shards; a shard is one part of a parameter along the mesh axes
with a Shard placement, and a copy along those with Replicate, so sums are all-reduced over exactly the sharded axes.
Pipeline stages hold different parameters, so their sums are added too; a parameter held by two stages (tied embeddings)
is skipped on one of them by name. There is one collective per process group, whatever the number of parameters, and no
synchronisation with the host. All ranks must call with the same parameters of their stage.
"""

from __future__ import annotations

from collections.abc import Callable, Container, Iterable
from dataclasses import dataclass, field

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.tensor import DeviceMesh, DTensor, Partial, Placement, Replicate

from modellink.optim.local import gradient_of, like_parameter, local_tensor, set_gradient

NamedParameters = Iterable[tuple[str, nn.Parameter]]

# CPU kernels add naively in the accumulation type: float32 is off by 0.2 % at 32M elements. Rows this short lose
# nothing, and their sums are added in float64; float64 throughout takes four times as long. Other devices add in trees,
# and their collective libraries need not know float64.
_CPU_ROW = 1 << 7


@dataclass
class _Shards:
    """Local shards that are sharded over the same process groups."""

    groups: dict[str, dist.ProcessGroup]
    tensors: list[Tensor] = field(default_factory=list)


def _accumulation_dtype(device: torch.device) -> torch.dtype:
    return torch.float64 if device.type == "cpu" else torch.float32


def _square_sum(tensors: list[Tensor]) -> Tensor:
    if _accumulation_dtype(tensors[0].device) == torch.float32:
        return torch.stack(list(torch._foreach_norm(tensors, 2, dtype=torch.float32))).square().sum()
    total = _row_square_sum(tensors, torch.float32)
    # squares of large but finite values overflow float32; float64 holds them all
    return total if total.isfinite() else _row_square_sum(tensors, torch.float64)


def _row_square_sum(tensors: list[Tensor], dtype: torch.dtype) -> Tensor:
    """float64 sum of squares; `dtype` is that of the sums over rows."""
    norms = []
    for flat in (tensor.reshape(-1) for tensor in tensors):
        whole = flat.numel() // _CPU_ROW * _CPU_ROW
        for rows in (flat[:whole].view(-1, _CPU_ROW), flat[whole:].unsqueeze(0)):
            if rows.numel():
                wide = torch.promote_types(rows.dtype, dtype)
                norms.append(torch.linalg.vector_norm(rows, dim=1, dtype=wide).double())
    return torch.cat(norms).square().sum()


def _zero_count(tensors: list[Tensor]) -> Tensor:
    numel = sum(tensor.numel() for tensor in tensors)
    return numel - torch.stack([torch.count_nonzero(tensor) for tensor in tensors]).sum()


def _non_finite_count(tensors: list[Tensor]) -> Tensor:
    if _accumulation_dtype(tensors[0].device) == torch.float64:
        # it is finite exactly when all values are, and the infinity norm is slower on CPU
        return _square_sum(tensors).isfinite().logical_not()
    largest = torch._foreach_norm(tensors, float("inf"))
    return torch.stack([value.isfinite().logical_not() for value in largest]).sum()


def _sharding_groups(tensor: Tensor) -> dict[str, dist.ProcessGroup]:
    """Process groups, by name, over which `tensor` is cut into parts."""
    groups: dict[str, dist.ProcessGroup] = {}
    if isinstance(tensor, DTensor):
        mesh = tensor.device_mesh
        for dim, placement in enumerate(tensor.placements):
            if placement.is_partial():
                raise ValueError("a gradient is a partial sum; call finalize_partial_grads before taking its norm")
            if mesh.size(dim) > 1 and not placement.is_replicate():
                group = mesh.get_group(dim)
                groups[group.group_name] = group
    return groups


def _global_sum(
    named_params: NamedParameters,
    pick: Callable[[Tensor], Tensor | None],
    local_sum: Callable[[list[Tensor]], Tensor],
    dtype: torch.dtype | None,
    pipeline_group: dist.ProcessGroup | None,
    skip_names: Container[str],
) -> Tensor:
    """Add `local_sum` of `pick(param)` over all parts of all parameters; `dtype` None: that of accumulation."""
    device = torch.device("cpu")
    shards: dict[tuple[str, ...], _Shards] = {}
    for name, param in named_params:
        device = param.device
        tensor = pick(param)
        if tensor is None or name in skip_names:
            continue
        groups = _sharding_groups(tensor)
        entry = shards.setdefault(tuple(sorted(groups)), _Shards(groups))
        local = local_tensor(tensor)
        if local.numel():
            entry.tensors.append(local)
    dtype = dtype or _accumulation_dtype(device)
    zero = torch.zeros((), dtype=dtype, device=device)
    sums = {key: local_sum(entry.tensors).to(dtype) if entry.tensors else zero for key, entry in shards.items()}
    every_group = {name: group for entry in shards.values() for name, group in entry.groups.items()}
    for name, group in every_group.items():
        keys = [key for key in sums if name in key]
        packed = torch.stack([sums[key] for key in keys])
        dist.all_reduce(packed, group=group)
        sums.update(zip(keys, packed.unbind(), strict=True))
    total = torch.stack([zero, *sums.values()]).sum()
    if pipeline_group is not None:
        dist.all_reduce(total, group=pipeline_group)
    return total


@torch.no_grad()
def global_grad_norm(
    named_params: NamedParameters,
    *,
    pipeline_group: dist.ProcessGroup | None = None,
    skip_names: Container[str] = (),
) -> Tensor:
    """L2 norm of all gradients (`main_grad` before `grad`), float32, 0-dimensional, on the parameters' device.

    `skip_names` are parameters of this stage that another stage counts. Raises ValueError on partial gradients.
    """
    total = _global_sum(named_params, gradient_of, _square_sum, None, pipeline_group, skip_names)
    return total.sqrt().float()


@torch.no_grad()
def global_params_norm(
    named_params: NamedParameters,
    *,
    pipeline_group: dist.ProcessGroup | None = None,
    skip_names: Container[str] = (),
) -> Tensor:
    """L2 norm of all parameters, as `global_grad_norm`."""
    total = _global_sum(named_params, lambda param: param, _square_sum, None, pipeline_group, skip_names)
    return total.sqrt().float()


@torch.no_grad()
def count_zeros(
    named_params: NamedParameters,
    *,
    pipeline_group: dist.ProcessGroup | None = None,
    skip_names: Container[str] = (),
) -> Tensor:
    """Number of gradient elements that are zero, int64, 0-dimensional."""
    return _global_sum(named_params, gradient_of, _zero_count, torch.int64, pipeline_group, skip_names)


@torch.no_grad()
def has_non_finite(named_params: NamedParameters, *, pipeline_group: dist.ProcessGroup | None = None) -> Tensor:
    """Whether any gradient anywhere holds an inf or NaN: bool, 0-dimensional, equal on all ranks."""
    return _global_sum(named_params, gradient_of, _non_finite_count, torch.int64, pipeline_group, ()) > 0


def clip_coefficient(norm: Tensor, clip: float) -> Tensor:
    """min(1, clip / (norm + 1e-6)) on the device of `norm` (spec e.2); the factor to scale gradients by."""
    return torch.clamp(clip / (norm + 1e-6), max=1.0)


def _is_plain_sum(have: Placement, want: Placement) -> bool:
    return type(have) is Partial and have.reduce_op == "sum" and isinstance(want, Replicate)


def _all_reduce_together(mesh: DeviceMesh, dims: tuple[int, ...], params: list[nn.Parameter]) -> None:
    """Sum partial gradients of one dtype over mesh axes `dims` in one buffer."""
    locals_ = [local_tensor(grad) for grad in map(gradient_of, params) if grad is not None]
    flat = torch.cat([local.reshape(-1) for local in locals_])
    for dim in dims:
        dist.all_reduce(flat, group=mesh.get_group(dim))
    for param, local, piece in zip(params, locals_, flat.split([t.numel() for t in locals_]), strict=True):
        set_gradient(param, like_parameter(param, piece.view(local.shape)))


@torch.no_grad()
def finalize_partial_grads(params: Iterable[nn.Parameter]) -> None:
    """Give every DTensor gradient the placements of its parameter.

    Sums pending over axes where the parameter is replicated (norm weights under sequence parallelism) are all-reduced
    together, one collective per axis and dtype; anything else goes through `DTensor.redistribute` on its own.
    """
    together: dict[tuple[DeviceMesh, tuple[int, ...], torch.dtype], list[nn.Parameter]] = {}
    for param in params:
        grad = gradient_of(param)
        if not isinstance(param, DTensor) or not isinstance(grad, DTensor) or grad.placements == param.placements:
            continue
        pairs = list(zip(grad.placements, param.placements, strict=True))
        dims = tuple(dim for dim, (have, want) in enumerate(pairs) if have != want)
        if grad.device_mesh == param.device_mesh and all(_is_plain_sum(*pairs[dim]) for dim in dims):
            together.setdefault((grad.device_mesh, dims, grad.dtype), []).append(param)
        else:
            set_gradient(param, grad.redistribute(placements=param.placements))
    for (mesh, dims, _), members in together.items():
        _all_reduce_together(mesh, dims, members)
