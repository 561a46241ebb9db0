"""`GPTModel`: weights, tokenizer and decoding behind one object, for Python users, chat, batch generation and
evaluation.

    model = GPTModel.from_pretrained("path/to/folder")
    print(model.generate("What does `len` do?", max_new_tokens=40))

Legend: B batch, S sequence, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from modellink.data.templates import Template, fit_tokenizer, get_template
from modellink.device import current_device
from modellink.errors import ModelLinkError
from modellink.infer.beam import beam_search
from modellink.infer.engine import DecodeOptions, decode
from modellink.infer.loading import load_pretrained
from modellink.infer.prompts import Prompts, build_prompts
from modellink.infer.text import TextStream, decode_text
from modellink.models.decoder import Decoder

_DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}


class GPTModel(nn.Module):
    """A decoder with its tokenizer. `stop_ids` end an answer besides the tokenizer's end-of-text token."""

    def __init__(self, decoder: Decoder, tokenizer: Any = None, stop_ids: Sequence[int] = ()) -> None:
        super().__init__()
        self.decoder = decoder
        self.tokenizer = tokenizer
        self.stop_ids = frozenset(stop_ids)
        self._fitted: dict[str, Any] = {}
        self.eval()

    @classmethod
    def from_pretrained(
        cls,
        path: str | Path,
        dtype: str | torch.dtype = "bfloat16",
        device: str | torch.device | None = None,
        tokenizer: Any = None,
    ) -> GPTModel:
        """Load a Hugging Face folder or a native checkpoint (a step folder, or a run's folder: its newest complete
        step).

        `device` defaults to the accelerator of this process. `tokenizer` is a tokenizer object or folder; by default
        the one that lies with the weights, and none if there is none (token ids then go in and come out). Raises
        ModelLinkError when the folder is missing, holds no model, or does not fit its own configuration.
        """
        if isinstance(dtype, str):
            if dtype not in _DTYPES:
                raise ModelLinkError(f"unknown dtype {dtype!r}: use one of {', '.join(_DTYPES)}.")
            dtype = _DTYPES[dtype]
        device = torch.device(device) if device is not None else current_device()
        decoder, found, stop_ids = load_pretrained(Path(path), dtype, device, tokenizer)
        return cls(decoder, found, stop_ids)

    def forward(self, input_ids_BS: Tensor) -> Tensor:
        """int [B, S] -> logits [B, S, V] in the dtype of the weights, V being the true (unpadded) vocabulary."""
        tokens_BS = input_ids_BS.to(next(self.decoder.parameters()).device)
        return self.decoder(tokens_BS)[..., : self.decoder.config.vocab_size]

    def generate(
        self,
        prompt: Any,
        *,
        max_new_tokens: int | None = None,
        max_length: int | None = None,
        do_sample: bool = False,
        temperature: float = 1.0,
        top_k: int = 50,
        top_p: float = 1.0,
        num_beams: int = 1,
        num_return_sequences: int = 1,
        length_penalty: float = 1.0,
        stream: bool = False,
        stop: Sequence[str | int] = (),
        eos_token_id: int | Sequence[int] | None = None,
        bos_token_id: int | None = None,
        pad_token_id: int | None = None,
        tokenizer: Any = None,
        detokenize: bool = True,
        include_input: bool = False,
        return_output_log_probs: bool = False,
        template: str | None = None,
        hf_chat_template: bool = False,
        seed: int | None = None,
        use_kv_cache: bool = True,
        recompute: bool = True,
    ) -> Any:
        """Continue one prompt or many (spec f.1).

        `prompt` is a str, a conversation (list of {"role", "content"}), token ids (list or 1-D tensor), or a list of
        these (or a 2-D tensor). One prompt gives one answer, a list gives a list; answers are text, or token ids when
        there is no tokenizer or `detokenize` is False. `num_return_sequences` > 1 gives a flat list, the answers of
        each prompt together.

        `max_new_tokens` counts per prompt; without it `max_length` (default 128 new tokens) counts the longest prompt
        as well. `stop` holds strings and token ids that end an answer and do not belong to its text. `bos_token_id`
        is put before token-id prompts. `template` names a chat template, `hf_chat_template` takes the tokenizer's
        own. `pad_token_id` and `recompute` are accepted and change nothing: padding never enters the result. With
        `stream`, returns an iterator of the growing answer(s). With `return_output_log_probs`, returns (answers, p),
        p being the fp32 [new tokens, V] softmax of every position per answer, or with beams the exponential of each
        answer's score.
        """
        row = get_template(template) if template else None
        active = self.tokenizer_for(row, tokenizer)
        prompts = build_prompts(prompt, active, row, hf_chat_template, bos_token_id)
        longest = max(len(ids) for ids in prompts.ids)
        if not max_new_tokens:
            max_new_tokens = 128 if max_length is None else max_length - longest
            if max_new_tokens < 1:
                raise ModelLinkError(
                    f"max_length is {max_length} but the longest prompt has {longest} tokens: raise it, or give "
                    "max_new_tokens."
                )
        options = DecodeOptions(
            max_new_tokens=max_new_tokens,
            do_sample=do_sample,
            temperature=temperature,
            top_k=top_k,
            top_p=top_p,
            num_beams=num_beams,
            num_return_sequences=num_return_sequences,
            length_penalty=length_penalty,
            stop_ids=self._stop_ids(active, eos_token_id, [*stop, *prompts.stop_words]),
            seed=seed,
            use_kv_cache=use_kv_cache,
            keep_probabilities=return_output_log_probs,
        )
        stop_strings = [word for word in [*stop, *prompts.stop_words] if isinstance(word, str)]
        answers = _Answers(prompts, active if detokenize else None, options, stop_strings, include_input)
        if stream:
            if num_beams > 1:
                raise ModelLinkError("beam search knows its answer only at the end: stream with num_beams=1.")
            return answers.stream(self.decoder)
        return answers.search(self.decoder) if num_beams > 1 else answers.collect(self.decoder)

    def tokenizer_for(self, template: Template | None, tokenizer: Any = None) -> Any:
        """The tokenizer to use, fitted to the template; fitting copies it, so the result for our own is kept."""
        if template is None or (tokenizer is None and self.tokenizer is None):
            return tokenizer if tokenizer is not None else self.tokenizer
        if tokenizer is not None:
            return fit_tokenizer(template, tokenizer)
        if template.name not in self._fitted:
            self._fitted[template.name] = fit_tokenizer(template, self.tokenizer)
        return self._fitted[template.name]

    def _stop_ids(
        self, tokenizer: Any, eos_token_id: int | Sequence[int] | None, stop: Sequence[str | int]
    ) -> frozenset[int]:
        """Ids that end an answer: the end-of-text token(s), and every stop entry that is a single token."""
        if eos_token_id is not None:
            ids = {eos_token_id} if isinstance(eos_token_id, int) else set(eos_token_id)
        else:
            eos = getattr(tokenizer, "eos_token_id", None)
            ids = set(self.stop_ids) | ({eos} if eos is not None else set())
        for word in stop:
            if isinstance(word, int):
                ids.add(word)
            elif tokenizer is not None:
                found = tokenizer.convert_tokens_to_ids(word)
                ids |= {found} - {None, tokenizer.unk_token_id}
        return frozenset(ids)


class _Answers:
    """The answers of one `generate` call while they grow."""

    def __init__(
        self, prompts: Prompts, tokenizer: Any, options: DecodeOptions, stop_strings: Sequence[str], include_input: bool
    ) -> None:
        self.prompts, self.tokenizer, self.options, self.stop_strings = prompts, tokenizer, options, stop_strings
        self.include_input = include_input
        self.single = prompts.single and options.num_return_sequences == 1
        self.ids: list[list[int]] = []
        self.streams: list[TextStream] = []
        self.probabilities: list[list[Tensor]] = []

    def _steps(self, decoder: Decoder) -> Iterator[list[int]]:
        """Decode, filling `ids` (and `probabilities`); yields the rows that grew."""
        repeats = self.options.num_return_sequences
        inputs = [ids for ids in self.prompts.ids for _ in range(repeats)]
        self.ids = [[] for _ in inputs]
        self.probabilities = [[] for _ in inputs]
        self.streams = [TextStream(self.tokenizer, self.stop_strings) for _ in inputs]
        watch = self._push if self.tokenizer is not None else None
        for step in decode(decoder, inputs, self.options, watch):
            for place, (row, token) in enumerate(zip(step.rows, step.tokens, strict=True)):
                self.ids[row].append(token)
                if step.probabilities is not None:
                    self.probabilities[row].append(step.probabilities[place])
            yield step.rows

    def _push(self, row: int, token: int) -> bool:
        return self.streams[row].push(token)

    def _finished(self, row: int) -> Any:
        """The whole answer of a row: text, or ids."""
        prompt = self.prompts.ids[row // self.options.num_return_sequences]
        return self._render(prompt, self.ids[row], self.streams[row])

    def _render(self, prompt: list[int], ids: list[int], stream: TextStream) -> Any:
        if self.tokenizer is None:
            return [*prompt, *ids] if self.include_input else ids
        text = stream.finish()
        return decode_text(self.tokenizer, prompt) + text if self.include_input else text

    def collect(self, decoder: Decoder) -> Any:
        """All answers, complete."""
        for _ in self._steps(decoder):
            pass
        results = [self._finished(row) for row in range(len(self.ids))]
        return self._shape(results, [torch.stack(rows) for rows in self.probabilities if rows])

    def search(self, decoder: Decoder) -> Any:
        """All answers by beam search, one prompt after the other."""
        results, scores = [], []
        for prompt in self.prompts.ids:
            for hypothesis in beam_search(decoder, prompt, self.options):
                stream = TextStream(self.tokenizer, self.stop_strings)
                stream.tokens = [token for token in hypothesis.tokens if token not in self.options.stop_ids]
                results.append(self._render(prompt, hypothesis.tokens, stream))
                scores.append(torch.tensor(hypothesis.score).exp())
        return self._shape(results, scores)

    def _shape(self, results: list[Any], extra: list[Tensor]) -> Any:
        shaped = results[0] if self.single else results
        if not self.options.keep_probabilities:
            return shaped
        return shaped, (extra[0] if self.single else extra)

    def stream(self, decoder: Decoder) -> Iterator[Any]:
        """The growing answers after every step, and at last the complete ones."""
        last: Any = None
        for _ in self._steps(decoder):
            last = self._growing()
            yield last
        final = [self._finished(row) for row in range(len(self.ids))]
        if (shaped := final[0] if self.single else final) != last:
            yield shaped

    def _growing(self) -> Any:
        repeats = self.options.num_return_sequences
        grown: list[Any] = []
        for row, ids in enumerate(self.ids):
            prompt = self.prompts.ids[row // repeats] if self.include_input else []
            if self.tokenizer is None:
                grown.append([*prompt, *ids])
            else:
                head = decode_text(self.tokenizer, prompt) if prompt else ""
                grown.append(head + self.streams[row].text)
        return grown[0] if self.single else grown
