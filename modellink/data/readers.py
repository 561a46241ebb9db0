"""Raw files to rows, in bounded memory: parquet, arrow, csv, json (an array or values one after another), jsonl and
txt.

`read_chunks` cuts the input into chunks of about CHUNK_BYTES. Where they are cut depends on the files alone, and a
chunk knows the position behind it, so reading can go on from there. Lines are handed out as raw bytes, to be parsed
by whoever works on the chunk; the other formats, whose records cannot be told apart without parsing, as rows.
"""

from __future__ import annotations

import csv
import io
import json
import sys
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any, NamedTuple

from modellink.errors import ModelLinkError

CHUNK_BYTES = 1 << 20
_COLUMN_BATCH = 256
Row = dict[str, Any]


class Position(NamedTuple):
    """A place between two chunks: file number, byte offset (files of lines only) and rows or lines before it."""

    file: int = 0
    offset: int = 0
    row: int = 0


@dataclass
class Chunk:
    """A run of rows of one file.

    Attributes:
        path: the file.
        first: number of the first line or row, from 1.
        content: raw lines (`jsonl`, `txt`) or parsed rows.
        end: the position behind the chunk.
        bytes_done: how far into the file it reaches, for the progress bar.
    """

    path: str
    first: int
    content: bytes | list[Row]
    end: Position
    bytes_done: int

    def rows(self) -> tuple[list[Row], Callable[[int], str]]:
        """Parse the chunk: its rows, and a function that says where row i is from."""
        if isinstance(self.content, list):
            return self.content, lambda i: f"{self.path}, row {self.first + i}"
        lines = self.content.split(b"\n")
        if lines[-1] == b"":
            lines.pop()
        if self.path.endswith(".txt"):
            texts = [self._text(line, n) for n, line in enumerate(lines)]
            return [{"text": text} for text in texts], lambda i: f"{self.path}, line {self.first + i}"
        rows, numbers = [], []
        for n, line in enumerate(lines):
            if line.strip():
                rows.append(self._object(line, n))
                numbers.append(self.first + n)
        return rows, lambda i: f"{self.path}, line {numbers[i]}"

    def _text(self, line: bytes, n: int) -> str:
        try:
            return line.removesuffix(b"\r").decode()
        except UnicodeDecodeError as error:
            raise ModelLinkError(
                f"{self.path}, line {self.first + n} is not UTF-8 ({error.reason}); convert the file"
            ) from error

    def _object(self, line: bytes, n: int) -> Row:
        try:
            row = json.loads(line)
        except ValueError as error:
            raise ModelLinkError(
                f"{self.path}, line {self.first + n} is not JSON ({error}); fix or drop the line"
            ) from error
        if not isinstance(row, dict):
            raise ModelLinkError(f"{self.path}, line {self.first + n} is not a JSON object; each line must be one")
        return row


def find_files(text: str) -> list[str]:
    """Return the files that --input means: one, several joined by commas, or those of a folder, sorted by name.

    Of a folder only the files with the most frequent supported extension count.
    """
    if not text:
        raise ModelLinkError("--input is missing; give a file or folder of raw data")
    parts = [text] if Path(text).exists() else text.split(",")
    return [str(file) for part in parts for file in _files_of(Path(part.strip()))]


def _files_of(path: Path) -> list[Path]:
    known = ", ".join(sorted(e[1:] for e in _READERS))
    if path.is_dir():
        files = sorted(f for f in path.iterdir() if f.is_file() and f.suffix.lower() in _READERS)
        if not files:
            raise ModelLinkError(f"folder {path} holds no file to read; supported are {known}")
        counts = Counter(f.suffix.lower() for f in files)
        extension = min(counts, key=lambda e: (-counts[e], e))
        return [f for f in files if f.suffix.lower() == extension]
    if path.suffix == ".py":
        raise ModelLinkError(
            f"--input {path} is a loading script, and code of a data set is not run; export its rows as jsonl"
        )
    if not path.is_file():
        raise ModelLinkError(
            f"--input {path} does not exist; give a local file or folder (data is not downloaded here)"
        )
    if path.suffix.lower() not in _READERS:
        raise ModelLinkError(f"--input {path} has no known extension; supported are {known}")
    return [path]


def read_chunks(
    files: Sequence[str], columns: Sequence[str] | None = None, start: Position | None = None
) -> Iterator[Chunk]:
    """Yield the chunks of `files` in order, from `start` on. `columns` (None: all) spares column stores the others.

    Raises ModelLinkError naming file and line when the data cannot be read.
    """
    start = start or Position()
    for number in range(start.file, len(files)):
        here = start if number == start.file else Position(number)
        yield from _READERS[Path(files[number]).suffix.lower()](files[number], columns, here)


def _read_lines(path: str, columns: Sequence[str] | None, start: Position) -> Iterator[Chunk]:
    with open(path, "rb") as file:
        if start.offset == 0 and file.read(3) != b"\xef\xbb\xbf":  # a byte order mark is not text
            file.seek(0)
        if start.offset:
            file.seek(start.offset)
        row = start.row
        while content := file.read(CHUNK_BYTES):
            if not content.endswith(b"\n"):
                content += file.readline()
            first, row = row + 1, row + content.count(b"\n")
            yield Chunk(path, first, content, Position(start.file, file.tell(), row), file.tell())


def _collect(path: str, rows: Iterable[Row], start: Position, done: Callable[[int], int]) -> Iterator[Chunk]:
    """Group parsed rows into chunks, skipping those before `start`; `done(rows so far)` estimates the bytes read."""
    batch: list[Row] = []
    size, count = 0, 0
    for count, row in enumerate(rows, 1):
        if count <= start.row:
            continue
        batch.append(row)
        size += sum(len(value) if isinstance(value, str) else 64 for value in row.values())
        if size >= CHUNK_BYTES:
            yield Chunk(path, count - len(batch) + 1, batch, Position(start.file, 0, count), done(count))
            batch, size = [], 0
    if batch:
        yield Chunk(path, count - len(batch) + 1, batch, Position(start.file, 0, count), done(count))


def _read_csv(path: str, columns: Sequence[str] | None, start: Position) -> Iterator[Chunk]:
    csv.field_size_limit(sys.maxsize)
    wanted = None if columns is None else set(columns)

    def rows(lines: IO[str]) -> Iterator[Row]:
        table = csv.reader(lines, strict=True)
        try:
            header = next(table, [])
            for fields in table:
                if not fields:
                    continue
                if len(fields) != len(header):
                    raise ModelLinkError(
                        f"{path}, line {table.line_num} has {len(fields)} fields, its header {len(header)}; fix the "
                        "line"
                    )
                row = zip(header, fields, strict=True)
                yield {name: value for name, value in row if wanted is None or name in wanted}
        except (csv.Error, UnicodeDecodeError) as error:
            raise ModelLinkError(
                f"{path}, near line {table.line_num + 1} is not valid UTF-8 csv ({error}); fix it"
            ) from error

    with open(path, "rb") as raw, io.TextIOWrapper(raw, "utf-8-sig", newline="") as text:
        yield from _collect(path, rows(text), start, lambda count: raw.tell())


def _read_json(path: str, columns: Sequence[str] | None, start: Position) -> Iterator[Chunk]:
    wanted = None if columns is None else set(columns)

    def rows(text: IO[str]) -> Iterator[Row]:
        for row in _JsonStream(path, text):
            yield row if wanted is None else {name: value for name, value in row.items() if name in wanted} or row

    with open(path, "rb") as raw, io.TextIOWrapper(raw, "utf-8-sig") as text:
        yield from _collect(path, rows(text), start, lambda count: raw.tell())


class _JsonStream:
    """The objects of a JSON array, or of JSON values one after another, with one block of the file in memory at a
    time.
    """

    def __init__(self, path: str, text: IO[str]) -> None:
        self.path, self.text = path, text
        self.buffer, self.at, self.line, self.ended = "", 0, 1, False
        self._decode = json.JSONDecoder().raw_decode

    def __iter__(self) -> Iterator[Row]:
        in_array = self._next_character() == "["
        self.at += in_array
        first = True
        while character := self._next_character():
            if in_array and character == "]":
                self.at += 1
                if self._next_character():
                    raise self._error("text after the end of the array", self.at)
                return
            if in_array and not first:
                if character != ",":
                    raise self._error("a comma is missing", self.at)
                self.at += 1
                self._next_character()
            yield self._object()
            first = False
        if in_array:
            raise self._error("the array does not end; the file is truncated", self.at)

    def _object(self) -> Row:
        while True:
            try:
                value, end = self._decode(self.buffer, self.at)
            except json.JSONDecodeError as error:
                # an error well before the end of what has been read is in the data, not in the cut
                cut = error.msg.startswith("Unterminated string") or error.pos >= len(self.buffer) - 16
                if self.ended or not cut:
                    raise self._error(error.msg, error.pos) from error
                self._more(max(CHUNK_BYTES, len(self.buffer) - self.at))  # doubling keeps a very long value linear
                continue
            if not isinstance(value, dict):
                raise self._error("rows must be objects", self.at)
            self.at = end
            return value

    def _next_character(self) -> str:
        while True:
            while self.at < len(self.buffer) and self.buffer[self.at] in " \t\r\n":
                self.at += 1
            if self.at < len(self.buffer) or not self._more(CHUNK_BYTES):
                return self.buffer[self.at : self.at + 1]

    def _more(self, size: int) -> bool:
        try:
            block = self.text.read(size)
        except UnicodeDecodeError as error:
            raise ModelLinkError(f"{self.path} is not UTF-8 ({error.reason}); convert the file") from error
        self.line += self.buffer.count("\n", 0, self.at)
        self.buffer, self.at, self.ended = self.buffer[self.at :] + block, 0, not block
        return not self.ended

    def _error(self, what: str, place: int) -> ModelLinkError:
        number = self.line + self.buffer.count("\n", 0, place)
        return ModelLinkError(f"{self.path}, line {number} is not valid JSON ({what}); fix the file")


def _present(names: Sequence[str], columns: Sequence[str] | None) -> list[str] | None:
    """Return those of `columns` that exist; all when none does, so that the error can say what there is."""
    return None if columns is None else [name for name in columns if name in names] or list(names)


def _read_parquet(path: str, columns: Sequence[str] | None, start: Position) -> Iterator[Chunk]:
    import pyarrow as pa
    from pyarrow import parquet

    try:
        with parquet.ParquetFile(path, buffer_size=1 << 20, pre_buffer=False) as file:
            chosen = _present(file.schema_arrow.names, columns)
            total, size = file.metadata.num_rows, Path(path).stat().st_size

            def rows() -> Iterator[Row]:
                for batch in file.iter_batches(batch_size=_COLUMN_BATCH, columns=chosen):
                    yield from batch.to_pylist()

            yield from _collect(path, rows(), start, lambda count: size * count // max(total, 1))
    except (pa.ArrowInvalid, OSError) as error:
        raise ModelLinkError(f"{path} is not a readable parquet file ({error}); download or write it again") from error


def _read_arrow(path: str, columns: Sequence[str] | None, start: Position) -> Iterator[Chunk]:
    import pyarrow as pa

    def rows(batches: Iterable[Any], chosen: list[str] | None) -> Iterator[Row]:
        for batch in batches:
            part = batch if chosen is None else batch.select(chosen)
            for i in range(0, part.num_rows, _COLUMN_BATCH):
                yield from part.slice(i, _COLUMN_BATCH).to_pylist()

    try:
        with open(path, "rb") as raw:
            is_file = raw.read(6) == b"ARROW1"  # the other layout is the stream that `datasets` writes
            raw.seek(0)
            reader = pa.ipc.open_file(raw) if is_file else pa.ipc.open_stream(raw)
            batches = (reader.get_batch(i) for i in range(reader.num_record_batches)) if is_file else reader
            chosen = _present(reader.schema.names, columns)
            yield from _collect(path, rows(batches, chosen), start, lambda count: raw.tell())
    except (pa.ArrowInvalid, OSError) as error:
        raise ModelLinkError(f"{path} is not a readable arrow file ({error}); download or write it again") from error


_READERS: dict[str, Callable[[str, Sequence[str] | None, Position], Iterator[Chunk]]] = {
    ".jsonl": _read_lines,
    ".txt": _read_lines,
    ".json": _read_json,
    ".csv": _read_csv,
    ".parquet": _read_parquet,
    ".arrow": _read_arrow,
}
