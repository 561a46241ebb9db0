"""Chat templates: how a conversation becomes token ids. Every template is a row of data over one small encoder.

A turn is a source (everything the model is given) and a target (the answer it learns). The source of the first turn
is prefix + system block + user block; later sources begin with the separator. Every piece of literal text is
tokenized on its own, without special tokens; a `Token` is looked up as one id, `BOS` and `EOS` are the tokenizer's.
Behaviour: spec d.6; sources of the formats are the model cards.
"""

from __future__ import annotations

import copy
import json
import logging
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from modellink.errors import ModelLinkError
from modellink.registry import Registry

log = logging.getLogger(__name__)

IGNORED = -100  # label of a token that takes no part in the loss
USER_SIDE, MODEL_SIDE = ("user", "observation"), ("assistant", "function")


@dataclass(frozen=True)
class Token:
    """One token of the vocabulary, by its text."""

    text: str


BOS, EOS = Token("bos"), Token("eos")
Piece = str | Token
Block = tuple[Piece, ...]
Turn = tuple[list[int], list[int]]


@dataclass(frozen=True)
class Template:
    """One chat format. "{content}" in a piece is replaced by the message's text, "{round}" by the number of the turn
    from 1.

    `observation` (a tool's result) defaults to the user block. `efficient_eos`: answers carry no EOS of their own,
    one ends the whole conversation. `replace_eos`: the first stop word is the end-of-text token. `system_in_user`:
    the system block is written into the first user text. `function` is the text of a tool call with "{name}" and
    "{arguments}".
    """

    name: str
    user: Block
    system: Block = ("{content}",)
    answer: Block = ("{content}", EOS)
    observation: Block = ()
    function: str = "Action: {name}\nAction Input: {arguments}"
    separator: Block = ()
    prefix: Block = ()
    default_system: str = ""
    stop_words: tuple[str, ...] = ()
    replace_eos: bool = False
    efficient_eos: bool = False
    system_in_user: bool = False

    def turns(
        self, tokenizer: Any, messages: Sequence[dict[str, str]], system: str | None = None, tools: str | None = None
    ) -> list[Turn]:
        """(source ids, target ids) of every exchange; the last target is empty of content when the conversation
        awaits its answer.

        `messages` alternate between user or observation and assistant or function, after an optional leading system
        message. `system` None takes the template's own. `tools` is JSON text describing callable functions. Raises
        ModelLinkError for a conversation in another order, or a token the tokenizer lacks.
        """
        messages, system = split_system(messages, system)
        text = (self.default_system if system is None else system) + (describe_tools(tools) if tools else "")
        with_system = bool(text or tools)  # a list of no tools leaves an empty block
        turns: list[Turn] = []
        for number in range(0, len(messages), 2):
            question = messages[number]
            block = self.user if question["role"] == "user" else self.observation or self.user
            content, first = question["content"], number == 0
            opening: list[int] = self._ids(tokenizer, self.prefix if first else self.separator)
            if first and with_system and self.system_in_user:
                content = "".join(str(p) for p in self.system).replace("{content}", text) + content
            elif first and with_system:
                opening += self._ids(tokenizer, self.system, text)
            source = opening + self._ids(tokenizer, block, content, number // 2 + 1)
            if number + 1 == len(messages):  # the model is to speak: what precedes its text belongs to the source
                turns.append((source + self._ids(tokenizer, self._before_answer()), []))
            else:
                turns.append((source, self._answer(tokenizer, messages[number + 1])))
        return turns

    def encode(
        self, tokenizer: Any, messages: Sequence[dict[str, str]], system: str | None = None, tools: str | None = None
    ) -> tuple[list[int], list[int]]:
        """(ids, labels) of a whole conversation for fine-tuning: labels are -100 on sources, every answer is learnt."""
        ids: list[int] = []
        labels: list[int] = []
        end = tokenizer.eos_token_id
        for number, (source, target) in enumerate(self.turns(tokenizer, messages, system, tools)):
            hidden = [IGNORED] * len(source)
            if self.efficient_eos and number and hidden:
                hidden[0] = end
            ids += source + target
            labels += hidden + target
        return (ids + [end], labels + [end]) if self.efficient_eos else (ids, labels)

    def encode_prompt(
        self, tokenizer: Any, messages: Sequence[dict[str, str]], system: str | None = None, tools: str | None = None
    ) -> list[int]:
        """Ids of a conversation up to where the model is to speak."""
        return [token for turn in self.turns(tokenizer, messages, system, tools) for part in turn for token in part]

    def _before_answer(self) -> Block:
        """What the model's turn begins with besides its text (ChatGLM3's newline)."""
        head = self.answer[0]
        text = head.split("{content}")[0] if isinstance(head, str) else ""
        return (text,) if text else ()

    def _answer(self, tokenizer: Any, message: dict[str, str]) -> list[int]:
        content = message["content"]
        if message["role"] == "function":
            content = self._call(content)
        return self._ids(tokenizer, self.answer, content)

    def _call(self, content: str) -> str:
        """Text of one tool call or several, given as JSON."""
        try:
            parsed = json.loads(content)
            calls = parsed if isinstance(parsed, list) else [parsed]
            named = [(call["name"], json.dumps(call["arguments"], ensure_ascii=False)) for call in calls]
        except (ValueError, TypeError, KeyError) as error:
            raise ModelLinkError(
                f'a function call must be JSON with "name" and "arguments", but is {content[:60]!r}.'
            ) from error
        return "\n".join(self.function.replace("{name}", n).replace("{arguments}", a) for n, a in named)

    def _ids(self, tokenizer: Any, block: Block, content: str = "", number: int = 0) -> list[int]:
        ids: list[int] = []
        for piece in block:
            if isinstance(piece, Token):
                ids += self._special(tokenizer, piece)
            # the content goes in last: braces in it are text
            elif text := piece.replace("{round}", str(number)).replace("{content}", content):
                ids += tokenizer.encode(text, add_special_tokens=False)
        return ids

    def _special(self, tokenizer: Any, piece: Token) -> list[int]:
        if piece is BOS or piece is EOS:
            found = tokenizer.bos_token_id if piece is BOS else tokenizer.eos_token_id
            return [] if found is None else [found]
        found = tokenizer.convert_tokens_to_ids(piece.text)
        if found is None or found == tokenizer.unk_token_id:
            raise ModelLinkError(
                f"template {self.name!r} needs the token {piece.text!r}, which the tokenizer lacks: "
                "use the model's own tokenizer, or another --prompt-type."
            )
        return [found]


def split_system(
    messages: Sequence[dict[str, str]], system: str | None = None
) -> tuple[list[dict[str, str]], str | None]:
    """Take a leading system message out of a conversation and check the order of the others (ModelLinkError)."""
    rest = list(messages)
    if rest and rest[0]["role"] == "system":
        system = rest.pop(0)["content"]
    if not rest:
        raise ModelLinkError("a conversation has no message: give at least one with the role 'user'.")
    for place, message in enumerate(rest):
        allowed = MODEL_SIDE if place % 2 else USER_SIDE
        if message["role"] not in allowed:
            raise ModelLinkError(
                f"message {place + 1} of a conversation has the role {message['role']!r} where {' or '.join(allowed)} "
                "belongs: user side and model side take turns, the user begins."
            )
    return rest, system


def _describe_parameter(name: str, parameter: dict[str, Any], required: Sequence[str]) -> str:
    notes = ", required" if name in required else ""
    values = f", should be one of [{', '.join(map(str, parameter['enum']))}]" if parameter.get("enum") else ""
    items = f", where each item should be {parameter['items'].get('type', '')}" if parameter.get("items") else ""
    kind, meaning = parameter.get("type", ""), parameter.get("description", "")
    return f"  - {name} ({kind}{notes}): {meaning}{values}{items}\n"


def describe_tools(tools: str) -> str:
    """The text about callable functions that follows the system text, from their JSON description (spec d.6)."""
    try:
        listed = json.loads(tools)
        functions = [tool.get("function", tool) for tool in listed]
        text, names = "", []
        for tool in functions:
            parameters = tool.get("parameters") or {}
            required = parameters.get("required", [])
            lines = [_describe_parameter(n, p, required) for n, p in parameters.get("properties", {}).items()]
            text += f"> Tool Name: {tool['name']}\nTool Description: {tool.get('description', '')}\nTool Args:\n"
            text += "".join(lines) + "\n"
            names.append(tool["name"])
    except (ValueError, TypeError, KeyError, AttributeError) as error:
        raise ModelLinkError(f"tools must be a JSON list of function descriptions, but are {tools[:60]!r}.") from error
    if not names:
        return ""
    return (
        f"You have access to the following tools:\n{text}Use the following format if using a tool:\n```\n"
        f"Action: tool name (one of [{', '.join(names)}])\n"
        "Action Input: the input to the tool, in a JSON format representing the kwargs "
        '(e.g. ```{"input": "hello world", "num_beams": 5}```)\n```\n'
    )


def fit_tokenizer(template: Template, tokenizer: Any) -> Any:
    """A copy of the tokenizer as this template needs it; the one passed in is left as it is.

    The first stop word becomes the end-of-text token where the template says so, a missing one becomes
    `<|endoftext|>`, a missing pad token the end-of-text token, and the other stop words become special tokens. Warns
    when the vocabulary grows by that.
    """
    fitted = copy.deepcopy(tokenizer)
    size = len(fitted)
    words = list(template.stop_words)
    if template.replace_eos and words:
        fitted.add_special_tokens({"eos_token": words.pop(0)})
    if fitted.eos_token_id is None:
        fitted.add_special_tokens({"eos_token": "<|endoftext|>"})
    if fitted.pad_token_id is None:
        fitted.pad_token = fitted.eos_token
    if words:
        # the copy's own extra special tokens stay
        fitted.add_tokens(words, special_tokens=True)
    if len(fitted) > size:
        log.warning(
            "template %r adds %d token(s) to the tokenizer (%d -> %d): the padded vocabulary must have room for them",
            template.name,
            len(fitted) - size,
            size,
            len(fitted),
        )
    return fitted


TEMPLATES: Registry[Template] = Registry("prompt type")


def get_template(name: str) -> Template:
    """The template called `name`; raises ModelLinkError with the nearest names."""
    return TEMPLATES.get(name)


_CHATML: dict[str, Any] = dict(
    user=("<|im_start|>user\n{content}<|im_end|>\n<|im_start|>assistant\n",),
    system=("<|im_start|>system\n{content}<|im_end|>\n",),
    separator=("\n",),
    replace_eos=True,
)
_CHATML_TOOL = ("<|im_start|>tool\n{content}<|im_end|>\n<|im_start|>assistant\n",)
_BRACKETS: dict[str, Any] = dict(user=("[INST] {content} [/INST]",), prefix=(BOS,))
_DEEPSEEK: dict[str, Any] = dict(user=("User: {content}\n\nAssistant:",), system=("{content}\n\n",), prefix=(BOS,))
_GLM: dict[str, Any] = dict(
    answer=("\n{content}",),
    function="{name}\n{arguments}",
    stop_words=("<|user|>", "<|observation|>"),
    efficient_eos=True,
)
_GLM3: dict[str, Any] = dict(
    _GLM,
    user=(Token("<|user|>"), "\n{content}", Token("<|assistant|>")),
    system=(Token("[gMASK]"), Token("sop"), Token("<|system|>"), "\n{content}"),
    observation=(Token("<|observation|>"), "\n{content}", Token("<|assistant|>")),
)
_LLAMA3_ROLE = "<|start_header_id|>%s<|end_header_id|>\n\n{content}<|eot_id|>"
_LLAMA3_REPLY = "<|start_header_id|>assistant<|end_header_id|>\n\n"

_ROWS: tuple[Template, ...] = (
    Template("empty", ("{content}",), answer=("{content}",)),
    Template("default", ("Human: {content}\nAssistant:",), system=("{content}\n",), separator=("\n",)),
    Template(
        "chatglm3_system",
        default_system="You are ChatGLM3, a large language model trained by Zhipu.AI. "
        "Follow the user's instructions carefully. Respond using markdown.",
        **_GLM3,
    ),
    Template("chatglm3", **{**_GLM3, "prefix": _GLM3["system"][:2], "system": _GLM3["system"][2:]}),
    Template(
        "chatglm2",
        ("[Round {round}]\n\n问：{content}\n\n答：",),
        answer=("{content}",),
        separator=("\n\n",),
        prefix=(Token("[gMASK]"), Token("sop")),
        efficient_eos=True,
    ),
    Template(
        "glm4",
        ("<|user|>\n{content}<|assistant|>",),
        ("<|system|>\n{content}",),
        observation=("<|observation|>\n{content}<|assistant|>",),
        prefix=("[gMASK]<sop>",),
        **_GLM,
    ),
    Template("chatml", observation=_CHATML_TOOL, stop_words=("<|im_end|>", "<|im_start|>"), **_CHATML),
    Template(
        "chatml_de",
        observation=_CHATML_TOOL,
        default_system="Du bist ein freundlicher und hilfsbereiter KI-Assistent.",
        stop_words=("<|im_end|>", "<|im_start|>"),
        **_CHATML,
    ),
    Template(
        "qwen",
        observation=_CHATML_TOOL,
        default_system="You are a helpful assistant.",
        stop_words=("<|im_end|>",),
        **_CHATML,
    ),
    Template("llama2", (BOS, "[INST] {content} [/INST]"), ("<<SYS>>\n{content}\n<</SYS>>\n\n",), system_in_user=True),
    Template(
        "llama3",
        (_LLAMA3_ROLE % "user" + _LLAMA3_REPLY,),
        (_LLAMA3_ROLE % "system",),
        observation=(_LLAMA3_ROLE % "tool" + _LLAMA3_REPLY,),
        prefix=(BOS,),
        stop_words=("<|eot_id|>",),
        replace_eos=True,
    ),
    Template("mixtral", **_BRACKETS),
    Template("mistral", **_BRACKETS),
    Template(
        "alpaca",
        ("### Instruction:\n{content}\n\n### Response:\n",),
        separator=("\n\n",),
        default_system="Below is an instruction that describes a task. "
        "Write a response that appropriately completes the request.\n\n",
    ),
    Template("deepseek2", **_DEEPSEEK),
    Template("deepseek2-lite", **_DEEPSEEK),
    Template(
        "gemma",
        ("<start_of_turn>user\n{content}<end_of_turn>\n<start_of_turn>model\n",),
        answer=("{content}",),
        observation=("<start_of_turn>tool\n{content}<end_of_turn>\n<start_of_turn>model\n",),
        separator=("<end_of_turn>\n",),
        prefix=(BOS,),
        efficient_eos=True,
    ),
)
for _row in _ROWS:
    TEMPLATES.add(_row.name, _row)
