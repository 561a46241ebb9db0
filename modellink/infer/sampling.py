"""From logits to the next token: temperature, top-k and top-p filters, and one draw per row.

Filters act in a fixed order: the temperature divides, then k, then the nucleus (spec f.1). A draw turns one uniform
number per row into a token by the inverse of the cumulative distribution, so a row's tokens do not depend on which
other rows are still running. Legend: B rows, V vocabulary.
"""

from __future__ import annotations

import torch
from torch import Tensor


def filter_logits(logits_BV: Tensor, temperature: float = 1.0, top_k: int = 0, top_p: float = 1.0) -> Tensor:
    """fp32 [B, V]: logits / temperature, -inf outside the `top_k` likeliest (0: all) and outside the nucleus.

    The nucleus is the smallest set of likeliest tokens whose probability, renormalised after the k filter, reaches
    `top_p` (1 or 0: all); the token that crosses `top_p` belongs to it, so it is never empty. Tokens that tie with
    the k-th stay.
    """
    logits_BV = logits_BV.float() / temperature
    if 0 < top_k < logits_BV.shape[-1]:
        smallest_B1 = logits_BV.topk(top_k, dim=-1).values[:, -1:]
        logits_BV = logits_BV.masked_fill(logits_BV < smallest_B1, float("-inf"))
    if 0.0 < top_p < 1.0:
        ordered_BV, index_BV = logits_BV.sort(dim=-1, descending=True, stable=True)
        probability_BV = ordered_BV.softmax(-1)
        before_BV = probability_BV.cumsum(-1) - probability_BV
        outside_BV = torch.zeros_like(before_BV, dtype=torch.bool).scatter(-1, index_BV, before_BV >= top_p)
        logits_BV = logits_BV.masked_fill(outside_BV, float("-inf"))
    return logits_BV


def draw(logits_BV: Tensor, uniform_B: Tensor) -> Tensor:
    """int64 [B]: the token at which the cumulative softmax of each row passes the row's uniform number in [0, 1)."""
    cumulative_BV = logits_BV.float().softmax(-1).cumsum(-1)
    total_B1 = cumulative_BV[:, -1:]
    token_B = (cumulative_BV <= uniform_B[:, None] * total_B1).sum(-1)
    # rounding may push the target to the total itself: the last token with any probability is then meant
    return torch.minimum(token_B, (cumulative_BV < total_B1).sum(-1))
