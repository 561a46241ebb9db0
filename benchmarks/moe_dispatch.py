"""What overlapped expert dispatch hides: step time, transfers, waiting and volume, on gloo processes.

    python benchmarks/moe_dispatch.py [--ranks 4] [--steps 10] [--hidden 256] [--shared 1] [--output FILE]

Trains a mixture of experts with expert parallelism over all ranks, with and without `--moe-permutation-async-comm`; the
two take turns step by step, so that a busy machine slows both alike. More steps of each are traced: "transfer" is the
time for which at least one exchange of rows or gradients was under way, "waiting" the time in which the program did
nothing but wait for one; what is hidden is the rest. "values" counts what the exchanges of a layer carry, to be
compared with the formula 4 k B S D (k rows a token, there and back, forward and backward).

Processes of one machine compete for its cores: with fewer cores than ranks, whoever waits gives its core to another,
and hidden transfers save little time. The share that is hidden is what the schedule allows.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import time
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from ranks import on_ranks
from rich.console import Console
from rich.table import Table
from torch.profiler import ProfilerActivity, profile

from modellink import device
from modellink.config.schema import Config, ModelConfig, OptimizerConfig, ParallelConfig
from modellink.parallel.apply import build_model
from modellink.parallel.collectives import WAIT
from modellink.parallel.topology import Topology
from modellink.train.engine import Engine

TRACED = 4  # steps
FORMS = {"plain": False, "overlapped": True}


def engine_of(arguments: argparse.Namespace, overlapped: bool) -> Engine:
    model = ModelConfig(
        num_layers=arguments.layers, hidden_size=arguments.hidden, num_attention_heads=4, num_key_value_heads=4,
        ffn_hidden_size=arguments.hidden, vocab_size=512, padded_vocab_size=512, normalization="RMSNorm",
        activation="silu", gated_mlp=True, mlp_bias=False, qkv_bias=False, attention_output_bias=False,
        position_embedding="rope", attention_dropout=0.0, hidden_dropout=0.0, num_experts=arguments.experts,
        moe_ffn_hidden_size=arguments.width, router_topk=arguments.topk, n_shared_experts=arguments.shared,
    ).resolve()  # fmt: skip
    parallel = ParallelConfig(expert_parallel=arguments.ranks, zero_stage=1, moe_permutation_async_comm=overlapped)
    config = Config(model=model, parallel=parallel, optimizer=OptimizerConfig(lr=1e-3))
    built = build_model(model, parallel, Topology(parallel), torch.device("cpu"), torch.float32, seed=1)
    return Engine(built, config)


def covered(intervals: list[tuple[float, float]]) -> float:
    """Length of the union of intervals."""
    total, end = 0.0, float("-inf")
    for first, last in sorted(intervals):
        total += max(0.0, last - max(first, end))
        end = max(end, last)
    return total


def traced(engine: Engine, batch: dict[str, torch.Tensor], arguments: argparse.Namespace) -> dict[str, float]:
    with profile(activities=[ProfilerActivity.CPU], record_shapes=True) as trace:
        for _ in range(TRACED):
            engine.step(batch, arguments.batch)
    rows = [event for event in trace.events() if event.name == "gloo:all_to_all" and len(event.input_shapes[0]) == 2]
    spans = [(event.time_range.start, event.time_range.end) for event in rows]
    waits = [(event.time_range.start, event.time_range.end) for event in trace.events() if event.name == WAIT]
    transfer, waiting = covered(spans), covered(waits)
    return {
        "transfer_ms": transfer / 1e3 / TRACED,
        "waiting_ms": waiting / 1e3 / TRACED,
        "hidden": 1.0 - waiting / transfer,
        "values": sum(event.input_shapes[0][0] * event.input_shapes[0][1] for event in rows)
        / arguments.layers
        / TRACED,
    }


def measure(arguments: argparse.Namespace) -> list[dict[str, Any]]:
    """Of each form: times of this rank's steps and what a trace of some of them shows."""
    engines = {name: engine_of(arguments, overlapped) for name, overlapped in FORMS.items()}
    generator = torch.Generator().manual_seed(dist.get_rank())
    text = torch.randint(0, 512, (arguments.batch, arguments.sequence + 1), generator=generator)
    batch = {"tokens": text[:, :-1].contiguous(), "labels": text[:, 1:].contiguous()}
    times: dict[str, list[float]] = {name: [] for name in FORMS}
    for step in range(arguments.steps + 1):
        for name, engine in engines.items():
            dist.barrier()
            begin = time.perf_counter()
            engine.step(batch, arguments.batch)
            if step:  # the first one warms up
                times[name].append((time.perf_counter() - begin) * 1e3)
    return [
        {"form": name, "step_ms": statistics.median(times[name]), "fastest_ms": min(times[name])}
        | traced(engine, batch, arguments)
        for name, engine in engines.items()
    ]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    sizes = {"ranks": 4, "steps": 10, "layers": 2, "hidden": 256, "width": 256, "experts": 16, "topk": 2, "shared": 1}
    for name, value in (sizes | {"batch": 2, "sequence": 512, "threads": 1}).items():
        parser.add_argument(f"--{name}", type=int, default=value)
    parser.add_argument("--output", type=Path, help="write the figures as JSON")
    arguments = parser.parse_args()
    results, *others = on_ranks(measure, arguments.ranks, arguments, threads=arguments.threads)
    for place, row in enumerate(results):  # one rank's exchanges vary with its routing: means over the ranks
        for key in row.keys() - {"form"}:
            row[key] = statistics.fmean([row[key], *(other[place][key] for other in others)])
    formula = 4 * arguments.topk * arguments.batch * arguments.sequence * arguments.hidden
    table = Table("", "step ms", "fastest", "transfer ms", "waiting ms", "hidden", "values a layer", "4 k B S D")
    for row in results:
        figures = [f"{row[key]:.1f}" for key in ("step_ms", "fastest_ms", "transfer_ms", "waiting_ms")]
        table.add_row(row["form"], *figures, f"{row['hidden']:.0%}", f"{row['values']:,.0f}", f"{formula:,}")
    Console(width=110).print(table)
    if arguments.output is not None:
        about = {
            "date": datetime.now(UTC).date().isoformat(),
            "torch": torch.__version__,
            "device": device.device_name(),
        }
        about |= {key: value for key, value in vars(arguments).items() if key != "output"}
        about |= {"cores": os.cpu_count(), "formula_values": formula}
        arguments.output.write_text(json.dumps({**about, "results": results}, indent=1) + "\n")


if __name__ == "__main__":
    main()
