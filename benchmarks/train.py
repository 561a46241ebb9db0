"""Tokens per second and peak memory of training: our loop, a bare PyTorch loop, and transformers in the bare loop.

    python benchmarks/train.py [--rounds 5] [--steps 20] [--warmup 3] [--threads 2] [--output FILE | --no-output]

    ours          `modellink train`: real .bin/.idx data, a log line and a line of metrics.jsonl per step, no saves
    bare          the same model (modellink's decoder), torch.optim.AdamW(fused=True), batches ready in memory, no log
    transformers  LlamaForCausalLM in that same bare loop

All three start from one Hugging Face folder and read the same samples, and the benchmark fails when their last losses
disagree, so they do the same work. Every run is a process of its own, and rounds are interleaved (one run of each, then
again), so that a busy machine hurts all alike; "times bare" is the median over rounds of the ratio inside a round. The
clock is the parent's: from the line a program prints after its last warm-up step to that after its last step. The
processor time of all threads between the two is given too; with --threads 1 other programs hardly disturb it.

Memory is the peak at the last step: resident size on CPU, allocated bytes on an accelerator. On CPU the model is a tiny
Llama in float32. On an accelerator it has the shape of Llama-3.2-1B, and weights in bfloat16; the bare loops then have
no float32 masters and no float32 gradients, which is less work than ours does.
"""

from __future__ import annotations

import argparse
import json
import math
import os
import platform
import re
import statistics
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from datetime import UTC, datetime
from importlib import metadata
from pathlib import Path
from time import perf_counter
from typing import Any

import psutil

ROOT = Path(__file__).resolve().parent.parent
PROGRAMS = ("ours", "bare", "transformers")
LR, BETAS, EPS, DECAY, CLIP, SEED = 3e-4, (0.9, 0.95), 1e-8, 0.1, 1.0, 1234


@dataclass(frozen=True)
class Job:
    """What all programs train, and for how long."""

    shape: dict[str, Any]  # keys of transformers.LlamaConfig
    dtype: str
    sequence: int
    micro_batch: int
    global_batch: int
    warmup: int
    steps: int
    folder: str  # holds hf/ and the data

    @property
    def data(self) -> str:
        return f"{self.folder}/docs_text_document"

    @property
    def samples(self) -> int:
        return (self.warmup + self.steps) * self.global_batch


TINY: dict[str, Any] = {
    **{"hidden_size": 320, "intermediate_size": 864, "num_hidden_layers": 8, "num_attention_heads": 8},
    **{"num_key_value_heads": 4, "vocab_size": 8192, "tie_word_embeddings": False, "max_position_embeddings": 256},
}
LLAMA_3_2_1B: dict[str, Any] = {
    **{"hidden_size": 2048, "intermediate_size": 8192, "num_hidden_layers": 16, "num_attention_heads": 32},
    **{"num_key_value_heads": 8, "head_dim": 64, "vocab_size": 128256, "tie_word_embeddings": True},
    **{"max_position_embeddings": 131072, "rms_norm_eps": 1e-5},
    "rope_parameters": {
        **{"rope_type": "llama3", "rope_theta": 5e5, "factor": 32.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0},
        "original_max_position_embeddings": 8192,
    },
}


def job(args: argparse.Namespace, folder: str) -> Job:
    from modellink import device

    if device.is_accelerated():
        return Job(LLAMA_3_2_1B, "bfloat16", 4096, 2, 8, args.warmup, args.steps, folder)
    return Job(TINY, "float32", 256, 2, 4, args.warmup, args.steps, folder)


def prepare(work: Job) -> None:
    """Initial weights as a Hugging Face folder, and Python's documentation as token ids."""
    import torch
    import transformers

    from modellink.config.preprocess_schema import PreprocessConfig
    from modellink.data.preprocess import preprocess
    from modellink.data.python_docs import write_corpus
    from modellink.data.train_tokenizer import train_tokenizer

    transformers.utils.logging.disable_progress_bar()
    torch.manual_seed(SEED)
    model = transformers.LlamaForCausalLM(transformers.LlamaConfig(**work.shape))
    model.to(getattr(torch, work.dtype)).save_pretrained(Path(work.folder) / "hf")
    corpus, tokenizer = f"{work.folder}/corpus.jsonl", f"{work.folder}/tokenizer"
    write_corpus(corpus)
    train_tokenizer(corpus, tokenizer, min(8192, work.shape["vocab_size"]))
    preprocess(PreprocessConfig(corpus, f"{work.folder}/docs", tokenizer_name_or_path=tokenizer, append_eod=True))


def batches(work: Job) -> Iterator[tuple[Any, Any]]:
    """Tokens and labels of each micro-step, int64 [micro batch, S] on the device; all are read before the first."""
    import numpy as np
    import torch

    from modellink import device
    from modellink.data.gpt import GPTDataset

    data, _, _ = GPTDataset.build(work.data, work.sequence, SEED, "100,0,0", [work.samples, None, None], cache=False)
    assert data is not None
    text = torch.from_numpy(np.stack([data.text(i) for i in range(work.samples)])).to(device.current_device())
    for rows in text.split(work.micro_batch):
        yield rows[:, :-1].contiguous(), rows[:, 1:].contiguous()


def decoder(work: Job) -> Any:
    """modellink's model as a plain module."""
    import torch

    from modellink import device
    from modellink.checkpoint.hf import load_hf, read_config
    from modellink.models.decoder import Decoder

    config = read_config(f"{work.folder}/hf")
    config.padded_vocab_size = config.vocab_size
    model = Decoder(config).to(getattr(torch, work.dtype)).to(device.current_device())
    load_hf(model, f"{work.folder}/hf", progress=False)
    return model


def llama(work: Job) -> Any:
    """transformers' model; its forward pass gives the logits under a name."""
    import torch
    import transformers

    from modellink import device

    folder, dtype = f"{work.folder}/hf", getattr(torch, work.dtype)
    return transformers.AutoModelForCausalLM.from_pretrained(folder, dtype=dtype).to(device.current_device())


def bare_loop(work: Job, name: str) -> None:
    """The least that trains: forward, backward, clip, AdamW. Prints "warm", then the result as JSON."""
    import torch
    import torch.nn.functional as F

    from modellink import device

    model = decoder(work) if name == "bare" else llama(work)
    model.train()
    decayed = [p for p in model.parameters() if p.ndim > 1]
    rest = [p for p in model.parameters() if p.ndim <= 1]
    groups = [{"params": decayed, "weight_decay": DECAY}, {"params": rest, "weight_decay": 0.0}]
    optimizer = torch.optim.AdamW(groups, lr=LR, betas=BETAS, eps=EPS, fused=True)
    micro_steps = work.global_batch // work.micro_batch
    feed = batches(work)
    device.reset_peak_memory()
    for step in range(1, work.warmup + work.steps + 1):
        total = torch.zeros((), device=device.current_device())
        for _ in range(micro_steps):
            tokens, labels = next(feed)
            logits = model(tokens) if name == "bare" else model(input_ids=tokens, use_cache=False).logits
            loss = F.cross_entropy(logits.flatten(0, 1).float(), labels.flatten()) / micro_steps
            loss.backward()
            total += loss.detach()
        torch.nn.utils.clip_grad_norm_(model.parameters(), CLIP)
        optimizer.step()
        optimizer.zero_grad()
        if step == work.warmup:
            device.synchronize()
            print("warm", flush=True)
    print(json.dumps({"loss": total.item(), "peak": device.memory_stats().peak_allocated}), flush=True)


def our_flags(work: Job, save: str) -> list[str]:
    flags = f"""
    --load {work.folder}/hf --data-path {work.data} --data-cache-path {work.folder}/cache --save {save}
    --split 100,0,0 --seed {SEED} --seq-length {work.sequence} --eval-iters 0 --log-interval 1
    --micro-batch-size {work.micro_batch} --global-batch-size {work.global_batch}
    --train-iters {work.warmup + work.steps} --lr {LR} --lr-decay-style constant --weight-decay {DECAY}
    --clip-grad {CLIP} --adam-beta1 {BETAS[0]} --adam-beta2 {BETAS[1]} --adam-eps {EPS}
    """.split()
    return flags + (["--bf16"] if work.dtype == "bfloat16" else [])


@contextmanager
def program(name: str, work: Job, threads: int, save: str) -> Iterator[subprocess.Popen[str]]:
    """The running process of program `name`, ended on exit: ours would go on to write a checkpoint."""
    command = [sys.executable, "-u"]
    command += ["-m", "modellink", "train", *our_flags(work, save)] if name == "ours" else [__file__, "--child", name]
    variables = {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": str(threads), "JOB": json.dumps(asdict(work))}
    with tempfile.TemporaryFile("w+") as log:
        process = subprocess.Popen(command, env=os.environ | variables, stdout=subprocess.PIPE, stderr=log, text=True)
        try:
            yield process
        except EOFError:
            log.seek(0)
            raise SystemExit(f"{name} ended before its last step:\n{log.read()}") from None
        finally:
            process.kill()
            process.wait()


def wait_for(process: subprocess.Popen[str], pattern: str) -> str:
    """Read lines until one matches; return it."""
    assert process.stdout is not None
    for line in process.stdout:
        if re.search(pattern, line):
            return line
    raise EOFError(pattern)


def cpu_seconds(process: subprocess.Popen[str]) -> float:
    """Processor time of all threads so far."""
    times = psutil.Process(process.pid).cpu_times()
    return times.user + times.system


def measure(name: str, work: Job, threads: int) -> dict[str, float]:
    """Run one program once: tokens per second, seconds per step, peak bytes, last loss."""
    warm, done = ("^warm", r"^\{")
    with tempfile.TemporaryDirectory() as save:
        if name == "ours":
            warm, done = (rf"iteration +{number}/" for number in (work.warmup, work.warmup + work.steps))
        with program(name, work, threads, save) as process:
            wait_for(process, warm)
            start, worked = perf_counter(), cpu_seconds(process)
            last = wait_for(process, done)
            seconds, worked = perf_counter() - start, cpu_seconds(process) - worked
        if name == "ours":
            entry = json.loads((Path(save) / "metrics.jsonl").read_text().splitlines()[-1])
            result = {"loss": entry["lm_loss"], "peak": entry["memory_gib"] * 2**30}
        else:
            result = json.loads(last)
    tokens = work.steps * work.global_batch * work.sequence
    times = {"step_ms": seconds / work.steps * 1e3, "cpu_ms": worked / work.steps * 1e3}
    return {"tokens_per_second": tokens / seconds, **times, **result}


def check_losses(found: dict[str, list[dict[str, float]]], tolerance: float) -> None:
    """Stop when the programs did not do the same job."""
    last = {name: runs[-1]["loss"] for name, runs in found.items()}
    if not all(math.isclose(loss, last["bare"], rel_tol=tolerance) for loss in last.values()):
        raise SystemExit(f"the programs do not compute the same: last losses {last}")


def summary(found: dict[str, list[dict[str, float]]]) -> list[dict[str, Any]]:
    rows = []
    for name, runs in found.items():
        speeds = [run["tokens_per_second"] for run in runs]
        ratios = [speed / bare["tokens_per_second"] for speed, bare in zip(speeds, found["bare"], strict=True)]
        rows.append(
            {
                "program": name,
                "tokens_per_second": statistics.median(speeds),
                "lowest": min(speeds),
                "highest": max(speeds),
                "step_ms": statistics.median(run["step_ms"] for run in runs),
                "cpu_ms": statistics.median(run["cpu_ms"] for run in runs),
                "times_bare": statistics.median(ratios),
                "peak_mib": statistics.median(run["peak"] for run in runs) / 2**20,
                "last_loss": runs[-1]["loss"],
            }
        )
    return rows


def show(rows: list[dict[str, Any]], title: str) -> None:
    from rich.console import Console
    from rich.table import Table

    table = Table(title=title)
    for column in (
        "program",
        "tokens/s, median",
        "lowest to highest",
        "times bare",
        "ms a step",
        "of processors",
        "peak memory",
    ):
        table.add_column(column, justify="left" if column == "program" else "right", no_wrap=True)
    for row in rows:
        spread = f"{row['lowest']:,.0f} to {row['highest']:,.0f}"
        cells = [f"{row['tokens_per_second']:,.0f}", spread, f"{row['times_bare']:.3f}", f"{row['step_ms']:,.1f}"]
        table.add_row(row["program"], *cells, f"{row['cpu_ms']:,.1f}", f"{row['peak_mib']:,.0f} MiB")
    Console(width=110).print(table)


def environment(threads: int) -> dict[str, Any]:
    from modellink import device

    return {
        "date": f"{datetime.now(UTC):%Y-%m-%d}",
        "device": device.device_name(),
        "machine": platform.machine(),
        "cpus": os.cpu_count(),
        "threads": threads,
        "load_average": [round(value, 2) for value in os.getloadavg()],
        "memory_gib": round(device.total_memory() / 2**30, 1),
        "python": platform.python_version(),
        **{name: metadata.version(name) for name in ("torch", "transformers", "numpy")},
    }


def main() -> None:
    sys.path.insert(0, str(ROOT))
    if sys.argv[1:2] == ["--child"]:
        bare_loop(Job(**json.loads(os.environ["JOB"])), sys.argv[2])
        return
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=5, help="runs of each program")
    parser.add_argument("--steps", type=int, default=20, help="timed steps of a run")
    parser.add_argument("--warmup", type=int, default=3, help="steps before the clock starts")
    parser.add_argument("--threads", type=int, default=min(2, os.cpu_count() or 1), help="OMP_NUM_THREADS")
    parser.add_argument("--output", help="result file; default benchmarks/results/train-DATE-DEVICE.json")
    parser.add_argument("--no-output", action="store_true", help="write no result file")
    args = parser.parse_args()
    from rich.progress import track

    from modellink import device
    from modellink.files import atomic_write

    before = environment(args.threads)
    found: dict[str, list[dict[str, float]]] = {name: [] for name in PROGRAMS}
    with tempfile.TemporaryDirectory() as folder:
        work = job(args, folder)
        prepare(work)
        plan = [name for _ in range(args.rounds) for name in PROGRAMS]
        for name in track(plan, "Training"):
            found[name].append(measure(name, work, args.threads))
    check_losses(found, 1e-4 if work.dtype == "float32" else 5e-2)  # without masters updates are rounded away
    rows = summary(found)
    content = asdict(work) | {"environment": before, "rounds": args.rounds, "summary": rows, "runs": found}
    content.pop("folder")
    show(rows, f"training, {work.dtype}, {work.steps} steps of {work.global_batch} x {work.sequence} tokens")
    if not args.no_output:
        kind = re.sub(r"[^a-z0-9]+", "-", device.device_name().lower()) if device.is_accelerated() else "cpu"
        target = args.output or ROOT / "benchmarks" / "results" / f"train-{before['date']}-{kind}.json"
        atomic_write(target, json.dumps(content, indent=1) + "\n")
        print(f"written to {target}")


if __name__ == "__main__":
    main()
