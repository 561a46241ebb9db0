"""Chat templates: what each row writes, where eos and labels go, and what happens to a tokenizer."""

from __future__ import annotations

import json
from typing import Any

import pytest
import transformers
from tokenizers import Tokenizer, decoders, models, pre_tokenizers

from modellink.data.templates import IGNORED, TEMPLATES, describe_tools, fit_tokenizer, get_template
from modellink.errors import ModelLinkError

PUBLISHED = (
    "empty default chatglm3_system chatml qwen llama2 llama3 mixtral alpaca deepseek2 deepseek2-lite "
    "mistral gemma glm4 chatglm3 chatglm2 chatml_de"
).split()
SPECIAL = ["<s>", "</s>", "[gMASK]", "sop", "<|user|>", "<|assistant|>", "<|system|>", "<|observation|>", "<|eot_id|>"]
TURNS = [
    {"role": "user", "content": "Q1"},
    {"role": "assistant", "content": "A1"},
    {"role": "user", "content": "Q2 {content}"},
    {"role": "assistant", "content": "A2"},
]
QUESTION = "Q2 {content}"


@pytest.fixture(scope="module")
def tokenizer() -> Any:
    letters = sorted(pre_tokenizers.ByteLevel.alphabet())
    vocabulary = {token: i for i, token in enumerate([*SPECIAL, *letters])}
    raw = Tokenizer(models.BPE(vocab=vocabulary, merges=[]))
    raw.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    raw.decoder = decoders.ByteLevel()
    return transformers.PreTrainedTokenizerFast(
        tokenizer_object=raw,
        bos_token="<s>",
        eos_token="</s>",
        additional_special_tokens=SPECIAL[2:],
        clean_up_tokenization_spaces=False,
    )


def written(tokenizer: Any, name: str, system: str | None = None) -> tuple[str, str]:
    """(whole conversation, what is learnt) as text; eos is shown as the template's own."""
    template = get_template(name)
    fitted = fit_tokenizer(template, tokenizer)
    ids, labels = template.encode(fitted, TURNS, system)
    assert len(ids) == len(labels)
    learnt = [label for label in labels if label != IGNORED]
    return fitted.decode(ids), fitted.decode(learnt)


def test_all_published_names_are_there() -> None:
    assert sorted(TEMPLATES.names()) == sorted(PUBLISHED)
    with pytest.raises(ModelLinkError, match="Did you mean 'llama3'"):
        get_template("llama33")


IM = "<|im_start|>"
WRITTEN = {
    "empty": f"Q1A1{QUESTION}A2",
    "default": f"Human: Q1\nAssistant:A1</s>\nHuman: {QUESTION}\nAssistant:A2</s>",
    "chatml": (
        f"{IM}user\nQ1<|im_end|>\n{IM}assistant\nA1<|im_end|>\n"
        f"{IM}user\n{QUESTION}<|im_end|>\n{IM}assistant\nA2<|im_end|>"
    ),
    "llama2": f"<s>[INST] Q1 [/INST]A1</s><s>[INST] {QUESTION} [/INST]A2</s>",
    "mixtral": f"<s>[INST] Q1 [/INST]A1</s>[INST] {QUESTION} [/INST]A2</s>",
    "mistral": f"<s>[INST] Q1 [/INST]A1</s>[INST] {QUESTION} [/INST]A2</s>",
    "deepseek2": f"<s>User: Q1\n\nAssistant:A1</s>User: {QUESTION}\n\nAssistant:A2</s>",
    "llama3": (
        "<s><|start_header_id|>user<|end_header_id|>\n\nQ1<|eot_id|><|start_header_id|>assistant<|end_header_id|>\n\n"
        f"A1<|eot_id|><|start_header_id|>user<|end_header_id|>\n\n{QUESTION}<|eot_id|>"
        "<|start_header_id|>assistant<|end_header_id|>\n\nA2<|eot_id|>"
    ),
    "gemma": (
        "<s><start_of_turn>user\nQ1<end_of_turn>\n<start_of_turn>model\nA1<end_of_turn>\n"
        f"<start_of_turn>user\n{QUESTION}<end_of_turn>\n<start_of_turn>model\nA2</s>"
    ),
    "chatglm3": f"[gMASK]sop<|user|>\nQ1<|assistant|>\nA1<|user|>\n{QUESTION}<|assistant|>\nA2</s>",
    "glm4": f"[gMASK]<sop><|user|>\nQ1<|assistant|>\nA1<|user|>\n{QUESTION}<|assistant|>\nA2</s>",
    "chatglm2": f"[gMASK]sop[Round 1]\n\n问：Q1\n\n答：A1\n\n[Round 2]\n\n问：{QUESTION}\n\n答：A2</s>",
}


@pytest.mark.parametrize("name", list(WRITTEN))
def test_conversations_are_written_as_published(tokenizer: Any, name: str) -> None:
    assert written(tokenizer, name)[0] == WRITTEN[name]


@pytest.mark.parametrize(
    ("name", "learnt"),
    [
        ("empty", "A1A2"),
        ("default", "A1</s>A2</s>"),
        ("qwen", "A1<|im_end|>A2<|im_end|>"),
        ("chatglm3", "\nA1</s>\nA2</s>"),  # one eos ends all; the start of a later turn teaches to stop before it
        ("gemma", "A1</s>A2</s>"),
    ],
)
def test_answers_are_learnt_with_their_end(tokenizer: Any, name: str, learnt: str) -> None:
    assert written(tokenizer, name)[1] == learnt


def test_system_texts(tokenizer: Any) -> None:
    assert written(tokenizer, "qwen")[0].startswith(f"{IM}system\nYou are a helpful assistant.<|im_end|>\n{IM}user")
    assert written(tokenizer, "qwen", "Be kind")[0].startswith(f"{IM}system\nBe kind<|im_end|>\n{IM}user")
    assert written(tokenizer, "llama2", "S")[0].startswith("<s>[INST] <<SYS>>\nS\n<</SYS>>\n\nQ1 [/INST]")
    assert written(tokenizer, "chatglm3_system")[0].startswith("[gMASK]sop<|system|>\nYou are ChatGLM3")
    template = get_template("default")
    asked = [{"role": "system", "content": "From the list"}, *TURNS[:1]]
    assert tokenizer.decode(template.encode_prompt(tokenizer, asked)) == "From the list\nHuman: Q1\nAssistant:"


@pytest.mark.parametrize("name", PUBLISHED)
def test_a_prompt_is_what_precedes_the_answer(tokenizer: Any, name: str) -> None:
    template = get_template(name)
    fitted = fit_tokenizer(template, tokenizer)
    prompt = template.encode_prompt(fitted, TURNS[:3])
    whole = template.encode(fitted, TURNS)[0]
    assert whole[: len(prompt)] == prompt
    rest = fitted.decode(whole[len(prompt) :])
    assert rest.startswith("A2") and "Q" not in rest


def test_tool_calls(tokenizer: Any) -> None:
    turns = [
        TURNS[0],
        {"role": "function", "content": json.dumps({"name": "look", "arguments": {"at": "é"}})},
        {"role": "observation", "content": "seen"},
        TURNS[1],
    ]
    tools = json.dumps(
        [{"name": "look", "description": "Look.", "parameters": {"properties": {"at": {"type": "string"}}}}]
    )
    text = tokenizer.decode(get_template("default").encode(tokenizer, turns, tools=tools)[0])
    assert 'Assistant:Action: look\nAction Input: {"at": "é"}</s>\nHuman: seen' in text
    assert "> Tool Name: look\nTool Description: Look.\nTool Args:\n  - at (string): " in text
    glm = get_template("chatglm3").encode(tokenizer, turns)[0]
    assert '<|assistant|>\nlook\n{"at": "é"}<|observation|>\nseen<|assistant|>' in tokenizer.decode(glm)
    assert describe_tools("[]") == ""
    for bad in ("{", '[{"x": 1}]', "3"):
        with pytest.raises(ModelLinkError, match="tools"):
            describe_tools(bad)
    with pytest.raises(ModelLinkError, match="arguments"):
        get_template("default").encode(tokenizer, [TURNS[0], {"role": "function", "content": "look"}])


@pytest.mark.parametrize("roles", [["assistant"], ["user", "user"], ["user", "assistant", "assistant"], []])
def test_turns_out_of_order_are_refused(tokenizer: Any, roles: list[str]) -> None:
    with pytest.raises(ModelLinkError, match="conversation"):
        get_template("default").encode(tokenizer, [{"role": role, "content": "x"} for role in roles])


def test_fitting_leaves_the_tokenizer_as_it_is(tokenizer: Any, caplog: pytest.LogCaptureFixture) -> None:
    size, eos = len(tokenizer), tokenizer.eos_token
    fitted = fit_tokenizer(get_template("chatml"), tokenizer)
    assert (fitted.eos_token, fitted.pad_token) == ("<|im_end|>", "<|im_end|>")
    assert len(fitted) == size + 2 and "2 token(s)" in caplog.text
    assert (len(tokenizer), tokenizer.eos_token, tokenizer.pad_token) == (size, eos, None)
    assert fitted.encode("a<|im_start|>b", add_special_tokens=False)[1] == size + 1
    known = fit_tokenizer(get_template("llama3"), tokenizer)
    assert known.eos_token == "<|eot_id|>" and len(known) == size


def test_missing_tokens_are_named() -> None:
    raw = Tokenizer(models.WordLevel({"<unk>": 0}, unk_token="<unk>"))
    plain = transformers.PreTrainedTokenizerFast(tokenizer_object=raw, unk_token="<unk>")
    with pytest.raises(ModelLinkError, match=r"\[gMASK\]"):
        get_template("chatglm3").encode(plain, TURNS)
