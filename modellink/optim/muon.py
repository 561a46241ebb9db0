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

Sharded matrices. Orthogonalisation needs the whole matrix. Ranks keep and update their own shard of the momentum. The
look ahead of each split matrix is put together on one of the ranks that share it, in the dtype of the iteration, which
does the iteration and sends the parts back (modellink/optim/owners.py). Weights are thus those of one process at any
layout, every rank does its share of the work, and its shards travel twice a step. Experts of which a rank holds whole
ones stay where they are.

In bytes a parameter of such a matrix (weights + gradients + masters + momentum): float32 4 + 4 + 0 + 4 = 12, bfloat16
with bfloat16 gradients and split masters 2 + 2 + 2 + 4 = 10.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from typing import Unpack

import torch
from torch import Tensor, nn

from modellink.optim.adamw import AdamWRule
from modellink.optim.local import local_tensor
from modellink.optim.mixed_precision import MixedPrecisionOptimizer, OptimizerOptions, is_bias_or_vector
from modellink.optim.owners import Split, split_of, work_on_owners
from modellink.optim.states import FullState, StateForm

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
        self._splits: dict[int, Split | None] = {}  # by id: the optimizer keeps the parameters alive

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
        aheads = []
        for grad, momentum, param in zip(grads, momenta, params, strict=True):
            momentum.lerp_(grad, 1 - self.momentum)
            ahead = momentum.lerp(grad, 1 - self.momentum).to(self.dtype).view(local_tensor(param).shape)
            aheads.append(ahead.to(param.device))  # products belong there, also where states live in host memory
        updates = self._orthogonal(aheads, params)
        for weight, update, param in zip(weights, updates, params, strict=True):
            scale = self.scale * math.sqrt(max(param.shape[-2:]))
            weight.mul_(1 - lr * weight_decay).sub_(update.reshape(-1).to(weight), alpha=lr * scale)

    def _orthogonal(self, shards: list[Tensor], params: list[Tensor]) -> list[Tensor]:
        """This rank's parts of the orthogonalised matrices of which `shards` are its parts."""
        splits = [self._split(param) for param in params]
        shared = [index for index, split in enumerate(splits) if split is not None]
        made = work_on_owners([shards[i] for i in shared], [s for s in splits if s is not None], self._iterate)
        done = dict(zip(shared, made, strict=True))
        return [done[index] if index in done else self._iterate(shard) for index, shard in enumerate(shards)]

    def _iterate(self, matrix: Tensor) -> Tensor:
        return orthogonalise(matrix, self.steps) if matrix.numel() else matrix

    def _split(self, param: Tensor) -> Split | None:
        if id(param) not in self._splits:
            self._splits[id(param)] = split_of(param)
        return self._splits[id(param)]


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
