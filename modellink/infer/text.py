"""Text at the two ends of decoding: tokens become text piece by piece, and an answer ends at a stop string.

A token may hold a part of a character only. `TextStream` hands out text when it is whole, never a half character and
never the beginning of a stop string that later completes; what it hands out in pieces equals what the tokenizer makes
of all tokens at once.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

_BROKEN = "\ufffd"  # what tokenizers decode an incomplete UTF-8 sequence to


def decode_text(tokenizer: Any, tokens: Sequence[int]) -> str:
    """Text of `tokens` without special tokens and without any prettifying of spaces."""
    return tokenizer.decode(list(tokens), skip_special_tokens=True, clean_up_tokenization_spaces=False)


class TextStream:
    """Decodes one answer as its tokens arrive.

    Only a window of recent tokens is decoded again per token: from `_start`, where the window begins, to `_end`, up
    to which its text has been handed out. The window keeps one handed-out piece as context, because a token's text
    depends on the one before it.
    """

    def __init__(self, tokenizer: Any, stop_strings: Sequence[str] = ()) -> None:
        self.tokenizer = tokenizer
        self.stop_strings = [text for text in stop_strings if text]
        self.tokens: list[int] = []
        self.stopped = False
        self._decoded = ""
        self._start = self._end = 0

    @property
    def text(self) -> str:
        """The text that is certain so far."""
        if self.stopped:
            return self._decoded
        held = max((_overlap(self._decoded, stop) for stop in self.stop_strings), default=0)
        return self._decoded[: len(self._decoded) - held]

    def push(self, token: int) -> bool:
        """Take one more token; returns whether a stop string is now complete (the text then ends before it)."""
        self.tokens.append(token)
        before = decode_text(self.tokenizer, self.tokens[self._start : self._end])
        now = decode_text(self.tokenizer, self.tokens[self._start :])
        if len(now) > len(before) and not now.endswith(_BROKEN):
            self._decoded += now[len(before) :]
            self._start, self._end = self._end, len(self.tokens)
            self._find_stop()
        return self.stopped

    def finish(self) -> str:
        """The whole text, once no more tokens come."""
        if not self.stopped:
            self._decoded = decode_text(self.tokenizer, self.tokens)
            self._find_stop()
            self.stopped = True
        return self._decoded

    def _find_stop(self) -> None:
        places = [place for stop in self.stop_strings if (place := self._decoded.find(stop)) >= 0]
        if places:
            self._decoded = self._decoded[: min(places)]
            self.stopped = True


def _overlap(text: str, stop: str) -> int:
    """Length of the longest end of `text` that begins `stop`."""
    return next((size for size in range(min(len(stop) - 1, len(text)), 0, -1) if text.endswith(stop[:size])), 0)
