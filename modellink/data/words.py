"""Tokenize much text fast: cut it into words, look each word up, and ask the Rust tokenizer only for new ones.

A BPE tokenizer works on one word at a time, and in real text most words have been seen before. A word's ids are kept
as raw bytes in the dtype of the output file, so a document is one join. What makes this exact rather than nearly right
is where words are cut, and it is done only for tokenizers whose own description (tokenizer.json) proves the cuts:

* SentencePiece style (Llama 2): the tokenizer sees a whole text as one word. Cutting between two characters changes
nothing when no merge joins a symbol that ends with the first to one that begins with the second. The merge table says
which characters can be joined at all; runs of those (a space mark only at the start) are the words, all others stand
alone. * Byte level (GPT-2, Qwen): words are what the tokenizer's own regular expression matches. Its character classes
are translated for ASCII, so texts with other characters go to the Rust tokenizer whole.

The same goes for texts that contain one of the tokenizer's added tokens. Tokenizers of any other build are not touched.
"""

from __future__ import annotations

import json
import re
import sys
from array import array
from collections.abc import Callable, Sequence
from itertools import chain
from typing import Any

import numpy as np
import numpy.typing as npt

CACHE_SIZE = 1 << 17
_LONGEST_CACHED = 48
_MARK = "▁"
_GPT2 = r"'s|'t|'re|'ve|'m|'ll|'d| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+"
_BYTE_TOKEN = re.compile(r"<0x[0-9A-F]{2}>")
_PROBES = (
    "Hello  world,\n\n it's 12345 x\t",
    "a",
    " a ",
    "\n",
    "中文 mixed, text。ok",
    "  \n  two",
    "don't'S ABC'll_x-1.5e3 ",
)


def packer(dtype: np.dtype[Any]) -> Callable[[Sequence[int]], bytes]:
    """Return the function that turns ids into the raw bytes of a little-endian array.

    It raises OverflowError when an id does not fit `dtype`.
    """
    code = {"<u2": "H", "<i4": "i"}.get(dtype.str) if sys.byteorder == "little" else None
    if code is None:
        return lambda ids: np.array(ids, dtype).tobytes()
    return lambda ids: array(code, ids).tobytes()  # several times faster than numpy for short lists


class WordEncoder:
    """Ids of texts as raw bytes of `dtype`; made by `word_encoder`, which refuses tokenizers that it does not
    understand."""

    def __init__(self, rust: Any, by_word: Any, pattern: re.Pattern[str], ascii_only: bool, prepend: str) -> None:
        self._rust, self._by_word, self._pattern = rust, by_word, pattern
        self._ascii_only, self._prepend = ascii_only, prepend
        added = [token.content for token in rust.get_added_tokens_decoder().values()]
        self._added = re.compile("|".join(map(re.escape, added))) if added else None
        self._cache = _Cache(by_word, np.dtype("<i4"))
        bare, full = (rust.encode("a", add_special_tokens=special).ids for special in (False, True))
        at = next(i for i in range(len(full)) if full[i : i + len(bare)] == bare)
        self._before, self._after = full[:at], full[at + len(bare) :]

    def encode(self, texts: Sequence[str], dtype: npt.DTypeLike) -> list[bytes]:
        """Return for every text the bytes of its ids, special tokens included, in `dtype`.

        Raises OverflowError when an id does not fit.
        """
        if np.dtype(dtype) != self._cache.dtype:
            self._cache = _Cache(self._by_word, np.dtype(dtype))
        words = [self._words(text) for text in texts]
        whole = [text for text, cut in zip(texts, words, strict=True) if cut is None]
        encoded = iter(self._rust.encode_batch_fast(whole) if whole else [])
        cache, pack = self._cache, packer(self._cache.dtype)
        before, after = pack(self._before), pack(self._after)
        return [
            pack(next(encoded).ids) if cut is None else b"".join(chain([before], map(cache.__getitem__, cut), [after]))
            for cut in words
        ]

    def _words(self, text: str) -> list[str] | None:
        if self._added is not None and self._added.search(text):
            return None
        if not self._ascii_only:
            return self._pattern.findall(self._prepend + text.replace(" ", _MARK)) if text else []
        if not text.isascii():
            return None
        found = self._pattern.findall(text)
        return found if sum(map(len, found)) == len(text) else None


class _Cache(dict[str, bytes]):
    """Word -> bytes of its ids; a word that is not there is encoded, and kept while there is room.

    The first words of a corpus are its frequent ones, so a full cache is left as it is.
    """

    def __init__(self, by_word: Any, dtype: np.dtype[Any]) -> None:
        self.dtype, self._pack, self._encode = dtype, packer(dtype), by_word.encode
        # without a pre-tokenizer the model may be asked directly, which is faster
        self._tokenize = by_word.model.tokenize if by_word.pre_tokenizer is None else None

    def __missing__(self, word: str) -> bytes:
        if self._tokenize is not None:
            found = self._pack([token.id for token in self._tokenize(word)])
        else:
            found = self._pack(self._encode(word, add_special_tokens=False).ids)
        if len(self) < CACHE_SIZE and len(word) <= _LONGEST_CACHED:
            self[word] = found
        return found


def word_encoder(rust: Any) -> WordEncoder | None:
    """Return a WordEncoder for a `tokenizers.Tokenizer`, or None when its build does not allow one."""
    from tokenizers import Tokenizer

    spec = json.loads(rust.to_str())
    model = spec["model"]
    plain = model["type"] == "BPE" and not any(
        model.get(key) for key in ("dropout", "continuing_subword_prefix", "end_of_word_suffix", "ignore_merges")
    )
    if not plain or spec["truncation"] or spec["padding"]:
        return None
    by_word: dict[str, Any] = spec | {"normalizer": None, "pre_tokenizer": None, "post_processor": None}
    levels = _parts(spec["pre_tokenizer"], "pretokenizers")
    if not levels:
        source, ascii_only, prepend = (
            _joinable_words(model, spec["added_tokens"]),
            False,
            _space_mark(spec["normalizer"]),
        )
    else:
        source, ascii_only, prepend = _byte_level_words(levels), True, ""
        by_word["pre_tokenizer"] = levels[-1] | {"use_regex": False}
        if any(part["type"] not in ("NFC", "NFKC") for part in _parts(spec["normalizer"], "normalizers")):
            return None  # Unicode normal forms leave ASCII as it is; nothing is known of others
    if source is None or prepend is None:
        return None
    pattern = re.compile(source)
    found = WordEncoder(rust, Tokenizer.from_str(json.dumps(by_word)), pattern, ascii_only, prepend)
    agree = [np.frombuffer(b, "<i4").tolist() for b in found.encode(_PROBES, "<i4")]
    return found if not pattern.groups and agree == [rust.encode(text).ids for text in _PROBES] else None


def _parts(entry: dict[str, Any] | None, children: str) -> list[dict[str, Any]]:
    if entry is None:
        return []
    return entry[children] if entry["type"] == "Sequence" else [entry]


def _space_mark(normalizer: dict[str, Any] | None) -> str | None:
    """What a SentencePiece-style normalizer puts before a text ("" or the mark); None when it does more than that."""
    parts = _parts(normalizer, "normalizers")
    replace = {"type": "Replace", "pattern": {"String": " "}, "content": _MARK}
    if parts == [{"type": "Prepend", "prepend": _MARK}, replace]:
        return _MARK
    return "" if parts == [replace] else None


def _joinable_words(model: dict[str, Any], added: list[dict[str, Any]]) -> str | None:
    """Regular expression of the longest pieces between which no merge can act."""
    merges = [pair if isinstance(pair, list) else pair.split(" ") for pair in model["merges"]]
    # a character without an entry of its own must become bytes, which no merge touches
    covered = model["byte_fallback"] and all(f"<0x{byte:02X}>" in model["vocab"] for byte in range(256))
    if not covered or any(_BYTE_TOKEN.fullmatch(side) for pair in merges for side in pair):
        return None
    if any(right[0] == _MARK and left[-1] != _MARK for left, right in merges):
        return None  # this one joins across the beginning of a word
    if any(_MARK in token["content"] for token in added):
        return None  # could arise from a space that was not there in the text
    joinable = {c for left, right in merges for c in (left[-1], right[0])} - {_MARK}
    letters = "".join(map(re.escape, sorted(joinable)))
    return f"{_MARK}*[{letters}]+|{_MARK}+|[^{_MARK}{letters}]" if letters else None


def _byte_level_words(levels: list[dict[str, Any]]) -> str | None:
    """The regular expression by which a byte-level tokenizer finds words, for ASCII text."""
    last = levels[-1]
    if last["type"] != "ByteLevel" or last["add_prefix_space"]:
        return None
    if len(levels) == 1:
        return _for_ascii(_GPT2) if last["use_regex"] else None
    first = levels[0]
    isolated = first["type"] == "Split" and first["behavior"] == "Isolated" and not first["invert"]
    if len(levels) != 2 or not isolated or last["use_regex"] or "Regex" not in first["pattern"]:
        return None
    return _for_ascii(first["pattern"]["Regex"])


def _for_ascii(pattern: str) -> str | None:
    r"""Write \p{L}, \p{N} and \s out as ASCII ranges; None when the pattern has what differs between engines."""
    ranges = {r"\p{L}": "a-zA-Z", r"\p{N}": "0-9", r"\s": r"\t\n\v\f\r "}
    result, inside = "", False
    for piece in re.findall(r"\\p\{\w+\}|\\.|.", pattern, re.DOTALL):
        if piece in ranges:
            result += ranges[piece] if inside else f"[{ranges[piece]}]"
        elif piece == r"\S" and not inside:
            result += f"[^{ranges[chr(92) + 's']}]"
        elif piece in (r"\r", r"\n", r"\t") or (len(piece) == 1 and (inside or piece not in ".$")):
            inside = piece == "[" or (inside and piece != "]")
            result += piece
        else:
            return None
    return result
