"""Log lines, metrics files, FLOP counts and the loss picture."""

from __future__ import annotations

import io
import json
import math
import re
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn
from torch.utils.flop_counter import FlopCounterMode

from modellink.errors import ModelLinkError
from modellink.train.metrics import METRIC_KEYS, MetricsLogger, memory_line, model_flops, perplexity
from modellink.train.plots import draw_loss


def record(iteration: int, **changes: Any) -> dict[str, Any]:
    return {
        "consumed_samples": 16 * iteration,
        "lm_loss": 10.0 - iteration,
        "learning_rate": 1.25e-6,
        "grad_norm": 1.2345,
        "loss_scale": 1.0,
        "tokens_per_second_per_device": 1234.56,
        "tflops_per_device": 45.67,
        "mfu": 0.5,
        "mfu_causal": 0.4,
        "memory_gib": 1.5,
        "step_ms": 100.0 * iteration,
        "global_batch_size": 16,
        **changes,
    }


def printed(tmp_path: Path, records: list[dict[str, Any]], **options: Any) -> list[str]:
    stream = io.StringIO()
    with MetricsLogger(tmp_path, total_iterations=2000, stream=stream, **options) as logger:
        for iteration, entry in enumerate(records, start=1):
            logger.log(iteration, entry)
    return stream.getvalue().splitlines()


def test_line_is_the_references_then_ours(tmp_path: Path) -> None:
    (line,) = printed(tmp_path, [record(1), record(2)], log_interval=2, log_throughput=True)
    assert re.match(r" \[\d{4}-\d\d-\d\d \d\d:\d\d:\d\d\] iteration ", line)
    assert line[line.index("]") :] == (
        "] iteration        2/    2000 | consumed samples:           32 | elapsed time per iteration (ms): 150.0 | "
        "throughput per GPU (TFLOP/s/GPU): 45.7 | learning rate: 1.250000E-06 | global batch size:    16 | "
        "lm loss: 8.500000E+00 | loss scale: 1.0 | grad norm: 1.234 | number of skipped iterations:   0 | "
        "number of nan iterations:   0 | tokens/s/device: 1234.6 | TFLOP/s/device: 45.67 | MFU: 50.00% | "
        "MFU (causal): 40.00% | memory (GiB): 1.50 |"
    )


def test_line_with_every_option_and_bad_iterations(tmp_path: Path) -> None:
    records = [
        record(1, losses={"rewards/accuracies": 0.25}),
        record(2, losses={"rewards/accuracies": 0.75}, skipped=True, lm_loss=math.nan),
        record(3, losses={"rewards/accuracies": 0.75}, num_zeros=3, params_norm=torch.tensor(2.5), mfu=math.nan),
    ]
    (line,) = printed(tmp_path, records, log_interval=3)
    assert "throughput" not in line
    assert (
        "| lm loss: 8.000000E+00 | rewards/accuracies: 5.000000E-01 | loss scale: 1.0 | grad norm: 1.234 | "
        "num zeros: 3.0 | params norm: 2.500 | number of skipped iterations:   1 | number of nan iterations:   1 |"
    ) in line
    assert "| MFU: n/a |" in line


def test_interval_starts_afresh(tmp_path: Path) -> None:
    lines = printed(tmp_path, [record(n) for n in range(1, 6)], log_interval=2)
    assert [re.search(r"lm loss: (\S+)", line)[1] for line in lines] == ["8.500000E+00", "6.500000E+00"]


def test_validation_and_memory_lines(tmp_path: Path) -> None:
    stream = io.StringIO()
    with MetricsLogger(tmp_path, total_iterations=10, stream=stream) as logger:
        logger.log_validation(4, 2.0)
        logger.log_validation(10, 30.0, "on test set")
    first, second = stream.getvalue().splitlines()[:3], stream.getvalue().splitlines()[3:]
    assert first[1] == " validation loss at iteration 4 | lm loss value: 2.000000E+00 | lm loss PPL: 7.389056E+00 | "
    assert set(first[0]) == {"-"} and first[0] == first[2]
    assert second[1].startswith(" validation loss at iteration 10 on test set | lm loss value: 3.000000E+01 | ")
    assert perplexity(30.0) == math.exp(20)
    entries = [json.loads(line) for line in (tmp_path / "validation.jsonl").read_text().splitlines()]
    assert entries == [{"iteration": 4, "lm_loss": 2.0, "perplexity": math.exp(2.0)}]
    assert memory_line(3, 10, 2**20, 2**21, 2**22, 2**23) == (
        "[Rank 3] (after 10 iterations) memory (MB) | "
        "allocated: 1.0 | max allocated: 2.0 | reserved: 4.0 | max reserved: 8.0"
    )


def lines_of(path: Path) -> list[dict[str, Any]]:
    def refuse(name: str) -> None:
        raise ValueError(f"{name} is not JSON")

    return [json.loads(line, parse_constant=refuse) for line in path.read_text().splitlines()]


def test_metrics_file(tmp_path: Path) -> None:
    printed(tmp_path, [record(1), record(2, lm_loss=math.nan, mfu=math.inf, grad_norm=torch.tensor(0.5))])
    entries = lines_of(tmp_path / "metrics.jsonl")
    assert [tuple(entry) for entry in entries] == [METRIC_KEYS, METRIC_KEYS]
    assert entries[0]["iteration"] == 1 and entries[0]["consumed_samples"] == 16 and entries[0]["lm_loss"] == 9.0
    assert entries[1]["lm_loss"] is None and entries[1]["mfu"] is None and entries[1]["grad_norm"] == 0.5


def test_resume_removes_what_came_after(tmp_path: Path) -> None:
    printed(tmp_path, [record(n) for n in range(1, 6)])
    path = tmp_path / "metrics.jsonl"
    path.write_text(path.read_text() + '{"iteration": 6, "lm_lo')  # killed while writing
    with MetricsLogger(tmp_path, total_iterations=9, start_iteration=3, stream=io.StringIO()) as logger:
        logger.log(4, record(4, lm_loss=1.0))
    assert [(entry["iteration"], entry["lm_loss"]) for entry in lines_of(path)] == [(1, 9), (2, 8), (3, 7), (4, 1)]


def test_other_ranks_write_nothing(tmp_path: Path) -> None:
    options = {"is_logging_rank": False, "log_interval": 1, "tensorboard_dir": tmp_path / "board"}
    assert printed(tmp_path / "run", [record(1)], **options) == []
    assert not list(tmp_path.iterdir())


def test_tensorboard_names(tmp_path: Path) -> None:
    accumulator = pytest.importorskip("tensorboard.backend.event_processing.event_accumulator")
    with MetricsLogger(None, total_iterations=9, tensorboard_dir=tmp_path, stream=io.StringIO()) as logger:
        logger.log(1, record(1, losses={"load_balancing_loss": 0.5}, num_zeros=3, params_norm=2.0))
        logger.log_validation(1, 2.0)
    events = accumulator.EventAccumulator(str(tmp_path))
    events.Reload()
    for name in (
        "learning-rate", "batch-size", "lm loss", "load_balancing_loss", "loss-scale", "grad-norm", "num-zeros",
        "params-norm", "lm loss validation", "lm loss validation ppl",
    ):  # fmt: skip
        assert len(events.Scalars(name)) == 1, name
        assert events.Scalars(f"{name} vs samples")[0].step == 16, name


@pytest.mark.parametrize(
    ("package", "option"),
    [("torch.utils.tensorboard", {"tensorboard_dir": "board"}), ("wandb", {"wandb_project": "p"})],
)
def test_missing_package_is_named(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, package: str, option: dict[str, str]
) -> None:
    monkeypatch.setitem(sys.modules, package, None)
    with pytest.raises(ModelLinkError, match=f"pip install {package.rpartition('.')[2]}"):
        MetricsLogger(tmp_path, total_iterations=1, **option)


# --- FLOPs --------------------------------------------------------------------------------------------------------


class CountedDecoder(nn.Module):
    """The matrix products of a decoder, written out, so that a counter sees each of them."""

    def __init__(self, shape: dict[str, Any]) -> None:
        super().__init__()
        self.shape = shape
        hidden, ffn = shape["hidden"], shape["ffn"]
        query, key = shape["heads"] * shape["head_dim"], shape["kv_heads"] * shape["head_dim"]
        sizes = [(hidden, query), (hidden, key), (hidden, key), (query, hidden), (hidden, ffn), (ffn, hidden)]
        sizes += [(hidden, ffn)] * shape["gated"]
        self.blocks = nn.ModuleList(
            nn.ModuleList(nn.Linear(*size, bias=False) for size in sizes) for _ in range(shape["layers"])
        )
        self.head = nn.Linear(hidden, shape["vocab"], bias=False)

    def forward(self, x_BSD: torch.Tensor) -> torch.Tensor:
        heads, kv_heads = self.shape["heads"], self.shape["kv_heads"]
        for q, k, v, o, up, down, *gate in self.blocks:
            q_BHSK, k_BHSK, v_BHSK = (
                layer(x_BSD).unflatten(-1, (count, -1)).transpose(1, 2).repeat_interleave(heads // count, 1)
                for layer, count in ((q, heads), (k, kv_heads), (v, kv_heads))
            )
            scores_BHSS = (q_BHSK @ k_BHSK.transpose(-1, -2)).softmax(-1)
            x_BSD = x_BSD + o((scores_BHSS @ v_BHSK).transpose(1, 2).flatten(2))
            inner_BSF = up(x_BSD).sigmoid()
            if gate:
                inner_BSF = inner_BSF * gate[0](x_BSD)
            x_BSD = x_BSD + down(inner_BSF)
        return self.head(x_BSD)


@pytest.mark.parametrize("gated", [False, True])
def test_flops_agree_with_a_counter(gated: bool) -> None:
    shape = {
        "layers": 3, "hidden": 24, "ffn": 40, "gated": gated, "heads": 6, "kv_heads": 2, "head_dim": 8, "vocab": 50,
        "seq": 10,
    }  # fmt: skip
    batch, seq = 2, shape["seq"]
    x_BSD = torch.randn(batch, seq, 24, requires_grad=True)
    with FlopCounterMode(display=False) as counter:
        CountedDecoder(shape)(x_BSD).sum().backward()
    flops = model_flops(**shape)
    assert counter.get_total_flops() == flops.full * batch * seq
    scores = 3 * 3 * 4 * seq * 6 * 8
    assert flops.full - flops.causal == scores // 2


def test_flops_of_experts_and_other_attention() -> None:
    common = {"layers": 4, "hidden": 16, "heads": 2, "kv_heads": 2, "head_dim": 8, "vocab": 32, "seq": 8, "gated": True}
    dense = model_flops(**common, ffn=3 * 20)
    routed = model_flops(**common, ffn=0, moe_layers=4, experts=0, experts_per_token=2, moe_ffn=20, shared_ffn=20)
    assert routed == dense
    router = model_flops(**common, ffn=0, moe_layers=4, experts=8, experts_per_token=2, moe_ffn=20, shared_ffn=20)
    assert router.full - routed.full == 3 * 4 * 2 * 16 * 8
    named = model_flops(**common, ffn=60, attention_params=4 * 16 * 16)
    assert named == dense


# --- picture ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("count", [1, 12, 300])
def test_picture(tmp_path: Path, count: int) -> None:
    pytest.importorskip("matplotlib")
    records = [record(n, lm_loss=2 + 8 / n if n % 50 else math.nan) for n in range(1, count + 1)]
    printed(tmp_path, records, log_interval=10**6)
    with MetricsLogger(tmp_path, total_iterations=9, start_iteration=count, stream=io.StringIO()) as logger:
        logger.log_validation(count, 2.5)
    target = tmp_path / "loss.png"
    target.write_bytes(b"old")
    draw_loss(tmp_path / "metrics.jsonl", target, sequence_length=128)
    content = target.read_bytes()
    assert content.startswith(b"\x89PNG") and len(content) > 10_000
    assert sorted(path.name for path in tmp_path.iterdir()) == ["loss.png", "metrics.jsonl", "validation.jsonl"]


def test_picture_of_nothing_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ModelLinkError, match="no iteration to draw"):
        draw_loss(tmp_path / "metrics.jsonl", tmp_path / "loss.png")


def test_a_terminal_gets_a_bar_below_the_lines() -> None:
    class Terminal(io.StringIO):
        def isatty(self) -> bool:
            return True

    record = {"consumed_samples": 2, "lm_loss": 1.25, "step_ms": 5.0, "global_batch_size": 2}
    shown = {}
    for stream in (Terminal(), io.StringIO()):
        with MetricsLogger(None, total_iterations=3, log_interval=1, stream=stream) as logger:
            logger.log(1, record | {"tokens_per_second_per_device": 1234.0})
        shown[type(stream)] = stream.getvalue()
        assert "iteration        1/       3" in stream.getvalue()
    assert "training" in shown[Terminal] and "loss 1.2500, 1,234 tokens/s/device" in shown[Terminal]
    assert "training" not in shown[io.StringIO]
