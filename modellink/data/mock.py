"""Synthetic samples for `--mock-data`: no file, the same on every machine.

A sample is a run of token 1 of random length, one end-of-document token 0, and padding 2. Length and content follow
from (split, index) alone, as in Megatron-Core's first mock dataset.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import numpy.typing as npt

from modellink.data.gpt import SPLITS, GPTOptions, as_sample

TOKEN, EOD, PAD = 1, 0, 2


class MockDataset:
    """`num_samples` synthetic samples of `options.sequence_length` tokens, with the keys of GPTDataset."""

    def __init__(self, num_samples: int, split: str, options: GPTOptions) -> None:
        self.num_samples, self.split, self.options = num_samples, split, options

    def __len__(self) -> int:
        return self.num_samples

    def __getitem__(self, index: int) -> dict[str, npt.NDArray[Any]]:
        if not 0 <= index < self.num_samples:
            raise IndexError(f"sample {index} of {self.num_samples}")
        size = self.options.sequence_length
        length = int(np.random.default_rng([SPLITS.index(self.split), index]).integers(0, size))
        text = np.full(size + 1, PAD, np.int64)
        text[:length] = TOKEN
        text[length] = EOD
        return as_sample(text[:-1], text[1:], self.options)
