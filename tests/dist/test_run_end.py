"""`--save-format hf`: what two processes trained is a folder that transformers opens, and still one that continues."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

import modellink
from modellink.cli.main import main

pytestmark = pytest.mark.dist

FLAGS = """
--num-layers 2 --hidden-size 32 --num-attention-heads 4 --num-key-value-heads 2 --ffn-hidden-size 64 --swiglu
--normalization RMSNorm --disable-bias-linear --position-embedding-type rope --seq-length 32
--max-position-embeddings 32 --untie-embeddings-and-output-weights --attention-dropout 0 --hidden-dropout 0
--micro-batch-size 2 --global-batch-size 4 --lr 1e-3 --eval-iters 0 --log-interval 1 --mock-data
""".split()


def test_the_folder_of_a_run_opens_in_transformers_and_continues(shared: Path, root: Path, tmp_path: Path) -> None:
    transformers = pytest.importorskip("transformers")
    run = str(tmp_path / "run")
    flags = [*FLAGS, "--tokenizer-name-or-path", str(shared / "tokenizers" / "llama2"), "--save", run, "--load", run]
    launch = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2", "-m", "modellink"]
    parallel = ["--tensor-model-parallel-size", "2", "--sequence-parallel"]
    done = subprocess.run(
        [*launch, "train", *flags, *parallel, "--train-iters", "2", "--save-format", "hf"],
        cwd=root,
        env=os.environ | {"OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert done.returncode == 0, done.stderr[-3000:]
    theirs = transformers.AutoModelForCausalLM.from_pretrained(run).eval()
    assert (theirs.config.eos_token_id, theirs.config.bos_token_id, theirs.config.vocab_size) == (2, 1, 32000)
    source, carried = (
        transformers.AutoTokenizer.from_pretrained(f)("def f(x):") for f in (shared / "tokenizers" / "llama2", run)
    )
    assert source["input_ids"] == carried["input_ids"]
    ours = modellink.GPTModel.from_pretrained(run, dtype="float32")
    tokens = torch.randint(0, 32000, (2, 7), generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        assert (ours(tokens) - theirs(tokens).logits).abs().max() <= 1e-5
    (tmp_path / "run" / "metrics.jsonl").rename(tmp_path / "before.jsonl")
    assert main(["train", *flags, "--train-iters", "3", "--override-opt_param-scheduler"]) == 0
    lines = (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()
    assert [json.loads(line)["iteration"] for line in lines] == [3]


def test_weights_of_others_are_not_replaced(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "config.json").write_text('{"model_type": "llama"}')
    (tmp_path / "model.safetensors").write_bytes(b"precious")
    flags = [*FLAGS, "--vocab-size", "100", "--train-iters", "1", "--save", str(tmp_path), "--save-format", "hf"]
    assert main(["train", *flags]) == 2
    assert f"{tmp_path} exists and was not written by ModelLink" in capsys.readouterr().err
    assert (tmp_path / "model.safetensors").read_bytes() == b"precious"
