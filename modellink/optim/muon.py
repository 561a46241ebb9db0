"""Muon for the matrices of the layers, AdamW for everything else (Jordan et al. 2024).

    momentum = mu * momentum + (1 - mu) * gradient
    update   = orthogonal(mu * momentum + (1 - mu) * gradient)                     Nesterov's look ahead
    weight   = weight * (1 - lr * weight_decay) - lr * scale * sqrt(max(rows, columns)) * update

`orthogonal` replaces a matrix U S V^T by about U V^T: every direction of the update gets the same length, also those
that few examples ask for. It is five steps of a quintic Newton-Schulz iteration, which takes singular values from
(0, 1] to about [0.7, 1.2] with products of matrices only, so bfloat16 is enough for it. With scale = 0.2 an update has
the root mean square of AdamW's, hence one lr and weight_decay serve both (Liu et al., arXiv:2502.16982).

Which parameters. Two-dimensional weights inside layers, and each expert of stacked ones [E, rows, columns]. Embeddings,
the output matrix, biases, vectors and matrices of one row go to AdamW.

Sharded matrices. Orthogonalisation needs the whole matrix. Ranks keep and update their own shard of the momentum,
gather the look ahead over the axes that split the matrix, in the dtype of the iteration, all do the same iteration, and
each keeps its part. Weights are thus those of one process at any layout, for one gather of each split matrix a step
and a temporary copy of it. Experts of which a rank holds whole ones are not gathered.

In bytes a parameter of such a matrix (weights + gradients + masters + momentum): float32 4 + 4 + 0 + 4 = 12, bfloat16
with bfloat16 gradients and split masters 2 + 2 + 2 + 4 = 10.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from typing import Unpack

import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor

from modellink.optim.adamw import AdamWRule
from modellink.optim.local import like_parameter, local_tensor
from modellink.optim.mixed_precision import MixedPrecisionOptimizer, OptimizerOptions, is_bias_or_vector
from modellink.optim.states import FullState, StateForm
from modellink.parallel.shard import local_slice

# Jordan's quintic: the steepest at zero that still keeps every singular value within about 0.3 of 1
_QUINTIC = (3.4445, -4.7750, 2.0315)


def is_hidden_matrix(name: str, param: Tensor) -> bool:
    """Whether Muon updates this parameter: a matrix, or a stack of them, inside a layer."""
    inside = name.startswith("layers.") and not is_bias_or_vector(name, param)
    return inside and param.ndim in (2, 3) and min(param.shape[-2:]) > 1


def orthogonalise(matrix_RC: Tensor, steps: int) -> Tensor:
    """About U V^T of the matrix U S V^T, or of each in a stack [..., R, C]; computes in the dtype it is given."""
    tall = matrix_RC.shape[-2] > matrix_RC.shape[-1]
    x_RC = matrix_RC.mT if tall else matrix_RC
    x_RC = x_RC / x_RC.norm(dim=(-2, -1), keepdim=True).clamp(min=1e-7)
    a, b, c = _QUINTIC
    for _ in range(steps):
        gram_RR = x_RC @ x_RC.mT
        x_RC = a * x_RC + (b * gram_RR + c * gram_RR @ gram_RR) @ x_RC
    return x_RC.mT if tall else x_RC


class MuonRule:
    """The formula on top of this module; `dtype` is that of the iteration."""

    states: Mapping[str, StateForm] = {"momentum_buffer": FullState}
    whole_shards = True

    def __init__(self, momentum: float, steps: int, scale: float, dtype: torch.dtype) -> None:
        self.momentum, self.steps, self.scale, self.dtype = momentum, steps, scale, dtype

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
        for weight, grad, momentum, param in zip(weights, grads, momenta, params, strict=True):
            momentum.lerp_(grad, 1 - self.momentum)
            ahead = momentum.lerp(grad, 1 - self.momentum).to(self.dtype).view(local_tensor(param).shape)
            update = self._orthogonal(ahead, param).reshape(-1).to(weight.dtype)
            scale = self.scale * math.sqrt(max(param.shape[-2:]))
            weight.mul_(1 - lr * weight_decay).sub_(update, alpha=lr * scale)

    def _orthogonal(self, shard: Tensor, param: Tensor) -> Tensor:
        """This rank's part of the orthogonalised matrix of which `shard` is its part."""
        if not _splits_matrices(param):
            return orthogonalise(shard, self.steps) if shard.numel() else shard
        whole = like_parameter(param, shard)
        assert isinstance(whole, DTensor)
        return local_slice(orthogonalise(whole.full_tensor(), self.steps), param)


def _splits_matrices(param: Tensor) -> bool:
    """Whether ranks hold parts of a matrix, and not whole ones of a stack or all."""
    if not isinstance(param, DTensor):
        return False
    held_whole = [
        place.is_replicate() or size == 1 or (param.ndim == 3 and getattr(place, "dim", None) == 0)
        for place, size in zip(param.placements, param.device_mesh.shape, strict=True)
    ]
    return not all(held_whole)


class MixedPrecisionMuon(MixedPrecisionOptimizer):
    """Muon over hidden matrices and AdamW over the rest; see MixedPrecisionOptimizer for masters, groups, sharding,
    state and errors. All ranks that share a parameter must step together.
    """

    def __init__(
        self,
        named_params: Iterable[tuple[str, nn.Parameter]],
        *,
        momentum: float = 0.95,
        newton_schulz_steps: int = 5,
        scale: float = 0.2,
        dtype: torch.dtype = torch.bfloat16,
        betas: tuple[float, float] = (0.9, 0.999),
        eps: float = 1e-8,
        weight_decay: float = 0.01,
        **options: Unpack[OptimizerOptions],
    ) -> None:
        others, matrices = AdamWRule(betas, eps), MuonRule(momentum, newton_schulz_steps, scale, dtype)
        super().__init__(
            named_params,
            others,
            weight_decay=weight_decay,
            rule_for=lambda name, param: matrices if is_hidden_matrix(name, param) else others,
            **options,
        )
