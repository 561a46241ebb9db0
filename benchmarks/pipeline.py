"""Idle time and live activations of every pipeline schedule, from the order in which torch runs it, and a picture.

    python benchmarks/pipeline.py [--ranks 4] [--micro-batches 8] [--image docs/images/pipeline-schedules.png]

Each schedule is built by torch and played with fixed costs: a forward pass through all chunks of a rank takes 1, its
input gradients 1, its weight gradients 1, a whole backward pass 2; a rank with v chunks does v parts of 1 / v.
Messages take no time. The first stage owes nobody an input gradient: all of its backward pass runs where a schedule
has its weight gradients. Idle is the share of time that ranks wait; live is the largest number of micro-batches whose
activations one rank holds, in units of all its chunks. With rows of micro-batches given (`--manual-mbs`), costs are in
proportion to them.
"""

from __future__ import annotations

import argparse
from collections import defaultdict
from dataclasses import dataclass, field
from types import SimpleNamespace
from typing import Any

from rich.console import Console
from rich.table import Table

from modellink.config.pipeline import MANUAL_SIZES, stages_of
from modellink.config.schema import ParallelConfig
from modellink.parallel.pipeline import SCHEDULES

CHUNKS = {"interleaved": 2, "aiao": 2, "zero_bubble, 2 chunks": 2, "zbv": 2, "dualpipev": 2}
ROWS = ("gpipe", "1f1b", "interleaved", "aiao", "zero_bubble", "zero_bubble, 2 chunks", "zbv", "dualpipev")
COLORS = {
    "F": ("#a6cee3", "#5b9fc9"),
    "B": ("#fdbf6f", "#f0943c"),
    "I": ("#fb9a99", "#e4605f"),
    "W": ("#b2df8a", "#7dbb4c"),
}
NAMES = {"F": "forward", "B": "backward", "I": "input gradients", "W": "weight gradients"}


@dataclass(frozen=True)
class Pass:
    """One pass of one micro-batch through one stage, and when it ran."""

    stage: int
    kind: str
    micro_batch: int
    start: float
    end: float


@dataclass
class Timeline:
    """What every rank did when."""

    chunks: int
    passes: dict[int, list[Pass]] = field(default_factory=lambda: defaultdict(list))

    @property
    def length(self) -> float:
        return max(each.end for passes in self.passes.values() for each in passes)

    @property
    def idle(self) -> float:
        """Share of the time of all ranks."""
        busy = sum(each.end - each.start for passes in self.passes.values() for each in passes)
        return 1 - busy / (len(self.passes) * self.length)

    def live(self, rank: int, sizes: list[int] | None = None) -> float:
        """Most micro-batches (or rows, with `sizes`) that `rank` holds activations of, over all its chunks."""
        held, most = 0, 0
        for each in self.passes[rank]:  # in order of time
            rows = 1 if sizes is None else sizes[each.micro_batch]
            held += rows * (each.kind == "F")
            most = max(most, held)
            held -= rows * (each.kind in ("B", "W"))
        return most / self.chunks


def one_forward_one_backward(ranks: int, micro_batches: int) -> dict[int, list[tuple[int, str, int]]]:
    """What `Schedule1F1B` runs; the table it keeps beside that leaves out the first micro-batch of the last rank."""
    orders = {}
    for rank in range(ranks):
        ahead = min(ranks - rank, micro_batches)
        passes = [(rank, "F", number) for number in range(ahead)]
        for number in range(micro_batches):
            passes.append((rank, "B", number))
            passes += [(rank, "F", number + ahead)] if number + ahead < micro_batches else []
        orders[rank] = passes
    return orders


def order(name: str, ranks: int, micro_batches: int) -> dict[int, list[tuple[int, str, int]]]:
    """(stage, kind of pass, micro-batch) of every rank in turn, as torch's schedule has them."""
    if name == "1f1b":
        return one_forward_one_backward(ranks, micro_batches)
    kind, chunks = name.split(",")[0], CHUNKS.get(name, 1)
    parallel = ParallelConfig(
        pipeline_parallel=ranks, pipeline_schedule=kind, layers_per_virtual_stage=1 if chunks == 2 else None
    )
    held = stages_of(0, ranks * chunks, parallel)
    stages: list[Any] = [
        SimpleNamespace(stage_index=s, num_stages=ranks * chunks, group_size=ranks, group_rank=0, submod=None)
        for s in held
    ]
    schedule: Any = SCHEDULES[kind](stages[0] if kind == "gpipe" else stages, micro_batches)
    orders = {}
    for rank, actions in schedule.pipeline_order.items():
        leaves = [leaf for action in actions if action is not None for leaf in action.sub_actions or (action,)]
        orders[rank] = [
            (leaf.stage_index, leaf.computation_type.value, leaf.microbatch_index)
            for leaf in leaves
            if leaf.computation_type.value in COLORS
        ]
    return orders


def play(name: str, ranks: int, micro_batches: int, sizes: list[int] | None = None) -> Timeline:
    """Run the schedule on paper."""
    timeline = Timeline(CHUNKS.get(name, 1))
    total, done = ranks * timeline.chunks, dict[tuple[int, str, int], float]()
    queues, clock = order(name, ranks, micro_batches), dict.fromkeys(range(ranks), 0.0)
    while any(queues.values()):
        before = len(done)
        for rank, queue in queues.items():
            while queue:
                stage, kind, number = queue[0]
                if kind == "F":
                    needs = [(stage - 1, "F", number)] if stage else []
                elif kind == "W":
                    needs = [(stage, "I", number)]
                else:
                    needs = [(stage + 1, "I", number)] if stage + 1 < total else [(stage, "F", number)]
                if any(need not in done for need in needs):
                    break
                cost = {"B": 2, "I": min(stage, 1), "W": 2 - min(stage, 1)}.get(kind, 1) / timeline.chunks
                cost *= 1 if sizes is None else sizes[number]
                start = max([clock[rank], *(done[need] for need in needs)])
                clock[rank] = done[stage, "I" if kind == "B" else kind, number] = start + cost
                if cost:
                    shown = kind if stage or kind == "F" else "B"
                    timeline.passes[rank].append(Pass(stage, shown, number, start, clock[rank]))
                queue.pop(0)
        assert len(done) > before, f"{name} does not come to an end"
    return timeline


def draw(timelines: dict[str, Timeline], path: str) -> None:
    """One panel per schedule: ranks from top to bottom, time from left to right, micro-batches numbered."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot as plt
    from matplotlib.patches import Patch

    ranks = len(next(iter(timelines.values())).passes)
    longest = max(timeline.length for timeline in timelines.values())
    figure, axes = plt.subplots(len(timelines), 1, figsize=(13, 1.55 * len(timelines)), sharex=True)
    for axis, (name, timeline) in zip(axes, timelines.items(), strict=True):
        for rank, passes in timeline.passes.items():
            for each in passes:
                width = each.end - each.start
                later = each.stage >= ranks
                axis.barh(
                    rank, width, left=each.start, height=0.94, color=COLORS[each.kind][later], edgecolor="white", lw=0.6
                )
                if width >= 0.45:
                    middle = each.start + width / 2
                    axis.text(
                        middle, rank, str(each.micro_batch), ha="center", va="center", fontsize=7, color="#222222"
                    )
        most = max(timeline.live(rank) for rank in range(ranks))
        axis.set_title(
            f"{name}: {timeline.idle:.0%} idle, {most:g} micro-batches live at most", loc="left", fontsize=10, pad=3
        )
        axis.set_yticks(range(ranks), [f"rank {rank}" for rank in range(ranks)], fontsize=8)
        axis.set_ylim(ranks - 0.45, -0.55)
        axis.set_xlim(0, longest)
        axis.set_facecolor("#eeeeee")
        axis.tick_params(length=0, labelsize=8)
        for side in axis.spines.values():
            side.set_visible(False)
    axes[-1].set_xlabel("time, in forward passes of a micro-batch through a rank", fontsize=9)
    handles = [Patch(color=COLORS[kind][0], label=label) for kind, label in NAMES.items()]
    handles += [Patch(color="#999999", label="darker: second chunk"), Patch(color="#eeeeee", label="idle")]
    figure.legend(handles=handles, loc="upper center", ncols=6, fontsize=9, frameon=False)
    figure.tight_layout(rect=(0, 0, 1, 0.97), h_pad=0.6)
    figure.savefig(path, dpi=110)
    plt.close(figure)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0] if __doc__ else None)
    parser.add_argument("--ranks", type=int, default=4)
    parser.add_argument("--micro-batches", type=int, default=8)
    parser.add_argument("--image", help="file of the picture; default: none is drawn")
    options = parser.parse_args()
    ranks, count = options.ranks, options.micro_batches
    timelines = {name: play(name, ranks, count) for name in ROWS}
    table = Table(title=f"{ranks} ranks, {count} micro-batches")
    for column in ("schedule", "length", "idle", "live on each rank"):
        table.add_column(column, justify="left" if column == "schedule" else "right")
    for name, timeline in timelines.items():
        live = " ".join(f"{timeline.live(rank):g}" for rank in range(ranks))
        table.add_row(name, f"{timeline.length:g}", f"{timeline.idle:.1%}", live)
    console = Console()
    console.print(table)
    table = Table(title="1f1b with micro-batches of other sizes (length in rows)")
    for column in ("ranks", "micro-batches", "length", "idle", "rows live on rank 0"):
        table.add_column(column, justify="right")
    for stages, (name, sizes) in zip((4, 8), MANUAL_SIZES.items(), strict=True):
        for label, rows in ((f"{len(sizes)} x 4", [4] * len(sizes)), (name, sizes)):
            timeline = play("1f1b", stages, len(rows), rows)
            table.add_row(
                str(stages), label, f"{timeline.length:g}", f"{timeline.idle:.1%}", f"{timeline.live(0, rows):g}"
            )
    console.print(table)
    if options.image:
        draw(timelines, options.image)


if __name__ == "__main__":
    main()
