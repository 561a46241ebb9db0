"""Conversations in a terminal: remembers the last exchanges, formats them as the model was trained, streams the
answers.

With a template or the tokenizer's own chat format the conversation is a list of messages; without either, earlier
turns are simply the text before the question. Beyond `history_turns` exchanges the oldest is forgotten.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator
from typing import Any

from modellink.infer.model import GPTModel
from modellink.infer.prompts import Message

LEAVE, START_OVER = frozenset({"q", "quit", "exit"}), frozenset({"clear", "new"})
PROMPT, HEADER = "You >> ", "ModelLink:"


class Chat:
    """One conversation. `options` go to `GPTModel.generate`; `template` (a name) and `hf_chat_template` set the
    format.
    """

    def __init__(
        self,
        model: GPTModel,
        history_turns: int = 3,
        template: str | None = None,
        hf_chat_template: bool = False,
        **options: Any,
    ) -> None:
        self.model, self.history_turns = model, history_turns
        self.formatted = bool(template or hf_chat_template)
        self.options = options | {"template": template, "hf_chat_template": hf_chat_template}
        self.exchanges: list[tuple[str, str]] = []

    def clear(self) -> None:
        """Forget everything said so far."""
        self.exchanges.clear()

    def prompt(self, question: str) -> list[Message] | str:
        """What the model is given for `question`: the messages, or the text, of the exchanges it remembers."""
        kept = self.exchanges[-self.history_turns :] if self.history_turns else []
        if not self.formatted:
            return "".join(part for exchange in kept for part in exchange) + question
        messages = []
        for asked, answered in kept:
            messages += [{"role": "user", "content": asked}, {"role": "assistant", "content": answered}]
        return [*messages, {"role": "user", "content": question}]

    def reply(self, question: str) -> Iterator[str]:
        """Yield the growing answer; an answer that is broken off is remembered as far as it went."""
        answer = ""
        try:
            for answer in self.model.generate(self.prompt(question), stream=True, **self.options):
                yield answer
        finally:
            self.exchanges.append((question, answer))


def converse(chat: Chat, read: Callable[[str], str] = input, write: Callable[[str], Any] | None = None) -> None:
    """Talk until `q`, `quit`, `exit` or the end of the input; `clear` and `new` start over, blank lines are ignored.

    Ctrl-C breaks off an answer. Reads whole lines, so a conversation can also be piped in.
    """
    write = write or _print
    while True:
        try:
            question = read(PROMPT).strip()
        except EOFError:
            write("\n")
            return
        if question.lower() in LEAVE:
            return
        if question.lower() in START_OVER:
            chat.clear()
            if sys.stdout.isatty():
                write("\033[2J\033[H")
        elif question:
            write(f"{HEADER}\n")
            _stream(chat.reply(question), write)


def _stream(answers: Iterator[str], write: Callable[[str], Any]) -> None:
    shown = ""
    try:
        for answer in answers:
            # normally only the new end; all of it in the rare case that the whole text reads differently
            write(answer[len(shown) :] if answer.startswith(shown) else f"\n{answer}")
            shown = answer
    except KeyboardInterrupt:
        write(" [stopped]")
    write("\n\n")


def _print(text: str) -> None:
    print(text, end="", flush=True)
