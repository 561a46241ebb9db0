"""What a row of raw data becomes. A handler names the columns it reads and the files it writes, and turns rows into
ids.

Adding one is a class with `encode`, registered under the name that `--handler-name` takes. `encode` runs in worker
processes on a few hundred rows at a time and must depend on nothing but those rows. What has to see the whole data at
once (packing) goes into `arrange`, which runs once, in the parent process, over the finished files.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from itertools import chain
from typing import Any, ClassVar

import numpy as np
import numpy.typing as npt

from modellink.config.preprocess_schema import PreprocessConfig
from modellink.data.indexed import IndexedDataset, IndexedDatasetWriter, best_dtype
from modellink.data.tokenizer import Tokenizer
from modellink.data.words import packer
from modellink.errors import ModelLinkError
from modellink.registry import Registry, suggest

Row = dict[str, Any]
Where = Callable[[int], str]


@dataclass
class Encoded:
    """Documents for one output file.

    Attributes:
        tokens: ids of all documents back to back, 1-D, in the dtype of the file.
        lengths: int32, tokens of each sequence.
        sequences: sequences in each document (0 for an empty one); None means one each.
    """

    tokens: npt.NDArray[Any]
    lengths: npt.NDArray[np.int32]
    sequences: npt.NDArray[np.int32] | None = None


class Handler:
    """Base of all handlers; made once per process with the options and the tokenizer.

    Attributes:
        accepts: options that only some handlers know ("pack", "max_samples", ...) and this one does.
        columns: columns it reads, so that a column store need not decode the others; None for all.
        outputs: name -> dtype of the files written, as PREFIX_NAME_document.bin and .idx.
    """

    accepts: ClassVar[frozenset[str]] = frozenset()
    columns: Sequence[str] | None = None
    outputs: Mapping[str, npt.DTypeLike]

    def __init__(self, config: PreprocessConfig, tokenizer: Tokenizer) -> None:
        self.config, self.tokenizer = config, tokenizer
        self.outputs = {}

    def encode(self, rows: Sequence[Row], where: Where) -> dict[str, Encoded]:
        """Return the documents of `rows` for every output; `where(i)` says which file and line row i is from."""
        raise AssertionError(f"{type(self).__name__} must say how rows are encoded")

    # `arrange(files, writers)`, when a handler has one, reads the encoded files and writes the final ones.
    arrange: Callable[[Mapping[str, IndexedDataset], Mapping[str, IndexedDatasetWriter]], None] | None = None


HANDLERS: Registry[type[Handler]] = Registry("handler")


def build_handler(config: PreprocessConfig, tokenizer: Tokenizer) -> Handler:
    """Return the handler of `config.handler_name` (empty: GeneralPretrainHandler)."""
    return HANDLERS.get(config.handler_name or "GeneralPretrainHandler")(config, tokenizer)


def column(row: Row, name: str, where: str) -> Any:
    """Return `row[name]`, or say which columns there are."""
    if name not in row:
        raise ModelLinkError(
            f"{where} has no column {name!r}; it has {', '.join(map(repr, row))}.{suggest(name, row)} "
            f"Name the column with --json-keys or --map-keys"
        )
    return row[name]


@HANDLERS.register("GeneralPretrainHandler")
class GeneralPretrainHandler(Handler):
    """Each --json-keys column holds text, which becomes one document with the tokenizer's own special tokens.

    A list of texts is one document of as many sequences. As in Megatron, a text without tokens is a document without
    sequences, and eod is appended (--append-eod) to documents that have tokens.
    """

    def __init__(self, config: PreprocessConfig, tokenizer: Tokenizer) -> None:
        super().__init__(config, tokenizer)
        self.dtype = best_dtype(tokenizer.vocab_size)
        self.columns = config.json_keys
        self.outputs = dict.fromkeys(config.json_keys, self.dtype)

    def texts(self, rows: Sequence[Row], key: str, where: Where) -> list[str | list[str]]:
        """Return the text of every row for output `key`."""
        found = [column(row, key, where(i)) for i, row in enumerate(rows)]
        for i, text in enumerate(found):
            if not isinstance(text, str) and not (isinstance(text, list) and all(isinstance(t, str) for t in text)):
                raise ModelLinkError(
                    f"{where(i)}: column {key!r} holds {type(text).__name__}, not text; drop or fix the row"
                )
        return found

    def encode(self, rows: Sequence[Row], where: Where) -> dict[str, Encoded]:
        return {key: self._encode_texts(self.texts(rows, key, where)) for key in self.outputs}

    def _encode_texts(self, documents: list[str | list[str]]) -> Encoded:
        nested = [[text] if isinstance(text, str) else text for text in documents]
        ids = iter(self.tokenizer.encode_bytes(list(chain.from_iterable(nested)), self.dtype))
        eod = packer(self.dtype)([self.tokenizer.eod]) if self.config.append_eod else b""
        kept: list[bytes] = []
        sequences = np.zeros(len(documents), np.int32)
        for i, texts in enumerate(nested):
            parts = [part for _ in texts if (part := next(ids))]
            if parts:
                parts[-1] += eod
            sequences[i] = len(parts)
            kept += parts
        lengths = np.fromiter(map(len, kept), np.int64, len(kept)) // self.dtype.itemsize
        return Encoded(np.frombuffer(b"".join(kept), self.dtype), lengths.astype(np.int32), sequences)


_ALPACA_PREAMBLE = (
    "A chat between a curious user and an artificial intelligence assistant. "
    "The assistant gives helpful, detailed, and polite answers to the user's questions. "
)


@HANDLERS.register("AlpacaPretrainHandler")
class AlpacaPretrainHandler(GeneralPretrainHandler):
    """Columns instruction, input (may be missing or empty) and output, written out as one chat-like paragraph, key
    "text".
    """

    def __init__(self, config: PreprocessConfig, tokenizer: Tokenizer) -> None:
        super().__init__(config, tokenizer)
        self.columns = ("instruction", "input", "output")
        self.outputs = {"text": self.dtype}

    def texts(self, rows: Sequence[Row], key: str, where: Where) -> list[str | list[str]]:
        found: list[str | list[str]] = []
        for i, row in enumerate(rows):
            parts = [column(row, "instruction", where(i)), row.get("input") or "", column(row, "output", where(i))]
            if not all(isinstance(part, str) for part in parts):
                raise ModelLinkError(f"{where(i)}: instruction, input and output must be text; drop or fix the row")
            instruction = "\n".join(part for part in parts[:2] if part)
            found.append(f"{_ALPACA_PREAMBLE}USER: ### Instruction: {instruction} ASSISTANT: {parts[2]}")
        return found
