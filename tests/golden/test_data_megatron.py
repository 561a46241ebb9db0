"""Files that Megatron itself made: read them, and build the same samples and the same bytes from them."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from modellink.config.preprocess_schema import PreprocessConfig
from modellink.data import GPTDataset, IndexedDataset
from modellink.data.indexed import merge
from modellink.data.preprocess import preprocess


def test_megatron_pair_is_read_and_rewritten_byte_for_byte(shared: Path, tmp_path: Path) -> None:
    prefix = shared / "megatron" / "text_document"
    dataset = IndexedDataset(prefix)
    assert dataset.dtype == np.uint16 and len(dataset.tokens) == int(dataset.sequence_lengths.sum()) == 6_249_540
    merge([prefix], tmp_path / "copy")
    for suffix in (".bin", ".idx"):
        assert Path(f"{prefix}{suffix}").read_bytes() == (tmp_path / f"copy{suffix}").read_bytes()


def test_samples_equal_megatron_cores(shared: Path, tmp_path: Path) -> None:
    train, valid, test = GPTDataset.build(
        shared / "megatron" / "text_document", 512, 1234, "949,50,1", 2000, cache_path=str(tmp_path)
    )
    assert train is not None and valid is not None and test is not None and len(train) >= 2000
    with np.load(shared / "megatron" / "gptdataset_ref.npz", allow_pickle=False) as reference:
        for name in ("tokens", "labels", "loss_mask"):
            ours = np.stack([train[i][name] for i in range(64)])
            assert ours.dtype == reference[name].dtype
            np.testing.assert_array_equal(ours, reference[name])


@pytest.mark.parametrize("workers", [1, 2])
def test_preprocess_gives_megatrons_bytes(shared: Path, tmp_path: Path, workers: int) -> None:
    preprocess(
        PreprocessConfig(
            input=str(shared / "megatron" / "corpus.jsonl"),
            output_prefix=str(tmp_path / "out"),
            tokenizer_name_or_path=str(shared / "tokenizers" / "llama2"),
            append_eod=True,
            workers=workers,
        )
    )
    for suffix in (".bin", ".idx"):
        ours = (tmp_path / f"out_text_document{suffix}").read_bytes()
        assert ours == (shared / "megatron" / f"text_document{suffix}").read_bytes()
