"""Reading and writing .bin/.idx pairs: every dtype, round trips, merging, resuming, and what damage looks like."""

from __future__ import annotations

import pickle
import struct
from pathlib import Path

import numpy as np
import pytest

from modellink.data import IndexedDataset, IndexedDatasetWriter
from modellink.data.indexed import DTYPE_OF_CODE, WriterState, best_dtype, check_vocabulary, merge
from modellink.errors import ModelLinkError


def write(prefix: Path, documents: list[list[int]], dtype: object = np.int32) -> Path:
    with IndexedDatasetWriter(prefix, dtype) as writer:
        for document in documents:
            writer.add_document(document)
    return prefix


@pytest.mark.parametrize("code", range(1, 9))
def test_every_dtype_code_is_read_from_a_file_laid_out_by_hand(tmp_path: Path, code: int) -> None:
    dtype = DTYPE_OF_CODE[code]
    tokens = np.arange(10).astype(dtype)
    (tmp_path / "d.bin").write_bytes(tokens.tobytes())
    idx = b"MMIDIDX\0\0" + struct.pack("<QBQQ", 1, code, 3, 3)
    idx += struct.pack("<3i", 4, 1, 5) + struct.pack("<3q", 0, 4 * dtype.itemsize, 5 * dtype.itemsize)
    (tmp_path / "d.idx").write_bytes(idx + struct.pack("<3q", 0, 2, 3))
    dataset = IndexedDataset(tmp_path / "d")
    assert len(dataset) == 3 and dataset.dtype == dtype
    assert [row.tolist() for row in dataset] == [[0, 1, 2, 3], [4], [5, 6, 7, 8, 9]]
    assert dataset.document_indices.tolist() == [0, 2, 3]
    assert dataset.get(2, offset=1, length=2).tolist() == [6, 7]


def test_a_sequence_is_a_read_only_view(tmp_path: Path) -> None:
    dataset = IndexedDataset(write(tmp_path / "d", [[1, 2, 3], [4, 5]]))
    assert np.shares_memory(dataset[1], dataset.tokens)
    with pytest.raises(ValueError, match="read-only"):
        dataset[0][0] = 9
    with pytest.raises(IndexError):
        dataset.get(0, offset=2, length=2)
    assert pickle.loads(pickle.dumps(dataset))[1].tolist() == [4, 5]


def test_batches_documents_and_empty_documents_give_the_same_bytes(tmp_path: Path) -> None:
    one, many = tmp_path / "one", tmp_path / "many"
    write(one, [[1, 2], [], [3], []], np.uint16)
    with IndexedDatasetWriter(many, np.uint16) as writer:
        writer.add_documents(np.array([1, 2, 3]), np.array([2, 1]), np.array([1, 0, 1, 0]))
    for suffix in (".bin", ".idx"):
        assert Path(f"{one}{suffix}").read_bytes() == Path(f"{many}{suffix}").read_bytes()
    assert IndexedDataset(one).document_indices.tolist() == [0, 1, 1, 2, 2]
    assert sorted(p.name for p in tmp_path.iterdir()) == ["many.bin", "many.idx", "one.bin", "one.idx"]


def test_a_document_of_several_sequences(tmp_path: Path) -> None:
    with IndexedDatasetWriter(tmp_path / "d") as writer:
        writer.add_document([1, 2, 3], lengths=[1, 2])
    dataset = IndexedDataset(tmp_path / "d")
    assert [row.tolist() for row in dataset] == [[1], [2, 3]] and dataset.document_indices.tolist() == [0, 2]


def test_merge_shifts_boundaries_and_wants_one_dtype(tmp_path: Path) -> None:
    a, b = write(tmp_path / "a", [[1], [2, 3]]), write(tmp_path / "b", [[], [4]])
    merge([a, b], tmp_path / "ab")
    whole = IndexedDataset(write(tmp_path / "whole", [[1], [2, 3], [], [4]]).as_posix() + ".idx")
    merged = IndexedDataset(tmp_path / "ab")
    assert [r.tolist() for r in merged] == [r.tolist() for r in whole]
    assert merged.document_indices.tolist() == whole.document_indices.tolist()
    write(tmp_path / "c", [[5]], np.uint16)
    with pytest.raises(ModelLinkError, match="one dtype"):
        merge([a, tmp_path / "c"], tmp_path / "x")
    assert not (tmp_path / "x.bin").exists()


def test_an_exception_leaves_the_old_pair(tmp_path: Path) -> None:
    write(tmp_path / "d", [[7]])
    with pytest.raises(RuntimeError), IndexedDatasetWriter(tmp_path / "d") as writer:
        writer.add_document([1, 2])
        raise RuntimeError
    assert IndexedDataset(tmp_path / "d")[0].tolist() == [7]
    assert len(list(tmp_path.iterdir())) == 2


def test_a_writer_resumes_from_a_flushed_state(tmp_path: Path) -> None:
    expected = write(tmp_path / "whole", [[1, 2], [], [3], [4, 5]])
    first = IndexedDatasetWriter(tmp_path / "d", np.int32, work=tmp_path / "w")
    first.add_document([1, 2])
    first.add_document([])
    state = WriterState(*first.flush())
    first.add_document([99, 99])
    first.close()
    with IndexedDatasetWriter(tmp_path / "d", np.int32, work=tmp_path / "w", resume=state) as second:
        second.add_document([3])
        second.add_document([4, 5])
    for suffix in (".bin", ".idx"):
        assert Path(f"{expected}{suffix}").read_bytes() == (tmp_path / f"d{suffix}").read_bytes()


def test_tokens_that_do_not_fit_are_refused(tmp_path: Path) -> None:
    with pytest.raises(ModelLinkError, match="do not fit uint16"):
        write(tmp_path / "d", [[70000]], np.uint16)
    assert best_dtype(65499) == np.uint16 and best_dtype(65500) == np.int32


def test_an_empty_dataset_round_trips(tmp_path: Path) -> None:
    dataset = IndexedDataset(write(tmp_path / "d", []))
    assert len(dataset) == 0 and dataset.document_indices.tolist() == [0]


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (lambda b, i: b.unlink(), "d.bin does not exist"),
        (lambda b, i: i.unlink(), "d.idx does not exist"),
        (lambda b, i: b.write_bytes(b.read_bytes()[:-4]), "d.bin is truncated"),
        (lambda b, i: b.write_bytes(b.read_bytes() + b"1234"), "does not belong to its .idx"),
        (lambda b, i: i.write_bytes(i.read_bytes()[:-4]), "d.idx is truncated"),
        (lambda b, i: i.write_bytes(i.read_bytes()[:20]), "truncated inside its header"),
        (lambda b, i: i.write_bytes(b"PK\x03\x04 something else entirely, not an index"), "not a Megatron .idx"),
        (lambda b, i: i.write_bytes(i.read_bytes()[:17] + b"\x09" + i.read_bytes()[18:]), "dtype code 9"),
    ],
)
def test_damage_is_one_sentence(tmp_path: Path, damage: object, message: str) -> None:
    write(tmp_path / "d", [[1, 2, 3], [4]])
    damage(tmp_path / "d.bin", tmp_path / "d.idx")  # type: ignore[operator]
    with pytest.raises(ModelLinkError, match=message):
        IndexedDataset(tmp_path / "d")


def test_check_vocabulary_names_the_id(tmp_path: Path) -> None:
    dataset = IndexedDataset(write(tmp_path / "d", [[1, 2, 3], [41]]))
    check_vocabulary([None, dataset], 42)
    with pytest.raises(ModelLinkError, match=r"disagrees with the data.*d\.bin holds token id 41.*41 entries"):
        check_vocabulary([dataset], 41)

    # inside a blend, and in one of the blocks that a large file is sampled at
    class Blend:
        datasets = [None, dataset]

    with pytest.raises(ModelLinkError, match="token id 41"):
        check_vocabulary([Blend()], 41, limit=1)
