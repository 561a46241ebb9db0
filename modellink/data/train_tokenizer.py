"""Train a tokenizer: byte-level BPE over any raw data that `preprocess` reads, saved as a Hugging Face folder.

    python -m modellink.data.train_tokenizer --input corpus.jsonl --output tokenizer --vocab-size 4096

Every byte is a token of its own, so no text is unknown. The folder carries the ChatML chat format: `<|im_end|>` ends a
message and a document, `<|endoftext|>` fills up batches. The same text and size give the same tokenizer.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path

from modellink.errors import ModelLinkError

PAD, _, END = SPECIAL = ("<|endoftext|>", "<|im_start|>", "<|im_end|>")
CHAT_TEMPLATE = (
    "{% for message in messages %}"
    "{{ '<|im_start|>' + message['role'] + '\\n' + message['content'] + '<|im_end|>\\n' }}"
    "{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\\n' }}{% endif %}"
)
SMALLEST = 256 + len(SPECIAL)


def _texts(source: str, key: str) -> Iterator[str]:
    """The texts of column `key` of every row, in bounded memory."""
    from modellink.data.handlers import column
    from modellink.data.readers import Position, find_files, read_chunks

    for chunk in read_chunks(find_files(source), [key], Position()):
        rows, where = chunk.rows()
        for number, row in enumerate(rows):
            text = column(row, key, where(number))
            if not isinstance(text, str):
                raise ModelLinkError(f"{where(number)}: {key} holds {type(text).__name__}, not text; fix the row.")
            yield text


def train_tokenizer(
    source: str, target: str | Path, vocab_size: int = 4096, key: str = "text", progress: bool = False
) -> int:
    """Train on `source` (file, files joined by commas, or folder) and write the folder `target`; returns the size.

    The size is smaller than `vocab_size` when the text has no more pairs to merge. Raises ModelLinkError for data that
    cannot be read and for a size below 259 (the bytes and three marks).
    """
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
    from transformers import PreTrainedTokenizerFast

    if vocab_size < SMALLEST:
        raise ModelLinkError(f"--vocab-size {vocab_size} is too small: give at least {SMALLEST}, the bytes and marks.")
    bpe = Tokenizer(models.BPE())
    bpe.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    bpe.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size,
        special_tokens=list(SPECIAL),
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=progress,
    )
    bpe.train_from_iterator(_texts(source, key), trainer)
    fast = PreTrainedTokenizerFast(
        tokenizer_object=bpe, eos_token=END, pad_token=PAD, clean_up_tokenization_spaces=False
    )
    fast.chat_template = CHAT_TEMPLATE
    fast.save_pretrained(str(target))
    return len(fast)


def main(argv: Sequence[str] | None = None) -> int:
    """Read the options, train, say what was written."""
    parser = argparse.ArgumentParser("python -m modellink.data.train_tokenizer", description=__doc__.split("\n\n")[0])
    parser.add_argument("--input", required=True, help="raw data, as for `modellink preprocess`")
    parser.add_argument("--output", required=True, help="tokenizer folder that is written")
    parser.add_argument("--vocab-size", type=int, default=4096, help="number of ids (default 4096)")
    parser.add_argument("--json-key", default="text", help="column that holds the text (default text)")
    options = parser.parse_args(argv)
    try:
        size = train_tokenizer(options.input, options.output, options.vocab_size, options.json_key, progress=True)
    except ModelLinkError as error:
        print(f"modellink: error: {error}", file=sys.stderr)
        return error.exit_code
    print(f"{options.output}: {size} ids")
    return 0


if __name__ == "__main__":
    sys.exit(main())
