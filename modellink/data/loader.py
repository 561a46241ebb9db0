"""Batches for one data-parallel rank, from a dataset and one number: how many samples all ranks together have consumed.

The samples of a run form one global row. A global batch takes the next `global_batch_size` of it, in blocks of
micro batch x data-parallel size; of each block rank d takes slice d, so that micro-step i of every rank together reads
block i (Megatron's order). As nothing else is remembered, a run can go on at another data-parallel size, micro-batch
size or batch size and sees every sample exactly once.

"single" walks the dataset once, in its own order. "cyclic" walks it for ever, each pass in an order drawn from the
number of the pass; unlike Megatron's, that order does not depend on the data-parallel size, or the promise above could
not be kept.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Any

import numpy as np
import torch

from modellink.data.blend import Dataset
from modellink.errors import ModelLinkError

IGNORE_INDEX = -100
EXTRA = ("position_ids", "documents")  # what a batch may hold besides tokens and labels
Sample = dict[str, Any]
Collate = Callable[[Sequence[Sample]], dict[str, torch.Tensor]]


def collate_tokens(samples: Sequence[Sample]) -> dict[str, torch.Tensor]:
    """Stack samples of equal length: int64 [B, S] "tokens" and "labels", labels without loss being -100, and
    "position_ids" and "documents" when the samples carry them."""
    batch = {k: np.stack([s[k] for s in samples]) for k in ("tokens", "labels", *EXTRA) if k in samples[0]}
    if "loss_mask" in samples[0]:
        batch["labels"][np.stack([s["loss_mask"] for s in samples]) == 0] = IGNORE_INDEX
    return {key: torch.from_numpy(value) for key, value in batch.items()}


class BatchLoader:
    """Hand out this rank's rows of consecutive global batches.

    Args:
        dataset: samples by number, as dicts of numpy arrays.
        micro_batch_size: rows of one micro-step on one rank.
        data_parallel_rank, data_parallel_size: this rank's place.
        consumed_samples: samples that all ranks have taken before.
        prefetch: batches read ahead.
        num_workers: threads that read ahead; 0 reads when asked.
        kind: "single" or "cyclic" (--dataloader-type).
        collate: turns a list of samples into a batch; the default stacks `tokens` and `labels`.
    """

    def __init__(
        self,
        dataset: Dataset,
        micro_batch_size: int,
        data_parallel_rank: int = 0,
        data_parallel_size: int = 1,
        consumed_samples: int = 0,
        prefetch: int = 2,
        *,
        num_workers: int = 1,
        kind: str = "single",
        collate: Collate = collate_tokens,
    ) -> None:
        if kind not in ("single", "cyclic"):
            raise ModelLinkError(f"--dataloader-type {kind} is not known; use single or cyclic")
        assert 0 <= data_parallel_rank < data_parallel_size and micro_batch_size > 0
        self.dataset, self.kind, self.collate, self.prefetch = dataset, kind, collate, prefetch
        self.micro_batch_size, self.rank, self.size = micro_batch_size, data_parallel_rank, data_parallel_size
        self.consumed_samples = consumed_samples
        self._block = micro_batch_size * data_parallel_size
        self._ahead: deque[Future[list[Sample]]] = deque()
        self._pool = ThreadPoolExecutor(num_workers, "data") if num_workers and prefetch else None
        self._orders: dict[int, torch.Tensor] = {}

    def next_batch(self, global_batch_size: int) -> dict[str, torch.Tensor]:
        """Return this rank's rows, [global_batch_size / data_parallel_size, ...], and advance by one global batch.

        Rows [i * micro_batch_size : (i + 1) * micro_batch_size] are micro-step i. Raises ModelLinkError when the size
        does not divide or the data is exhausted, and whatever reading a sample raised.
        """
        steps, rest = divmod(global_batch_size, self._block)
        if rest or not steps:
            raise ModelLinkError(
                f"--global-batch-size {global_batch_size} is no multiple of --micro-batch-size {self.micro_batch_size} "
                f"times the data-parallel size {self.size}; change one of them"
            )
        end = self.consumed_samples + global_batch_size
        if self._exhausted(end):
            raise ModelLinkError(
                f"the data is exhausted: {len(self.dataset):,} samples are there, {end:,} are asked for; use more "
                f"data, "
                f"fewer iterations or --dataloader-type cyclic"
            )
        starts = range(self.consumed_samples, end, self._block)
        try:
            samples = [sample for start in starts for sample in self._take(start)]
        except BaseException:
            self._drop_ahead()  # what is left there is no longer what comes next
            raise
        self.consumed_samples = end
        self._read_ahead(steps * self.prefetch)
        return self.collate(samples)

    def state_dict(self) -> dict[str, int]:
        """The whole state: the number of samples consumed by all ranks."""
        return {"consumed_samples": self.consumed_samples}

    def load_state_dict(self, state: dict[str, int]) -> None:
        """Go on behind `state["consumed_samples"]` samples, whatever layout they were consumed at."""
        self._drop_ahead()
        self.consumed_samples = int(state["consumed_samples"])

    def close(self) -> None:
        """Stop the reading threads; the loader can be used on, without reading ahead."""
        self._drop_ahead()
        if self._pool is not None:
            self._pool.shutdown(cancel_futures=True)
            self._pool = None

    def _exhausted(self, end: int) -> bool:
        return len(self.dataset) == 0 or (self.kind == "single" and end > len(self.dataset))

    def _take(self, start: int) -> list[Sample]:
        """The samples of the block at `start`: the one read ahead, which is always the next, or read now."""
        if self._ahead:
            return self._ahead.popleft().result()
        return self._read(start)

    def _read_ahead(self, blocks: int) -> None:
        if self._pool is None:
            return
        while len(self._ahead) < blocks:
            start = self.consumed_samples + len(self._ahead) * self._block
            if self._exhausted(start + self._block):
                return
            self._ahead.append(self._pool.submit(self._read, start))

    def _drop_ahead(self) -> None:
        while self._ahead:
            self._ahead.pop().cancel()

    def _read(self, start: int) -> list[Sample]:
        first = start + self.rank * self.micro_batch_size
        return [self.dataset[self._index(i)] for i in range(first, first + self.micro_batch_size)]

    def _index(self, place: int) -> int:
        """The sample at `place` of the global row."""
        if self.kind == "single":
            return place
        epoch, position = divmod(place, len(self.dataset))
        order = self._orders.get(epoch)
        if order is None:
            order = torch.randperm(len(self.dataset), generator=torch.Generator().manual_seed(epoch))
            # a block may straddle two passes; more than two are never in use at once
            self._orders = {e: o for e, o in self._orders.items() if e == epoch - 1} | {epoch: order}
        return int(order[position])
