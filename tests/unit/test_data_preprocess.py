"""preprocess: every input format, any number of workers, interruption, merging, and what bad input says."""

from __future__ import annotations

import csv
import dataclasses
import itertools
import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from modellink.config.preprocess_schema import PreprocessConfig
from modellink.data import IndexedDataset, readers
from modellink.data.preprocess import preprocess
from modellink.errors import ModelLinkError

# The null tokenizer makes expected ids readable: text is numbers, 1000 ends a document.
EOD = 1000
TEXTS = [f"{i} {i + 1} {i % 7}" if i % 10 else "" for i in range(300)]
IDS = [[*map(int, t.split()), EOD] if t else [] for t in TEXTS]


@pytest.fixture(autouse=True)
def small_chunks(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(readers, "CHUNK_BYTES", 256)


def config(source: Path, prefix: Path, **more: object) -> PreprocessConfig:
    base = PreprocessConfig(
        input=str(source),
        output_prefix=str(prefix),
        tokenizer_type="NullTokenizer",
        vocab_size=EOD,
        append_eod=True,
    )
    return dataclasses.replace(base, **more)  # type: ignore[arg-type]


def write_rows(path: Path, texts: list[str]) -> Path:
    rows = [{"text": text, "n": i} for i, text in enumerate(texts)]
    kind = path.suffix
    if kind == ".jsonl":
        path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    elif kind == ".json":
        path.write_text(json.dumps(rows, indent=1))
    elif kind == ".csv":
        with open(path, "w", newline="") as file:
            writer = csv.DictWriter(file, ["text", "n"])
            writer.writeheader()
            writer.writerows(rows)
    elif kind == ".txt":
        path.write_text("".join(text + "\n" for text in texts))
    elif kind == ".parquet":
        pq.write_table(pa.Table.from_pylist(rows), path, row_group_size=100)
    else:
        table = pa.Table.from_pylist(rows)
        with pa.OSFile(str(path), "wb") as sink, pa.ipc.new_stream(sink, table.schema) as writer:
            writer.write_table(table, max_chunksize=70)
    return path


def documents(prefix: Path | str) -> list[list[int]]:
    """Documents, empty ones included."""
    dataset = IndexedDataset(prefix)
    ends = dataset.document_indices.tolist()
    return [[t for s in range(a, b) for t in dataset[s].tolist()] for a, b in itertools.pairwise(ends)]


def both(prefix: Path) -> tuple[bytes, bytes]:
    return Path(f"{prefix}.bin").read_bytes(), Path(f"{prefix}.idx").read_bytes()


@pytest.mark.parametrize("kind", [".jsonl", ".json", ".csv", ".txt", ".parquet", ".arrow"])
def test_every_format_gives_the_same_documents(tmp_path: Path, kind: str) -> None:
    source = write_rows(tmp_path / f"in{kind}", TEXTS)
    summary = preprocess(config(source, tmp_path / "out"))
    assert documents(summary.prefixes["text"]) == IDS
    assert IndexedDataset(summary.prefixes["text"]).dtype == np.uint16
    assert (summary.documents, summary.tokens) == (len(IDS), sum(map(len, IDS)))
    assert sorted(p.name for p in tmp_path.iterdir()) == sorted(
        [source.name, "out_text_document.bin", "out_text_document.idx"]
    )


def test_other_layouts_are_read(tmp_path: Path) -> None:
    pretty = "\n".join(json.dumps({"text": t}, indent=2) for t in TEXTS)
    (tmp_path / "stream.json").write_text(pretty)
    table = pa.Table.from_pylist([{"text": t} for t in TEXTS])
    with pa.OSFile(str(tmp_path / "file.arrow"), "wb") as sink, pa.ipc.new_file(sink, table.schema) as writer:
        writer.write_table(table)
    marked = b"\xef\xbb\xbf" + b"\r\n".join(json.dumps({"text": t}).encode() for t in TEXTS) + b"\r\n\r\n"
    (tmp_path / "marked.jsonl").write_bytes(marked)
    for name in ("stream.json", "file.arrow", "marked.jsonl"):
        preprocess(config(tmp_path / name, tmp_path / "o"))
        assert documents(tmp_path / "o_text_document") == IDS


@pytest.mark.parametrize("kind", [".jsonl", ".csv"])
def test_bytes_do_not_depend_on_workers(tmp_path: Path, kind: str) -> None:
    source = write_rows(tmp_path / f"in{kind}", TEXTS)
    for name, more in {"one": {}, "three": {"workers": 3}, "subs": {"n_subs": 2}}.items():
        preprocess(config(source, tmp_path / name, **more))
    expected = both(tmp_path / "one_text_document")
    assert expected == both(tmp_path / "three_text_document") == both(tmp_path / "subs_text_document")


def test_a_folder_is_its_most_frequent_kind_in_the_order_of_names(tmp_path: Path) -> None:
    folder = tmp_path / "raw"
    folder.mkdir()
    write_rows(folder / "b.jsonl", TEXTS[100:])
    write_rows(folder / "a.jsonl", TEXTS[:100])
    write_rows(folder / "z.csv", ["7"])
    (folder / "notes.md").write_text("x")
    preprocess(config(folder, tmp_path / "out", workers=2))
    assert documents(tmp_path / "out_text_document") == IDS
    preprocess(config(Path(f"{folder}/b.jsonl,{folder}/a.jsonl"), tmp_path / "list"))
    assert documents(tmp_path / "list_text_document") == IDS[100:] + IDS[:100]


def test_several_keys_and_lists_of_texts(tmp_path: Path) -> None:
    rows = [{"a": "1 2", "b": ["3", "", "4 5"]}, {"a": "", "b": []}]
    (tmp_path / "in.jsonl").write_text("\n".join(map(json.dumps, rows)))
    summary = preprocess(config(tmp_path / "in.jsonl", tmp_path / "o", json_keys=["a", "b"]))
    assert list(summary.prefixes) == ["a", "b"]
    assert documents(tmp_path / "o_a_document") == [[1, 2, EOD], []]
    b = IndexedDataset(tmp_path / "o_b_document")
    assert [row.tolist() for row in b] == [[3], [4, 5, EOD]] and b.document_indices.tolist() == [0, 2, 2]


def test_a_large_vocabulary_is_stored_as_int32(tmp_path: Path) -> None:
    source = write_rows(tmp_path / "in.txt", ["70000 1"])
    preprocess(config(source, tmp_path / "o", vocab_size=100_000, append_eod=False))
    dataset = IndexedDataset(tmp_path / "o_text_document")
    assert dataset.dtype == np.int32 and dataset[0].tolist() == [70000, 1]


def test_alpaca_pretraining_text(shared: Path, tmp_path: Path) -> None:
    rows = [{"instruction": "Add.", "input": "1+1", "output": "2"}, {"instruction": "Hi", "output": "Hello"}]
    (tmp_path / "in.jsonl").write_text("\n".join(map(json.dumps, rows)))
    gpt2 = str(shared / "tokenizers/gpt2")
    more = {"handler_name": "AlpacaPretrainHandler", "tokenizer_type": "PretrainedFromHF"}
    preprocess(config(tmp_path / "in.jsonl", tmp_path / "o", tokenizer_name_or_path=gpt2, **more))
    from modellink.data.tokenizer import build_tokenizer

    texts = [build_tokenizer(name_or_path=gpt2).decode(d) for d in documents(tmp_path / "o_text_document")]
    assert texts[0].startswith("A chat between a curious user")
    assert texts[0].endswith("USER: ### Instruction: Add.\n1+1 ASSISTANT: 2")
    assert texts[1].endswith("USER: ### Instruction: Hi ASSISTANT: Hello")


def test_merge_groups(tmp_path: Path) -> None:
    for name, texts in {"p1": TEXTS[:50], "p0": TEXTS[50:90]}.items():
        preprocess(config(write_rows(tmp_path / "in.txt", texts), tmp_path / "parts" / name))
    merging = PreprocessConfig(input=str(tmp_path / "parts"), output_prefix=str(tmp_path / "all"))
    summary = preprocess(dataclasses.replace(merging, merge_group_keys=["text_document"]))
    assert documents(tmp_path / "all_text_document") == IDS[50:90] + IDS[:50]
    assert summary.documents == 90
    with pytest.raises(ModelLinkError, match=r"no .bin/.idx pair with 'labels'"):
        preprocess(dataclasses.replace(merging, merge_group_keys=["labels"]))


SLOW = """
import sys, time
from modellink.config.preprocess_schema import PreprocessConfig
from modellink.data import preprocess as p, readers
from modellink.data.handlers import HANDLERS, GeneralPretrainHandler
readers.CHUNK_BYTES, p.COMMIT_SECONDS = 256, 0.0
@HANDLERS.register("Slow")
class Slow(GeneralPretrainHandler):
    def encode(self, rows, where):
        time.sleep(float(sys.argv[3]))
        return super().encode(rows, where)
summary = p.preprocess(PreprocessConfig(input=sys.argv[1], output_prefix=sys.argv[2], handler_name="Slow",
    tokenizer_type="NullTokenizer", vocab_size=1000, append_eod=True, workers=int(sys.argv[4])))
print(summary.resumed)
"""


@pytest.mark.parametrize(("kind", "workers"), [(".jsonl", "1"), (".json", "2")])
def test_a_killed_run_goes_on_where_it_was(tmp_path: Path, kind: str, workers: str, root: Path) -> None:
    source = write_rows(tmp_path / f"in{kind}", TEXTS)
    preprocess(config(source, tmp_path / "whole"))
    journal = tmp_path / "out.preprocess" / "journal.json"
    environment = {**os.environ, "PYTHONPATH": str(root)}

    def start(seconds: str) -> subprocess.Popen[str]:
        command = [sys.executable, "-c", SLOW, str(source), str(tmp_path / "out"), seconds, workers]
        return subprocess.Popen(command, env=environment, stdout=subprocess.PIPE, text=True, start_new_session=True)

    run = start("0.05")
    deadline = time.monotonic() + 30
    while not (journal.exists() and json.loads(journal.read_text())["position"][2] > 20):
        assert time.monotonic() < deadline and run.poll() is None
        time.sleep(0.01)
    os.killpg(run.pid, signal.SIGKILL)
    run.communicate()
    assert not Path(f"{tmp_path}/out_text_document.idx").exists()
    again = start("0")
    assert again.communicate()[0].strip() == "True" and again.returncode == 0
    assert both(tmp_path / "out_text_document") == both(tmp_path / "whole_text_document")
    assert not journal.parent.exists()


def test_leftovers_of_other_options_or_damaged_ones_are_not_used(tmp_path: Path) -> None:
    source = write_rows(tmp_path / "in.txt", TEXTS)
    broken = config(source, tmp_path / "out")
    folder = tmp_path / "out.preprocess"
    for leftover in ("other options", "not json", "files missing"):
        folder.mkdir()
        if leftover == "files missing":
            from modellink.data.preprocess import _fingerprint

            state = {
                "fingerprint": _fingerprint(broken, [str(source)]),
                "position": [0, 9, 3],
                "states": {"text": [9, 3, 3]},
            }
            (folder / "journal.json").write_text(json.dumps(state))
        else:
            (folder / "journal.json").write_text("{" if leftover == "not json" else '{"fingerprint": "x"}')
            (folder / "text.bin").write_bytes(b"\0" * 100)
        summary = preprocess(broken)
        assert not summary.resumed and documents(summary.prefixes["text"]) == IDS


def test_two_runs_do_not_share_an_output(tmp_path: Path) -> None:
    import fcntl

    source = write_rows(tmp_path / "in.txt", TEXTS)
    (tmp_path / "out.preprocess").mkdir()
    with open(tmp_path / "out.preprocess" / "lock", "w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        with pytest.raises(ModelLinkError, match="another preprocess"):
            preprocess(config(source, tmp_path / "out"))


@pytest.mark.parametrize("workers", [1, 2])
@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("a.jsonl", '{"text": "1"}\n' * 40 + '{"text": \n', r"a.jsonl, line 41 is not JSON"),
        ("a.jsonl", '{"text": "1"}\n\n[1]\n', r"a.jsonl, line 3 is not a JSON object"),
        ("a.jsonl", '{"text": "1"}\n\n{"txt": "1"}\n', r"a.jsonl, line 3 has no column 'text'.*Did you mean 'txt'"),
        ("a.jsonl", '{"text": "1"}\n{"text": null}\n', r"a.jsonl, line 2: column 'text' holds NoneType"),
        ("a.json", '[{"text": "1"},\n' * 1 + '{"text": "2"},\n{"text" 3}]', r"a.json, line 3 is not valid JSON"),
        ("a.json", '[{"text": "1"},\n{"text": "2"}', r"a.json, line 2 .*truncated"),
        ("a.json", '[{"text": "1"}\n{"text": "2"}]', r"a.json, line 2 .*a comma is missing"),
        ("a.json", '[{"text": "1"},\n3]', r"a.json, line 2 .*rows must be objects"),
        ("a.csv", 'text,n\n1,2\n"1\n2",3\n4,5,6\n', r"a.csv, line 5 has 3 fields, its header 2"),
        ("a.csv", "txt,n\n1,2\n", r"a.csv, row 1 has no column 'text'"),
        ("a.txt", b"1\n\xff\xfe\n", r"a.txt, line 2 is not UTF-8"),
        ("a.parquet", "PAR1 nonsense", r"a.parquet is not a readable parquet"),
        ("a.arrow", "nonsense", r"a.arrow is not a readable arrow"),
        ("a.xyz", "1", r"no known extension; supported are arrow, csv"),
        ("a.py", "1", r"a loading script"),
    ],
)
def test_bad_input_names_file_and_line(
    tmp_path: Path, name: str, content: str | bytes, message: str, workers: int
) -> None:
    (tmp_path / name).write_bytes(content if isinstance(content, bytes) else content.encode())
    with pytest.raises(ModelLinkError, match=message):
        preprocess(config(tmp_path / name, tmp_path / "out", workers=workers))
    assert not list(tmp_path.glob("out*.idx"))


def test_bad_options(tmp_path: Path) -> None:
    source = write_rows(tmp_path / "in.txt", TEXTS)
    for more, message in [
        ({"pack": True}, "--pack has no meaning"),
        ({"split_sentences": True}, "--split-sentences is not supported"),
        ({"handler_name": "GeneralPretrainHandlr"}, "Did you mean 'GeneralPretrainHandler'"),
        ({"workers": 0}, "--workers 0"),
        ({"output_prefix": ""}, "--output-prefix is missing"),
        ({"input": str(tmp_path / "none")}, "none does not exist"),
        ({"input": ""}, "--input is missing"),
    ]:
        with pytest.raises(ModelLinkError, match=message):
            preprocess(dataclasses.replace(config(source, tmp_path / "out"), **more))  # type: ignore[arg-type]
    (tmp_path / "empty").mkdir()
    with pytest.raises(ModelLinkError, match="no file to read"):
        preprocess(config(tmp_path / "empty", tmp_path / "out"))


def test_a_value_longer_than_a_block_is_read(tmp_path: Path) -> None:
    long = " ".join(["12"] * 5000)
    (tmp_path / "in.json").write_text(json.dumps([{"text": "1"}, {"text": long}, {"text": "2"}]))
    preprocess(config(tmp_path / "in.json", tmp_path / "o"))
    assert list(map(len, documents(tmp_path / "o_text_document"))) == [2, 5001, 2]


PEAK = """
import sys
from modellink.config.preprocess_schema import PreprocessConfig
from modellink.data.preprocess import preprocess
preprocess(PreprocessConfig(input=sys.argv[1], output_prefix=sys.argv[2], tokenizer_type="NullTokenizer",
    vocab_size=1000))
# not getrusage: its peak includes that of the process forked from
print(next(line.split()[1] for line in open('/proc/self/status') if line.startswith('VmHWM')))
"""


@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="peak memory is read from /proc")
@pytest.mark.parametrize("kind", [".jsonl", ".json", ".csv", ".parquet"])
def test_memory_does_not_grow_with_the_input(tmp_path: Path, kind: str, root: Path) -> None:
    text = " ".join(["0" * 40] * 50)
    peaks = []
    for count in (2_000, 20_000):
        source = write_rows(tmp_path / f"{count}{kind}", [text] * count)
        command = [sys.executable, "-c", PEAK, str(source), str(tmp_path / "out")]
        environment = {**os.environ, "PYTHONPATH": str(root)}
        done = subprocess.run(command, env=environment, stdout=subprocess.PIPE, text=True, check=True)
        peaks.append(int(done.stdout) / 1024)
    assert kind == ".parquet" or source.stat().st_size > 40e6  # the same text again and again packs well
    assert peaks[1] - peaks[0] < 12, f"{peaks} MiB"
