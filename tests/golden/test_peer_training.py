"""Fifty AdamW steps through `modellink train` against a plain loop of transformers and torch on the same data."""

from __future__ import annotations

import json
import math
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import transformers

from modellink.data.gpt import GPTDataset
from modellink.data.python_docs import write_corpus

STEPS, WARMUP, SEQUENCE, MICRO_BATCH, GLOBAL_BATCH, SEED = 50, 5, 64, 2, 4, 1234
LR, MIN_LR, BETAS, EPS, DECAY, CLIP = 1e-3, 1e-4, (0.9, 0.95), 1e-8, 0.1, 1.0
MODELS: dict[str, dict[str, Any]] = {
    "grouped queries": {"num_key_value_heads": 2, "tie_word_embeddings": False},
    "tied": {"num_key_value_heads": 4, "tie_word_embeddings": True},
}
FLAGS = f"""
--split 949,50,1 --seq-length {SEQUENCE} --seed {SEED} --train-iters {STEPS} --eval-iters 0 --log-interval {STEPS}
--micro-batch-size {MICRO_BATCH} --global-batch-size {GLOBAL_BATCH} --lr {LR} --min-lr {MIN_LR} --lr-decay-style cosine
--lr-warmup-iters {WARMUP} --weight-decay {DECAY} --clip-grad {CLIP} --adam-beta1 {BETAS[0]} --adam-beta2 {BETAS[1]}
--adam-eps {EPS}
""".split()


def modellink(root: Path, *arguments: object) -> None:
    done = subprocess.run(
        [sys.executable, "-m", "modellink", *map(str, arguments)],
        cwd=root,
        env=os.environ | {"OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert done.returncode == 0, done.stderr[-3000:]


@pytest.fixture(scope="module")
def data(shared: Path, root: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Prefix of a hundred pages of Python's documentation as token ids of the Llama 2 tokenizer."""
    folder = tmp_path_factory.mktemp("data")
    write_corpus(folder / "all.jsonl")
    lines = (folder / "all.jsonl").read_text(encoding="utf-8").splitlines(keepends=True)
    (folder / "corpus.jsonl").write_text("".join(lines[:100]), encoding="utf-8")
    flags = ["--input", folder / "corpus.jsonl", "--output-prefix", folder / "docs", "--append-eod", "--workers", 1]
    modellink(root, "preprocess", *flags, "--tokenizer-name-or-path", shared / "tokenizers" / "llama2")
    return folder / "docs_text_document"


def learning_rate(step: int) -> float:
    """Of step 0, 1, ...: linear warm-up from zero, then half a cosine down to the minimum at the last step."""
    if step <= WARMUP:
        return LR * step / WARMUP
    return MIN_LR + (LR - MIN_LR) * (1 + math.cos(math.pi * (step - WARMUP) / (STEPS - WARMUP))) / 2


def clip(parameters: list[torch.nn.Parameter]) -> float:
    """`torch.nn.utils.clip_grad_norm_` in its two halves, the norm in float64: on CPU torch's float32 norm of an
    embedding of this size is off by 5e-4, which would move the losses by 3e-5."""
    norm = torch.nn.utils.get_total_norm([p.grad.double() for p in parameters if p.grad is not None]).float()
    torch.nn.utils.clip_grads_with_norm_(parameters, CLIP, norm)
    return norm.item()


def peer_losses(model: torch.nn.Module, data: Path) -> tuple[list[float], list[float]]:
    """(loss, gradient norm) of each step of the plain loop."""
    samples, _, _ = GPTDataset.build(data, SEQUENCE, SEED, "949,50,1", [STEPS * GLOBAL_BATCH, 0, 0], cache=False)
    assert samples is not None
    text = torch.from_numpy(np.stack([samples.text(i) for i in range(STEPS * GLOBAL_BATCH)]))
    matrices = [p for p in model.parameters() if p.ndim > 1]
    vectors = [p for p in model.parameters() if p.ndim <= 1]
    groups = [{"params": matrices, "weight_decay": DECAY}, {"params": vectors, "weight_decay": 0.0}]
    optimizer = torch.optim.AdamW(groups, betas=BETAS, eps=EPS)
    losses, norms = [], []
    for step, batch in enumerate(text.split(GLOBAL_BATCH)):
        total = 0.0
        for rows in batch.split(MICRO_BATCH):
            # one token more than a sample: the model shifts its labels itself
            loss = model(input_ids=rows, labels=rows).loss * MICRO_BATCH / GLOBAL_BATCH
            loss.backward()
            total += loss.item()
        losses.append(total)
        norms.append(clip(list(model.parameters())))
        for group in optimizer.param_groups:
            group["lr"] = learning_rate(step)
        optimizer.step()
        optimizer.zero_grad()
    return losses, norms


@pytest.mark.parametrize("name", MODELS)
def test_fifty_steps(name: str, data: Path, root: Path, tmp_path: Path) -> None:
    config = transformers.LlamaConfig(
        vocab_size=32000,
        hidden_size=64,
        intermediate_size=160,
        num_hidden_layers=3,
        num_attention_heads=4,
        max_position_embeddings=256,
        **MODELS[name],
    )
    torch.manual_seed(0)
    model = transformers.LlamaForCausalLM(config)
    model.save_pretrained(tmp_path / "hf")
    paths = ["--load", tmp_path / "hf", "--data-path", data, "--data-cache-path", tmp_path / "cache"]
    modellink(root, "train", *FLAGS, *paths, "--save", tmp_path / "run", "--no-save-optim", "--no-save-rng")
    ours = [json.loads(line) for line in (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()]
    assert [entry["iteration"] for entry in ours] == list(range(1, STEPS + 1))
    assert [entry["learning_rate"] for entry in ours] == pytest.approx([learning_rate(i) for i in range(STEPS)])
    losses, norms = peer_losses(model.train(), data)
    differences = [abs(entry["lm_loss"] - loss) for entry, loss in zip(ours, losses, strict=True)]
    assert max(differences) <= 1e-5  # measured: 2e-6
    assert max(abs(entry["grad_norm"] / norm - 1) for entry, norm in zip(ours, norms, strict=True)) <= 1e-4
    assert losses[-1] < losses[0] - 1  # it learns, so equal losses are not those of a model at rest
