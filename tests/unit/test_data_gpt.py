"""GPTDataset against a literal transcription of its definition, its masks, and its cache."""

from __future__ import annotations

import logging
import time
from pathlib import Path

import numpy as np
import pytest

from modellink.data import GPTDataset, IndexedDatasetWriter
from modellink.data.gpt import GPTOptions, parse_split
from modellink.errors import ModelLinkError

EOD = 0


@pytest.fixture
def prefix(tmp_path: Path) -> Path:
    rng = np.random.default_rng(5)
    with IndexedDatasetWriter(tmp_path / "d", np.uint16) as writer:
        for i in range(120):
            length = int(rng.integers(0, 40))
            # a sequence of no tokens, which only a foreign writer makes, is legal too
            writer.add_document([*rng.integers(1, 99, length), EOD] if i % 9 else [], None if i % 9 else [0])
    return tmp_path / "d"


def walk(lengths: np.ndarray, order: np.ndarray, s: int, samples: int) -> list[tuple[int, int]]:
    """The sample index by walking token after token."""
    flat = [(place, offset) for place, document in enumerate(order) for offset in range(lengths[document])]
    return [(0, 0)] + [flat[k * s] for k in range(1, samples + 1)]


@pytest.mark.parametrize("s", [1, 7, 64])
@pytest.mark.parametrize("asked", [None, 1, 150, 700])
def test_samples_are_windows_over_the_shuffled_documents(prefix: Path, s: int, asked: int | None) -> None:
    train, valid, test = GPTDataset.build(prefix, s, 3, "80,20,0", (asked, 5, 5), cache=False)
    assert train is not None and valid is not None and test is None
    lengths = train.indexed.sequence_lengths
    assert [tuple(row) for row in train.sample_index.tolist()] == walk(lengths, train.document_index, s, len(train))
    row = np.concatenate([train.indexed[d] for d in train.document_index])
    for i in range(0, len(train), 13):
        k = int(train.shuffle_index[i])
        assert train[i]["tokens"].tolist() == row[k * s : k * s + s].tolist()
        assert train[i]["labels"].tolist() == row[k * s + 1 : k * s + s + 1].tolist()
    assert len(train) == (train.epochs * train.tokens_per_epoch - 1) // s
    assert asked is None or len(train) >= asked
    assert sorted(train.shuffle_index.tolist()) == list(range(len(train)))
    assert not set(train.documents) & set(valid.documents)


def test_a_short_last_epoch_is_shuffled_by_itself(prefix: Path) -> None:
    def build(asked: int) -> GPTDataset:
        train = GPTDataset.build(prefix, 16, 3, "1", asked, cache=False)[0]
        assert train is not None and train.epochs == 2
        return train

    one = GPTDataset.build(prefix, 16, 3, "1", None, cache=False)[0]
    assert one is not None
    short, long = build(len(one) + 5), build(2 * len(one) - 1)
    documents = len(short.documents)
    assert sorted(short.document_index[:documents].tolist()) == list(range(documents))
    assert sorted(short.shuffle_index[: len(one)].tolist()) == list(range(len(one)))
    assert sorted(long.document_index[:documents].tolist()) != list(range(documents))


def test_types_masks_and_positions(prefix: Path) -> None:
    plain = GPTDataset.build(prefix, 32, cache=False)[0]
    masked = GPTDataset.build(prefix, 32, cache=False, eod_mask_loss=True, reset_position_ids=True, eod=EOD)[0]
    assert plain is not None and masked is not None
    assert {k: (v.dtype.name, v.shape) for k, v in plain[0].items()} == {
        "tokens": ("int64", (32,)),
        "labels": ("int64", (32,)),
        "loss_mask": ("float32", (32,)),
    }
    ends = 0
    for i in range(len(masked)):
        sample, position = masked[i], 0
        for token, mask, place in zip(sample["tokens"], sample["loss_mask"], sample["position_ids"], strict=True):
            assert place == position and mask == (token != EOD)
            position = 0 if token == EOD else position + 1
            ends += token == EOD
    assert ends > 10
    assert plain[-1]["tokens"].tolist() == plain[len(plain) - 1]["tokens"].tolist()
    with pytest.raises(IndexError):
        plain[len(plain)]


def indices(dataset: GPTDataset | None) -> list[list[int]]:
    assert dataset is not None
    return [a.tolist() for a in (dataset.document_index, dataset.sample_index, dataset.shuffle_index)]


def test_cache_is_used_and_rebuilt_when_damaged(
    prefix: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    cache = tmp_path / "cache"

    def build() -> GPTDataset | None:
        return GPTDataset.build(prefix, 16, num_samples=100, split="1", cache_path=str(cache))[0]

    first = indices(build())
    files = sorted(cache.iterdir())
    assert sorted(f.name.split("-", 1)[1] for f in files) == [
        "GPTDataset-description.txt",
        "GPTDataset-document_index.npy",
        "GPTDataset-sample_index.npy",
        "GPTDataset-shuffle_index.npy",
    ]
    with monkeypatch.context() as patch:
        patch.setattr(GPTDataset, "_build", lambda self: pytest.fail("the cache was not used"))
        assert indices(build()) == first
    assert caplog.text == ""
    for file in files:
        good = file.read_bytes()
        for bad in (good[: len(good) // 2], good[:-1] + bytes([good[-1] ^ 1]), b""):
            caplog.clear()
            file.write_bytes(bad)
            assert indices(build()) == first
            assert "is damaged" in caplog.text
            assert file.read_bytes() == good
    with IndexedDatasetWriter(prefix) as writer:
        writer.add_document(list(range(400)))
    assert indices(build()) != first


def test_an_unwritable_cache_only_warns(prefix: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    (tmp_path / "file").write_text("not a folder")
    with caplog.at_level(logging.WARNING):
        built = GPTDataset.build(prefix, 16, cache_path=str(tmp_path / "file"))[0]
    assert built is not None and len(built) and "going on without it" in caplog.text


def test_the_default_cache_lies_beside_the_data(prefix: Path) -> None:
    GPTDataset.build(prefix, 16, split="1")
    assert len(list((prefix / "cache" / "GPTDataset_indices").iterdir())) == 4


def test_splits(prefix: Path, tmp_path: Path) -> None:
    assert parse_split("969, 30, 1")[0] == (0.0, 0.969)
    assert parse_split("1") == [(0.0, 1.0), None, None]
    for bad in ("0,0,0", "", "1,2,3,4"):
        with pytest.raises(ModelLinkError, match="--split"):
            parse_split(bad)
    with IndexedDatasetWriter(tmp_path / "tiny") as writer:
        writer.add_document([1, 2, 3, 4])
    train, valid, test = GPTDataset.build(tmp_path / "tiny", 2, num_samples=9, cache=False)
    assert train is not None and len(train) >= 9 and valid is None and test is None
    with IndexedDatasetWriter(tmp_path / "empty"):
        pass
    with pytest.raises(ModelLinkError, match=r"train split of .* is empty"):
        GPTDataset.build(tmp_path / "empty", 2, num_samples=9, cache=False)


def test_masks_need_the_eod_id() -> None:
    with pytest.raises(ModelLinkError, match="end-of-document"):
        GPTOptions(eod_mask_loss=True)


def test_the_index_of_many_samples_is_built_without_a_loop_over_them(tmp_path: Path) -> None:
    with IndexedDatasetWriter(tmp_path / "big", np.uint16) as writer:
        writer.add_documents(np.zeros(4_000_000, np.uint16), np.full(40_000, 100))
    start = time.perf_counter()
    train = GPTDataset.build(tmp_path / "big", 8, split="1", num_samples=2_000_000, cache=False)[0]
    assert train is not None and len(train) >= 2_000_000
    assert time.perf_counter() - start < 5.0
