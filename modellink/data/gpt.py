"""Pre-training samples over a token file, the same ones in the same order as Megatron-Core's GPTDataset.

All documents of a split, repeated for as many epochs as the samples asked for need, are shuffled and thought of as one
long row of tokens; sample k is the window of S + 1 tokens that starts at token k * S. Three arrays say which:

    document index [E * documents]  int32   the shuffled row of documents
    sample index   [M + 1, 2]       int32   (place in the document index, token offset) at which window k starts
    shuffle index  [M]              uint32  the order in which windows are handed out

They follow from (seed, S, sequence lengths, samples asked, split) alone. When the last epoch is needed for less than
80 % of its samples it is shuffled by itself and comes last, so that no document of it is seen twice before the others
once.

Nothing here needs torch, and processes need no coordination: each may build the indices, and because a cache file only
ever appears whole and always with the same bytes, the ones that come later map what the first has written.
"""

from __future__ import annotations

import hashlib
import itertools
import json
import logging
import re
import zlib
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from modellink.data.documents import number_documents, restart_positions
from modellink.data.indexed import IndexedDataset
from modellink.errors import ModelLinkError
from modellink.files import atomic_path, atomic_write

logger = logging.getLogger(__name__)

SPLITS = ("train", "valid", "test")
_LAST_EPOCH_THRESHOLD = 0.80
_ARRAYS = ("document_index", "sample_index", "shuffle_index")


@dataclass(frozen=True)
class GPTOptions:
    """How samples are cut and masked.

    Attributes:
        sequence_length: tokens per sample (S).
        seed: of every shuffle.
        eod_mask_loss: no loss at positions whose input token is `eod`.
        reset_position_ids: positions restart after each `eod`; samples then carry "position_ids".
        reset_attention_mask: samples carry "documents", the number of each token's document.
        eod: end-of-document id, needed by the three above.
        cache_path: folder of index caches; None puts them beside the data, in `PREFIX/cache/GPTDataset_indices`.
        cache: False builds in memory only.
        tokenizer: any text that names the tokenizer; part of the cache key.
    """

    sequence_length: int = 512
    seed: int = 1234
    eod_mask_loss: bool = False
    reset_position_ids: bool = False
    reset_attention_mask: bool = False
    eod: int | None = None
    cache_path: str | None = None
    cache: bool = True
    tokenizer: str = ""

    def __post_init__(self) -> None:
        if self.sequence_length < 1:
            raise ModelLinkError(f"--seq-length {self.sequence_length} must be at least 1")
        if (self.eod_mask_loss or self.reset_position_ids or self.reset_attention_mask) and self.eod is None:
            raise ModelLinkError(
                "--eod-mask-loss, --reset-position-ids and --reset-attention-mask need the end-of-document id; "
                "give the tokenizer that the data was preprocessed with"
            )


def parse_split(split: str) -> list[tuple[float, float] | None]:
    """Turn "949,50,1" into three (start, end) fractions of the documents; a part of weight 0 is None."""
    weights = [float(text) for text in re.findall(r"[.0-9]+", split)]
    if not 1 <= len(weights) <= 3 or sum(weights) <= 0:
        raise ModelLinkError(f"--split {split!r} must be one to three weights such as 969,30,1, not all zero")
    vector = np.array(weights + [0.0] * (3 - len(weights)))
    # Summed one by one from the left: rounding decides at which document a split ends.
    edges = [0.0]
    for share in (vector / vector.sum()).tolist():
        edges.append(edges[-1] + share)
    return [(a, b) if b > a else None for a, b in itertools.pairwise(edges)]


def build_document_index(
    documents: npt.NDArray[np.int32], epochs: int, separate_last: bool, rng: np.random.RandomState
) -> npt.NDArray[np.int32]:
    """Repeat `documents` for `epochs` and shuffle all of it, the last epoch by itself if `separate_last`."""
    blocks = [epochs - 1, 1] if separate_last else [epochs]
    parts = [np.tile(documents, count) for count in blocks]
    for part in parts:
        rng.shuffle(part)
    return np.concatenate(parts)


def build_sample_index(
    lengths: npt.NDArray[np.int32], document_index: npt.NDArray[np.int32], sequence_length: int, samples: int
) -> npt.NDArray[Any]:
    """Return [samples + 1, 2]: where in the shuffled row of documents every window of `sequence_length` starts.

    Window k starts at token k * S of the row, and that token lies in the first document whose end is beyond it.
    """
    ends = np.cumsum(lengths[document_index], dtype=np.int64)
    starts = np.arange(samples + 1, dtype=np.int64) * sequence_length
    place = np.searchsorted(ends, starts, side="right")
    before = np.where(place > 0, ends[place - 1], 0)
    wide = max(len(document_index), int(lengths.max(initial=0))) > np.iinfo(np.int32).max
    index = np.stack([place, starts - before], axis=1).astype(np.int64 if wide else np.int32)
    index[0] = 0  # the first window starts at the first document even when that one is empty
    return index


def build_shuffle_index(first: int, total: int, rng: np.random.RandomState) -> npt.NDArray[Any]:
    """Return a permutation of [0, first) followed by one of [first, total)."""
    dtype = np.int64 if total >= np.iinfo(np.uint32).max - 1 else np.uint32
    head, tail = np.arange(first, dtype=dtype), np.arange(first, total, dtype=dtype)
    rng.shuffle(head)
    if first == total:
        return head
    rng.shuffle(tail)
    return np.concatenate([head, tail])


class GPTDataset:
    """One split of one token file as samples of S tokens.

    `ds[i]` is {"tokens": int64 [S], "labels": int64 [S], "loss_mask": float32 [S]}, and "position_ids": int64 [S] with
    `reset_position_ids`, "documents": int64 [S] with `reset_attention_mask`; labels are the tokens that follow.

    Args:
        indexed: the token file.
        documents: int32, the sequences of it that belong to this split.
        num_samples: samples that must be there; None for one epoch.
        split: "train", "valid" or "test".
        split_weights: the --split text (part of the cache key).

    Raises ModelLinkError when the split holds no token but samples are asked of it.
    """

    def __init__(
        self,
        indexed: IndexedDataset,
        documents: npt.NDArray[np.int32],
        num_samples: int | None,
        split: str,
        options: GPTOptions,
        split_weights: str = "",
    ) -> None:
        self.indexed, self.documents, self.num_samples = indexed, documents, num_samples
        self.split, self.options, self.split_weights = split, options, split_weights
        self.tokens_per_epoch = int(indexed.sequence_lengths[documents].sum(dtype=np.int64))
        if not self.tokens_per_epoch:
            raise ModelLinkError(
                f"the {split} split of {indexed.prefix}.bin is empty ({len(indexed):,} documents, --split "
                f"{split_weights}); give it a larger share of --split or use more data"
            )
        self.epochs = self._epochs()
        self.document_index, self.sample_index, self.shuffle_index = self._load_or_build()

    @classmethod
    def build(
        cls,
        prefix: str | Path,
        sequence_length: int = 512,
        seed: int = 1234,
        split: str = "949,50,1",
        num_samples: int | Sequence[int | None] | None = None,
        *,
        options: GPTOptions | None = None,
        **more: Any,
    ) -> tuple[GPTDataset | None, GPTDataset | None, GPTDataset | None]:
        """Open `prefix` and return its (train, valid, test) datasets; a split without documents is None.

        `num_samples` is a triple, or the number for training alone: valid and test are then one pass over their
        documents. None anywhere means one pass. `more` are fields of GPTOptions (`options` replaces all of them).
        """
        options = options or GPTOptions(sequence_length=sequence_length, seed=seed, **more)
        if isinstance(num_samples, Sequence):
            wanted = list(num_samples)
        else:
            wanted = [num_samples, None, None]
        indexed = IndexedDataset(prefix)
        built: list[GPTDataset | None] = []
        for name, bounds, count in zip(SPLITS, parse_split(split), wanted, strict=True):
            first, last = (round(edge * float(len(indexed))) for edge in bounds or (0.0, 0.0))
            # a few documents leave nothing for a small valid or test share: that is no dataset, not an error
            if first == last and name != "train":
                built.append(None)
                continue
            documents = np.arange(first, last, dtype=np.int32)
            built.append(cls(indexed, documents, count, name, options, split) if bounds else None)
        return built[0], built[1], built[2]

    def _epochs(self) -> int:
        if self.num_samples is None:
            return 1
        return max(1, -(-(self.num_samples * self.options.sequence_length + 1) // self.tokens_per_epoch))

    @property
    def _samples(self) -> int:
        return (self.epochs * self.tokens_per_epoch - 1) // self.options.sequence_length

    def _build(self) -> tuple[npt.NDArray[Any], ...]:
        self.indexed.check_index()
        length, total = self.options.sequence_length, self._samples
        separate, first = False, total
        if self.epochs > 1 and self.num_samples is not None:
            without_last = ((self.epochs - 1) * self.tokens_per_epoch - 1) // length
            per_epoch = (self.tokens_per_epoch - 1) // length
            separate = self.num_samples - without_last < int(_LAST_EPOCH_THRESHOLD * per_epoch)
            first = without_last if separate else total
        rng = np.random.RandomState(self.options.seed)
        document_index = build_document_index(self.documents, self.epochs, separate, rng)
        sample_index = build_sample_index(self.indexed.sequence_lengths, document_index, length, total)
        return document_index, sample_index, build_shuffle_index(first, total, rng)

    @property
    def description(self) -> str:
        """Everything the indices depend on, as JSON; its md5 names the cache files."""
        lengths = np.ascontiguousarray(self.indexed.sequence_lengths[self.documents])
        identity = {
            "class": type(self).__name__,
            "dataset_path": str(Path(self.indexed.prefix).absolute()),
            "num_samples": self.num_samples,
            "index_split": self.split,
            "random_seed": self.options.seed,
            "sequence_length": self.options.sequence_length,
            "split": self.split_weights,
            "documents": [int(self.documents[0]), int(self.documents[-1]) + 1],
            "tokenizer": self.options.tokenizer,
            # the file under this path may have been written again since
            "sequence_lengths_md5": hashlib.md5(lengths.data, usedforsecurity=False).hexdigest(),
        }
        return json.dumps(identity, indent=4)

    def _load_or_build(self) -> tuple[npt.NDArray[Any], ...]:
        if not self.options.cache:
            return self._build()
        default = Path(self.indexed.prefix) / "cache" / "GPTDataset_indices"
        folder = Path(self.options.cache_path) if self.options.cache_path else default
        key = hashlib.md5(self.description.encode(), usedforsecurity=False).hexdigest()
        stem = f"{key}-{type(self).__name__}"
        cached = self._load(folder, stem)
        if cached:
            return cached
        arrays = self._build()
        try:
            self._save(folder, stem, arrays)
        except OSError as error:
            logger.warning("data index cache %s cannot be written (%s); going on without it", folder, error)
        return arrays

    def _save(self, folder: Path, stem: str, arrays: tuple[npt.NDArray[Any], ...]) -> None:
        for name, array in zip(_ARRAYS, arrays, strict=True):
            with atomic_path(folder / f"{stem}-{name}.npy") as temporary, open(temporary, "wb") as handle:
                np.save(handle, array, allow_pickle=False)
        checks = {name: zlib.crc32(np.ascontiguousarray(a).data) for name, a in zip(_ARRAYS, arrays, strict=True)}
        # last, because it is what makes the others count
        text = json.dumps({"description": json.loads(self.description), "crc32": checks}, indent=4)
        atomic_write(folder / f"{stem}-description.txt", text)

    def _load(self, folder: Path, stem: str) -> tuple[npt.NDArray[Any], ...] | None:
        note = folder / f"{stem}-description.txt"
        if not note.is_file():
            return None
        try:
            checks = json.loads(note.read_text())["crc32"]
            paths = [folder / f"{stem}-{name}.npy" for name in _ARRAYS]
            arrays = [np.load(path, mmap_mode="r", allow_pickle=False) for path in paths]
            for name, array in zip(_ARRAYS, arrays, strict=True):
                if zlib.crc32(array.data) != checks[name]:
                    raise ValueError(f"{name} does not match its checksum")
        except (OSError, ValueError, KeyError, TypeError, EOFError) as error:
            logger.warning("data index cache %s is damaged (%s); building it again", note, error)
            return None
        return tuple(array.view(np.ndarray) for array in arrays)

    def __len__(self) -> int:
        return len(self.shuffle_index)

    def text(self, index: int) -> npt.NDArray[np.int64]:
        """Return the S + 1 tokens of sample `index`."""
        window = int(self.shuffle_index[index])
        (first, start), (last, end) = self.sample_index[window].tolist(), self.sample_index[window + 1].tolist()
        if first == last:
            parts = [self.indexed.get(int(self.document_index[first]), start, end - start + 1)]
        else:
            parts = [self.indexed.get(int(self.document_index[first]), start)]
            parts += [self.indexed.get(int(document)) for document in self.document_index[first + 1 : last]]
            parts.append(self.indexed.get(int(self.document_index[last]), 0, end + 1))
        return np.concatenate(parts, dtype=np.int64)

    def __getitem__(self, index: int) -> dict[str, npt.NDArray[Any]]:
        if not -len(self) <= index < len(self):
            raise IndexError(f"sample {index} of {len(self)}")
        text = self.text(index)
        return as_sample(text[:-1], text[1:], self.options)


def as_sample(
    tokens: npt.NDArray[np.int64], labels: npt.NDArray[np.int64], options: GPTOptions
) -> dict[str, npt.NDArray[Any]]:
    """Add the loss mask and, when asked for, the positions to `tokens` and `labels` (each [S])."""
    sample: dict[str, npt.NDArray[Any]] = {"tokens": tokens, "labels": labels}
    loss_mask = np.ones(len(tokens), np.float32)
    if options.eod_mask_loss:
        loss_mask[tokens == options.eod] = 0.0
    sample["loss_mask"] = loss_mask
    if options.eod is not None and options.reset_position_ids:
        sample["position_ids"] = restart_positions(tokens, options.eod)
    if options.eod is not None and options.reset_attention_mask:
        sample["documents"] = number_documents(tokens, options.eod)
    return sample
