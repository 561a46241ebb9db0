"""Activation memory and step time of each kind of recomputation and offloading, on one model.

    python benchmarks/activation_memory.py [--layers 8] [--hidden 512] [--sequence 1024] [--rows 2] [--rounds 3]

"kept" is what all layers hold for backward when the last of them has run; "peak" the most that is held at once beyond
weights and gradients that wait (activations, gradients of this batch as they come, and what operators hold for a
moment). Both are measured: on a CPU by following every storage, on an accelerator by its allocator. Gradients are
dropped before each batch and nothing is updated. Times are the fastest of the rounds, each of which goes through all
modes, without the meter; on a CPU they are processor time, which other programs change little. Modes that need tensor
parallelism run in two processes, beside the plain layout of those. Results go to benchmarks/results/ (Markdown) and
docs/images/activation-memory.png.
"""

from __future__ import annotations

import argparse
import time
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import torch
from ranks import on_ranks
from rich.console import Console
from rich.progress import track
from rich.table import Table

from modellink import device
from modellink.config.schema import Config, ModelConfig, ParallelConfig
from modellink.parallel.apply import build_model
from modellink.parallel.meter import MemoryMeter
from modellink.parallel.topology import Topology
from modellink.train.engine import Engine

ROOT = Path(__file__).resolve().parents[1]
FULL: dict[str, Any] = {"recompute_granularity": "full"}
BLOCK = FULL | {"recompute_method": "block"}
SWAP_ALL = "input_layernorm,self_attention,post_attention_layernorm,mlp"
TP: dict[str, Any] = {"tensor_parallel": 2}


def modules(*names: str) -> dict[str, Any]:
    return {"recompute_granularity": "selective", "recompute_modules": list(names)}


# another row is another pair here; each starts as many processes as its layout needs
MODES: list[tuple[str, dict[str, Any]]] = [
    ("none", {}),
    ("selective (core_attn)", modules("core_attn")),
    ("modules layernorm", modules("layernorm")),
    ("activation function", {"recompute_activation_function": True}),
    ("modules layernorm, mlp_act", modules("layernorm", "mlp_act")),
    ("modules mlp", modules("mlp")),
    ("operators", {"recompute_granularity": "operators"}),
    ("block 2", BLOCK | {"recompute_num_layers": 2}),
    ("block 4", BLOCK | {"recompute_num_layers": 4}),
    ("block 4, activation function", BLOCK | {"recompute_num_layers": 4, "recompute_activation_function": True}),
    ("uniform 1", FULL),
    ("uniform 2", FULL | {"recompute_num_layers": 2}),
    ("swap norms and attention", {"swap_attention": True}),
    ("swap, MLP as well", {"swap_attention": True, "swap_modules": SWAP_ALL}),
    ("block 4, swap with MLP", BLOCK | {"recompute_num_layers": 4, "swap_attention": True, "swap_modules": SWAP_ALL}),
    ("output in 4 slices", {"output_layer_slice_num": 4}),
    ("activation function, output in 4 slices", {"recompute_activation_function": True, "output_layer_slice_num": 4}),
    ("tensor 2: none", TP),
    ("tensor 2: uniform 1", TP | FULL),
    ("tensor 2: uniform 1, inputs shared", TP | FULL | {"distribute_saved_activations": True}),
]


def measure(sizes: argparse.Namespace, options: dict[str, Any]) -> dict[str, float]:
    """kept and peak in MiB, step in seconds."""
    model = ModelConfig(
        num_layers=sizes.layers, hidden_size=sizes.hidden, num_attention_heads=8, num_key_value_heads=8,
        ffn_hidden_size=sizes.hidden * 11 // 4, padded_vocab_size=2048, max_position_embeddings=sizes.sequence,
        normalization="RMSNorm", activation="silu", gated_mlp=True, qkv_bias=False, attention_output_bias=False,
        mlp_bias=False, position_embedding="rope", attention_dropout=0.0, hidden_dropout=0.0,
    ).resolve()  # fmt: skip
    parallel = ParallelConfig(**options)
    config = Config(model=model, parallel=parallel)
    here = device.current_device()
    built = build_model(model, parallel, Topology(parallel), here, torch.float32, seed=1)
    engine = Engine(built, config)
    tokens = torch.arange(sizes.rows * sizes.sequence, device=here).view(sizes.rows, -1) % model.padded_vocab_size
    batch = {"tokens": tokens, "labels": tokens.roll(-1, 1)}
    kept: list[int] = []
    with MemoryMeter([parameter for _, parameter in built.named_parameters()]) as meter:
        before = meter.live
        hook = built.chunks[0].norm.register_forward_pre_hook(lambda *_: kept.append(meter.live - before))
        engine.forward_backward(batch, sizes.rows)
        peak = meter.peak - before
    hook.remove()
    engine.optimizer.zero_grad()
    clock = time.perf_counter if device.is_accelerated() else time.process_time
    device.synchronize()
    begin = clock()
    engine.forward_backward(batch, sizes.rows)
    device.synchronize()
    return {"kept": kept[0] / 2**20, "peak": peak / 2**20, "seconds": clock() - begin}


def run(sizes: argparse.Namespace, options: dict[str, Any]) -> dict[str, float]:
    if options.get("tensor_parallel", 1) == 1:
        return measure(sizes, options)
    found: dict[str, float] = on_ranks(measure, 2, sizes, options)[0]
    return found


def draw(results: dict[str, dict[str, float]], target: Path) -> None:
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    alone = {name: row for name, row in results.items() if not name.startswith("tensor")}
    figure, axes = plt.subplots(figsize=(10, 5.5), layout="constrained")
    base = alone["none"]
    # names beside the points would lie on each other: a number in each, from the most memory to the least
    for number, name in enumerate(sorted(alone, key=lambda name: -alone[name]["peak"]), start=1):
        x, y = alone[name]["seconds"] / base["seconds"], alone[name]["peak"]
        axes.scatter(x, y, s=190, color=f"C{number % 10}", alpha=0.55, label=f"{number:2d}  {name}")
        axes.annotate(str(number), (x, y), ha="center", va="center", fontsize=8.5)
    axes.legend(handlelength=0, markerscale=0, loc="center left", bbox_to_anchor=(1.0, 0.5), frameon=False, fontsize=9)
    axes.set_xlabel("step time, relative to no recomputation")
    axes.set_ylabel("peak beyond weights, MiB")
    axes.set_ylim(bottom=0)
    axes.grid(alpha=0.3)
    axes.set_title("Memory against time of each kind of recomputation and offloading")
    target.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(target, dpi=130)


def write(results: dict[str, dict[str, float]], sizes: argparse.Namespace, target: Path) -> None:
    about = (
        f"{sizes.layers} layers, D {sizes.hidden}, S {sizes.sequence}, B {sizes.rows}, float32, "
        f"{device.device_name()}, torch {torch.__version__}, {sizes.threads} thread(s), fastest of {sizes.rounds}"
    )
    lines = ["# Activation memory of each kind of recomputation and offloading", "", about + ".", ""]
    lines += ["| mode | kept by layers, MiB | peak, MiB | step, s | time |", "|---|---|---|---|---|"]
    table = Table("mode", "kept MiB", "peak MiB", "step s", "time", title=about)
    for name, row in results.items():
        base = results["tensor 2: none" if name.startswith("tensor") else "none"]
        cells = [f"{row['kept']:.1f}", f"{row['peak']:.1f}", f"{row['seconds']:.2f}"]
        cells.append(f"{row['seconds'] / base['seconds']:.2f} x")
        table.add_row(name, *cells)
        lines.append(f"| {name} | {' | '.join(cells)} |")
    lines += ["", "Made by `python benchmarks/activation_memory.py`, whose first lines say what is measured.", ""]
    Console(width=120).print(table)
    target.parent.mkdir(parents=True, exist_ok=True)
    target.write_text("\n".join(lines), encoding="utf-8")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    sizes = (("layers", 8), ("hidden", 512), ("sequence", 1024), ("rows", 2), ("rounds", 3), ("threads", 1))
    for name, default in sizes:
        parser.add_argument(f"--{name}", type=int, default=default)
    parser.add_argument("--output", type=Path, default=ROOT / "benchmarks" / "results")
    parser.add_argument("--image", type=Path, default=ROOT / "docs" / "images" / "activation-memory.png")
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    results: dict[str, dict[str, float]] = {}
    for name, options in track(MODES * arguments.rounds, description="modes"):
        found = run(arguments, options)
        results[name] = found | {"seconds": min(found["seconds"], results.get(name, found)["seconds"])}
    today = datetime.now(UTC).date().isoformat()
    write(results, arguments, arguments.output / f"{today}-activation-memory-{device.device_type()}.md")
    draw(results, arguments.image)


if __name__ == "__main__":
    main()
