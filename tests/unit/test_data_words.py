"""Tokenizing word by word must give exactly the ids of the tokenizer itself, or not be done at all."""

from __future__ import annotations

import json
import random
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from tokenizers import Tokenizer, models, normalizers, pre_tokenizers, processors, trainers

from modellink.data import words
from modellink.data.words import word_encoder

PIECES = [
    *"abcXYZ019.,;:!?'\"()[]{}<>-_=+*/\\|@#$%^&~`",
    *(" ", "  ", "   ", "\n", "\n\n", "\r\n", "\t", "\x0b", "\x0c", "\x1c", "\x85", "\x00", "▁", "▁▁", " ▁"),
    *("the", " the", "ing", "'s", "'LL", "n't", "don't", "2024", "3.14", "中", "文字", "。", "，", "é", "e\u0301", "ß"),
    *("ſ", "\u00a0", "\u3000", "\u200b", "🙂", "👩‍👩‍👧", "<s>", "</s>", "<unk>", "<|endoftext|>", "<|im_start|>"),
    "<0x0A>",
]


def texts(count: int, alphabet: list[str]) -> list[str]:
    rng = random.Random(7)
    return ["".join(rng.choices(alphabet, k=rng.randint(0, 30))) for _ in range(count)]


def check(rust: Any, found: list[str], dtype: str = "<i4") -> words.WordEncoder:
    encoder = word_encoder(rust)
    assert encoder is not None
    for start in range(0, len(found), 500):
        part = found[start : start + 500]
        expected = [np.array(e.ids, dtype).tobytes() for e in rust.encode_batch_fast(part)]
        assert encoder.encode(part, dtype) == expected
    return encoder


@pytest.mark.parametrize("name", ["llama2", "gpt2", "qwen15"])
def test_ids_are_the_tokenizers_own(shared: Path, name: str) -> None:
    rust = Tokenizer.from_file(str(shared / "tokenizers" / name / "tokenizer.json"))
    ascii_only = [piece for piece in PIECES if piece.isascii()]
    check(rust, ["", " ", *texts(3000, PIECES), *texts(3000, ascii_only)])
    lines = (shared / "megatron" / "corpus.jsonl").read_text().splitlines()
    check(rust, [json.loads(line)["text"] for line in lines[::60]])


def test_special_tokens_around_a_text_are_kept(shared: Path) -> None:
    rust = Tokenizer.from_file(str(shared / "tokenizers" / "llama2" / "tokenizer.json"))
    rust.post_processor = processors.TemplateProcessing(single="<s> $A </s>", special_tokens=[("<s>", 1), ("</s>", 2)])
    encoder = check(rust, ["", "two words", *texts(200, PIECES)], "<u2")
    assert np.frombuffer(encoder.encode([""], "<u2")[0], "<u2").tolist() == [1, 2]


def test_the_cache_does_not_grow_beyond_its_size(shared: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(words, "CACHE_SIZE", 50)
    rust = Tokenizer.from_file(str(shared / "tokenizers" / "llama2" / "tokenizer.json"))
    encoder = check(rust, ["x" * 200, *texts(1500, PIECES)])
    assert len(encoder._cache) == 50 and max(map(len, encoder._cache)) < 49


def test_ids_that_do_not_fit_are_an_error(shared: Path) -> None:
    encoder = word_encoder(Tokenizer.from_file(str(shared / "tokenizers" / "qwen15" / "tokenizer.json")))
    assert encoder is not None
    with pytest.raises(OverflowError):
        encoder.encode(["<|im_start|>"], "<u2")


def sentencepiece_like(**spec: Any) -> Tokenizer:
    """A small byte-fallback BPE with the merges given."""
    merges = spec.pop("merges", [["▁", "a"], ["a", "b"]])
    vocab = {token: i for i, token in enumerate([f"<0x{b:02X}>" for b in range(256)] + ["▁", "a", "b"])}
    for left, right in merges:
        vocab.setdefault(left + right, len(vocab))
    rust = Tokenizer(models.BPE(vocab, [tuple(m) for m in merges], byte_fallback=True, fuse_unk=True, **spec))
    rust.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
    return rust


def test_builds_that_cannot_be_cut_are_refused() -> None:
    good = sentencepiece_like()
    check(good, texts(300, ["a", "b", " ", "c", "中"]))
    assert word_encoder(sentencepiece_like(merges=[["b", "▁"], ["b▁", "a"]])) is None
    assert word_encoder(sentencepiece_like(dropout=0.5)) is None
    lower = sentencepiece_like()
    lower.normalizer = normalizers.Lowercase()
    assert word_encoder(lower) is None
    cut = sentencepiece_like()
    cut.enable_truncation(4)
    assert word_encoder(cut) is None
    byte_level = Tokenizer(models.BPE())
    byte_level.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=True)
    byte_level.train_from_iterator(["a text to learn from"], trainers.BpeTrainer(show_progress=False))
    assert word_encoder(byte_level) is None
    assert word_encoder(Tokenizer(models.WordLevel({"a": 0}, unk_token="a"))) is None
