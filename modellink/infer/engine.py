"""The decoding engine: token ids in, token ids out, one step at a time.

`DecodeState` holds a batch between steps. Prompts of different lengths are padded on the left and keep their true
positions, so every row computes what it would compute alone; rows that have finished leave the batch together with
their cache. A step reads the chosen tokens back from the device once and waits for nothing else. Legend: B rows, S
tokens, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from modellink.errors import ModelLinkError
from modellink.infer.sampling import draw, filter_logits
from modellink.models.cache import KVCache
from modellink.models.decoder import Decoder


@dataclass(frozen=True)
class DecodeOptions:
    """How tokens are chosen (spec f.1). `seed` None draws one from torch's global generator."""

    max_new_tokens: int = 128
    do_sample: bool = False
    temperature: float = 1.0
    top_k: int = 50
    top_p: float = 1.0
    num_beams: int = 1
    num_return_sequences: int = 1
    length_penalty: float = 1.0
    stop_ids: frozenset[int] = frozenset()
    seed: int | None = None
    use_kv_cache: bool = True
    keep_probabilities: bool = False

    def __post_init__(self) -> None:
        checks = [
            (self.max_new_tokens >= 1, f"max_new_tokens is {self.max_new_tokens}: ask for at least 1"),
            (self.temperature >= 0, f"temperature is {self.temperature}: use 0 (greedy) or more"),
            (self.top_k >= 0, f"top_k is {self.top_k}: use 0 (all tokens) or more"),
            (0.0 <= self.top_p <= 1.0, f"top_p is {self.top_p}: use a probability between 0 and 1"),
            (self.num_beams >= 1, f"num_beams is {self.num_beams}: use 1 (no beams) or more"),
            (self.num_return_sequences >= 1, f"num_return_sequences is {self.num_return_sequences}: use 1 or more"),
            (
                self.num_beams == 1 or self.num_return_sequences <= self.num_beams,
                f"num_return_sequences is {self.num_return_sequences} but num_beams only {self.num_beams}: raise it",
            ),
            (
                self.num_beams > 1 or self.num_return_sequences == 1 or self.samples,
                f"num_return_sequences is {self.num_return_sequences} but greedy decoding has one answer: "
                "set num_beams or do_sample",
            ),
        ]
        for good, message in checks:
            if not good:
                raise ModelLinkError(f"{message}.")

    @property
    def samples(self) -> bool:
        """Whether chance is involved: temperature 0 is the greedy limit."""
        return self.do_sample and self.temperature > 0

    def generator(self, device: torch.device) -> torch.Generator:
        """The run's own source of random numbers, so decoding neither disturbs nor depends on training's."""
        seed = self.seed if self.seed is not None else int(torch.randint(2**62, (1,)))
        return torch.Generator(device).manual_seed(seed)


@dataclass(frozen=True)
class Step:
    """What one step produced: `tokens[i]` belongs to the prompt `rows[i]`. `probabilities` fp32 [len(rows), V] when
    asked for.
    """

    rows: list[int]
    tokens: list[int]
    probabilities: Tensor | None


def check_prompts(decoder: Decoder, prompts: Sequence[Sequence[int]], max_new_tokens: int) -> int:
    """Return how many new tokens fit behind the longest prompt; raises ModelLinkError for prompts that cannot be
    computed.
    """
    vocabulary = decoder.config.padded_vocab_size or 0
    for row, prompt in enumerate(prompts):
        if not len(prompt):
            raise ModelLinkError(
                f"prompt {row} has no tokens: give at least one, for example the beginning-of-text token."
            )
        low, high = min(prompt), max(prompt)
        if low < 0 or high >= vocabulary:
            raise ModelLinkError(
                f"prompt {row} holds token id {low if low < 0 else high} but the model has ids 0 to {vocabulary - 1}: "
                "use the tokenizer that belongs to this model."
            )
    limit = decoder.config.max_position_embeddings
    if decoder.config.position_embedding != "learned_absolute" or limit is None:
        return max_new_tokens
    longest = max(len(prompt) for prompt in prompts)
    if longest >= limit:
        raise ModelLinkError(f"a prompt has {longest} tokens but the model has {limit} learned positions: shorten it.")
    return min(max_new_tokens, limit - longest)


class DecodeState:
    """A batch between steps: the tokens not yet computed, their positions, and the cache of all earlier ones.

    Without a cache the pending tokens are the whole window and every step computes all of it again.
    """

    def __init__(self, decoder: Decoder, prompts: Sequence[Sequence[int]], use_kv_cache: bool, room: int = 64) -> None:
        self.decoder = decoder
        device = next(decoder.parameters()).device
        lengths = [len(prompt) for prompt in prompts]
        longest = max(lengths)
        padded = [[0] * (longest - len(prompt)) + list(prompt) for prompt in prompts]
        self.tokens_BS = torch.tensor(padded, dtype=torch.int64, device=device)
        first = [longest - length for length in lengths]
        self.first_key = torch.tensor(first, dtype=torch.int64, device=device) if any(first) else None
        self.position_ids = torch.arange(longest, device=device).expand(len(prompts), -1)
        if self.first_key is not None:
            self.position_ids = (self.position_ids - self.first_key[:, None]).clamp(min=0)
        self.cache = (
            KVCache(decoder.config.num_layers or 0, capacity=longest + min(room, 256)) if use_kv_cache else None
        )

    @torch.inference_mode()
    def next_logits(self) -> Tensor:
        """fp32 [B, V]: logits of the position after the pending tokens, cut to the true vocabulary."""
        logits_B1V = self.decoder(
            self.tokens_BS, self.position_ids, cache=self.cache, first_key=self.first_key, last_only=True
        )
        return logits_B1V[:, -1, : self.decoder.config.vocab_size].float()

    @torch.inference_mode()
    def append(self, tokens_B: Tensor) -> None:
        """The next token of each row becomes the pending one."""
        next_position = self.position_ids[:, -1:] + 1
        if self.cache is not None:
            self.tokens_BS, self.position_ids = tokens_B[:, None], next_position
        else:
            self.tokens_BS = torch.cat((self.tokens_BS, tokens_B[:, None]), 1)
            self.position_ids = torch.cat((self.position_ids, next_position), 1)

    @torch.inference_mode()
    def select(self, rows: list[int]) -> None:
        """Keep, repeat or reorder rows."""
        index = torch.tensor(rows, dtype=torch.int64, device=self.tokens_BS.device)
        self.tokens_BS, self.position_ids = self.tokens_BS[index], self.position_ids[index]
        if self.first_key is not None:
            self.first_key = self.first_key[index]
        if self.cache is not None:
            self.cache.select_rows(index)


@torch.inference_mode()
def _choose(logits_BV: Tensor, options: DecodeOptions, uniform_B: Tensor | None) -> Tensor:
    """int64 [B]: the likeliest token, or a drawn one."""
    if uniform_B is None:
        return logits_BV.argmax(-1)
    return draw(filter_logits(logits_BV, options.temperature, options.top_k, options.top_p), uniform_B)


def decode(
    decoder: Decoder,
    prompts: Sequence[Sequence[int]],
    options: DecodeOptions,
    finished: Callable[[int, int], bool] | None = None,
) -> Iterator[Step]:
    """Greedy or sampled continuation of every prompt, one `Step` per new token of the batch.

    A row ends after a token of `options.stop_ids` (which is part of the result), when `finished(row, token)` says so,
    or after `max_new_tokens`. Raises ModelLinkError for prompts the model cannot take.
    """
    new_tokens = check_prompts(decoder, prompts, options.max_new_tokens)
    state = DecodeState(decoder, prompts, options.use_kv_cache, room=new_tokens)
    device = state.tokens_BS.device
    generator = options.generator(device) if options.samples else None
    rows = list(range(len(prompts)))
    active: Tensor | None = None  # index of the running rows, None while all run
    for _ in range(new_tokens):
        logits_BV = state.next_logits()
        uniform_B = None
        if generator is not None:
            uniform_B = torch.rand(len(prompts), generator=generator, device=device)
            uniform_B = uniform_B if active is None else uniform_B[active]
        tokens_B = _choose(logits_BV, options, uniform_B)
        probabilities = logits_BV.softmax(-1) if options.keep_probabilities else None
        tokens = tokens_B.tolist()
        going = [
            place
            for place, (row, token) in enumerate(zip(rows, tokens, strict=True))
            if token not in options.stop_ids and not (finished is not None and finished(row, token))
        ]
        yield Step(rows, tokens, probabilities)
        if not going:
            return
        state.append(tokens_B)
        if len(going) < len(rows):
            state.select(going)
            rows = [rows[place] for place in going]
            active = torch.tensor(rows, device=device)
