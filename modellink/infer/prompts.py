"""What a user may hand to `generate`, turned into token ids: text, conversations, token ids, one or many.

A conversation is formatted by a named chat template, or by the tokenizer's own; plain text is wrapped as a
one-message conversation when either is asked for, and otherwise tokenized as it is with the tokenizer's special
tokens (spec f.1).
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch

from modellink.data.templates import Template
from modellink.errors import ModelLinkError

Message = dict[str, str]


@dataclass(frozen=True)
class Prompts:
    """Token ids of every prompt; `single` when the user gave one rather than a list; words that end an answer in this
    format.
    """

    ids: list[list[int]]
    single: bool
    stop_words: tuple[str, ...] = ()


def _is_conversation(value: Any) -> bool:
    return isinstance(value, Sequence) and bool(value) and all(isinstance(item, dict) for item in value)


def _is_ids(value: Any) -> bool:
    if isinstance(value, torch.Tensor):
        return value.dim() == 1
    return isinstance(value, Sequence) and not isinstance(value, str) and all(isinstance(item, int) for item in value)


def _split(prompt: Any) -> tuple[list[Any], bool]:
    """The separate prompts in what the user gave, and whether it was one."""
    if isinstance(prompt, torch.Tensor) and prompt.dim() == 2:
        return list(prompt), False
    if isinstance(prompt, str) or _is_conversation(prompt) or (_is_ids(prompt) and len(prompt)):
        return [prompt], True
    if isinstance(prompt, Sequence) and len(prompt):
        return list(prompt), False
    raise ModelLinkError(
        "a prompt must be text, a list of messages, token ids, or a list of these, "
        f"but is {type(prompt).__name__} {str(prompt)[:40]!r}."
    )


def build_prompts(
    prompt: Any,
    tokenizer: Any,
    template: Template | None = None,
    hf_chat_template: bool = False,
    bos_token_id: int | None = None,
) -> Prompts:
    """Token ids of `prompt`; `tokenizer` is the one fitted to `template`. Raises ModelLinkError for prompts that need
    a tokenizer, template or form that is not there.
    """
    if template and hf_chat_template:
        raise ModelLinkError("choose one format: either --prompt-type (template) or --hf-chat-template.")
    separate, single = _split(prompt)
    chat: Callable[[list[Message]], list[int]] | None = None
    if template:
        chat = functools.partial(template.encode_prompt, tokenizer)
    elif hf_chat_template:
        chat = _own_template(tokenizer)
    ids: list[list[int]] = []
    for item in separate:
        if _is_ids(item):
            opening = [] if bos_token_id is None else [bos_token_id]
            ids.append(opening + [int(token) for token in item])
        elif tokenizer is None:
            raise ModelLinkError(
                "this model has no tokenizer: pass tokenizer=FOLDER, or give token ids instead of text."
            )
        elif isinstance(item, str) and chat is None:
            ids.append(list(tokenizer(item)["input_ids"]))
        elif isinstance(item, str) or _is_conversation(item):
            messages = [{"role": "user", "content": item}] if isinstance(item, str) else list(item)
            ids.append((chat or _own_template(tokenizer))(messages))
        else:
            raise ModelLinkError(f"a prompt must be text, messages or token ids, but one is {type(item).__name__}.")
    return Prompts(ids, single, template.stop_words if template else ())


def _own_template(tokenizer: Any) -> Callable[[list[Message]], list[int]]:
    """The tokenizer's own chat template, with the opening of the model's turn."""
    if not getattr(tokenizer, "chat_template", None):
        raise ModelLinkError(
            "the tokenizer has no chat template: name one with --prompt-type (template=...), or give plain text."
        )

    def encode(messages: list[Message]) -> list[int]:
        text = tokenizer.apply_chat_template(messages, add_generation_prompt=True, tokenize=False)
        return tokenizer.encode(text, add_special_tokens=False)

    return encode
