"""Tokens per second and memory of `preprocess`, against a pool that tokenizes one document at a time.

    python benchmarks/preprocess.py --input corpus.jsonl --tokenizer FOLDER [--workers 1 2] [--runs 5] [--output FILE]

The comparison is the usual script: a multiprocessing pool in which every worker parses one line, calls the Hugging Face
tokenizer on its text and returns a list of ids, which the parent writes in order. Both write .bin/.idx files, and the
run stops when a byte differs. Rust threads are off in both, so that one worker is one core. Runs alternate, so that a
busy machine hurts both alike; a run starts with a new interpreter and includes loading the tokenizer.

Memory is the resident size of the whole process tree, sampled every 10 ms, for the input and for the input ten times
over.
"""

from __future__ import annotations

import argparse
import json
import multiprocessing
import os
import platform
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from datetime import UTC, datetime
from importlib import metadata
from pathlib import Path
from typing import Any

import numpy as np
import psutil

ROOT = Path(__file__).resolve().parent.parent


def ours(source: str, prefix: str, tokenizer: str, workers: int) -> float:
    from modellink.config.preprocess_schema import PreprocessConfig
    from modellink.data.preprocess import preprocess

    config = PreprocessConfig(
        input=source, output_prefix=prefix, tokenizer_name_or_path=tokenizer, append_eod=True, workers=workers
    )
    return preprocess(config).seconds


_TOKENIZER: Any = None


def _load(folder: str) -> None:
    global _TOKENIZER
    from transformers import AutoTokenizer

    _TOKENIZER = AutoTokenizer.from_pretrained(folder)


def _tokenize(line: str) -> list[int]:
    ids = _TOKENIZER(json.loads(line)["text"])["input_ids"]
    if ids:
        ids.append(_TOKENIZER.eos_token_id)
    return ids


def one_document_at_a_time(source: str, prefix: str, tokenizer: str, workers: int) -> float:
    from modellink.data.indexed import IndexedDatasetWriter, best_dtype

    _load(tokenizer)
    dtype = best_dtype(len(_TOKENIZER))
    start = time.perf_counter()
    with (
        open(source, encoding="utf-8") as lines,
        multiprocessing.get_context("fork").Pool(workers, _load, (tokenizer,)) as pool,
        IndexedDatasetWriter(f"{prefix}_text_document", dtype) as writer,
    ):
        for ids in pool.imap(_tokenize, lines, 32):
            writer.add_document(np.array(ids, dtype))
    return time.perf_counter() - start


PROGRAMS: dict[str, Callable[[str, str, str, int], float]] = {"ours": ours, "pool": one_document_at_a_time}


def measure(name: str, source: str, prefix: str, tokenizer: str, workers: int) -> tuple[float, float, float]:
    """Run one program in an interpreter of its own: (seconds of conversion, of everything, peak MiB of its tree)."""
    command = [sys.executable, __file__, "--child", name, source, prefix, tokenizer, str(workers)]
    environment = os.environ | {"TOKENIZERS_PARALLELISM": "false", "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    start, peak = time.perf_counter(), 0
    with tempfile.TemporaryFile() as log:
        process = subprocess.Popen(command, env=environment, stdout=log, stderr=log)
        root = psutil.Process(process.pid)
        while process.poll() is None:
            peak = max(peak, _tree_size(root))
            time.sleep(0.01)
        seconds = time.perf_counter() - start
        if process.returncode:
            log.seek(0)
            raise SystemExit(f"{name} failed:\n{log.read().decode()}")
    return float(Path(f"{prefix}.seconds").read_text()), seconds, peak / 2**20


def _tree_size(root: psutil.Process) -> int:
    total = 0
    try:
        for process in [root, *root.children(recursive=True)]:
            total += process.memory_info().rss
    except psutil.NoSuchProcess:
        pass  # it ended while being looked at
    return total


def speeds(source: str, tokenizer: str, folder: str, worker_counts: list[int], runs: int) -> list[str]:
    lines = [
        "| workers | program | tokens/s, median | lowest to highest | times the pool | whole process, median |",
        "|---|---|---|---|---|---|",
    ]
    for workers in worker_counts:
        found: dict[str, list[float]] = {name: [] for name in PROGRAMS}
        whole: dict[str, list[float]] = {name: [] for name in PROGRAMS}
        for _ in range(runs):
            for name in PROGRAMS:
                prefix = f"{folder}/{name}"
                seconds, everything, _ = measure(name, source, prefix, tokenizer, workers)
                whole[name].append(everything)
                tokens = _count(prefix)
                found[name].append(tokens / seconds)
            for suffix in (".bin", ".idx"):
                first, second = (Path(f"{folder}/{name}_text_document{suffix}").read_bytes() for name in PROGRAMS)
                if first != second:
                    raise SystemExit(f"the two programs wrote different {suffix} files")
        base = statistics.median(found["pool"])
        for name, values in found.items():
            middle = statistics.median(values)
            spread = f"{min(values):,.0f} to {max(values):,.0f}"
            lines.append(
                f"| {workers} | {name} | {middle:,.0f} | {spread} | {middle / base:.2f} | "
                f"{statistics.median(whole[name]):.1f} s |"
            )
    return lines


def _count(prefix: str) -> int:
    from modellink.data.indexed import IndexedDataset

    return len(IndexedDataset(f"{prefix}_text_document").tokens)


def memory(source: str, tokenizer: str, folder: str, worker_counts: list[int]) -> list[str]:
    large = f"{folder}/ten_times.jsonl"
    text = Path(source).read_bytes()
    with open(large, "wb") as out:
        for _ in range(10):
            out.write(text)
    lines = ["| workers | input | peak memory of the process tree |", "|---|---|---|"]
    for workers in worker_counts:
        for path in (source, large):
            _, _, peak = measure("ours", path, f"{folder}/memory", tokenizer, workers)
            lines.append(f"| {workers} | {Path(path).stat().st_size / 2**20:,.0f} MiB | {peak:,.0f} MiB |")
    return lines


def main() -> None:
    if sys.argv[1:2] == ["--child"]:
        name, source, prefix, tokenizer, workers = sys.argv[2:]
        Path(f"{prefix}.seconds").write_text(str(PROGRAMS[name](source, prefix, tokenizer, int(workers))))
        return
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--input", required=True, help="jsonl file with a text column")
    parser.add_argument("--tokenizer", required=True, help="folder of a Hugging Face tokenizer")
    parser.add_argument("--workers", type=int, nargs="+", default=[1, 2])
    parser.add_argument("--runs", type=int, default=5)
    parser.add_argument("--output", help="write the report here too")
    args = parser.parse_args()
    sys.path.insert(0, str(ROOT))
    with tempfile.TemporaryDirectory() as folder:
        ram = psutil.virtual_memory().total / 2**30
        versions = ", ".join(f"{name} {metadata.version(name)}" for name in ("tokenizers", "transformers", "numpy"))
        report = [
            f"# preprocess, {datetime.now(UTC):%Y-%m-%d}",
            "",
            f"{Path(args.input).name} ({Path(args.input).stat().st_size / 2**20:.0f} MiB), tokenizer "
            f"{Path(args.tokenizer).name}, {args.runs} alternating runs of each program; "
            f"{psutil.cpu_count()} CPU cores ({platform.machine()}), {ram:.0f} GiB of memory; "
            f"Python {platform.python_version()}, {versions}.",
            "",
            "The pool calls the Hugging Face tokenizer one document at a time. Output files are compared byte for byte",
            "after every pair of runs. Tokens/s: from the loaded tokenizer to the finished files.",
            "",
            *speeds(args.input, args.tokenizer, folder, args.workers, args.runs),
            "",
            *memory(args.input, args.tokenizer, folder, args.workers),
            "",
        ]
    print("\n".join(report))
    if args.output:
        Path(args.output).write_text("\n".join(report))


if __name__ == "__main__":
    main()
