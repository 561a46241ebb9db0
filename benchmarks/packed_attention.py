"""Packed documents and sliding windows on a CPU: a dense mask against tiles, in time and in bytes.

    python benchmarks/packed_attention.py [--rounds 5] [--threads 1] [--output FILE]

One attention layer, forward and backward, float32. "dense" is what fused attention with a mask of all queries by all
keys takes, "tiles" what the model runs (`modellink/models/tiles.py`). Times are medians of processor time, which other
programs hardly disturb, over interleaved rounds. Bytes are counted operation by operation by a `Meter`
(`modellink/parallel/meter.py`): the peak, without the gradients of q, k and v. Masks are made anew in every step of
both. Both must agree within 1e-6.
"""

from __future__ import annotations

import argparse
import platform
import statistics
from collections.abc import Callable
from datetime import UTC, datetime
from functools import partial
from pathlib import Path
from time import process_time
from typing import NamedTuple

import torch
import torch.nn.functional as F
from rich.console import Console
from rich.table import Table
from torch import Tensor

from modellink.models.attention import AttentionMask
from modellink.models.blockwise import ScoreRule, merge_
from modellink.models.tiles import attend_tiles
from modellink.parallel.meter import Meter

ROWS, HEADS, GROUPS, SIZE = 2, 8, 4, 64


class Case(NamedTuple):
    """What is masked: documents of about so many positions, or a window."""

    name: str
    length: int
    documents: int | None = None
    window: int | None = None


CASES = [
    Case("documents of 64", 2048, 64),
    Case("documents of 256", 2048, 256),
    Case("documents of 1024", 2048, 1024),
    Case("documents of 1024, window 256", 2048, 1024, 256),
    Case("window 256", 2048, None, 256),
    Case("window 256", 4096, None, 256),
    Case("window 1024", 4096, None, 1024),
]


def documents_of(length: int, mean: int) -> Tensor:
    """int64 [ROWS, length]: numbers of documents of mean/2 to 3 mean/2 positions, other ones in each row."""
    draw = torch.Generator().manual_seed(0)
    rows = []
    for _ in range(ROWS):
        sizes = torch.randint(mean // 2, mean + mean // 2, (2 * length // mean + 1,), generator=draw)
        rows.append(torch.arange(len(sizes)).repeat_interleave(sizes)[:length])
    return torch.stack(rows)


def mask_of(case: Case) -> AttentionMask:
    documents = None if case.documents is None else documents_of(case.length, case.documents)
    return AttentionMask(case.length, case.length, torch.device("cpu"), documents=documents)


def dense(q: Tensor, k: Tensor, v: Tensor, case: Case) -> Tensor:
    k, v = (x.repeat_interleave(HEADS // GROUPS, 1) for x in (k, v))
    return F.scaled_dot_product_attention(q, k, v, attn_mask=mask_of(case).dense(case.window), scale=SIZE**-0.5)


def tiled(q: Tensor, k: Tensor, v: Tensor, case: Case) -> Tensor:
    return attend_tiles(q, k, v, ScoreRule(SIZE**-0.5), mask_of(case).tiles(case.window))


def inputs(length: int) -> list[Tensor]:
    draw = torch.Generator().manual_seed(1)
    return [
        torch.randn(ROWS, heads, length, SIZE, generator=draw).requires_grad_() for heads in (HEADS, GROUPS, GROUPS)
    ]


def step(run: Callable[[], Tensor], leaves: list[Tensor]) -> list[Tensor]:
    out = run()
    return [out, *torch.autograd.grad(out, leaves, torch.ones_like(out))]


def measure(case: Case, rounds: int) -> dict[str, float]:
    leaves = inputs(case.length)
    ways = {"dense": partial(dense, *leaves, case), "tiles": partial(tiled, *leaves, case)}
    results, peaks = {}, {}
    gradients = sum(x.nbytes for x in leaves)
    for name, run in ways.items():
        with Meter() as meter:
            results[name] = step(run, leaves)
        peaks[name] = meter.peak - gradients
    for ours, theirs in zip(results["tiles"], results["dense"], strict=True):
        assert (ours - theirs).abs().max() <= 1e-6 * theirs.abs().max().clamp(min=1)
    times: dict[str, list[float]] = {name: [] for name in ways}
    for _ in range(rounds):
        for name, run in ways.items():
            begin = process_time()
            step(run, leaves)
            times[name].append(process_time() - begin)
    found = {f"{name} ms": statistics.median(values) * 1e3 for name, values in times.items()}
    return found | {f"{name} MiB": peak / 2**20 for name, peak in peaks.items()}


def merging(rounds: int) -> dict[str, float]:
    """Milliseconds to merge two results [1, 16, 4096, 64], in one pass and as the formula is written."""
    draw = torch.Generator().manual_seed(2)
    out, more = (torch.randn(1, 16, 4096, 64, generator=draw) for _ in range(2))
    lse, more_lse = (torch.randn(1, 16, 4096, generator=draw) for _ in range(2))

    def written() -> None:
        both = torch.logaddexp(lse, more_lse)
        base = both.masked_fill(both == float("-inf"), 0.0)
        shares = (torch.exp(part - base)[..., None] for part in (lse, more_lse))
        merged = out * next(shares) + more * next(shares)
        out.copy_(merged)
        lse.copy_(both)

    times: dict[str, list[float]] = {"as written": [], "in place": []}
    for _ in range(4 * rounds):
        for name, run in (("as written", written), ("in place", partial(merge_, out, lse, more, more_lse))):
            begin = process_time()
            run()
            times[name].append((process_time() - begin) * 1e3)
    return {name: statistics.median(values) for name, values in times.items()}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--output", type=Path, help="write the tables as markdown")
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    heads = ["masked", "S", "dense ms", "tiles ms", "times faster", "dense MiB", "tiles MiB"]
    rows = []
    for case in CASES:
        found = measure(case, arguments.rounds)
        faster = found["dense ms"] / found["tiles ms"]
        rows.append(
            [case.name, str(case.length), f"{found['dense ms']:.0f}", f"{found['tiles ms']:.0f}", f"{faster:.1f}"]
            + [f"{found[key]:.0f}" for key in ("dense MiB", "tiles MiB")]
        )
    table = Table(*heads)
    for row in rows:
        table.add_row(*row)
    merged = merging(arguments.rounds)
    lines = f"Merging two results of 16 heads by 4096 by 64: {merged['as written']:.1f} ms as the formula is written, "
    lines += f"{merged['in place']:.1f} ms in place."
    console = Console(width=110)
    console.print(table)
    console.print(lines)
    if arguments.output is not None:
        today, about = datetime.now(UTC).date(), f"torch {torch.__version__}, {platform.machine()}"
        text = [f"# Packed documents and windows, {today}", ""]
        text += [
            f"B {ROWS}, {HEADS} query and {GROUPS} key/value heads of {SIZE}, float32, forward and backward; {about}, "
        ]
        text[-1] += f"{arguments.threads} thread(s), median processor time of {arguments.rounds} interleaved rounds."
        text += ["", "| " + " | ".join(heads) + " |", "|" + "---|" * len(heads)]
        text += ["| " + " | ".join(row) + " |" for row in rows] + ["", lines, ""]
        arguments.output.write_text("\n".join(text))


if __name__ == "__main__":
    main()
