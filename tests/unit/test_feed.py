"""What a run reads: the tokenizer as the data were encoded with it."""

from __future__ import annotations

from pathlib import Path

import pytest

from modellink.config.load import load_config
from modellink.train.feed import open_tokenizer

FLAGS = """
--num-layers 2 --hidden-size 32 --num-attention-heads 4 --seq-length 16 --max-position-embeddings 16 --train-iters 1
--micro-batch-size 1 --lr 1e-3 --mock-data
""".split()


@pytest.mark.parametrize(("prompt_type", "size", "eod"), [(None, 32000, 2), ("chatml", 32002, 32000)])
def test_a_chat_template_adds_its_tokens(shared: Path, prompt_type: str | None, size: int, eod: int) -> None:
    folder = str(shared / "tokenizers" / "llama2")
    flags = ["--prompt-type", prompt_type] if prompt_type else []
    resolved = load_config([*FLAGS, "--tokenizer-name-or-path", folder, *flags], "train")
    tokenizer = open_tokenizer(resolved)
    assert tokenizer is not None and (tokenizer.vocab_size, tokenizer.eod) == (size, eod)
    model = resolved.config.model
    assert (model.vocab_size, model.padded_vocab_size) == (size, -(-size // 128) * 128)


def test_null_tokenizer_counts_its_end_of_document_once() -> None:
    null = ["--tokenizer-type", "NullTokenizer", "--vocab-size", "128"]
    resolved = load_config([*FLAGS, *null], "train")
    tokenizer = open_tokenizer(resolved)
    assert tokenizer is not None and tokenizer.eod == 128
    assert (resolved.config.model.vocab_size, resolved.config.model.padded_vocab_size) == (129, 256)
