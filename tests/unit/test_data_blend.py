"""Blending against the plain loop it stands for, the forms of --data-path, and mock data."""

from __future__ import annotations

import time
from pathlib import Path

import numpy as np
import pytest

from modellink.data import IndexedDatasetWriter
from modellink.data.blend import BlendedDataset, blend_indices, build_datasets, parse_data_path
from modellink.data.gpt import GPTOptions
from modellink.data.mock import MockDataset
from modellink.errors import ModelLinkError

OPTIONS = GPTOptions(sequence_length=4, cache=False)


def plain_loop(weights: list[float], size: int) -> tuple[list[int], list[int]]:
    taken = [0] * len(weights)
    parts, numbers = [], []
    for i in range(size):
        errors = [w * max(float(i), 1.0) - t for w, t in zip(weights, taken, strict=True)]
        best = errors.index(max(errors))
        parts.append(best)
        numbers.append(taken[best])
        taken[best] += 1
    return parts, numbers


@pytest.mark.parametrize("count", [1, 2, 3, 7, 40])
@pytest.mark.parametrize("size", [0, 1, 255, 5000, 20_000])
def test_blend_equals_the_plain_loop(count: int, size: int) -> None:
    rng = np.random.default_rng(count + size)
    for weights in (np.ones(count), rng.random(count), rng.random(count) ** 6 + 1e-6, rng.integers(1, 5, count)):
        shares = (np.asarray(weights, float) / np.sum(weights)).tolist()
        part, number = blend_indices(shares, size)
        assert part.dtype == np.int16 and number.dtype == np.int64
        assert (part.tolist(), number.tolist()) == plain_loop(shares, size)


def test_ten_million_samples_do_not_take_long() -> None:
    start = time.perf_counter()
    part, _ = blend_indices([0.5, 0.3, 0.15, 0.05], 10_000_000)
    assert time.perf_counter() - start < 20
    np.testing.assert_allclose(np.bincount(part) / len(part), [0.5, 0.3, 0.15, 0.05], atol=1e-6)


def file_of(prefix: Path, token: int, documents: int) -> str:
    with IndexedDatasetWriter(prefix) as writer:
        for _ in range(documents):
            writer.add_document([token] * 9)
    return str(prefix)


def test_data_paths_become_blends(tmp_path: Path) -> None:
    a, b = file_of(tmp_path / "a", 1, 50), file_of(tmp_path / "b", 2, 10)
    train, valid, test = build_datasets((100, 10, 5), OPTIONS, data_path=["0.7", a, "0.3", b], split="8,1,1")
    assert train is not None and valid is not None and test is not None
    first = [int(train[i]["tokens"][0]) for i in range(100)]
    assert first == [1 + p for p in plain_loop([0.7, 0.3], 100)[0]] and len(train) >= 100
    alone, _, _ = build_datasets((100, 10, 5), OPTIONS, data_path=[a], split="1")
    assert alone is not None and {int(alone[i]["tokens"][0]) for i in range(100)} == {1}
    plain, _, _ = build_datasets((None, None, None), OPTIONS, data_path=[a, b], split="1")
    assert isinstance(plain, BlendedDataset) and len(plain) >= 112 + 22 - 2
    split = build_datasets((20, 5, 5), OPTIONS, train_data_path=[a], valid_data_path=[b])
    assert split[0] is not None and split[1] is not None and split[2] is None
    assert int(split[0][0]["tokens"][0]) == 1 and int(split[1][0]["tokens"][0]) == 2


def test_a_part_that_runs_short_is_named(tmp_path: Path) -> None:
    parts = [MockDataset(10, "train", OPTIONS), MockDataset(3, "train", OPTIONS)]
    with pytest.raises(ModelLinkError, match="second of the blend has 3 samples, 5"):
        BlendedDataset(parts, [0.5, 0.5], 10, ["first", "second"])
    assert len(BlendedDataset(parts, None, None)) in (12, 13)


def test_data_path_forms() -> None:
    assert parse_data_path(["a"]) == (["a"], None)
    assert parse_data_path(["a", "b"]) == (["a", "b"], None)
    assert parse_data_path(["30", "a", "70", "b"]) == (["a", "b"], [30.0, 70.0])
    for bad in (["1", "a", "b", "c"], ["-1", "a", "2", "b"], ["0", "a"]):
        with pytest.raises(ModelLinkError, match="--data-path"):
            parse_data_path(bad)
    with pytest.raises(ModelLinkError, match="no training data"):
        build_datasets((1, 1, 1), OPTIONS)
    with pytest.raises(ModelLinkError, match="exclude"):
        build_datasets((1, 1, 1), OPTIONS, data_path=["a"], test_data_path=["b"])


def test_mock_data_follows_from_split_and_index() -> None:
    options = GPTOptions(sequence_length=16, eod_mask_loss=True, reset_position_ids=True, eod=0)
    train, valid, _ = build_datasets((8, 4, None), options, mock=True)
    assert train is not None and valid is not None and len(train) == 8
    again = MockDataset(3, "train", options)
    for i in range(3):
        sample = train[i]
        length = int(np.random.default_rng([0, i]).integers(0, 16))
        assert sample["tokens"].tolist() == ([1] * length + [0] + [2] * 16)[:16]
        assert sample["labels"].tolist() == ([1] * length + [0] + [2] * 16)[1:17]
        assert all((sample[k] == again[i][k]).all() for k in sample)
        assert sample["loss_mask"].sum() == 15
    assert any((train[i]["tokens"] != valid[i]["tokens"]).any() for i in range(4))
    with pytest.raises(IndexError):
        again[3]
