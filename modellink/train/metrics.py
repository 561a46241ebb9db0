"""What a run reports while it trains: log lines, ``metrics.jsonl``, TensorBoard, Weights & Biases, and FLOP counts.

The per-iteration line keeps the wording and padding of the reference's (specification e.3), because tools parse it, and
goes on after it with tokens per second and device, TFLOP/s, model FLOP utilisation in both conventions, and memory.
``metrics.jsonl`` has one object per iteration, of the keys in `METRIC_KEYS` and no others; ``validation.jsonl`` one per
validation.
"""

from __future__ import annotations

import dataclasses
import json
import math
import os
import sys
from collections.abc import Mapping
from dataclasses import dataclass, field
from datetime import datetime
from pathlib import Path
from typing import Any, TextIO

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

from modellink.config.schema import ModelConfig
from modellink.errors import ModelLinkError
from modellink.files import atomic_write
from modellink.models.count import attention_parameters

METRICS_FILE = "metrics.jsonl"
VALIDATION_FILE = "validation.jsonl"

METRIC_KEYS = (
    "iteration",
    "consumed_samples",
    "lm_loss",
    "learning_rate",
    "grad_norm",
    "loss_scale",
    "tokens_per_second_per_device",
    "tflops_per_device",
    "mfu",
    "mfu_causal",
    "memory_gib",
    "step_ms",
)


@dataclass(frozen=True)
class ModelFlops:
    """Floating-point operations per token of one training step (forward and backward).

    `full` counts every score of the S x S attention matrix, `causal` half of them: a causal kernel skips the rest.
    """

    full: int
    causal: int


def model_flops(
    *,
    layers: int,
    hidden: int,
    ffn: int,
    gated: bool,
    heads: int,
    kv_heads: int,
    head_dim: int,
    vocab: int,
    seq: int,
    value_head_dim: int | None = None,
    attention_params: int | None = None,
    moe_layers: int = 0,
    experts: int = 0,
    experts_per_token: int = 0,
    moe_ffn: int = 0,
    shared_ffn: int = 0,
    shared_gate: int = 0,
) -> ModelFlops:
    """Return the FLOPs per token of training a decoder on sequences of `seq` tokens: its matrix products, exactly.

    A product with a weight of n entries costs 2n per token. Forward, per token (letters as in the shape suffixes, M the
    value head size, P = 3 for a gated feed-forward network, else 2):

        projections   2 (D H K + D G K + D G M + H M D)      or 2 `attention_params` where they differ (MLA)
        scores        2 S H K + 2 S H M                      half of it in the causal convention
        feed-forward  2 P D F                                in each dense layer
        experts       2 D (E + gate) + 2 P D (topk F_moe + F_shared)  in each of `moe_layers`
        logits        2 D V

    Training costs three times the forward pass: the backward pass has two products for each one of the forward pass.
    Recomputation is not counted, as it is not part of the model.
    """
    value_head_dim = head_dim if value_head_dim is None else value_head_dim
    if attention_params is None:
        attention_params = hidden * (heads + kv_heads) * head_dim + hidden * (kv_heads + heads) * value_head_dim
    scores = 2 * seq * heads * (head_dim + value_head_dim)
    matrices = 3 if gated else 2
    dense = 2 * matrices * hidden * ffn
    sparse = 2 * hidden * (experts + shared_gate) + 2 * matrices * hidden * (experts_per_token * moe_ffn + shared_ffn)
    rest = layers * 2 * attention_params + (layers - moe_layers) * dense + moe_layers * sparse + 2 * hidden * vocab
    return ModelFlops(full=3 * (rest + layers * scores), causal=3 * (rest + layers * scores // 2))


def flops_of(model: ModelConfig, seq: int) -> ModelFlops:
    """`model_flops` of a decoder whose sizes are resolved; multiplications only, so norms and biases do not count."""
    latent = None
    if model.multi_head_latent_attention:
        plain = dataclasses.replace(model, qkv_bias=False, attention_output_bias=False, qk_norm=False)
        latent = attention_parameters(plain)
    moe_ffn = model.moe_ffn_hidden_size or 0
    return model_flops(
        layers=model.num_layers,
        hidden=model.hidden_size,
        ffn=model.ffn_hidden_size,
        gated=model.gated_mlp,
        heads=model.num_attention_heads,
        kv_heads=model.num_key_value_heads,
        head_dim=model.head_dim,
        vocab=model.padded_vocab_size,
        seq=seq,
        value_head_dim=model.v_head_dim if latent else None,
        attention_params=latent,
        moe_layers=sum(model.layer_has_experts(layer) for layer in range(model.num_layers)),
        experts=model.num_experts or 0,
        experts_per_token=model.router_topk,
        moe_ffn=moe_ffn,
        shared_ffn=model.n_shared_experts * moe_ffn,
        shared_gate=model.shared_expert_gate_dimension if model.shared_expert_gate and model.n_shared_experts else 0,
    )


def perplexity(loss: float) -> float:
    """exp(loss), with the loss cut at 20 as the reference does."""
    return math.exp(min(20.0, loss))


def memory_line(
    rank: int, iterations: int, allocated: int, max_allocated: int, reserved: int, max_reserved: int
) -> str:
    """Return the reference's line about device memory; the four sizes are in bytes."""
    sizes = {
        "allocated": allocated,
        "max allocated": max_allocated,
        "reserved": reserved,
        "max reserved": max_reserved,
    }
    text = " | ".join(f"{name}: {size / 2**20}" for name, size in sizes.items())
    return f"[Rank {rank}] (after {iterations} iterations) memory (MB) | {text}"


def _number(value: Any) -> float | int | None:
    """Return `value` (a number or a tensor of one) as a Python number, or None when it is absent, NaN or infinite."""
    if value is None:
        return None
    number = value if isinstance(value, int) else float(value)
    return number if math.isfinite(number) else None


def _show(value: Any, form: str) -> str:
    number = _number(value)
    return "n/a" if number is None else format(number, form)


def read_lines(path: Path) -> list[dict[str, Any]]:
    """Return the objects of a JSON-lines file in order; a line cut short by a crash is left out."""
    if not path.exists():
        return []
    entries = []
    for line in path.read_text().splitlines():
        try:
            entries.append(json.loads(line))
        except json.JSONDecodeError:
            continue
    return [entry for entry in entries if isinstance(entry, dict) and "iteration" in entry]


def _truncate_after(path: Path, iteration: int) -> None:
    """Drop what a run wrote after the checkpoint it resumes from."""
    if path.exists():
        kept = [entry for entry in read_lines(path) if entry["iteration"] <= iteration]
        atomic_write(path, "".join(json.dumps(entry) + "\n" for entry in kept))


@dataclass
class _Interval:
    """Sums since the last log line."""

    losses: dict[str, float] = field(default_factory=dict)
    good: int = 0
    skipped: int = 0
    nan: int = 0
    iterations: int = 0
    step_ms: float = 0.0

    def add(self, record: Mapping[str, Any]) -> None:
        loss = float(record["lm_loss"])
        self.iterations += 1
        self.step_ms += float(record["step_ms"])
        self.nan += not math.isfinite(loss)
        if record.get("skipped"):
            self.skipped += 1
            return
        self.good += 1
        for name, value in {"lm loss": loss, **record.get("losses", {})}.items():
            self.losses[name] = self.losses.get(name, 0.0) + float(value)


class MetricsLogger:
    """Reports one run. All ranks may hold one; only that with `is_logging_rank` writes anything.

    `save_dir` receives the JSON-lines files (None: none); entries after `start_iteration`, left by a run that got
    further than the checkpoint now resumed from, are removed. A line is printed every `log_interval` iterations, above
    a progress bar on a terminal; files get every iteration, TensorBoard and Weights & Biases every `board_interval`.
    `wandb_project` asks for Weights & Biases. `stream` replaces standard output.
    """

    def __init__(
        self,
        save_dir: str | os.PathLike[str] | None,
        *,
        total_iterations: int,
        log_interval: int = 100,
        start_iteration: int = 0,
        is_logging_rank: bool = True,
        log_throughput: bool = False,
        tensorboard_dir: str | os.PathLike[str] | None = None,
        wandb_project: str | None = None,
        wandb_name: str | None = None,
        wandb_dir: str | os.PathLike[str] | None = None,
        board_interval: int = 1,
        run_config: Mapping[str, Any] | None = None,
        stream: TextIO | None = None,
    ) -> None:
        self.total_iterations = total_iterations
        self.start_iteration = start_iteration
        self.log_interval = log_interval
        self.log_throughput = log_throughput
        self.is_logging_rank = is_logging_rank
        self.save_dir = Path(save_dir) if save_dir is not None and is_logging_rank else None
        self.stream = sys.stdout if stream is None else stream
        self.board_interval = board_interval
        self._interval = _Interval()
        self._consumed = 0
        self._lines: TextIO | None = None
        self._board: Any = None
        self._wandb: Any = None
        self._bar: Progress | None = None
        if not is_logging_rank:
            return
        if tensorboard_dir is not None:
            self._board = _open_tensorboard(Path(tensorboard_dir), start_iteration)
        if wandb_project is not None:
            self._wandb = _open_wandb(wandb_project, wandb_name, wandb_dir, run_config)
        if self.save_dir is not None:
            self.save_dir.mkdir(parents=True, exist_ok=True)
            for name in (METRICS_FILE, VALIDATION_FILE):
                _truncate_after(self.save_dir / name, start_iteration)
            self._lines = (self.save_dir / METRICS_FILE).open("a")

    def log(self, iteration: int, record: Mapping[str, Any]) -> None:
        """Report one finished iteration.

        `record` has the keys of `METRIC_KEYS` but `iteration` (absent or NaN ones become null), `global_batch_size`,
        and where they apply `skipped` (the optimizer skipped the step), `losses` (further averages by name),
        `num_zeros` and `params_norm`. Values may be numbers or tensors of one element.
        """
        if not self.is_logging_rank:
            return
        entry = {"iteration": iteration, **{key: _number(record.get(key)) for key in METRIC_KEYS[1:]}}
        self._consumed = int(record["consumed_samples"])
        if self._lines is not None:
            self._lines.write(json.dumps(entry) + "\n")
            self._lines.flush()
        if iteration % self.board_interval == 0:
            self._write_scalars(iteration, _scalars(record))
        if self._bar is not None:
            speed = _show(record.get("tokens_per_second_per_device"), ",.0f")
            state = f"loss {_show(record.get('lm_loss'), '.4f')}, {speed} tokens/s/device"
            self._bar.update(self._bar.task_ids[0], completed=iteration, state=state)
        self._interval.add(record)
        if iteration % self.log_interval == 0:
            self._print(self._line(iteration, record))
            self._interval = _Interval()

    def log_validation(self, iteration: int, loss: float, where: str = "") -> None:
        """Report a validation loss (nats per token). `where` is "on validation set" or "on test set" at a run's end."""
        if not self.is_logging_rank:
            return
        loss = float(loss)
        text = (
            f" validation loss at iteration {iteration}{' ' + where if where else ''} | "
            f"lm loss value: {loss:.6E} | lm loss PPL: {perplexity(loss):.6E} | "
        )
        rule = "-" * (len(text) + 1)
        self._print(f"{rule}\n{text}\n{rule}")
        if self.save_dir is not None and where != "on test set":
            entry = {"iteration": iteration, "lm_loss": _number(loss), "perplexity": _number(perplexity(loss))}
            with open(self.save_dir / VALIDATION_FILE, "a") as handle:
                handle.write(json.dumps(entry) + "\n")
        prefix = "test" if where == "on test set" else "validation"
        self._write_scalars(iteration, {f"lm loss {prefix}": loss, f"lm loss {prefix} ppl": perplexity(loss)})

    def close(self) -> None:
        """Flush and close everything; the logger is of no use afterwards."""
        if self._bar is not None:
            self._bar.stop()
        if self._lines is not None:
            self._lines.close()
        if self._board is not None:
            self._board.close()
        if self._wandb is not None:
            self._wandb.finish()

    def __enter__(self) -> MetricsLogger:
        if self.is_logging_rank and self.stream.isatty():
            self._bar = _open_bar(self.stream, self.total_iterations, self.start_iteration)
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def _line(self, iteration: int, record: Mapping[str, Any]) -> str:
        interval = self._interval
        elapsed_ms = interval.step_ms / interval.iterations
        stamp = datetime.now().strftime("%Y-%m-%d %H:%M:%S")
        parts = [
            f" [{stamp}] iteration {iteration:8d}/{self.total_iterations:8d}",
            f"consumed samples: {self._consumed:12d}",
            f"elapsed time per iteration (ms): {elapsed_ms:.1f}",
        ]
        if self.log_throughput:
            parts.append(f"throughput per GPU (TFLOP/s/GPU): {_show(record.get('tflops_per_device'), '.1f')}")
        parts.append(f"learning rate: {_show(record.get('learning_rate'), '.6E')}")
        parts.append(f"global batch size: {int(record['global_batch_size']):5d}")
        parts += [f"{name}: {total / interval.good:.6E}" for name, total in interval.losses.items()]
        parts.append(f"loss scale: {_show(record.get('loss_scale'), '.1f')}")
        for name, key, form in (
            ("grad norm", "grad_norm", ".3f"),
            ("num zeros", "num_zeros", ".1f"),
            ("params norm", "params_norm", ".3f"),
        ):
            if record.get(key) is not None:
                parts.append(f"{name}: {float(record[key]):{form}}")
        parts.append(f"number of skipped iterations: {interval.skipped:3d}")
        parts.append(f"number of nan iterations: {interval.nan:3d}")
        for name, key, form in (
            ("tokens/s/device", "tokens_per_second_per_device", ".1f"),
            ("TFLOP/s/device", "tflops_per_device", ".2f"),
            ("MFU", "mfu", ".2%"),
            ("MFU (causal)", "mfu_causal", ".2%"),
            ("memory (GiB)", "memory_gib", ".2f"),
        ):
            parts.append(f"{name}: {_show(record.get(key), form)}")
        return " | ".join(parts) + " |"

    def _write_scalars(self, iteration: int, scalars: Mapping[str, float]) -> None:
        if self._board is not None:
            for name, value in scalars.items():
                self._board.add_scalar(name, value, iteration)
                self._board.add_scalar(f"{name} vs samples", value, self._consumed)
        if self._wandb is not None:
            self._wandb.log({**scalars, "samples": self._consumed}, step=iteration)

    def _print(self, text: str) -> None:
        if self._bar is not None:
            self._bar.console.print(text, markup=False, highlight=False, soft_wrap=True)
        else:
            print(text, file=self.stream, flush=True)


def _open_bar(stream: TextIO, total: int, start: int) -> Progress:
    """A bar on the terminal below the log lines: iterations, time left, loss, speed."""
    columns = (
        TextColumn("training"),
        BarColumn(),
        MofNCompleteColumn(),
        TimeRemainingColumn(),
        TextColumn("{task.fields[state]}"),
    )
    bar = Progress(*columns, console=Console(file=stream))
    bar.add_task("training", total=total, completed=start, state="")
    bar.start()
    return bar


def _scalars(record: Mapping[str, Any]) -> dict[str, float]:
    """Return the TensorBoard names (the reference's, then ours) with what `record` has for them."""
    named = {
        "learning-rate": record.get("learning_rate"),
        "batch-size": record.get("global_batch_size"),
        "lm loss": record.get("lm_loss"),
        **record.get("losses", {}),
        "loss-scale": record.get("loss_scale"),
        "grad-norm": record.get("grad_norm"),
        "num-zeros": record.get("num_zeros"),
        "params-norm": record.get("params_norm"),
        "iteration-time": None if record.get("step_ms") is None else float(record["step_ms"]) / 1000,
        "tokens-per-second-per-device": record.get("tokens_per_second_per_device"),
        "throughput": record.get("tflops_per_device"),
        "mfu": record.get("mfu"),
        "mfu-causal": record.get("mfu_causal"),
        "memory-gib": record.get("memory_gib"),
    }
    return {name: number for name, value in named.items() if (number := _number(value)) is not None}


def _open_tensorboard(folder: Path, start_iteration: int) -> Any:
    try:
        from torch.utils.tensorboard import SummaryWriter
    except ImportError as error:
        raise ModelLinkError(
            "--tensorboard-dir needs the package tensorboard, which is not installed; run `pip install tensorboard`."
        ) from error
    # events from `purge_step` on are hidden: a resumed run draws over what it repeats
    return SummaryWriter(log_dir=str(folder), purge_step=start_iteration + 1 if start_iteration else None)


def _open_wandb(
    project: str, name: str | None, folder: str | os.PathLike[str] | None, run_config: Mapping[str, Any] | None
) -> Any:
    try:
        import wandb
    except ImportError as error:
        raise ModelLinkError(
            "--wandb-project needs the package wandb, which is not installed; run `pip install wandb`."
        ) from error
    return wandb.init(project=project, name=name, dir=folder, config=dict(run_config or {}))
