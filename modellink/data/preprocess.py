"""Raw data to .bin/.idx files: `modellink preprocess`.

The parent process reads the input in chunks and writes the output; worker processes, or the parent when there is one
worker, turn chunks into ids. Results are taken in the order of the input, so the files do not depend on the number of
workers, and only a few chunks are under way at any time, so memory does not depend on the size of the input.

An interrupted run goes on where it was. Its unfinished files lie in `PREFIX.preprocess/` with a journal of the last
durable state (position in the input, tokens, sequences and documents written). The journal also holds everything the
bytes depend on: options, input files with size and time, tokenizer, chunk size. When any of it differs, the folder is
emptied and work starts over.
"""

from __future__ import annotations

import contextlib
import dataclasses
import fcntl
import hashlib
import json
import logging
import multiprocessing
import os
import shutil
import time
from collections import deque
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from modellink.config.preprocess_schema import PreprocessConfig
from modellink.data import instruction_handlers, readers
from modellink.data.handlers import HANDLERS, Encoded, Handler, build_handler
from modellink.data.indexed import IndexedDataset, IndexedDatasetWriter, WriterState, merge
from modellink.data.readers import Chunk, Position, find_files, read_chunks
from modellink.data.tokenizer import Tokenizer, build_tokenizer
from modellink.errors import ModelLinkError, RunFailure
from modellink.files import atomic_write

logger = logging.getLogger(__name__)

assert instruction_handlers.HANDLERS is HANDLERS  # importing it is what registers them

COMMIT_SECONDS = 2.0
_FORMAT = 1
# options that change how the work is done but not what comes out
_NEUTRAL = {"workers", "n_subs", "log_interval", "overwrite_cache", "cache_dir", "streaming", "output_prefix"}


@dataclass
class PreprocessSummary:
    """What a run wrote.

    Attributes:
        prefixes: prefix of every .bin/.idx pair, by key.
        documents, sequences, tokens: totals over all pairs, resumed parts included.
        seconds: time of this run.
        tokens_per_second: tokens written by this run over `seconds`.
        resumed: whether an interrupted run was continued.
    """

    prefixes: dict[str, str]
    documents: int
    sequences: int
    tokens: int
    seconds: float
    tokens_per_second: float
    resumed: bool = False


def preprocess(config: PreprocessConfig) -> PreprocessSummary:
    """Convert `config.input`, or merge files when `merge_group_keys` is given, and return what was written.

    Raises ModelLinkError for options that do not fit together, for input that cannot be read (naming file and line) and
    for a tokenizer that is missing. Files under their final names are whole or absent at any moment.
    """
    if not config.output_prefix:
        raise ModelLinkError("--output-prefix is missing; give the path that the names of the output files begin with")
    if config.merge_group_keys:
        return merge_groups(config)
    tokenizer = _build_tokenizer(config)
    handler = build_handler(config, tokenizer)
    _check_options(config, handler)
    files = find_files(config.input)
    with _WorkFolder(config, files) as work:
        return _Run(config, tokenizer, handler, files, work).run()


def merge_groups(config: PreprocessConfig) -> PreprocessSummary:
    """For each key, concatenate the pairs in --input whose name contains it, sorted by name, to PREFIX_KEY."""
    start, folder = time.monotonic(), Path(config.input)
    if not folder.is_dir():
        raise ModelLinkError(f"--merge-group-keys needs --input to be a folder of .bin/.idx pairs, {folder} is none")
    prefixes: dict[str, str] = {}
    totals = WriterState()
    for key in config.merge_group_keys or []:
        target = f"{config.output_prefix}_{key}"
        pairs = sorted(str(p)[:-4] for p in folder.glob("*.idx") if key in p.stem and p.with_suffix(".bin").is_file())
        # an earlier result in the same folder is not input
        pairs = [pair for pair in pairs if Path(pair).resolve() != Path(target).resolve()]
        if not pairs:
            raise ModelLinkError(
                f"folder {folder} has no .bin/.idx pair with {key!r} in its name; check --merge-group-keys"
            )
        merge(pairs, target)
        prefixes[key] = target
        merged = IndexedDataset(target)
        totals = _add(totals, WriterState(len(merged.tokens), len(merged), len(merged.document_indices) - 1))
    seconds = time.monotonic() - start
    return PreprocessSummary(
        prefixes, totals.documents, totals.sequences, totals.tokens, seconds, totals.tokens / max(seconds, 1e-9)
    )


def _add(a: WriterState, b: WriterState) -> WriterState:
    return WriterState(*(x + y for x, y in zip(a, b, strict=True)))


def _build_tokenizer(config: PreprocessConfig) -> Tokenizer:
    return build_tokenizer(
        config.tokenizer_type,
        config.tokenizer_name_or_path,
        use_fast=not config.tokenizer_not_use_fast,
        kwargs=config.tokenizer_kwargs,
        vocab_file=config.vocab_file,
        merge_file=config.merge_file,
        tokenizer_model=config.tokenizer_model,
        vocab_size=config.vocab_size,
    )


def _check_options(config: PreprocessConfig, handler: Handler) -> None:
    name = type(handler).__name__
    for option in ("pack", "map_keys", "max_samples", "dataset_dir", "interleave_probs", "mix_strategy"):
        given = getattr(config, option) != getattr(PreprocessConfig, option)
        if given and option not in handler.accepts:
            flag = "--" + option.replace("_", "-")
            raise ModelLinkError(f"{flag} has no meaning for {name}; leave it out or choose another --handler-name")
    for option, why in (
        ("split_sentences", "it serves BERT-style training, which there is none of; leave it out"),
        ("keep_newlines", "it belongs to --split-sentences; leave it out"),
        ("hf_datasets_params", "rows are read as they are; name the files in --input"),
    ):
        if getattr(config, option):
            raise ModelLinkError(f"--{option.replace('_', '-')} is not supported: {why}")
    if config.workers < 1 or config.n_subs < 1:
        raise ModelLinkError(f"--workers {config.workers} and --n-subs {config.n_subs} must be at least 1")


def _fingerprint(config: PreprocessConfig, files: list[str]) -> str:
    """Digest of everything the output bytes depend on."""
    options = {k: v for k, v in dataclasses.asdict(config).items() if k not in _NEUTRAL}
    tokenizer_files = [config.vocab_file, config.merge_file, config.tokenizer_model]
    if config.tokenizer_name_or_path:
        tokenizer_files += sorted(str(f) for f in Path(config.tokenizer_name_or_path).iterdir() if f.is_file())
    stats = [(f, os.stat(f).st_size, os.stat(f).st_mtime_ns) for f in [*files, *filter(None, tokenizer_files)]]
    return hashlib.sha256(json.dumps([_FORMAT, readers.CHUNK_BYTES, options, stats]).encode()).hexdigest()


class _WorkFolder:
    """`PREFIX.preprocess/`: unfinished files and their journal, locked while a run uses it."""

    def __init__(self, config: PreprocessConfig, files: list[str]) -> None:
        self.path = Path(config.output_prefix + ".preprocess")
        self.fingerprint = _fingerprint(config, files)
        self._fresh = config.overwrite_cache
        self.finished = False

    def __enter__(self) -> _WorkFolder:
        try:
            self.path.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise ModelLinkError(
                f"folder {self.path} for unfinished work cannot be made ({error.strerror}); choose another "
                f"--output-prefix"
            ) from error
        self._lock = open(self.path / "lock", "w")
        try:
            fcntl.flock(self._lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError as error:
            self._lock.close()
            raise ModelLinkError(
                f"another preprocess is writing {self.path}; wait for it or choose another --output-prefix"
            ) from error
        self.journal = self._read_journal()
        if self.journal is None:
            self.clear()
        return self

    def clear(self) -> None:
        """Remove what an earlier run left."""
        for leftover in self.path.iterdir():
            if leftover.name != "lock":
                leftover.unlink()
        self.journal = None

    def _read_journal(self) -> dict[str, Any] | None:
        path = self.path / "journal.json"
        if self._fresh or not path.is_file():
            return None
        try:
            journal = json.loads(path.read_text())
        except ValueError:
            journal = {}
        if journal.get("fingerprint") != self.fingerprint:
            logger.warning("%s was left by a run with other options or other data; starting over", self.path)
            return None
        return journal

    def commit(self, position: Position, states: dict[str, WriterState]) -> None:
        """Record that everything before `position` is durably written."""
        content = {"fingerprint": self.fingerprint, "position": position, "states": states}
        atomic_write(self.path / "journal.json", json.dumps(content))

    def __exit__(self, *_: object) -> None:
        if self.finished:
            shutil.rmtree(self.path, ignore_errors=True)
        self._lock.close()


class _Run:
    """One conversion: state shared by reading, tokenizing, writing and reporting."""

    def __init__(
        self, config: PreprocessConfig, tokenizer: Tokenizer, handler: Handler, files: list[str], work: _WorkFolder
    ) -> None:
        self.config, self.tokenizer, self.handler, self.files, self.work = config, tokenizer, handler, files, work
        self.prefixes = {key: f"{config.output_prefix}_{key}_document" for key in handler.outputs}
        self.position = Position()
        self.resumed = False

    def run(self) -> PreprocessSummary:
        started = time.monotonic()
        self.writers = self._open_writers()
        before = self._totals()
        try:
            self._convert(before.tokens)
            self._finish()
        finally:
            for writer in self.writers.values():
                writer.close()
        total, seconds = self._totals(), time.monotonic() - started
        speed = (total.tokens - before.tokens) / max(seconds, 1e-9)
        return PreprocessSummary(
            self.prefixes, total.documents, total.sequences, total.tokens, seconds, speed, self.resumed
        )

    def _totals(self) -> WriterState:
        total = WriterState()
        for writer in self.writers.values():
            total = _add(total, writer.state)
        return total

    def _open_writers(self) -> dict[str, IndexedDatasetWriter]:
        """Continue from the journal when there is one and the files match it, else start over."""
        journal = self.work.journal
        if journal is not None:
            try:
                writers = {k: self._writer(k, WriterState(*journal["states"][k])) for k in self.handler.outputs}
            except (FileNotFoundError, ModelLinkError, KeyError, TypeError):
                logger.warning("%s is incomplete; starting over", self.work.path)
                self.work.clear()
            else:
                self.position, self.resumed = Position(*journal["position"]), True
                return writers
        return {key: self._writer(key, None) for key in self.handler.outputs}

    def _writer(self, key: str, resume: WriterState | None) -> IndexedDatasetWriter:
        # with a second pass to come, the files of the first are finished inside the work folder
        prefix = self.prefixes[key] if self.handler.arrange is None else str(self.work.path / f"encoded_{key}")
        return IndexedDatasetWriter(prefix, self.handler.outputs[key], work=self.work.path / key, resume=resume)

    def _convert(self, tokens_before: int) -> None:
        sizes = [os.path.getsize(f) for f in self.files]
        results = self._results()
        first = next(results, None)  # starts the workers, before the progress bar starts its thread
        started = committed = time.monotonic()
        shown = self._totals().documents
        with _progress(sum(sizes)) as show:
            while first is not None:
                chunk, encoded = first
                for key, part in encoded.items():
                    self.writers[key].add_documents(part.tokens, part.lengths, part.sequences)
                self.position = chunk.end
                total = self._totals()
                if total.documents - shown >= self.config.log_interval:
                    shown = total.documents
                    speed = (total.tokens - tokens_before) / max(time.monotonic() - started, 1e-9)
                    show(sum(sizes[: chunk.end.file]) + chunk.bytes_done, total, speed)
                if time.monotonic() - committed >= COMMIT_SECONDS:
                    self.work.commit(self.position, {k: w.flush() for k, w in self.writers.items()})
                    committed = time.monotonic()
                first = next(results, None)
            total = self._totals()
            show(sum(sizes), total, (total.tokens - tokens_before) / max(time.monotonic() - started, 1e-9))

    def _results(self) -> Iterator[tuple[Chunk, dict[str, Encoded]]]:
        """Yield every chunk with what it became, in order."""
        chunks = read_chunks(self.files, self.handler.columns, self.position)
        workers = max(self.config.workers, self.config.n_subs)
        if workers == 1:
            for chunk in chunks:
                yield chunk, self.handler.encode(*chunk.rows())
            return
        # Forked, so that workers share the tokenizer's memory and start at once; nothing else runs in this process yet.
        self.tokenizer.encode_bytes([], np.int32)  # what it prepares on first use is prepared once
        context = multiprocessing.get_context("fork" if "fork" in multiprocessing.get_all_start_methods() else "spawn")
        pool = ProcessPoolExecutor(workers, context, _start_worker, (self.config, os.getpid()))
        waiting: deque[tuple[Chunk, Future[dict[str, Encoded]]]] = deque()
        _INHERITED.append(self.handler)
        try:
            for chunk in chunks:
                waiting.append((chunk, pool.submit(_encode_in_worker, chunk)))
                if len(waiting) > 2 * workers:
                    yield self._take(waiting)
            while waiting:
                yield self._take(waiting)
        finally:
            _INHERITED.pop()
            pool.shutdown(wait=True, cancel_futures=True)

    def _take(self, waiting: deque[tuple[Chunk, Future[dict[str, Encoded]]]]) -> tuple[Chunk, dict[str, Encoded]]:
        chunk, future = waiting.popleft()
        try:
            return chunk, future.result()
        except BrokenProcessPool as error:
            raise RunFailure(
                f"a worker process died while reading {chunk.path} from line {chunk.first}, most likely for lack of "
                f"memory; run the same command again with fewer --workers and it will go on from there"
            ) from error

    def _finish(self) -> None:
        for writer in self.writers.values():
            writer.finalize()
        if self.handler.arrange is not None:
            encoded = {key: IndexedDataset(writer.prefix) for key, writer in self.writers.items()}
            with contextlib.ExitStack() as stack:
                final = {
                    key: stack.enter_context(IndexedDatasetWriter(prefix, self.handler.outputs[key]))
                    for key, prefix in self.prefixes.items()
                }
                self.handler.arrange(encoded, final)
            self.writers = final
        self.work.finished = True


# A forked worker finds the parent's handler here; a spawned one builds its own.
_INHERITED: list[Handler] = []


def _start_worker(config: PreprocessConfig, parent: int) -> None:
    # one worker is one core: threads of the Rust tokenizer would only compete with the other workers
    os.environ["TOKENIZERS_PARALLELISM"] = "false"
    if not _INHERITED:
        _INHERITED.append(build_handler(config, _build_tokenizer(config)))


def _encode_in_worker(chunk: Chunk) -> dict[str, Encoded]:
    return _INHERITED[-1].encode(*chunk.rows())


@contextlib.contextmanager
def _progress(total_bytes: int) -> Iterator[Callable[[int, WriterState, float], None]]:
    """A progress bar over the bytes of the input with documents, tokens and tokens/s beside it, on standard error."""
    from rich.console import Console
    from rich.progress import BarColumn, Progress, TaskProgressColumn, TextColumn, TimeRemainingColumn

    text = TextColumn("{task.fields[counts]}")
    columns = (TextColumn("preprocess"), BarColumn(), TaskProgressColumn(), text, TimeRemainingColumn())
    with Progress(*columns, console=Console(stderr=True)) as bar:
        task = bar.add_task("preprocess", total=max(total_bytes, 1), counts="")

        def show(done: int, state: WriterState, speed: float) -> None:
            counts = f"{state.documents:,} documents, {state.tokens:,} tokens, {speed:,.0f} tokens/s"
            bar.update(task, completed=max(done, int(total_bytes == 0)), counts=counts)

        yield show
