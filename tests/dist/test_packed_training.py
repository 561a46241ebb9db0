"""`modellink train` on packed documents and conversations: sharing a sequence changes nothing."""

from __future__ import annotations

import json
import subprocess
import sys
from contextlib import ExitStack
from pathlib import Path

import numpy as np
import pytest
from test_resume import FLAGS, VOCABULARY

from modellink.data.indexed import IndexedDatasetWriter

pytestmark = pytest.mark.dist
RESET = ["--reset-position-ids", "--reset-attention-mask"]
CHAT = ["--is-instruction-dataset"]
TEXTS = {
    "documents": [*RESET, "--eod-mask-loss"],
    "conversations": [*CHAT, *RESET],
    "variable lengths": [*CHAT, *RESET, "--variable-seq-lengths", "--pad-to-multiple-of", "4"],
}
LAYOUTS = {
    "one process": [],
    "ring": ["--context-parallel-size", "2", "--context-parallel-algo", "megatron_cp_algo"],
    "Ulysses": ["--context-parallel-size", "2"],
    "all-gather": ["--context-parallel-size", "2", "--context-parallel-algo", "allgather_cp_algo"],
}


def write(folder: Path) -> Path:
    """Documents and packed conversations; each ends with the last id of the vocabulary."""
    draw = np.random.default_rng(0)
    prefix = folder / "text"
    files = [prefix, *(Path(f"{prefix}_packed_{kind}_document") for kind in ("input_ids", "labels"))]
    with ExitStack() as stack:
        writers = [stack.enter_context(IndexedDatasetWriter(file, np.int32)) for file in files]
        for _ in range(60):
            pieces = [draw.zipf(1.3, draw.integers(3, 12)).clip(max=VOCABULARY - 1) - 1 for _ in range(3)]
            ended = [np.append(piece, VOCABULARY - 1) for piece in pieces]
            for piece in ended:
                writers[0].add_document(piece)
            tokens = np.concatenate(ended)[: draw.integers(12, 33)]
            writers[1].add_document(tokens)
            writers[2].add_document(np.where(draw.random(len(tokens)) < 0.3, -100, tokens))
    return prefix


def test_losses_of_packed_data_are_those_of_one_process(tmp_path: Path) -> None:
    prefix, cases = write(tmp_path), []
    for text, flags in TEXTS.items():
        for layout, more in LAYOUTS.items():
            argv = [*FLAGS, "--train-iters", "3", *flags, *more, "--data-path", str(prefix)]
            argv += ["--data-cache-path", str(tmp_path / "cache"), "--save", str(tmp_path / text / layout)]
            cases.append({"argv": argv, "ranks": 2 if more else 1})
    (tmp_path / "cases.json").write_text(json.dumps(cases))
    program = [sys.executable, Path(__file__).with_name("forked_runs.py")]
    subprocess.run([*program, tmp_path / "cases.json", tmp_path / "results.json"], check=True, timeout=600)
    for result in json.loads((tmp_path / "results.json").read_text()):
        assert set(result["codes"]) == {0}, result

    def curve(text: str, layout: str) -> np.ndarray:
        lines = (tmp_path / text / layout / "metrics.jsonl").read_text().splitlines()
        found = [(entry["lm_loss"], entry["grad_norm"]) for entry in map(json.loads, lines)]
        assert len(found) == 3
        return np.array(found)

    for text in TEXTS:
        for layout in LAYOUTS:
            np.testing.assert_allclose(curve(text, layout), curve(text, "one process"), rtol=2e-5, err_msg=layout)
    assert not np.allclose(curve("conversations", "ring"), curve("documents", "ring"), rtol=1e-3)
