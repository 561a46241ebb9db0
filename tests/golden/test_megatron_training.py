"""Megatron's own training run, flag for flag, through `pretrain_gpt.py`: every iteration's loss, at five layouts."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

FLAGS = """
--num-layers 2 --hidden-size 64 --num-attention-heads 4 --group-query-attention --num-query-groups 2 --ffn-hidden-size
96 --seq-length 128 --max-position-embeddings 128 --normalization RMSNorm --norm-epsilon 1e-5 --swiglu
--disable-bias-linear --position-embedding-type rope --untie-embeddings-and-output-weights --attention-dropout 0
--hidden-dropout 0 --micro-batch-size 4 --global-batch-size 8 --train-iters 20 --lr 1e-3 --min-lr 1e-4
--lr-decay-style cosine --lr-warmup-iters 2 --weight-decay 0.01 --clip-grad 1.0 --adam-beta2 0.95 --split 949,50,1
--seed 1234 --finetune --log-interval 20 --eval-iters 0
""".split()
LAYOUTS = {
    "tp1": (1, []),
    "tp2": (2, ["--tensor-model-parallel-size", "2", "--sequence-parallel"]),
    "pp2": (2, ["--pipeline-model-parallel-size", "2"]),
    "tp2pp2": (4, ["--tensor-model-parallel-size", "2", "--pipeline-model-parallel-size", "2"]),
    "dp2": (2, ["--use-distributed-optimizer"]),
}


@pytest.mark.dist
@pytest.mark.parametrize("layout", LAYOUTS)
def test_every_loss_of_the_reference_run(layout: str, shared: Path, root: Path, tmp_path: Path) -> None:
    processes, flags = LAYOUTS[layout]
    reference = shared / "megatron"
    launch = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(processes)]
    paths = ["--load", reference / "hf" / "tiny32k", "--data-path", reference / "text_document"]
    paths += ["--data-cache-path", tmp_path / "cache", "--save", tmp_path / "run"]
    done = subprocess.run(
        [*launch, root / "pretrain_gpt.py", *FLAGS, *flags, *map(str, paths)],
        env=os.environ | {"OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert done.returncode == 0, done.stderr[-3000:]
    ours = [json.loads(line) for line in (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()]
    theirs = json.loads((reference / "train_ref.json").read_text())["A_tp1pp1"]
    assert [entry["iteration"] for entry in ours] == [iteration for iteration, _, _ in theirs]
    worst = max(abs(entry["lm_loss"] - loss) for entry, (_, loss, _) in zip(ours, theirs, strict=True))
    assert worst <= 2e-5
    assert all(abs(entry["grad_norm"] - norm) < 1.5e-3 for entry, (_, _, norm) in zip(ours, theirs, strict=True))
