"""Tokenizers behind one small protocol: text to ids, ids to text, and the ids that mark ends.

Four kinds: a Hugging Face folder, a SentencePiece model (Llama 2), GPT-2's vocab.json + merges.txt, and the null
tokenizer whose text already is numbers. Everything is read from local files and no code from a model folder is ever
run.
"""

from __future__ import annotations

import copy
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import numpy.typing as npt

from modellink.data.words import WordEncoder, packer, word_encoder
from modellink.errors import ModelLinkError
from modellink.registry import Registry


class Tokenizer(Protocol):
    """What the rest of ModelLink asks of a tokenizer.

    Attributes:
        vocab_size: number of ids, before padding.
        eod: id that ends a document.
        bos: id that begins a text, or None.
        pad: id that fills up batches.
        hf: the Hugging Face tokenizer underneath, or None.
    """

    vocab_size: int
    eod: int
    bos: int | None
    pad: int
    hf: Any

    def encode(self, text: str, add_special_tokens: bool = True) -> list[int]:
        """Return the ids of `text`, with the tokenizer's own begin and end marks unless told otherwise."""
        ...

    def encode_batch(self, texts: Sequence[str], add_special_tokens: bool = True) -> list[list[int]]:
        """Return `encode` of every text, faster."""
        ...

    def encode_bytes(self, texts: Sequence[str], dtype: npt.DTypeLike) -> list[bytes]:
        """Return `encode` of every text as the raw bytes of a `dtype` array: the fastest way from text to a file.

        Raises ModelLinkError when an id does not fit.
        """
        ...

    def decode(self, ids: Sequence[int], skip_special_tokens: bool = True) -> str:
        """Return the text of `ids`."""
        ...


class _Bytes:
    """`encode_bytes` for all kinds: word by word where the Rust tokenizer underneath allows it (see `words.py`)."""

    _rust: Any = None
    _words: WordEncoder | None = None
    _looked: bool = False

    def encode_bytes(self: Any, texts: Sequence[str], dtype: npt.DTypeLike) -> list[bytes]:
        if not self._looked:
            self._looked, self._words = True, word_encoder(self._rust) if self._rust is not None else None
        try:
            if self._words is not None:
                return self._words.encode(texts, dtype)
            return list(map(packer(np.dtype(dtype)), self.encode_batch(texts)))
        except OverflowError as error:
            raise ModelLinkError(
                f"the tokenizer gives an id that does not fit {np.dtype(dtype).name} ({error}): it is larger than its "
                f"vocabulary size {self.vocab_size} says; fix the tokenizer or --vocab-size"
            ) from error


# how the names of the files begin that hold a tokenizer, or say where it is
_TOKENIZER_FILES = ("tokeniz", "vocab", "merges", "special_tokens", "added_tokens", "spiece", "sentencepiece", "config")


class HFTokenizer(_Bytes):
    """A tokenizer folder as Hugging Face writes it. eod is the eos id; pad falls back to it."""

    def __init__(
        self,
        folder: str,
        *,
        use_fast: bool = True,
        padding_side: str | None = None,
        kwargs: dict[str, Any] | None = None,
    ) -> None:
        if not Path(folder).is_dir():
            raise ModelLinkError(
                f"tokenizer folder {folder} does not exist; give a local folder with tokenizer files to "
                f"--tokenizer-name-or-path (models are not downloaded here)"
            )
        if not any(file.name.startswith(_TOKENIZER_FILES) for file in Path(folder).iterdir()):
            raise ModelLinkError(
                f"folder {folder} holds no tokenizer; give one with tokenizer.json, or with the files of a slow "
                f"tokenizer and their tokenizer_config.json, to --tokenizer-name-or-path"
            )
        from transformers import AutoTokenizer

        options = {"use_fast": use_fast, "local_files_only": True, "trust_remote_code": False, **(kwargs or {})}
        if padding_side:
            options["padding_side"] = padding_side
        try:
            hf = AutoTokenizer.from_pretrained(folder, **options)
        except (OSError, ValueError, KeyError, TypeError, ImportError) as error:
            reason = " ".join(str(error).split())[:300]
            raise ModelLinkError(
                f"no tokenizer can be read from {folder} ({reason}); the folder needs tokenizer.json or the files that "
                f"its tokenizer_config.json names"
            ) from error
        if hf.eos_token_id is None:
            raise ModelLinkError(
                f"the tokenizer in {folder} names no eos token; add eos_token to its tokenizer_config.json"
            )
        self._adopt(hf)

    def _adopt(self, hf: Any) -> None:
        self.hf = hf
        self._rust = getattr(hf, "backend_tokenizer", None)
        self.vocab_size = len(hf)
        self.bos: int | None = hf.bos_token_id
        self.eod: int = hf.eos_token_id
        self.pad: int = hf.eos_token_id if hf.pad_token_id is None else hf.pad_token_id

    def replaced_by(self, hf: Any) -> HFTokenizer:
        """The same interface over another Hugging Face tokenizer, such as one that a chat template added tokens to."""
        new = copy.copy(self)
        new._adopt(hf)
        return new

    def encode(self, text: str, add_special_tokens: bool = True) -> list[int]:
        if self._rust is not None:
            return self._rust.encode(text, add_special_tokens=add_special_tokens).ids
        return self.hf(text, add_special_tokens=add_special_tokens, return_attention_mask=False)["input_ids"]

    def encode_batch(self, texts: Sequence[str], add_special_tokens: bool = True) -> list[list[int]]:
        if self._rust is None:
            return [self.encode(text, add_special_tokens) for text in texts]
        # the fast variant leaves out character offsets, which nobody here reads
        batch = self._rust.encode_batch_fast(list(texts), add_special_tokens=add_special_tokens)
        return [encoding.ids for encoding in batch]

    def decode(self, ids: Sequence[int], skip_special_tokens: bool = True) -> str:
        return str(self.hf.decode(list(ids), skip_special_tokens=skip_special_tokens))


class Llama2Tokenizer(_Bytes):
    """A SentencePiece model; bos goes before every text, eod is eos, as in Megatron's class of this name."""

    hf = None

    def __init__(self, model: str) -> None:
        _require_file(model, "--tokenizer-model", "a SentencePiece tokenizer.model")
        from sentencepiece import SentencePieceProcessor

        try:
            self._model = SentencePieceProcessor(model_file=model)
        except RuntimeError as error:
            raise ModelLinkError(
                f"{model} is not a SentencePiece model; give tokenizer.model to --tokenizer-model"
            ) from error
        self.vocab_size = self._model.vocab_size()
        self.bos: int | None = self._model.bos_id()
        self.eod = self._model.eos_id()
        self.pad = self._model.pad_id() if self._model.pad_id() >= 0 else self.eod

    def encode(self, text: str, add_special_tokens: bool = True) -> list[int]:
        return self._model.encode(text, add_bos=add_special_tokens)

    def encode_batch(self, texts: Sequence[str], add_special_tokens: bool = True) -> list[list[int]]:
        return self._model.encode(list(texts), add_bos=add_special_tokens, num_threads=1)

    def decode(self, ids: Sequence[int], skip_special_tokens: bool = True) -> str:
        del skip_special_tokens  # SentencePiece never prints control pieces
        return self._model.decode([int(i) for i in ids])


class GPT2BPETokenizer(_Bytes):
    """GPT-2's byte-level BPE from vocab.json and merges.txt; eod is `<|endoftext|>`, nothing is added to a text."""

    hf = None
    bos: int | None = None

    def __init__(self, vocab_file: str, merge_file: str) -> None:
        _require_file(vocab_file, "--vocab-file", "GPT-2's vocab.json")
        _require_file(merge_file, "--merge-file", "GPT-2's merges.txt")
        from tokenizers import Tokenizer as RustTokenizer
        from tokenizers import decoders, models, pre_tokenizers

        try:
            self._rust = RustTokenizer(models.BPE.from_file(vocab_file, merge_file))
        except Exception as error:  # the Rust side raises plain Exception
            raise ModelLinkError(
                f"{vocab_file} and {merge_file} are not a byte-level BPE ({error}); give GPT-2's vocab.json and "
                f"merges.txt"
            ) from error
        self._rust.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
        self._rust.decoder = decoders.ByteLevel()
        eod = self._rust.token_to_id("<|endoftext|>")
        if eod is None:
            raise ModelLinkError(f"{vocab_file} has no <|endoftext|> entry; use GPT-2's own vocab.json")
        self.vocab_size = self._rust.get_vocab_size()
        self.eod = self.pad = eod

    def encode(self, text: str, add_special_tokens: bool = True) -> list[int]:
        return self._rust.encode(text, add_special_tokens=add_special_tokens).ids

    def encode_batch(self, texts: Sequence[str], add_special_tokens: bool = True) -> list[list[int]]:
        return [e.ids for e in self._rust.encode_batch_fast(list(texts), add_special_tokens=add_special_tokens)]

    def decode(self, ids: Sequence[int], skip_special_tokens: bool = True) -> str:
        kept = [i for i in ids if not (skip_special_tokens and i == self.eod)]
        return self._rust.decode(kept, skip_special_tokens=skip_special_tokens)


class NullTokenizer(_Bytes):
    """Text that already is numbers separated by blanks: `vocab_size` ids and one more for the end of a document."""

    hf = None
    bos: int | None = None

    def __init__(self, vocab_size: int) -> None:
        self.vocab_size = vocab_size + 1
        self.eod = self.pad = vocab_size

    def encode(self, text: str, add_special_tokens: bool = True) -> list[int]:
        del add_special_tokens
        try:
            return [int(word) for word in text.split()]
        except ValueError as error:
            raise ModelLinkError(
                f"NullTokenizer reads numbers only ({error}); choose another --tokenizer-type"
            ) from error

    def encode_batch(self, texts: Sequence[str], add_special_tokens: bool = True) -> list[list[int]]:
        return [self.encode(text, add_special_tokens) for text in texts]

    def decode(self, ids: Sequence[int], skip_special_tokens: bool = True) -> str:
        return " ".join(str(i) for i in ids if not (skip_special_tokens and i == self.eod))


KINDS: Registry[str] = Registry("tokenizer type")
for _kind in ("PretrainedFromHF", "Llama2Tokenizer", "GPT2BPETokenizer", "NullTokenizer"):
    KINDS.add(_kind, _kind)


def build_tokenizer(
    kind: str = "PretrainedFromHF",
    name_or_path: str | None = None,
    *,
    use_fast: bool = True,
    kwargs: Sequence[str] | dict[str, Any] | None = None,
    padding_side: str | None = None,
    vocab_file: str | None = None,
    merge_file: str | None = None,
    tokenizer_model: str | None = None,
    vocab_size: int | None = None,
) -> Tokenizer:
    """Return the tokenizer of --tokenizer-type `kind`.

    `kwargs` are further arguments of AutoTokenizer, as a mapping or as the flag's list "key value key value".
    Raises ModelLinkError when a file or folder is missing, unreadable or not given.
    """
    KINDS.get(kind)
    if kind == "PretrainedFromHF":
        folder = _given(name_or_path, kind, "--tokenizer-name-or-path")
        return HFTokenizer(folder, use_fast=use_fast, padding_side=padding_side, kwargs=_as_mapping(kwargs))
    if kind == "Llama2Tokenizer":
        return Llama2Tokenizer(_given(tokenizer_model, kind, "--tokenizer-model"))
    if kind == "GPT2BPETokenizer":
        return GPT2BPETokenizer(_given(vocab_file, kind, "--vocab-file"), _given(merge_file, kind, "--merge-file"))
    if vocab_size is None:
        raise ModelLinkError("--tokenizer-type NullTokenizer needs --vocab-size")
    return NullTokenizer(vocab_size)


def _as_mapping(kwargs: Sequence[str] | dict[str, Any] | None) -> dict[str, Any]:
    if kwargs is None or isinstance(kwargs, dict):
        return dict(kwargs or {})
    if len(kwargs) % 2:
        raise ModelLinkError("--tokenizer-kwargs must be pairs: key value key value")

    def value(text: str) -> Any:
        try:
            return json.loads(text[:1].lower() + text[1:] if text in ("True", "False") else text)
        except ValueError:
            return text

    return {key: value(text) for key, text in zip(kwargs[::2], kwargs[1::2], strict=True)}


def _given(value: str | None, kind: str, flag: str) -> str:
    if not value:
        raise ModelLinkError(f"--tokenizer-type {kind} needs {flag}")
    return value


def _require_file(path: str, flag: str, what: str) -> None:
    if not Path(path).is_file():
        raise ModelLinkError(f"tokenizer file {path} does not exist; give {what} to {flag}")


def padded_vocab_size(size: int, multiple: int = 128, tensor_parallel: int = 1) -> int:
    """Round a vocabulary up to a multiple of `multiple` * `tensor_parallel`, so that every rank holds as many rows."""
    step = multiple * tensor_parallel
    return -(-size // step) * step
