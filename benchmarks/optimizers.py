"""Loss, state bytes per parameter and step time of each optimizer on the quickstart's model and text.

    python benchmarks/optimizers.py [--data PREFIX] [--optimizers adam cadam ...] [--steps 280] [--output FILE]

The model (a Llama of 1.4 million parameters), the text (Python's own documentation, 4096 token ids) and the schedule of
AdamW are those of `python -m modellink.quickstart`; `--data` takes its OUT/data/docs_text_document, otherwise the text
is prepared anew. All runs start from one seed and read the same samples, in float32, in one process. cadam has a
seventh of AdamW's rate (a thirteenth for embedding and output matrix) and seven times its weight decay; Muon and 8-bit
AdamW have AdamW's.

"train" is the mean loss of the last 20 steps, "held out" that of 64 sequences from the end of the text that no run
trains on. Bytes are measured from storage. Times are medians: of the whole step, and of clipping and update alone.
"""

from __future__ import annotations

import argparse
import json
import platform
import statistics
import subprocess
import sys
import tempfile
import time
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import numpy as np
import torch
import yaml
from rich.console import Console
from rich.table import Table

from modellink.config.schema import Config, ModelConfig, OptimizerConfig, ParallelConfig
from modellink.data.indexed import IndexedDataset
from modellink.optim.schedule import ParameterSchedule
from modellink.parallel.apply import build_model
from modellink.parallel.topology import Topology
from modellink.quickstart import __main__ as quickstart
from modellink.train.engine import Engine

SEQUENCE, ROWS, HELD_OUT, VOCABULARY = 128, 8, 64, 4096
ADAM: dict[str, Any] = {"lr": 4e-3, "decoupled_lr": 4e-2, "weight_decay": 0.1, "adam_beta2": 0.95}
SETTINGS: dict[str, dict[str, Any]] = {
    "adam": ADAM,
    "adamw8bit": ADAM,
    "cadam": {"lr": 4e-3 / 7, "decoupled_lr": 3e-3, "weight_decay": 0.7, "adam_beta1": 0.9},
    "muon": ADAM,
}


def prepared(folder: str) -> str:
    """Prefix of the quickstart's tokens, made in `folder` by its own commands."""
    for command in (quickstart.TEXT, quickstart.TOKENIZER, quickstart.DATASET):
        words = command.replace("OUT", folder).split()
        program = ["-m", "modellink"] if words[0] == "modellink" else []
        subprocess.run([sys.executable, *program, *words[1:]], check=True, stdout=subprocess.DEVNULL)
    return f"{folder}/data/docs_text_document"


def batch_of(text: np.ndarray[Any, Any], starts: np.ndarray[Any, Any]) -> dict[str, torch.Tensor]:
    rows = torch.from_numpy(np.stack([text[start : start + SEQUENCE + 1] for start in starts]).astype(np.int64))
    return {"tokens": rows[:, :-1].contiguous(), "labels": rows[:, 1:].contiguous()}


def run(name: str, text: np.ndarray[Any, Any], steps: int) -> dict[str, Any]:
    model = {key.replace("-", "_"): value for key, value in yaml.safe_load(quickstart.MODEL).items()}
    untied = model.pop("untie_embeddings_and_output_weights")
    biases = ("qkv_bias", "attention_output_bias", "mlp_bias")
    model |= {bias: not model.pop(f"no_{bias}") for bias in biases} | {"vocab_size": VOCABULARY}
    config = Config(
        model=ModelConfig(**model, tie_word_embeddings=not untied, padded_vocab_size=VOCABULARY).resolve(),
        optimizer=OptimizerConfig(optimizer=name, **SETTINGS[name]),
    )
    options, topology = config.optimizer, Topology(ParallelConfig())
    built = build_model(config.model, config.parallel, topology, torch.device("cpu"), torch.float32, seed=1234)
    engine = Engine(built, config)
    schedule = ParameterSchedule(
        options.lr or 0.0, steps, lr_warmup_steps=min(20, steps // 2), lr_decay_style="cosine",
        decoupled_lr=options.decoupled_lr, start_wd=options.weight_decay, end_wd=options.weight_decay,
    )  # fmt: skip
    draw = np.random.default_rng(0)
    held_out, trained = text[-HELD_OUT * (SEQUENCE + 1) :], text[: -HELD_OUT * (SEQUENCE + 1)]
    losses, whole_ms, update_ms = [], [], []
    moved: dict[str, float] = {}
    for _ in range(steps):
        batch = batch_of(trained, draw.integers(0, len(trained) - SEQUENCE, ROWS))
        schedule.apply(engine.optimizer.param_groups)
        begin = time.perf_counter()
        losses.append(engine.forward_backward(batch, ROWS).item())
        moved = moved or engine.optimizer.bytes_per_parameter()
        middle = time.perf_counter()
        engine.update()
        end = time.perf_counter()
        whole_ms.append((end - begin) * 1e3)
        update_ms.append((end - middle) * 1e3)
        schedule.step(1, engine.optimizer.param_groups)
    total, count = engine.evaluate(batch_of(held_out, np.arange(HELD_OUT) * (SEQUENCE + 1)), ROWS)
    return {
        "optimizer": name,
        **SETTINGS[name],
        "train": statistics.fmean(losses[-20:]),
        "held_out": (total / count).item(),
        "state_bytes": engine.optimizer.state_bytes_per_parameter(),
        "bytes": sum(moved.values()),
        "step_ms": statistics.median(whole_ms),
        "update_ms": statistics.median(update_ms),
    }


def show(results: list[dict[str, Any]]) -> None:
    table = Table("optimizer", "lr", "train", "held out", "states B/param", "all B/param", "step ms", "update ms")
    for row in results:
        numbers = [f"{row['lr']:.2g}", *(f"{row[key]:.4f}" for key in ("train", "held_out"))]
        numbers += [f"{row[key]:.3f}" for key in ("state_bytes", "bytes")]
        table.add_row(row["optimizer"], *numbers, *(f"{row[key]:.1f}" for key in ("step_ms", "update_ms")))
    Console(width=110).print(table)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", help="prefix of the quickstart's .bin/.idx files")
    parser.add_argument("--optimizers", nargs="+", choices=sorted(SETTINGS), default=list(SETTINGS))
    parser.add_argument("--steps", type=int, default=280)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--output", type=Path, help="write the figures as JSON")
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    with tempfile.TemporaryDirectory() as folder:
        text = np.array(IndexedDataset(arguments.data or prepared(folder)).tokens)
    results = [run(name, text, arguments.steps) for name in arguments.optimizers]
    show(results)
    if arguments.output is not None:
        about = {"date": datetime.now(UTC).date().isoformat(), "torch": torch.__version__, "cpu": platform.machine()}
        about |= {"threads": arguments.threads, "steps": arguments.steps}
        arguments.output.write_text(json.dumps({**about, "results": results}, indent=1) + "\n")


if __name__ == "__main__":
    main()
