"""BatchLoader: Megatron's order of rows, and no sample lost or repeated whatever changes between two batches."""

from __future__ import annotations

from collections import Counter
from typing import Any

import numpy as np
import pytest
import torch

from modellink.data import BatchLoader
from modellink.errors import ModelLinkError


class Numbers:
    """Sample i is [i, i, i]; even labels carry no loss; sample `bad` cannot be read."""

    def __init__(self, size: int, bad: int = -1, positions: bool = False) -> None:
        self.size, self.bad, self.positions = size, bad, positions

    def __len__(self) -> int:
        return self.size

    def __getitem__(self, index: int) -> dict[str, Any]:
        if index == self.bad:
            raise OSError(f"disk error at {index}")
        sample = {"tokens": np.full(3, index), "labels": np.arange(3), "loss_mask": np.array([0, 1, 0], np.float32)}
        return sample | ({"position_ids": np.arange(3)} if self.positions else {})


def rows(batch: dict[str, torch.Tensor]) -> list[int]:
    return batch["tokens"][:, 0].tolist()


@pytest.mark.parametrize("num_workers", [0, 1, 3])
def test_rank_d_takes_slice_d_of_every_block(num_workers: int) -> None:
    loaders = [BatchLoader(Numbers(48), 2, rank, 3, num_workers=num_workers) for rank in range(3)]
    first = [rows(loader.next_batch(12)) for loader in loaders]
    assert first == [[0, 1, 6, 7], [2, 3, 8, 9], [4, 5, 10, 11]]
    assert [rows(loader.next_batch(6)) for loader in loaders] == [[12, 13], [14, 15], [16, 17]]


def test_batches_are_int64_tensors_and_masked_labels_are_ignored() -> None:
    batch = BatchLoader(Numbers(8), 4).next_batch(8)
    assert set(batch) == {"tokens", "labels"}
    assert all(t.dtype == torch.int64 and t.shape == (8, 3) for t in batch.values())
    assert batch["labels"].tolist() == [[-100, 1, -100]] * 8
    assert BatchLoader(Numbers(8, positions=True), 4).next_batch(4)["position_ids"].tolist() == [[0, 1, 2]] * 4


@pytest.mark.parametrize("kind", ["single", "cyclic"])
def test_nothing_is_lost_or_repeated_when_layout_and_batch_size_change(kind: str) -> None:
    # (data-parallel size, micro batch, global batch sizes): a ramp, then other layouts, each resumed from the state
    plan = [(2, 2, [4, 4, 8]), (4, 1, [8, 16]), (1, 3, [3, 9]), (3, 2, [18, 12, 6]), (2, 1, [10])]
    dataset, state, seen = Numbers(98), {"consumed_samples": 0}, []
    for size, micro, batches in plan:
        loaders = [BatchLoader(dataset, micro, rank, size, num_workers=2, kind=kind) for rank in range(size)]
        for loader in loaders:
            loader.load_state_dict(state)
        for batch in batches:
            parts = [rows(loader.next_batch(batch)) for loader in loaders]
            assert all(len(part) == batch // size for part in parts)
            seen.append(sorted(index for part in parts for index in part))
        states = [loader.state_dict() for loader in loaders]
        assert all(s == states[0] for s in states)
        state = states[0]
    assert state == {"consumed_samples": 98}
    assert Counter(index for part in seen for index in part) == Counter(range(98))
    if kind == "single":
        assert [index for part in seen for index in part] == list(range(98))


def test_cyclic_goes_round_in_a_new_order() -> None:
    loader = BatchLoader(Numbers(10), 2, kind="cyclic")
    passes = [[index for _ in range(5) for index in rows(loader.next_batch(2))] for _ in range(3)]
    assert all(sorted(p) == list(range(10)) for p in passes)
    assert passes[0] == torch.randperm(10, generator=torch.Generator().manual_seed(0)).tolist()
    assert passes[0] != passes[1] != passes[2]
    assert (
        rows(BatchLoader(Numbers(10), 4, consumed_samples=8, kind="cyclic").next_batch(4))
        == passes[0][8:] + passes[1][:2]
    )


@pytest.mark.parametrize("num_workers", [0, 2])
def test_errors_of_a_sample_arrive_with_its_batch(num_workers: int) -> None:
    loader = BatchLoader(Numbers(40, bad=9), 2, num_workers=num_workers)
    assert rows(loader.next_batch(4)) == [0, 1, 2, 3] and rows(loader.next_batch(4)) == [4, 5, 6, 7]
    for _ in range(2):
        with pytest.raises(OSError, match="disk error at 9"):
            loader.next_batch(4)
    assert loader.consumed_samples == 8


def test_reading_ahead_happens_and_stops_at_the_end() -> None:
    read: list[int] = []

    class Watched(Numbers):
        def __getitem__(self, index: int) -> dict[str, Any]:
            read.append(index)
            return super().__getitem__(index)

    loader = BatchLoader(Watched(9), 2, prefetch=2)
    loader.next_batch(2)
    loader._pool.shutdown(wait=True)  # type: ignore[union-attr]
    assert sorted(read) == [0, 1, 2, 3, 4, 5]
    loader.close()
    assert rows(loader.next_batch(2)) == [2, 3]


def test_bad_sizes_and_the_end_of_the_data() -> None:
    loader = BatchLoader(Numbers(10), 2, 0, 2)
    with pytest.raises(ModelLinkError, match="--global-batch-size 6 is no multiple"):
        loader.next_batch(6)
    loader.next_batch(8)
    with pytest.raises(ModelLinkError, match="the data is exhausted: 10 samples"):
        loader.next_batch(4)
    with pytest.raises(ModelLinkError, match="exhausted"):
        BatchLoader(Numbers(0), 1, kind="cyclic").next_batch(1)
    with pytest.raises(ModelLinkError, match="--dataloader-type"):
        BatchLoader(Numbers(10), 2, kind="external")


def test_a_collate_of_ones_own_sees_all_rows() -> None:
    loader = BatchLoader(Numbers(12), 2, collate=lambda samples: {"n": torch.tensor([len(samples)])})
    assert loader.next_batch(6)["n"].item() == 6
