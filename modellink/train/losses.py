"""Token losses. Every loss is a *sum* over tokens; the trainer divides by the number of tokens in the global batch.

So the curve does not depend on how the batch is cut into micro-batches and ranks. Masked positions carry the label
`IGNORED`. Rows that only pad the vocabulary are no words: they have no share in any probability, so the numbers do not
depend on how far a layout pads, and are those of the exported model.
"""

from __future__ import annotations

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor

IGNORED = -100


class _VocabularyParallelCrossEntropy(torch.autograd.Function):
    """Cross entropy of logits split over the vocabulary: three small all-reduces instead of gathering [B, S, V].

    Forward keeps one fp32 copy of the local logits, turned in place into probabilities; backward turns it into the
    gradient.
    Source: Shoeybi et al. (arXiv:1909.08053), section 3.
    """

    @staticmethod
    def forward(ctx, logits_NV: Tensor, labels_N: Tensor, group: dist.ProcessGroup, vocab_size: int) -> Tensor:  # type: ignore[no-untyped-def]
        local = logits_NV.shape[-1]
        first = dist.get_rank(group) * local
        shifted = logits_NV.float() if logits_NV.dtype != torch.float32 else logits_NV.clone()
        shifted[:, max(vocab_size - first, 0) :] = -torch.inf
        largest = shifted.amax(-1)
        dist.all_reduce(largest, op=dist.ReduceOp.MAX, group=group)
        shifted -= largest[:, None]
        index = labels_N - first
        mine = (index >= 0) & (index < local)
        index = index.clamp(0, local - 1)
        target = shifted.gather(-1, index[:, None])[:, 0].where(mine, 0.0)
        total = shifted.exp_().sum(-1)
        both = torch.stack((target, total))
        dist.all_reduce(both, group=group)
        target, total = both
        probabilities = shifted.div_(total[:, None])
        valid = labels_N != IGNORED
        ctx.save_for_backward(probabilities, index, mine, valid)
        ctx.dtype = logits_NV.dtype
        return (total.log() - target) * valid

    @staticmethod
    def backward(ctx, grad_N: Tensor) -> tuple[Tensor, None, None, None]:  # type: ignore[no-untyped-def]
        probabilities, index, mine, valid = ctx.saved_tensors
        # out of place: a saved tensor may be needed again under a retained graph
        grad_NV = probabilities * (grad_N * valid)[:, None]
        grad_NV.scatter_add_(-1, index[:, None], -(grad_N * (mine & valid))[:, None])
        return grad_NV.to(ctx.dtype), None, None, None


def token_cross_entropy(
    logits_BSV: Tensor, labels_BS: Tensor, vocab_size: int, group: dist.ProcessGroup | None = None
) -> Tensor:
    """fp32 [B, S]: -log p(label) per token, 0 where the label is IGNORED. Logits of any float dtype are upcast.

    V counts padding, `vocab_size` does not. With `group`, the last dimension of the logits is this rank's contiguous
    part of the vocabulary.
    """
    logits_NV, labels_N = logits_BSV.flatten(0, -2), labels_BS.flatten()
    if group is None:
        words_NV = logits_NV if logits_NV.shape[-1] == vocab_size else logits_NV[:, :vocab_size]
        losses = F.cross_entropy(words_NV.float(), labels_N, ignore_index=IGNORED, reduction="none")
    else:
        losses = _VocabularyParallelCrossEntropy.apply(logits_NV, labels_N, group, vocab_size)
    return losses.view(labels_BS.shape)


def cross_entropy_sum(
    logits_BSV: Tensor, labels_BS: Tensor, vocab_size: int, group: dist.ProcessGroup | None = None
) -> Tensor:
    """Sum of `token_cross_entropy` over the batch, fp32 scalar."""
    return token_cross_entropy(logits_BSV, labels_BS, vocab_size, group).sum()
