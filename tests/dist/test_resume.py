"""A run that is killed, at any moment, and started again reports the losses of one that never was, bit for bit."""

from __future__ import annotations

import json
import random
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from forked_runs import PHASES

from modellink.data.indexed import IndexedDatasetWriter

pytestmark = pytest.mark.dist

VOCABULARY, ITERATIONS = 300, 12
FLAGS = f"""
--num-layers 4 --hidden-size 32 --num-attention-heads 4 --num-key-value-heads 2 --ffn-hidden-size 64 --swiglu
--normalization RMSNorm --disable-bias-linear --position-embedding-type rope --seq-length 32
--max-position-embeddings 32 --vocab-size {VOCABULARY} --tokenizer-type NullTokenizer
--micro-batch-size 2 --global-batch-size 8
--lr 1e-3 --min-lr 1e-4 --lr-decay-style cosine --clip-grad 1.0
--attention-dropout 0 --hidden-dropout 0 --split 90,5,5 --eval-iters 1 --eval-interval 4 --save-interval 2
""".split()
LENGTH = ["--train-iters", str(ITERATIONS), "--lr-warmup-iters", "2"]


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    prefix = tmp_path_factory.mktemp("data") / "text"
    draw = np.random.default_rng(0)
    with IndexedDatasetWriter(prefix, np.uint16) as writer:
        for _ in range(60):
            writer.add_document(draw.zipf(1.3, draw.integers(20, 200)).clip(max=VOCABULARY) - 1)
    return prefix


class Runs:
    """Collects runs and performs them in one program."""

    def __init__(self, folder: Path, data: Path) -> None:
        self.folder, self.data = folder, data
        self.cases: list[dict[str, Any]] = []

    def add(self, name: str, *flags: str, ranks: int = 1, load: str | None = None, **how: Any) -> str:
        """A run into folder `name`, going on from `load` (default: from `name` itself, if there is anything)."""
        length = [] if "--train-samples" in flags else LENGTH
        argv = [*FLAGS, *length, *flags, "--data-path", str(self.data), "--data-cache-path", str(self.folder / "cache")]
        argv += ["--save", str(self.folder / name), "--load", str(self.folder / (load or name))]
        self.cases.append({"argv": argv, "ranks": ranks, **how})
        return name

    def perform(self) -> list[dict[str, Any]]:
        (self.folder / "cases.json").write_text(json.dumps(self.cases))
        program = [sys.executable, Path(__file__).with_name("forked_runs.py")]
        files = [self.folder / "cases.json", self.folder / "results.json"]
        done = subprocess.run([*program, *files], capture_output=True, text=True, timeout=1200)
        assert done.returncode == 0, done.stderr[-3000:]
        self.cases = []
        return json.loads(files[1].read_text())

    def losses(self, name: str) -> dict[int, tuple[float, float]]:
        """iteration -> (loss, gradient norm), as reported."""
        lines = (self.folder / name / "metrics.jsonl").read_text().splitlines()
        entries = [json.loads(line) for line in lines]
        assert [entry["iteration"] for entry in entries] == sorted({entry["iteration"] for entry in entries})
        return {entry["iteration"]: (entry["lm_loss"], entry["grad_norm"]) for entry in entries}


@pytest.fixture
def runs(tmp_path: Path, data: Path) -> Runs:
    return Runs(tmp_path, data)


def expect_all(results: list[dict[str, Any]], codes: list[int]) -> None:
    for result, code in zip(results, codes, strict=True):
        assert set(result["codes"]) == {code}, result


def test_killed_in_every_phase_of_an_iteration_and_of_a_save(runs: Runs) -> None:
    runs.add("whole")
    for number, phase in enumerate(PHASES):
        runs.add(f"killed {number}", "--keep-checkpoints", "2", die=phase)
        runs.add(f"killed {number}", "--keep-checkpoints", "2")
    expect_all(runs.perform(), [0] + [-9, 0] * len(PHASES))
    whole = runs.losses("whole")
    assert len(whole) == ITERATIONS and whole[ITERATIONS][0] < whole[1][0]
    for number, phase in enumerate(PHASES):
        assert runs.losses(f"killed {number}") == whole, phase


MODES = {
    "bf16, separate masters": ["--bf16"],
    "bf16, split masters": ["--bf16", "--reuse-fp32-param"],
    "fp16, dynamic scale": ["--fp16", "--loss-scale-window", "3", "--initial-loss-scale", "1048576"],
    "dropout": ["--attention-dropout", "0.1", "--hidden-dropout", "0.1"],
    "background saves": ["--async-save"],
    "momentum": ["--optimizer", "sgd"],
    "packed momentum": ["--optimizer", "cadam", "--bf16"],
    "growing batch": ["--rampup-batch-size", "4", "2", "24", "--train-samples", "84", "--lr-warmup-samples", "8"],
    "shuffled epochs": ["--dataloader-type", "cyclic"],
}


def test_killed_in_every_mode(runs: Runs) -> None:
    for mode, flags in MODES.items():
        runs.add(f"{mode} whole", *flags)
        runs.add(f"{mode} killed", *flags, die="shards written")
        runs.add(f"{mode} killed", *flags)
    expect_all(runs.perform(), [0, -9, 0] * len(MODES))
    for mode in MODES:
        assert runs.losses(f"{mode} killed") == runs.losses(f"{mode} whole"), mode


def soak(runs: Runs, kills: int, seed: int) -> int:
    """Kill one run again and again at random moments until it gets through; returns how often it was killed."""
    runs.add("whole")
    runs.add("timed")  # the first run also warms caches
    draw = random.Random(seed)
    first = runs.perform()
    expect_all(first, [0, 0])
    seconds = first[1]["seconds"]
    for number in range(kills):
        runs.add(f"soak {number}", kill_after=draw.uniform(0.1, 1.0) * seconds)
        runs.add(f"soak {number}", kill_after=draw.uniform(0.1, 1.0) * seconds)
        runs.add(f"soak {number}")
    results = runs.perform()
    killed = sum(result["codes"] == [-9] for result in results)
    expect_all(results[2::3], [0] * kills)
    whole = runs.losses("whole")
    for number in range(kills):
        assert runs.losses(f"soak {number}") == whole
    return killed


def test_killed_at_random_moments(runs: Runs) -> None:
    assert soak(runs, kills=5, seed=1) > 0


@pytest.mark.slow
@pytest.mark.timeout(1800)
def test_killed_at_random_moments_for_long(runs: Runs) -> None:
    assert soak(runs, kills=40, seed=2) > 40  # of 80 attempts


TP2 = ["--tensor-model-parallel-size", "2"]
PP2 = ["--pipeline-model-parallel-size", "2"]
GROUPS = {"tp2": [*TP2, "--sequence-parallel"], "pp2": PP2, "dp2 zero1": ["--use-distributed-optimizer"], "dp2": []}


def test_killed_in_a_group_of_two(runs: Runs) -> None:
    """Both ranks are told to die; one that only waits finds out by itself and leaves with a sentence."""
    for layout, flags in GROUPS.items():
        runs.add(f"{layout} whole", *flags, ranks=2)
        for phase in ("shards written", "before the tracker"):
            runs.add(f"{layout} {phase}", *flags, ranks=2, die=phase)
            runs.add(f"{layout} {phase}", *flags, ranks=2)
    results = runs.perform()
    for index, result in enumerate(results):
        killed = index % 5 in (1, 3)
        assert -9 in result["codes"] if killed else result["codes"] == [0, 0], result
        assert result["seconds"] < 60
    for layout in GROUPS:
        for phase in ("shards written", "before the tracker"):
            assert runs.losses(f"{layout} {phase}") == runs.losses(f"{layout} whole"), (layout, phase)


CHANGES = {
    "dp2 to dp4": (2, [], 4, []),
    "zero1 dp2 to dp4": (2, ["--use-distributed-optimizer"], 4, ["--use-distributed-optimizer"]),
    "zero3 dp4 to dp2": (4, ["--zero-stage", "3"], 2, ["--zero-stage", "3"]),
    "dp2 to one": (2, [], 1, []),
    "one to tp2": (1, [], 2, TP2),
    "tp2 to pp2": (2, TP2, 2, PP2),
    "pp2 interleaved to tp2 with sp": (
        2,
        [*PP2, "--num-layers-per-virtual-pipeline-stage", "1"],
        2,
        [*TP2, "--sequence-parallel"],
    ),
    "pp2 zbv to tp2": (2, [*PP2, "--pipeline-schedule", "zbv"], 2, TP2),
    "one to pp2 zbv zero1": (1, [], 4, [*PP2, "--pipeline-schedule", "zbv", "--use-distributed-optimizer"]),
    "cp2 to one": (2, ["--context-parallel-size", "2"], 1, []),
    "tp2 pp2 to dp2": (4, [*TP2, *PP2], 2, ["--use-distributed-optimizer"]),
    "uneven pp2 to tp2 dp2": (2, [*PP2, "--num-layer-list", "3,1"], 4, [*TP2, "--zero-stage", "2"]),
}


SPARSE = """--num-experts 4 --moe-intermediate-size 32 --n-shared-experts 1 --router-scoring sigmoid
--router-correction-bias --first-k-dense-replace 1 --moe-aux-loss-coeff 0.01 --seq-aux""".split()
EP2, CP2 = ["--expert-model-parallel-size", "2"], ["--context-parallel-size", "2"]
SPARSE_CHANGES = {
    "one to ep2": (1, [], 2, EP2),
    "ep2 zero1 to tp2": (2, [*EP2, "--use-distributed-optimizer"], 2, TP2),
    "tp2 to ep2 cp2": (2, TP2, 2, [*EP2, *CP2]),
    "ep2 pp2 to ep2 dp4 zero3": (4, [*EP2, *PP2], 4, [*EP2, "--zero-stage", "3"]),
}


@pytest.mark.parametrize(("common", "changes"), [([], CHANGES), (SPARSE, SPARSE_CHANGES)], ids=["dense", "sparse"])
def test_resumed_at_another_layout(runs: Runs, common: list[str], changes: dict[str, Any]) -> None:
    runs.add("whole", *common)
    for name, (before, flags, after, other) in changes.items():
        runs.add(f"{name} first", *common, *flags, "--exit-interval", "6", ranks=before)
        runs.add(f"{name} second", *common, *other, "--no-load-rng", ranks=after, load=f"{name} first")
    expect_all(runs.perform(), [0] * (1 + 2 * len(changes)))
    whole = runs.losses("whole")
    for name in changes:
        resumed = runs.losses(f"{name} second")
        assert list(resumed) == list(range(7, ITERATIONS + 1)), name
        worst = max(abs(resumed[i][0] / whole[i][0] - 1) for i in resumed)
        assert worst <= 1e-6, (name, worst)
