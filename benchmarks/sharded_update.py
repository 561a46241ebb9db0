"""Time of an optimizer's update where matrices are shards of several ranks.

    python benchmarks/sharded_update.py [--optimizer muon] [--ranks 1 4] [--hidden 512] [--layers 4] [--steps 5]

The parameters are the seven matrices of each layer of a Llama (width H, MLP 2.5 H), cut by rows over all ranks as
ZeRO does, in float32, with random gradients; a rank has one thread. "elapsed" is the median time of a step on the
slowest rank, "processor" the time that all threads of a rank worked in it, largest over ranks: what a rank has to do,
however busy the machine is.
"""

from __future__ import annotations

import argparse
import statistics
import time

import torch
import torch.distributed as dist
from ranks import on_ranks
from rich.console import Console
from rich.table import Table
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import DTensor, Shard

from modellink.optim.adamw import MixedPrecisionAdamW
from modellink.optim.cadam import MixedPrecisionCAdam
from modellink.optim.mixed_precision import MixedPrecisionOptimizer
from modellink.optim.muon import MixedPrecisionMuon


def build(name: str, named: list[tuple[str, nn.Parameter]]) -> MixedPrecisionOptimizer:
    if name == "muon":
        return MixedPrecisionMuon(named, lr=1e-3, dtype=torch.float32)
    if name == "cadam":
        return MixedPrecisionCAdam(named, lr=1e-3)
    return MixedPrecisionAdamW(named, lr=1e-3, eight_bits=name == "adamw8bit")


def measure(options: argparse.Namespace) -> list[float]:
    """Elapsed and processor milliseconds of a step, largest over ranks."""
    world_size = dist.get_world_size()
    mesh = init_device_mesh("cpu", (world_size,))
    wide, narrow = options.hidden * 5 // 2, options.hidden
    shapes = [(narrow, narrow)] * 4 + [(wide, narrow)] * 2 + [(narrow, wide)]
    named = []
    for layer in range(options.layers):
        for index, (rows, columns) in enumerate(shapes):
            shard = torch.randn(rows // world_size, columns) / narrow**0.5
            named.append((f"layers.{layer}.{index}", nn.Parameter(DTensor.from_local(shard, mesh, [Shard(0)]))))
    optimizer = build(options.optimizer, named)
    elapsed, processor = [], []
    for _ in range(options.steps + 1):
        for _, parameter in named:
            parameter.grad = torch.randn_like(parameter)
        dist.barrier()
        begin = time.perf_counter(), time.process_time()
        optimizer.step()
        elapsed.append(time.perf_counter() - begin[0])
        processor.append(time.process_time() - begin[1])
    times = torch.tensor([statistics.median(elapsed[1:]), statistics.median(processor[1:])])  # the first warms up
    dist.all_reduce(times, op=dist.ReduceOp.MAX)
    return (times * 1e3).tolist()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--optimizer", choices=("adam", "adamw8bit", "cadam", "muon"), default="muon")
    parser.add_argument("--ranks", type=int, nargs="+", default=[1, 4])
    parser.add_argument("--hidden", type=int, default=512)
    parser.add_argument("--layers", type=int, default=4)
    parser.add_argument("--steps", type=int, default=5)
    options = parser.parse_args()
    table = Table("optimizer", "ranks", "elapsed ms", "processor ms of a rank")
    for ranks in options.ranks:
        elapsed, processor = on_ranks(measure, ranks, options)[0]
        table.add_row(options.optimizer, str(ranks), f"{elapsed:.0f}", f"{processor:.0f}")
    Console(width=100).print(table)


if __name__ == "__main__":
    main()
