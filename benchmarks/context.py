"""What context parallelism sends, keeps and holds on a rank, and how long a sequence it makes possible.

    python benchmarks/context.py [--output FILE.md] [--plot FILE.png] [--budget-mib 16]

First one attention layer on four processes (gloo): bytes sent and kept beside the formulas of
`modellink/parallel/context_cost.py`, and the peak. Then a decoder of two layers on 1, 2 and 4 processes: the longest
sequence, in steps of 64 positions a rank, whose forward and backward hold no more than the budget on any rank. Bytes
are counted operation by operation (`modellink/parallel/meter.py`), so they do not depend on the machine.
"""

from __future__ import annotations

import argparse
import platform
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from ranks import on_ranks
from rich.console import Console
from rich.table import Table

from modellink.config.schema import Config, ModelConfig, ParallelConfig
from modellink.parallel.apply import build_model
from modellink.parallel.context_cost import AttentionShape, context_cost, measure_context
from modellink.parallel.meter import Meter
from modellink.parallel.topology import Topology
from modellink.train.engine import Engine

ALGORITHMS: dict[str, dict[str, Any]] = {
    "ring": {"context_parallel_algo": "megatron_cp_algo"},
    "Ulysses": {"context_parallel_algo": "ulysses_cp_algo"},
    "hybrid": {"context_parallel_algo": "hybrid_cp_algo", "ulysses_degree_in_cp": 2},
    "all-gather": {"context_parallel_algo": "allgather_cp_algo"},
}
WORLDS, STEP = (1, 2, 4), 64
SHAPE = AttentionShape(1, 2048, 8, 4, 32, torch.bfloat16)


def layout(name: str, ranks: int) -> ParallelConfig:
    return ParallelConfig(context_parallel=ranks, **(ALGORITHMS[name] if ranks > 1 else {}))


def layers() -> dict[str, Any]:
    """One attention layer by every algorithm: [forward, backward, kept, peak] in bytes."""
    return {
        name: list(vars(measure_context(layout(name, dist.get_world_size()), SHAPE)).values()) for name in ALGORITHMS
    }


class Trainer:
    """A small decoder at one layout; its peak bytes in forward and backward of one sequence."""

    def __init__(self, parallel: ParallelConfig) -> None:
        model = ModelConfig(
            num_layers=2, hidden_size=64, num_attention_heads=8, num_key_value_heads=4, ffn_hidden_size=128,
            vocab_size=64, padded_vocab_size=64, normalization="RMSNorm", activation="silu", gated_mlp=True,
            position_embedding="rope", attention_dropout=0.0, hidden_dropout=0.0, max_position_embeddings=1 << 16,
        )  # fmt: skip
        config = Config(model=model.resolve(), parallel=parallel)
        built = build_model(config.model, parallel, Topology(parallel), torch.device("cpu"), torch.float32, seed=1)
        self.engine = Engine(built, config)

    def peak(self, length: int) -> int:
        tokens = torch.ones(1, length, dtype=torch.int64)
        with Meter() as meter:
            self.engine.forward_backward({"tokens": tokens, "labels": tokens}, 1)
        self.engine.optimizer.zero_grad()
        highest = torch.tensor(meter.peak)
        dist.all_reduce(highest, dist.ReduceOp.MAX)
        return int(highest)


def longest(budget: int) -> dict[str, Any]:
    """Positions of the longest sequence within `budget` bytes, by algorithm."""
    found, world = {}, dist.get_world_size()
    for name in ALGORITHMS:
        if (world == 1 and name != "ring") or (world == 2 and name == "hybrid"):
            continue
        trainer, step = Trainer(layout(name, world)), STEP * world
        small, large = trainer.peak(4 * step), trainer.peak(8 * step)
        slope = (large - small) / 4
        steps = int((budget - small) / slope) + 4  # bytes are nearly linear in positions; the last steps are measured
        while trainer.peak(steps * step) > budget:
            steps -= 1
        while trainer.peak((steps + 1) * step) <= budget:
            steps += 1
        found["one process" if world == 1 else name] = steps * step
    return found


def draw(lengths: dict[int, dict[str, int]], budget: int, path: Path) -> None:
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot as plt
    from matplotlib.ticker import StrMethodFormatter

    figure, (left, right) = plt.subplots(1, 2, figsize=(10, 4), layout="constrained")
    alone = lengths[1]["one process"]
    left.plot(WORLDS, [alone * world for world in WORLDS], "--", color="0.6", label="in proportion to ranks")
    # the curves lie on one another: open marks of falling size
    marks: dict[str, dict[str, Any]] = {
        name: {"marker": mark, "markersize": size, "fillstyle": "none", "markeredgewidth": 1.5}
        for name, mark, size in zip(ALGORITHMS, "osD^", (16, 12, 8, 6), strict=True)
    }
    for name in ALGORITHMS:
        points = [(world, lengths[world][name]) for world in WORLDS[1:] if name in lengths[world]]
        left.plot([1, *(p[0] for p in points)], [alone, *(p[1] for p in points)], label=name, **marks[name])
    left.set(xlabel="ranks", ylabel="longest sequence (positions)", xticks=WORLDS, ylim=(0, None))
    left.set_title(f"within {budget >> 20} MiB a rank, measured")
    sizes = [2, 4, 8, 16, 32]
    wide = AttentionShape(1, 131072, 32, 8, 128, torch.bfloat16)
    for name in ALGORITHMS:
        usable = [size for size in sizes if name != "hybrid" or size > 2]
        costs = [context_cost(layout(name, size), wide) for size in usable]
        right.plot(usable, [(c.forward + c.backward) / 2**20 for c in costs], label=name, **marks[name])
    right.set_xscale("log", base=2)
    right.set(xlabel="ranks", ylabel="MiB sent by a rank", xticks=sizes, ylim=(0, None))
    right.xaxis.set_major_formatter(StrMethodFormatter("{x:.0f}"))
    right.set_title("one layer, S 131072, 32 / 8 heads of 128, bf16, by formula", fontsize=10)
    for axes in (left, right):
        axes.grid(alpha=0.3)
        axes.legend()
    figure.savefig(path, dpi=120)


def markdown(heads: list[str], rows: list[list[str]]) -> list[str]:
    return ["| " + " | ".join(heads) + " |", "|" + "---|" * len(heads), *("| " + " | ".join(r) + " |" for r in rows)]


def show(title: str, heads: list[str], rows: list[list[str]]) -> None:
    table = Table(*heads, title=title)
    for row in rows:
        table.add_row(*row)
    Console(width=120).print(table)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output", type=Path, help="write the tables as markdown")
    parser.add_argument("--plot", type=Path, help="draw the longest sequences and the volumes")
    parser.add_argument("--budget-mib", type=int, default=16)
    arguments = parser.parse_args()
    measured, budget = on_ranks(layers, 4)[0], arguments.budget_mib << 20
    heads = ["4 ranks", "sent forward", "formula", "sent backward", "formula", "kept", "formula", "peak", "formula"]
    rows = []
    for name, (forward, backward, kept, peak) in measured.items():
        cost = context_cost(layout(name, 4), SHAPE)
        pairs = (forward, cost.forward, backward, cost.backward, kept, cost.kept, peak, cost.peak)
        rows.append([name, *(f"{number:,}" for number in pairs)])
    show("bytes of a rank, one layer", heads, rows)
    lengths = {world: on_ranks(longest, world, budget)[0] for world in WORLDS}
    alone = lengths[1]["one process"]
    counts = [[name, *(str(lengths[w].get(name, "")) for w in WORLDS[1:])] for name in ALGORITHMS]
    growth = [[*row, *(f"{int(n) / alone:.2f}" if n else "" for n in row[1:])] for row in counts]
    length_heads = [f"one rank: {alone}", "2 ranks", "4 ranks", "times, 2 ranks", "times, 4 ranks"]
    show(f"longest sequence within {arguments.budget_mib} MiB a rank", length_heads, growth)
    if arguments.plot is not None:
        draw(lengths, budget, arguments.plot)
    if arguments.output is not None:
        today = datetime.now(UTC).date()
        shape = (
            f"B {SHAPE.batch}, S {SHAPE.length}, {SHAPE.heads} query and {SHAPE.groups} key/value heads of {SHAPE.size}"
        )
        text = [f"# Context parallelism, {today}", "", f"torch {torch.__version__}, {platform.machine()}, gloo.", ""]
        text += [f"One attention layer, bytes of rank 0 of 4: {shape}, bf16, causal.", "", *markdown(heads, rows), ""]
        text += ["Longest sequence that a decoder of two layers (hidden 64, float32) trains within "]
        text[-1] += f"{arguments.budget_mib} MiB a rank, in steps of {STEP} positions a rank; {alone} positions on one."
        text += ["", *markdown(length_heads, growth), ""]
        arguments.output.write_text("\n".join(text))


if __name__ == "__main__":
    main()
