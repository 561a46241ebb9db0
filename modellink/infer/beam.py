"""Beam search over one prompt, plain or with sampling.

Keeps the `num_beams` best unfinished continuations and the `num_beams` best finished ones. A finished one is worth
the sum of its log-probabilities / length ** length_penalty (spec f.1); the search ends when no unfinished one is
worth more at its present length than the worst finished one, the rule that `transformers` follows with
early_stopping=False. Legend: N running beams, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from modellink.infer.engine import DecodeOptions, DecodeState, check_prompts
from modellink.infer.sampling import filter_logits
from modellink.models.decoder import Decoder


@dataclass(frozen=True)
class Hypothesis:
    """One continuation: its new tokens, and its length-normalised log-probability."""

    tokens: list[int]
    score: float


def _candidates(scores_NV: Tensor, count: int, generator: torch.Generator | None) -> list[tuple[float, int, int]]:
    """The `count` best (or drawn) of all continuations as (sum of log-probabilities, beam, token), best or first
    drawn first.
    """
    flat = scores_NV.flatten()
    order = flat
    if generator is not None:  # adding Gumbel noise and taking the largest draws without replacement
        noise = torch.empty_like(flat).exponential_(generator=generator)
        order = flat - noise.log()
    index = order.topk(min(count, flat.numel())).indices
    vocabulary = scores_NV.shape[1]
    packed = torch.stack((flat[index].double(), index.double()), 1).tolist()  # one transfer; ids are exact in fp64
    return [(score, int(i) // vocabulary, int(i) % vocabulary) for score, i in packed if score != float("-inf")]


def beam_search(decoder: Decoder, prompt: Sequence[int], options: DecodeOptions) -> list[Hypothesis]:
    """The `num_return_sequences` best hypotheses, best first. Stop tokens are part of them. Raises as `decode` does."""
    new_tokens = check_prompts(decoder, [prompt], options.max_new_tokens)
    state = DecodeState(decoder, [prompt], options.use_kv_cache, room=new_tokens)
    generator = options.generator(state.tokens_BS.device) if options.samples else None
    beams, penalty = options.num_beams, options.length_penalty
    # enough candidates that `beams` of them go on even when every stop token is among the best of every beam
    count = max(2, 1 + len(options.stop_ids)) * beams
    running: list[tuple[float, list[int]]] = [(0.0, [])]
    finished: list[Hypothesis] = []
    for length in range(1, new_tokens + 1):
        with torch.inference_mode():
            scores_NV = state.next_logits().log_softmax(-1)
            if generator is not None:
                scores_NV = filter_logits(scores_NV, options.temperature, max(options.top_k, 2), options.top_p)
            scores_NV = scores_NV + torch.tensor([[score] for score, _ in running], device=scores_NV.device)
            candidates = _candidates(scores_NV, count, generator)
        ends = [token in options.stop_ids or length == new_tokens for _, _, token in candidates]
        for (score, beam, token), end in list(zip(candidates, ends, strict=True))[:beams]:
            if end:
                finished.append(Hypothesis([*running[beam][1], token], score / length**penalty))
        finished = sorted(finished, key=lambda h: -h.score)[:beams]
        going = [candidate for candidate, end in zip(candidates, ends, strict=True) if not end]
        going = sorted(going, key=lambda candidate: -candidate[0])[:beams]
        if not going or (len(finished) == beams and finished[-1].score >= going[0][0] / length**penalty):
            break
        running = [(score, [*running[beam][1], token]) for score, beam, token in going]
        state.select([beam for _, beam, _ in going])
        state.append(torch.tensor([token for _, _, token in going], device=state.tokens_BS.device))
    return finished[: options.num_return_sequences]
