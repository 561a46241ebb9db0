"""The output matrix and the loss slice by slice, so that the logits of one slice of positions exist at a time.

    hidden [B, S, D] ──┬─ slice 0 ─▶ output matrix ─▶ loss ─▶ forget the logits ─┬─▶ losses [B, S]
                       ├─ slice 1 ─▶ ...                                         │
                       └─ slice N-1                                              ┘

Forward keeps the hidden states alone. Backward computes the logits of each slice again, one product more than whole
logits need, and adds up the gradient of the output matrix in fp32. Keeping that gradient from forward to backward
would save the product, and cost a matrix for every micro-batch under way in a pipeline; it would also fix in forward
how much each token counts. Legend: B batch, S sequence, s positions on this rank, D hidden, V vocabulary.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor

from modellink.models.decoder import Decoder


class SlicedLosses:
    """(decoder, hidden [B, s, D], labels int [B, S]) -> losses fp32 [B, S], for `Decoder.output_losses`.

    `token_losses` takes logits [B, n, V] and labels [B, n] and gives fp32 [B, n]. Where the sequence is sharded over
    tensor ranks (s < S), a slice holds the same positions of every rank's shard, which the output matrix gathers in
    the order of ranks. The last slice is shorter when `slices` does not divide s.
    """

    def __init__(self, token_losses: Callable[[Tensor, Tensor], Tensor], slices: int) -> None:
        self.token_losses, self.slices = token_losses, slices

    def __call__(self, decoder: Decoder, hidden_BSD: Tensor, labels_BS: Tensor) -> Tensor:
        return _Sliced.apply(hidden_BSD, labels_BS, decoder, self, *decoder.lm_head.parameters())

    def parts(self, hidden_BSD: Tensor, labels_BS: Tensor) -> Iterator[tuple[slice, Tensor, Tensor]]:
        """(positions, hidden, labels) of each slice."""
        local = hidden_BSD.shape[1]
        size = math.ceil(local / self.slices)
        for start in range(0, local, size):
            here = slice(start, min(start + size, local))
            yield here, hidden_BSD[:, here], by_rank(labels_BS, local)[:, :, here].flatten(1)


def by_rank(x_BS: Tensor, local: int) -> Tensor:
    """[B, S] -> [B, ranks that share the sequence, local positions], a view."""
    return x_BS.unflatten(1, (-1, local))


class _Sliced(torch.autograd.Function):
    """Parameters of the output matrix come as inputs only to have their gradients returned."""

    @staticmethod
    def forward(  # type: ignore[no-untyped-def]
        ctx, hidden_BSD: Tensor, labels_BS: Tensor, decoder: Decoder, sliced: SlicedLosses, *parameters: Tensor
    ) -> Tensor:
        ctx.save_for_backward(hidden_BSD, labels_BS)
        ctx.decoder, ctx.sliced = decoder, sliced
        losses_BS = torch.empty(labels_BS.shape, dtype=torch.float32, device=hidden_BSD.device)
        for here, hidden, labels in sliced.parts(hidden_BSD, labels_BS):
            losses = sliced.token_losses(decoder.project(hidden), labels)
            part = by_rank(losses_BS, hidden_BSD.shape[1])[:, :, here]
            part.copy_(losses.view(part.shape))
        return losses_BS

    @staticmethod
    def backward(ctx, grad_BS: Tensor) -> tuple[Any, ...]:  # type: ignore[no-untyped-def]
        hidden_BSD, labels_BS = ctx.saved_tensors
        # asked again: what was gathered in forward may since have been dropped and gathered anew
        parameters = list(ctx.decoder.lm_head.parameters())
        wanted = [place for place, parameter in enumerate(parameters) if parameter.requires_grad]
        sums: list[Any] = [None] * len(parameters)
        grad_hidden_BSD = torch.empty_like(hidden_BSD)
        for here, hidden, labels in ctx.sliced.parts(hidden_BSD, labels_BS):
            with torch.enable_grad():
                hidden = hidden.detach().requires_grad_()
                losses = ctx.sliced.token_losses(ctx.decoder.project(hidden), labels)
            weights = by_rank(grad_BS, hidden_BSD.shape[1])[:, :, here].flatten(1)
            inputs = [hidden, *(parameters[place] for place in wanted)]
            grad_hidden, *gradients = torch.autograd.grad(losses, inputs, weights)
            grad_hidden_BSD[:, here] = grad_hidden
            for place, gradient in zip(wanted, gradients, strict=True):
                wide = torch.promote_types(gradient.dtype, torch.float32)
                sums[place] = gradient.to(wide) if sums[place] is None else sums[place].add_(gradient)
            del losses, gradients
        for place in wanted:
            sums[place] = sums[place].to(parameters[place].dtype)
        return grad_hidden_BSD, None, None, None, *sums
