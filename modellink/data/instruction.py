"""Instruction data as training samples: three token files of one prefix, one document per sample (spec d.2, d.8).

    train, valid, test = build_instruction_datasets(prefix, "949,50,1", 512, num_samples=(2000, 200, 200))
    batch = collate([train[i] for i in range(4)], 512, pad_id=0)     # {"tokens": [4, 512], "labels": [4, 512]}

Every epoch visits each document of a split once, in a new order drawn from one RandomState(seed). A sample's labels
stand under their own tokens in the file; `collate` moves them one place to the left, so labels[t] is what the model
at position t shall say. Legend: B batch, S sequence.
"""

from __future__ import annotations

import random
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from modellink.data.documents import number_documents, restart_positions
from modellink.data.gpt import parse_split
from modellink.data.indexed import IndexedDataset
from modellink.data.templates import IGNORED
from modellink.errors import ModelLinkError

Sample = dict[str, npt.NDArray[np.int64]]


def sample_order(
    documents: npt.NDArray[np.int64], num_samples: int, seed: int, full_shuffle: bool = False, no_shuffle: bool = False
) -> npt.NDArray[np.int64]:
    """The documents in the order they are visited: whole epochs until there are at least `num_samples` (spec d.8).

    `full_shuffle` shuffles across epochs as well, `no_shuffle` keeps the order of the file.
    """
    if full_shuffle and no_shuffle:
        raise ModelLinkError("--full-shuffle-instruction-dataset and --no-shuffle exclude each other: keep one.")
    epochs = max(1, -(-num_samples // len(documents)))
    if no_shuffle:
        return np.tile(documents, epochs)
    generator = np.random.RandomState(seed)
    order = np.concatenate([generator.permutation(documents) for _ in range(epochs)])
    if full_shuffle:
        visited = order.tolist()
        random.Random(seed).shuffle(visited)
        order = np.array(visited, dtype=np.int64)
    return order


class InstructionDataset:
    """The samples of one split; `[i]` gives int64 arrays "tokens" and "labels", at most `sequence_length` long.

    `num_samples` None is one epoch. Labels are -100 where a token takes no part in the loss.
    """

    def __init__(
        self,
        tokens: IndexedDataset,
        labels: IndexedDataset,
        documents: npt.NDArray[np.int64],
        sequence_length: int,
        seed: int = 1234,
        num_samples: int | None = None,
        full_shuffle: bool = False,
        no_shuffle: bool = False,
    ) -> None:
        self.indexed, self._labels, self.sequence_length = tokens, labels, sequence_length
        wanted = len(documents) if num_samples is None else num_samples
        self.order = sample_order(documents, wanted, seed, full_shuffle, no_shuffle)
        self._length = len(self.order) if num_samples is None else num_samples

    def __len__(self) -> int:
        return self._length

    def __getitem__(self, index: int) -> Sample:
        document = int(self.order[index])
        return {
            "tokens": self.indexed[document][: self.sequence_length].astype(np.int64),
            "labels": self._labels[document][: self.sequence_length].astype(np.int64),
        }


def open_instruction_files(prefix: str | Path) -> tuple[IndexedDataset, IndexedDataset]:
    """(token ids, labels) of the files that `preprocess` writes; raises ModelLinkError when they do not belong
    together.
    """
    names = [f"{prefix}_packed_{key}_document" for key in ("input_ids", "labels")]
    if not Path(f"{names[0]}.idx").is_file():
        raise ModelLinkError(
            f"no instruction data at {prefix}: {names[0]}.idx is missing. Give --data-path the --output-prefix of a "
            "`modellink preprocess` run with an instruction handler."
        )
    tokens, labels = IndexedDataset(names[0]), IndexedDataset(names[1])
    if len(tokens) != len(labels):
        raise ModelLinkError(
            f"{names[0]} holds {len(tokens)} samples but {names[1]} {len(labels)}: preprocess the data again."
        )
    return tokens, labels


def build_instruction_datasets(
    prefix: str | Path,
    split: str = "949,50,1",
    sequence_length: int = 512,
    seed: int = 1234,
    num_samples: Sequence[int | None] = (None, None, None),
    *,
    full_shuffle: bool = False,
    no_shuffle: bool = False,
) -> tuple[InstructionDataset | None, InstructionDataset | None, InstructionDataset | None]:
    """(train, valid, test) over the documents of one prefix; a split without documents, or of which 0 samples are
    asked, is None.

    Raises ModelLinkError when files are missing or when training samples are asked of an empty split.
    """
    tokens, labels = open_instruction_files(prefix)
    built: list[InstructionDataset | None] = []
    for name, bounds, count in zip(("train", "valid", "test"), parse_split(split), num_samples, strict=True):
        first, last = (round(edge * len(tokens)) for edge in bounds or (0.0, 0.0))
        if first == last and name == "train" and count != 0:
            raise ModelLinkError(f"the train split of {prefix} is empty ({len(tokens)} samples, --split {split}).")
        if first == last or count == 0:
            built.append(None)
            continue
        documents = np.arange(first, last, dtype=np.int64)
        built.append(
            InstructionDataset(tokens, labels, documents, sequence_length, seed, count, full_shuffle, no_shuffle)
        )
    return built[0], built[1], built[2]


def collate(
    rows: Sequence[Any],
    sequence_length: int,
    pad_id: int,
    variable: bool = False,
    pad_to_multiple_of: int = 8,
    separate: int | None = None,
    restart: bool = False,
) -> dict[str, Tensor]:
    """Samples -> {"tokens", "labels"}, int64 [B, S]; labels[t] is the token to come after position t, or -100.

    S is `sequence_length`, or with `variable` the longest sample rounded up to `pad_to_multiple_of` (never above it).
    With `separate`, the id that ends a packed conversation, there are "documents" too, which numbers the conversations
    so that they do not see each other, and with `restart` "position_ids", which begin at 0 in each.
    """
    length = sequence_length
    if variable:
        longest = max(len(row["tokens"]) for row in rows)
        length = min(-(-longest // pad_to_multiple_of) * pad_to_multiple_of, sequence_length)
    tokens_BS = torch.full((len(rows), length), pad_id, dtype=torch.int64)
    labels_BS = torch.full((len(rows), length), IGNORED, dtype=torch.int64)
    for place, row in enumerate(rows):
        ids, labels = row["tokens"][:length], row["labels"][1:length]
        tokens_BS[place, : len(ids)] = torch.from_numpy(np.ascontiguousarray(ids))
        labels_BS[place, : len(labels)] = torch.from_numpy(np.ascontiguousarray(labels))
    batch = {"tokens": tokens_BS, "labels": labels_BS}
    if separate is not None:
        batch["documents"] = torch.from_numpy(number_documents(tokens_BS.numpy(), separate))
        if restart:
            batch["position_ids"] = torch.from_numpy(restart_positions(tokens_BS.numpy(), separate))
    return batch
