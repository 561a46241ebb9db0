"""Our templates against the token ids and labels that another program made for the same rows of real instruction
data.

Where the two formats differ on purpose, the difference is written down here as a variant of the row, which must then
agree exactly: * alpaca, chatml, qwen: the reference ends every answer with the separator and trains on it; ours opens
the next turn with it. * default: the reference ends the question and the system text with EOS and a separator, and
names the system. * qwen: another default system text, and tools described as XML. The reference cuts a conversation
at 512 tokens, turn by turn, source and target pro rata.
"""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path
from typing import Any

import pytest
import transformers

from modellink.data.templates import EOS, IGNORED, Template, fit_tokenizer, get_template

CUTOFF = 512
ROLES = {
    "human": "user",
    "gpt": "assistant",
    "observation": "observation",
    "function_call": "function",
    "system": "system",
}


def variant(name: str) -> Template:
    """Our row of that name with the reference's own habits."""
    ours = get_template("deepseek2" if name == "deepseek" else name)
    if name in ("alpaca", "chatml", "qwen"):
        ours = dataclasses.replace(ours, answer=("{content}", EOS, *ours.separator), separator=())
    if name == "qwen":
        text = "You are Qwen, created by Alibaba Cloud. You are a helpful assistant."
        ours = dataclasses.replace(ours, default_system=text)
    if name == "default":
        ours = dataclasses.replace(
            ours,
            user=("Human: {content}", EOS, "\nAssistant:"),
            system=("System: {content}", EOS, "\n"),
            answer=("{content}", EOS, "\n"),
            separator=(),
        )
    return ours


@pytest.fixture(scope="module")
def tokenizers(shared: Path) -> dict[str, Any]:
    return {
        name: transformers.AutoTokenizer.from_pretrained(shared / "tokenizers" / name) for name in ("llama2", "qwen15")
    }


def alpaca_messages(row: dict[str, Any]) -> list[dict[str, str]]:
    question = "\n".join(text for text in (row["instruction"], row["input"]) if text)
    return [{"role": "user", "content": question}, {"role": "assistant", "content": row["output"]}]


def chat_messages(turns: list[dict[str, str]]) -> list[dict[str, str]]:
    return [{"role": ROLES[turn["from"]], "content": turn["value"]} for turn in turns]


def cut(source: list[int], target: list[int], room: int) -> tuple[list[int], list[int]]:
    if len(target) * 2 < room:
        longest = room
    elif len(source) * 2 < room:
        longest = room - len(source)
    else:
        longest = int(room * (len(target) / (len(source) + len(target))))
    kept = min(longest, len(target))
    return source[: max(room - kept, 0)], target[:kept]


def encode_cut(template: Template, tokenizer: Any, messages: list[dict[str, str]], tools: str | None) -> Any:
    ids: list[int] = []
    labels: list[int] = []
    for source, target in template.turns(tokenizer, messages, tools=tools):
        if len(ids) >= CUTOFF:
            break
        source, target = cut(source, target, CUTOFF - len(ids))
        ids += source + target
        labels += [IGNORED] * len(source) + target
    return ids, labels


def encode_pair(
    template: Template, tokenizer: Any, history: list[dict[str, str]], answers: list[dict[str, str]]
) -> list[tuple[list[int], list[int]]]:
    """The same conversation with each of two last answers, cut to one common length."""
    turns = [template.turns(tokenizer, [*history, answer]) for answer in answers]
    source = [token for turn in turns[0] for part in turn for token in part][: -len(turns[0][-1][1])]
    targets = [each[-1][1] for each in turns]
    kept_source, longest = cut(source, max(targets, key=len), CUTOFF)
    return [(kept_source + t[: len(longest)], [IGNORED] * len(kept_source) + t[: len(longest)]) for t in targets]


CASES = [
    (name, data)
    for name in ("alpaca", "chatml", "deepseek", "default", "llama2", "qwen")
    for data in ("alpaca_en_demo", "dpo_en_demo", "glaive_toolcall_en_demo")
    if (name, data) != ("qwen", "glaive_toolcall_en_demo")  # every row describes tools, as XML in the reference
]


@pytest.mark.parametrize(("name", "data"), CASES)
def test_ids_and_labels(shared: Path, tokenizers: dict[str, Any], name: str, data: str) -> None:
    kind = "qwen15" if name in ("chatml", "qwen") else "llama2"
    reference = json.loads((shared / "templates" / f"{name}_{kind}_{data}.json").read_text())
    rows = json.loads((shared / "data" / "instruct" / f"{data}.json").read_text())
    template = variant(name)
    tokenizer = fit_tokenizer(template, tokenizers[kind])
    assert tokenizer.eos_token == reference["eos"]
    assert len(reference["rows"]) == 50
    for row, wanted in zip(rows, reference["rows"], strict=False):
        if data == "dpo_en_demo":
            answers = chat_messages([row["chosen"], row["rejected"]])
            pairs = encode_pair(template, tokenizer, chat_messages(row["conversations"]), answers)
            for key, (ids, labels) in zip(("chosen", "rejected"), pairs, strict=True):
                assert (ids, labels) == (wanted[f"{key}_input_ids"], wanted[f"{key}_labels"])
        else:
            messages = alpaca_messages(row) if "instruction" in row else chat_messages(row["conversations"])
            assert encode_cut(template, tokenizer, messages, row.get("tools")) == (
                wanted["input_ids"],
                wanted["labels"],
            )


@pytest.mark.parametrize("name", ["alpaca", "chatml"])
def test_separator_belongs_to_the_next_source(shared: Path, tokenizers: dict[str, Any], name: str) -> None:
    """Our own row of a format with a separator: the reference's ids less the last separator, which takes no part in
    the loss.
    """
    kind = "qwen15" if name == "chatml" else "llama2"
    reference = json.loads((shared / "templates" / f"{name}_{kind}_glaive_toolcall_en_demo.json").read_text())
    rows = json.loads((shared / "data" / "instruct" / "glaive_toolcall_en_demo.json").read_text())
    template = get_template(name)
    tokenizer = fit_tokenizer(template, tokenizers[kind])
    length = len(tokenizer.encode(template.separator[0], add_special_tokens=False))
    compared = 0
    for row, wanted in zip(rows, reference["rows"], strict=False):
        if len(wanted["input_ids"]) >= CUTOFF - 1:
            continue  # where the cut falls depends on the length of the last answer
        ids, labels = template.encode(tokenizer, chat_messages(row["conversations"]), tools=row["tools"])
        if len(ids) != len(wanted["input_ids"]) - length:
            continue  # cut inside the conversation
        assert ids == wanted["input_ids"][:-length]
        separators = [
            i for i, (mine, theirs) in enumerate(zip(labels, wanted["labels"], strict=False)) if mine != theirs
        ]
        turns = len(row["conversations"]) // 2
        assert len(separators) == (turns - 1) * length
        assert all(labels[i] == IGNORED for i in separators)
        compared += 1
    assert compared >= 10
