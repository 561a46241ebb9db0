"""Handlers of instruction data: rows become three files of equal length, ids, mask and labels of each sample.

The template handlers read a conversation through --map-keys and encode it with the --prompt-type's template;
GeneralInstructionHandler writes the fixed Alpaca paragraph. A row that is no valid conversation is named in a warning
and left out, and so is a sample that --seq-length has no room for (spec d.4, d.5, d.7).
"""

from __future__ import annotations

import json
import logging
from collections.abc import Mapping, Sequence
from itertools import chain
from typing import Any, ClassVar

import numpy as np

from modellink.config.preprocess_schema import PreprocessConfig
from modellink.data.handlers import HANDLERS, Encoded, Handler, Row, Where, column
from modellink.data.indexed import IndexedDataset, IndexedDatasetWriter
from modellink.data.templates import IGNORED, Template, fit_tokenizer, get_template
from modellink.data.tokenizer import Tokenizer
from modellink.errors import ModelLinkError
from modellink.registry import suggest

log = logging.getLogger(__name__)

IDS, MASK, LABELS = OUTPUTS = ("packed_input_ids", "packed_attention_mask", "packed_labels")
PAD = 0  # fills up packed sequences; its label takes it out of the loss


class RowError(Exception):
    """Why a row is no valid sample."""


class InstructionHandler(Handler):
    """Base: `sample(row)` gives ids and labels of one row, or raises RowError."""

    accepts: ClassVar[frozenset[str]] = frozenset({"pack"})

    def __init__(self, config: PreprocessConfig, tokenizer: Tokenizer) -> None:
        super().__init__(config, tokenizer)
        self.outputs = dict.fromkeys(OUTPUTS, np.int32)  # labels hold -100
        if config.pack:
            if not config.seq_length:
                raise ModelLinkError("--pack needs --seq-length, the length of a packed sequence.")
            self.arrange = self._pack

    def sample(self, row: Row, where: str) -> tuple[list[int], list[int]]:
        raise AssertionError(f"{type(self).__name__} must say how a row is encoded")

    def encode(self, rows: Sequence[Row], where: Where) -> dict[str, Encoded]:
        longest = (self.config.seq_length or 1 << 62) - 1  # one place stays free for the next token
        all_ids, all_labels = [], []
        for i, row in enumerate(rows):
            try:
                ids, labels = self.sample(row, where(i))
            except RowError as error:
                log.warning("%s is left out: %s", where(i), error)
                continue
            if len(ids) > longest:
                log.warning("%s is left out: %d tokens, --seq-length %d", where(i), len(ids), longest + 1)
                continue
            all_ids.append(ids)
            all_labels.append(labels)
        lengths = np.fromiter(map(len, all_ids), np.int32, len(all_ids))
        tokens, learnt = (
            np.fromiter(chain.from_iterable(each), np.int32, int(lengths.sum())) for each in (all_ids, all_labels)
        )
        return {
            IDS: Encoded(tokens, lengths),
            MASK: Encoded(np.ones_like(tokens), lengths),
            LABELS: Encoded(learnt, lengths),
        }

    def _pack(self, files: Mapping[str, IndexedDataset], writers: Mapping[str, IndexedDatasetWriter]) -> None:
        """Write sequences of exactly --seq-length, each filled with the largest remaining samples that fit."""
        assert self.config.seq_length
        ids, labels = files[IDS], files[LABELS]
        for members in fill_bins([len(ids[i]) for i in range(len(ids))], self.config.seq_length - 1):
            length = sum(len(ids[i]) for i in members)
            rest = self.config.seq_length - length
            packed = {
                IDS: np.concatenate([*(ids[i] for i in members), np.full(rest, PAD, np.int32)]),
                MASK: np.ones(self.config.seq_length, np.int32),
                LABELS: np.concatenate([*(labels[i] for i in members), np.full(rest, IGNORED, np.int32)]),
            }
            for key, tokens in packed.items():
                writers[key].add_document(tokens, [len(tokens)])


def fill_bins(lengths: Sequence[int], capacity: int) -> list[list[int]]:
    """Indices of the samples of each bin: greedily the largest remaining one that fits; equals keep their order.

    No length may exceed `capacity`.
    """
    by_length: dict[int, list[int]] = {}
    for index in reversed(range(len(lengths))):
        by_length.setdefault(lengths[index], []).append(index)
    sizes = sorted(by_length)
    bins = []
    while sizes:
        room, members = capacity, []
        while (place := int(np.searchsorted(sizes, room, side="right")) - 1) >= 0:
            size = sizes[place]
            members.append(by_length[size].pop())
            room -= size
            if not by_length[size]:
                sizes.pop(place)
        bins.append(members)
    return bins


@HANDLERS.register("GeneralInstructionHandler")
class GeneralInstructionHandler(InstructionHandler):
    """Columns instruction, input and output written out as the Alpaca paragraph; the answer alone is learnt."""

    HEAD = (
        "\nBelow is an instruction that describes a task, paired with an input that provides further context. "
        "Write a response that appropriately completes the request. "
        "Please note that you need to think through your response logically and step by step.\n"
    )
    columns = ("instruction", "input", "output")

    def sample(self, row: Row, where: str) -> tuple[list[int], list[int]]:
        question = _joined([column(row, "instruction", where), row.get("input")])
        prompt = f"{self.HEAD}### Instruction:\n{question}\n### Response:\n"
        ids = list(self.tokenizer.encode(f"{prompt}{_text(column(row, 'output', where), 'output')}\n"))
        hidden = min(len(self.tokenizer.encode(prompt)), len(ids))
        labels = [IGNORED] * hidden + ids[hidden:]
        if self.config.append_eod:
            ids.append(self.tokenizer.eod)
            labels.append(self.tokenizer.eod)
        return ids, labels


class TemplateHandler(InstructionHandler):
    """Base of the handlers that encode a conversation with a chat template."""

    accepts = frozenset({"pack", "map_keys"})
    defaults: ClassVar[dict[str, Any]] = {}

    def __init__(self, config: PreprocessConfig, tokenizer: Tokenizer) -> None:
        super().__init__(config, tokenizer)
        self.keys = read_map_keys(config.map_keys, self.defaults)
        if not config.prompt_type:
            log.warning("no --prompt-type: text is encoded without any format, and answers have no end token")
        self.template: Template = get_template(config.prompt_type or "empty")
        if tokenizer.hf is None:
            raise ModelLinkError(
                f"{type(self).__name__} needs a Hugging Face tokenizer: give its folder to --tokenizer-name-or-path."
            )
        self.fitted = fit_tokenizer(self.template, tokenizer.hf)
        self.columns = [name for name in self.keys.values() if isinstance(name, str)]

    def conversation(self, row: Row, where: str) -> tuple[list[dict[str, str]], str | None, str | None]:
        """(messages, system, tools) of a row."""
        raise AssertionError(f"{type(self).__name__} must say what a row's conversation is")

    def sample(self, row: Row, where: str) -> tuple[list[int], list[int]]:
        messages, system, tools = self.conversation(row, where)
        try:
            return self.template.encode(self.fitted, messages, system, tools)
        except ModelLinkError as error:
            raise RowError(str(error)) from error

    def _optional(self, row: Row, key: str) -> Any:
        """The value of a column that may be unmapped, missing or empty (then None)."""
        name = self.keys.get(key)
        return (row.get(name) or None) if name else None


@HANDLERS.register("AlpacaStyleInstructionHandler")
class AlpacaStyleInstructionHandler(TemplateHandler):
    """One exchange per row: the question in columns prompt and query, the answer in response; earlier ones in
    history.
    """

    defaults = {
        "prompt": "instruction",
        "query": "input",
        "response": "output",
        "history": None,
        "system": None,
        "chosen": "chosen",
        "rejected": "rejected",
    }

    def conversation(self, row: Row, where: str) -> tuple[list[dict[str, str]], str | None, str | None]:
        messages: list[dict[str, str]] = []
        for pair in self._optional(row, "history") or []:
            if not isinstance(pair, Sequence) or isinstance(pair, str) or len(pair) != 2:
                raise RowError(f"history must be a list of [user, assistant] pairs, but holds {str(pair)[:40]!r}")
            messages += _exchange(_text(pair[0], "history"), _text(pair[1], "history"))
        question = _joined([column(row, self.keys["prompt"], where), self._optional(row, "query")])
        answer = column(row, self.keys["response"], where)
        if isinstance(answer, list):
            if len(answer) != 1:
                raise RowError(f"the response is a list of {len(answer)}, not one answer")
            answer = answer[0]
        messages += _exchange(question, _text(answer, "response"))
        system = self._optional(row, "system")
        return messages, None if system is None else _text(system, "system"), None


@HANDLERS.register("SharegptStyleInstructionHandler")
class SharegptStyleInstructionHandler(TemplateHandler):
    """Whole conversations: a list of messages per row, whose tags --map-keys can rename (as OpenAI has them)."""

    TAGS = {
        "role_tag": "from",
        "content_tag": "value",
        "user_tag": "human",
        "assistant_tag": "gpt",
        "observation_tag": "observation",
        "function_tag": "function_call",
        "system_tag": "system",
    }
    defaults = {
        "messages": "conversations",
        "system": None,
        "tools": None,
        "chosen": "chosen",
        "rejected": "rejected",
        "tags": TAGS,
    }

    def __init__(self, config: PreprocessConfig, tokenizer: Tokenizer) -> None:
        super().__init__(config, tokenizer)
        tags = self.keys["tags"]
        self.role_of = {
            tags[f"{role}_tag"]: role for role in ("user", "assistant", "observation", "function", "system")
        }

    def conversation(self, row: Row, where: str) -> tuple[list[dict[str, str]], str | None, str | None]:
        tags = self.keys["tags"]
        listed = column(row, self.keys["messages"], where)
        if not isinstance(listed, list) or not all(isinstance(message, dict) for message in listed):
            raise RowError("the conversation is not a list of messages")
        messages = []
        for message in listed:
            role = message.get(tags["role_tag"])
            if role not in self.role_of:
                raise RowError(f"unknown role {role!r}.{suggest(str(role), self.role_of)}")
            content = _text(message.get(tags["content_tag"]), tags["content_tag"])
            messages.append({"role": self.role_of[role], "content": content})
        system = self._optional(row, "system")
        if messages and messages[0]["role"] == "system":
            system = messages.pop(0)["content"]
        if not messages or len(messages) % 2:
            raise RowError(f"{len(messages)} messages: fine-tuning needs an answer to every question")
        tools = self._optional(row, "tools")
        if tools is not None and not isinstance(tools, str):
            tools = json.dumps(tools, ensure_ascii=False)
        return messages, system, tools


def read_map_keys(text: str | None, defaults: dict[str, Any]) -> dict[str, Any]:
    """--map-keys laid over the handler's own column names; raises ModelLinkError for bad JSON and unknown names."""
    try:
        given = json.loads(text) if text else {}
    except ValueError as error:
        raise ModelLinkError(
            f'--map-keys is not JSON ({error}): write it like \'{{"prompt": "question"}}\'.'
        ) from error
    if not isinstance(given, dict):
        raise ModelLinkError(f"--map-keys must be a JSON object of names, but is {type(given).__name__}.")
    merged = dict(defaults)
    for key, value in given.items():
        if key not in defaults:
            raise ModelLinkError(
                f"--map-keys has no name {key!r}.{suggest(key, defaults)} Known: {', '.join(sorted(defaults))}."
            )
        if isinstance(defaults[key], dict):
            if not isinstance(value, dict):
                raise ModelLinkError(f"--map-keys: {key!r} must be a JSON object, but is {type(value).__name__}.")
            unknown = [name for name in value if name not in defaults[key]]
            if unknown:
                raise ModelLinkError(
                    f"--map-keys: {key!r} has no name {unknown[0]!r}.{suggest(unknown[0], defaults[key])} "
                    f"Known: {', '.join(sorted(defaults[key]))}."
                )
            value = defaults[key] | value
        merged[key] = value
    return merged


def _text(value: Any, name: str) -> str:
    if not isinstance(value, str):
        raise RowError(f"{name} holds {type(value).__name__}, not text")
    return value


def _joined(parts: Sequence[Any]) -> str:
    return "\n".join(_text(part, "question") for part in parts if part)


def _exchange(question: str, answer: str) -> list[dict[str, str]]:
    return [{"role": "user", "content": question}, {"role": "assistant", "content": answer}]
