"""Time and peak memory of a gated MLP whose gate and up matrices run separately, together, or as one matrix.

    python benchmarks/mlp_fusion.py [--hidden 1024] [--width 2816] [--tokens 4096] [--repeats 5] [--output FILE]

"separate" is two products and the sum of two input gradients, as the model does it; "together" adds the second gradient
into the first; "stacked" makes one [2 F, D] matrix of both in every forward pass, which keeps their
names and costs a copy. The forms take turns, so that a busy machine slows all alike. Times are medians of forward and
backward, with the smallest and largest; memory is the largest amount allocated during one pass, beyond what was there.
On an accelerator the same script measures there.
"""

from __future__ import annotations

import argparse
import json
import statistics
import time
from collections.abc import Callable, Sequence
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from rich.console import Console
from rich.table import Table
from torch import Tensor, nn
from torch.profiler import ProfilerActivity, profile

from modellink import device
from modellink.config.schema import ModelConfig
from modellink.models.layers import MLP
from modellink.models.projections import separately


class _Together(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, *weights: Tensor) -> tuple[Tensor, ...]:
        ctx.save_for_backward(x, *weights)
        return tuple(F.linear(x, weight) for weight in weights)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        x, *weights = ctx.saved_tensors
        grads_TF = [grad.flatten(0, -2) for grad in grads]
        grad_TD = grads_TF[0] @ weights[0]
        for grad_TF, weight in zip(grads_TF[1:], weights[1:], strict=True):
            grad_TD.addmm_(grad_TF, weight)
        return grad_TD.view_as(x), *(grad_TF.T @ x.flatten(0, -2) for grad_TF in grads_TF)


def together(x: Tensor, linears: Sequence[nn.Linear]) -> tuple[Tensor, ...]:
    return _Together.apply(x, *(linear.weight for linear in linears))


def stacked(x: Tensor, linears: Sequence[nn.Linear]) -> tuple[Tensor, ...]:
    weight = torch.cat([linear.weight for linear in linears])
    return F.linear(x, weight).chunk(len(linears), -1)


FORMS: dict[str, Callable[..., Any]] = {"separate": separately, "together": together, "stacked": stacked}


def one_pass(mlp: MLP, x: Tensor) -> None:
    mlp(x).backward(torch.ones_like(x))
    for tensor in (x, *mlp.parameters()):
        tensor.grad = None


def peak_bytes(mlp: MLP, x: Tensor) -> int:
    """Most bytes allocated at one time during a pass, above those before it."""
    if device.is_accelerated():
        module = torch.get_device_module(device.device_type())
        module.reset_peak_memory_stats()
        before = module.memory_allocated()
        one_pass(mlp, x)
        return int(module.max_memory_allocated() - before)
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as trace:
        one_pass(mlp, x)
    now = peak = 0
    for event in trace.profiler.kineto_results.events():
        if event.name() == "[memory]":
            now += event.nbytes()
            peak = max(peak, now)
    return peak


def measure(arguments: argparse.Namespace, dtype: torch.dtype) -> list[dict[str, Any]]:
    config = ModelConfig(
        num_layers=1, hidden_size=arguments.hidden, num_attention_heads=8, ffn_hidden_size=arguments.width,
        activation="silu", gated_mlp=True, mlp_bias=False,
    ).resolve()  # fmt: skip
    where = device.current_device()
    mlp = MLP(config).to(where, dtype)
    x = torch.randn(1, arguments.tokens, arguments.hidden, device=where, dtype=dtype, requires_grad=True)
    times: dict[str, list[float]] = {name: [] for name in FORMS}
    memory = {}
    for repeat in range(arguments.repeats + 1):
        for name, form in FORMS.items():
            mlp.enter = form
            if not repeat:  # the first pass of each form warms up
                memory[name] = peak_bytes(mlp, x)
                continue
            device.synchronize()
            begin = time.perf_counter()
            one_pass(mlp, x)
            device.synchronize()
            times[name].append((time.perf_counter() - begin) * 1e3)
    return [
        {
            "form": name,
            "dtype": str(dtype).removeprefix("torch."),
            "ms": statistics.median(times[name]),
            "fastest_ms": min(times[name]),
            "slowest_ms": max(times[name]),
            "peak_mib": memory[name] / 2**20,
        }
        for name in FORMS
    ]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--hidden", type=int, default=1024)
    parser.add_argument("--width", type=int, default=2816)
    parser.add_argument("--tokens", type=int, default=4096)
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--dtypes", nargs="+", default=["float32", "bfloat16"])
    parser.add_argument("--output", type=Path, help="write the figures as JSON")
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    results = [row for dtype in arguments.dtypes for row in measure(arguments, getattr(torch, dtype))]
    table = Table("form", "dtype", "ms", "fastest", "slowest", "peak MiB")
    for row in results:
        figures = [f"{row[key]:.1f}" for key in ("ms", "fastest_ms", "slowest_ms", "peak_mib")]
        table.add_row(row["form"], row["dtype"], *figures)
    Console(width=100).print(table)
    if arguments.output is not None:
        about = {
            "date": datetime.now(UTC).date().isoformat(),
            "torch": torch.__version__,
            "device": device.device_name(),
        }
        about |= {key: getattr(arguments, key) for key in ("hidden", "width", "tokens", "repeats", "threads")}
        arguments.output.write_text(json.dumps({**about, "results": results}, indent=1) + "\n")


if __name__ == "__main__":
    main()
