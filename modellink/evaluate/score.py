"""How likely a model finds given continuations: the sum of their log-probabilities, in batches of similar length.

Legend: B rows, S tokens, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch

from modellink.errors import ModelLinkError
from modellink.infer.model import GPTModel


@dataclass(frozen=True)
class Request:
    """Score `continuation` after `context`, both token ids; neither may be empty."""

    context: list[int]
    continuation: list[int]


@torch.inference_mode()
def log_likelihoods(
    model: GPTModel,
    requests: Sequence[Request],
    batch_size: int = 1,
    advance: Callable[[int], None] = lambda done: None,
) -> list[float]:
    """Natural-log probability of every continuation given its context, fp32 sums; `advance` hears of finished requests.

    Raises ModelLinkError for an empty context or continuation.
    """
    for request in requests:
        if not request.context or not request.continuation:
            raise ModelLinkError("a likelihood needs at least one token of context and one of continuation.")
    device = next(model.parameters()).device
    order = sorted(range(len(requests)), key=lambda i: -len(requests[i].context) - len(requests[i].continuation))
    scores = [0.0] * len(requests)
    for start in range(0, len(order), batch_size):
        batch = order[start : start + batch_size]
        rows = [(requests[i].context + requests[i].continuation)[:-1] for i in batch]  # the last token predicts nothing
        tokens_BS = torch.zeros(len(rows), max(map(len, rows)), dtype=torch.int64)
        for place, row in enumerate(rows):
            tokens_BS[place, : len(row)] = torch.tensor(row)  # padding behind a row is seen by nothing before it
        logits_BSV = model(tokens_BS.to(device))
        sums = []
        for place, i in enumerate(batch):
            target = torch.tensor(requests[i].continuation, device=device)
            end = len(rows[place])
            log_p = logits_BSV[place, end - len(target) : end].float().log_softmax(-1)
            sums.append(log_p.gather(-1, target[:, None]).sum())
        for i, score in zip(batch, torch.stack(sums).tolist(), strict=True):
            scores[i] = score
        advance(len(batch))
    return scores
