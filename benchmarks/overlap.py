"""How much of data-parallel communication runs while the same rank computes, seen by torch.profiler on gloo ranks.

    python benchmarks/overlap.py [--ranks 2] [--hidden 256] [--layers 6] [--tokens 256]

Every row profiles one step of two micro-batches after one to warm up. "communication" is the time in which a gloo
collective is under way on rank 0 (from the call to its end, waiting for other ranks included), "beside computation"
the part of it during which a matrix product runs on the same rank. Collectives of gloo run in threads of their own if
they are asked for asynchronously, and block otherwise: what FSDP2 does with streams on an accelerator (reductions, and
gathers without --overlap-param-gather) cannot overlap here, and shows as 0.
"""

from __future__ import annotations

import argparse
from typing import Any

import torch
from ranks import on_ranks
from rich.console import Console
from rich.table import Table
from torch.profiler import ProfilerActivity, profile

from modellink.config.schema import Config, ModelConfig, OptimizerConfig, ParallelConfig
from modellink.parallel.apply import build_model
from modellink.parallel.topology import Topology
from modellink.train.engine import Engine

ROWS: list[dict[str, Any]] = [
    {"zero_stage": 0},
    {"zero_stage": 0, "overlap_grad_reduce": False},
    {"zero_stage": 1},
    {"zero_stage": 1, "overlap_param_gather": True},
    {"zero_stage": 3},
    {"zero_stage": 3, "overlap_param_gather": True},
]
PRODUCTS = ("aten::mm", "aten::bmm", "aten::addmm", "aten::_scaled_dot_product_flash_attention_for_cpu")
KINDS = {"reduce": ("all_reduce", "allreduce", "reduce_scatter"), "gather": ("all_gather", "allgather")}
Spans = list[tuple[float, float]]


def union(spans: Spans) -> Spans:
    """The same moments in disjoint spans."""
    merged: Spans = []
    for start, end in sorted(spans):
        if merged and start <= merged[-1][1]:
            merged[-1] = (merged[-1][0], max(end, merged[-1][1]))
        else:
            merged.append((start, end))
    return merged


def common(one: Spans, other: Spans) -> float:
    """Length of the moments that are in both."""
    return sum(max(0.0, min(a[1], b[1]) - max(a[0], b[0])) for a in one for b in other)


def measure(row: dict[str, Any], options: argparse.Namespace) -> dict[str, float]:
    width = options.hidden
    model = ModelConfig(
        num_layers=options.layers, hidden_size=width, num_attention_heads=4, ffn_hidden_size=3 * width, vocab_size=256,
        padded_vocab_size=256, normalization="RMSNorm", activation="silu", gated_mlp=True, position_embedding="rope",
        qkv_bias=False, attention_output_bias=False, mlp_bias=False, attention_dropout=0.0, hidden_dropout=0.0,
        tie_word_embeddings=False, max_position_embeddings=options.tokens,
    ).resolve()  # fmt: skip
    config = Config(model=model, parallel=ParallelConfig(**row), optimizer=OptimizerConfig(lr=1e-3))
    topology = Topology(config.parallel)
    built = build_model(model, config.parallel, topology, torch.device("cpu"), torch.float32, 1)
    engine = Engine(built, config)
    tokens = torch.randint(0, 256, (2, options.tokens))
    batch = {"tokens": tokens, "labels": tokens}
    engine.step(batch, 1)
    with profile(activities=[ProfilerActivity.CPU]) as profiled:
        engine.forward_backward(batch, 1)
    spans: dict[str, Spans] = {"reduce": [], "gather": [], "product": []}
    for event in profiled.events():
        span = (event.time_range.start, event.time_range.end)
        if event.name in PRODUCTS:
            spans["product"].append(span)
        for kind, names in KINDS.items():
            if event.name.startswith("gloo:") and any(name in event.name for name in names):
                spans[kind].append(span)
    engine.update()
    products = union(spans["product"])
    found = {"products": sum(end - start for start, end in products)}
    for kind in KINDS:
        found[kind] = sum(end - start for start, end in union(spans[kind]))
        found[f"{kind} beside"] = common(union(spans[kind]), products)
    return found


def measure_all(options: argparse.Namespace) -> list[dict[str, float]]:
    return [measure(row, options) for row in ROWS]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--ranks", type=int, default=2)
    parser.add_argument("--hidden", type=int, default=256)
    parser.add_argument("--layers", type=int, default=6)
    parser.add_argument("--tokens", type=int, default=256)
    options = parser.parse_args()
    results = on_ranks(measure_all, options.ranks, options)[0]
    table = Table("layout", "products ms", "reduce ms", "beside computation", "gather ms", "beside computation")
    for row, found in zip(ROWS, results, strict=True):
        cells = [f"{found['products'] / 1e3:.0f}"]
        for kind in KINDS:
            share = found[f"{kind} beside"] / found[kind] if found[kind] else 0.0
            cells += [f"{found[kind] / 1e3:.0f}", f"{100 * share:.0f} %"]
        table.add_row(" ".join(f"{key}={value}" for key, value in row.items()), *cells)
    Console(width=120).print(table)


if __name__ == "__main__":
    main()
