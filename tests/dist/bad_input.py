"""Broken inputs on disk, and what a user is told about each: shared by the tests of errors."""

from __future__ import annotations

import contextlib
import io
import os
import resource
import shutil
import time
from collections.abc import Iterator
from dataclasses import astuple, dataclass
from pathlib import Path
from typing import Any

import numpy as np

ARCHITECTURE = """
--num-layers 2 --hidden-size 16 --num-attention-heads 4 --group-query-attention --num-query-groups 2
--ffn-hidden-size 32 --normalization RMSNorm --norm-epsilon 1e-5 --swiglu --disable-bias-linear
--position-embedding-type rope --untie-embeddings-and-output-weights --max-position-embeddings 64
--attention-dropout 0 --hidden-dropout 0
""".split()
RUN = "--seq-length 16 --micro-batch-size 1 --global-batch-size 2 --train-iters 2 --lr 1e-3 --eval-iters 0".split()
VOCABULARY = 64


@dataclass(frozen=True)
class Case:
    """A command line and what it must say; {rank} in it is the rank's own number. `code` is every rank's exit code."""

    name: str
    argv: list[str]
    says: list[str]
    code: int = 2
    worlds: tuple[int, ...] = (1, 2)


def make_tokenizer(folder: Path, size: int = VOCABULARY) -> Path:
    """A word-level tokenizer of `size` ids."""
    import transformers
    from tokenizers import Tokenizer, models, pre_tokenizers

    words = ["<pad>", "<s>", "</s>", "<unk>"] + [f"w{i}" for i in range(size - 4)]
    raw = Tokenizer(models.WordLevel({word: i for i, word in enumerate(words)}, unk_token="<unk>"))
    raw.pre_tokenizer = pre_tokenizers.Whitespace()
    fast = transformers.PreTrainedTokenizerFast(
        tokenizer_object=raw, bos_token="<s>", eos_token="</s>", pad_token="<pad>", unk_token="<unk>"
    )
    fast.save_pretrained(folder)
    return folder


def make_tokens(prefix: Path, largest: int = VOCABULARY - 1, documents: int = 40) -> Path:
    """A .bin/.idx pair whose largest id is `largest`."""
    from modellink.data.indexed import IndexedDatasetWriter

    random = np.random.RandomState(0)
    with IndexedDatasetWriter(prefix, np.uint16) as writer:
        for _ in range(documents):
            writer.add_document(random.randint(3, VOCABULARY, 50))
        writer.add_document([5, largest, 7])
    return prefix


def make_hf(folder: Path, tokenizer: Path, shard_bytes: int = 5_000_000) -> Path:
    """A Hugging Face folder of the architecture above with random weights."""
    import torch

    from modellink.checkpoint.hf import save_hf
    from modellink.config.load import load_config
    from modellink.models.decoder import Decoder

    flags = [*ARCHITECTURE, *RUN, "--vocab-size", str(VOCABULARY), "--mock-data"]
    config = load_config([*flags, "--make-vocab-size-divisible-by", "1"], "train").config.model
    torch.manual_seed(0)
    named = ((name, parameter.detach()) for name, parameter in Decoder(config).named_parameters())
    save_hf(folder, named, config, tokenizer_from=tokenizer, max_shard_bytes=shard_bytes)
    return folder


def truncate(path: Path, keep: float = 0.5) -> None:
    """Cut a file short."""
    os.truncate(path, int(path.stat().st_size * keep))


def flip(path: Path, at: int) -> None:
    """Invert one byte of a file, its size unchanged."""
    with open(path, "r+b") as handle:
        handle.seek(at)
        byte = handle.read(1)[0]
        handle.seek(at)
        handle.write(bytes([byte ^ 0xFF]))


def copy(source: Path, target: Path) -> Path:
    shutil.copytree(source, target)
    return target


def copy_pair(prefix: Path, target: Path) -> Path:
    for suffix in (".bin", ".idx"):
        shutil.copyfile(f"{prefix}{suffix}", f"{target}{suffix}")
    return target


@contextlib.contextmanager
def captured() -> Iterator[io.StringIO]:
    """Everything that is printed to standard error; standard output is dropped."""
    errors = io.StringIO()
    with contextlib.redirect_stderr(errors), contextlib.redirect_stdout(io.StringIO()):
        yield errors


def run_case(argv: list[str]) -> tuple[int, str, float]:
    """(exit code, standard error, seconds) of one command line, in this process."""
    from modellink.cli.main import main

    began = time.monotonic()
    with captured() as errors:
        try:
            code = main(argv)
        except SystemExit as leaving:
            code = int(leaving.code or 0)
    return code, errors.getvalue(), time.monotonic() - began


def run_cases(
    rank: int, world_size: int, cases: list[tuple[Any, ...]], ports: list[int], memory_limit: int
) -> dict[str, Any]:
    """Run every case on this rank, each with a rendezvous store of its own.

    `memory_limit`: a layout that should have been refused must not take the machine down.
    """
    from modellink.cli import main as cli

    cli.FIRST_SPEAKS_S = cli.ORDER_S = 0.0  # nobody ends a rank here, so no rank need wait for the words of another
    resource.setrlimit(resource.RLIMIT_AS, (memory_limit, memory_limit))
    found = {}
    for fields, port in zip(cases, ports, strict=True):
        case = Case(*fields)
        os.environ["MASTER_PORT"] = str(port)
        found[case.name] = run_case([word.replace("{rank}", str(rank)) for word in case.argv])
    return found


def as_tuples(cases: list[Case]) -> list[tuple[Any, ...]]:
    return [astuple(case) for case in cases]
