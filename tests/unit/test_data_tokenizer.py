"""The tokenizer kinds against the libraries they wrap, and what a missing file says."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from modellink.data.tokenizer import build_tokenizer, padded_vocab_size
from modellink.errors import ModelLinkError

TEXTS = ["Hello world, 12345!", "", "  two  spaces\n\nand\ttabs ", "你好，世界 🙂 ▁x", "plain <s> not special </s>."]


@pytest.mark.parametrize("name", ["llama2", "gpt2", "qwen15"])
def test_hugging_face_folder(shared: Path, name: str) -> None:
    from transformers import AutoTokenizer

    folder = str(shared / "tokenizers" / name)
    reference = AutoTokenizer.from_pretrained(folder)
    ours = build_tokenizer(name_or_path=folder)
    expected = [reference(text)["input_ids"] for text in TEXTS]
    assert [ours.encode(text) for text in TEXTS] == expected
    assert ours.encode_batch(TEXTS) == expected
    assert ours.decode(ours.encode(TEXTS[0])).strip() == TEXTS[0]
    assert (ours.vocab_size, ours.eod) == (len(reference), reference.eos_token_id)


def test_llama2_sentencepiece_agrees_with_the_hugging_face_one(shared: Path) -> None:
    ours = build_tokenizer("Llama2Tokenizer", tokenizer_model=str(shared / "tokenizers/llama2/tokenizer.model"))
    other = build_tokenizer(name_or_path=str(shared / "tokenizers/llama2"))
    text = "Hello world, 12345!\nA second line."
    assert ours.encode(text) == [1, *other.encode(text, add_special_tokens=False)]
    assert ours.encode_batch([text, "a"], add_special_tokens=False)[0] == ours.encode(text)[1:]
    assert ours.decode(ours.encode(text)) == text
    assert (ours.vocab_size, ours.bos, ours.eod) == (32000, 1, 2)


def test_gpt2_from_vocab_and_merges(shared: Path, tmp_path: Path) -> None:
    model = json.loads((shared / "tokenizers/gpt2/tokenizer.json").read_text())["model"]
    vocab, merges = tmp_path / "vocab.json", tmp_path / "merges.txt"
    vocab.write_text(json.dumps(model["vocab"]))
    merges.write_text("#version: 0.2\n" + "\n".join(" ".join(pair) for pair in model["merges"]))
    ours = build_tokenizer("GPT2BPETokenizer", vocab_file=str(vocab), merge_file=str(merges))
    other = build_tokenizer(name_or_path=str(shared / "tokenizers/gpt2"))
    for text in TEXTS:
        assert ours.encode(text) == other.encode(text)
        assert ours.decode([*ours.encode(text), ours.eod]) == text
    assert ours.encode_batch(TEXTS) == [ours.encode(text) for text in TEXTS]
    assert ours.eod == ours.pad == 50256


def test_null_tokenizer() -> None:
    ours = build_tokenizer("NullTokenizer", vocab_size=10)
    assert ours.encode("1 2 3") == [1, 2, 3] and ours.decode([4, 5, 10]) == "4 5"
    assert (ours.vocab_size, ours.eod) == (11, 10)
    with pytest.raises(ModelLinkError, match="numbers only"):
        ours.encode("one")


def test_kwargs_and_padding_side_reach_the_tokenizer(shared: Path) -> None:
    folder = str(shared / "tokenizers/gpt2")
    ours = build_tokenizer(name_or_path=folder, padding_side="left", kwargs=["pad_token", "!", "model_max_length", "7"])
    assert ours.hf.padding_side == "left" and ours.hf.model_max_length == 7
    assert ours.pad == ours.encode("!")[0]


def test_what_is_missing_is_named(tmp_path: Path) -> None:
    for kwargs, message in [
        ({"name_or_path": str(tmp_path / "none")}, "none does not exist"),
        ({"name_or_path": str(tmp_path)}, "holds no tokenizer; give one with tokenizer.json"),
        ({}, "needs --tokenizer-name-or-path"),
        ({"kind": "Llama2Tokenizer", "tokenizer_model": str(tmp_path / "m")}, "--tokenizer-model"),
        ({"kind": "GPT2BPETokenizer", "vocab_file": str(tmp_path / "v"), "merge_file": "m"}, "--vocab-file"),
        ({"kind": "GPT2BPETokeniser"}, "Did you mean 'GPT2BPETokenizer'"),
        ({"kind": "NullTokenizer"}, "--vocab-size"),
    ]:
        with pytest.raises(ModelLinkError, match=message):
            build_tokenizer(**kwargs)


def test_padded_vocabulary() -> None:
    assert padded_vocab_size(32000) == 32000
    assert padded_vocab_size(50257, 128, 8) == 51200
    assert padded_vocab_size(5, 1, 2) == 6
