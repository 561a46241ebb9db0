"""Bytes per parameter of weights, gradients and optimizer states, measured at the fullest moment of a training step.

    python benchmarks/memory_per_param.py [--ranks 1 2 4 8] [--modes fp32 cadam ...] [--output FILE.md]

Every figure comes from storages that are alive, not from formulas. A model of 4 layers (0.9 million parameters, hardly
any vocabulary) trains two steps of two micro-batches of two tokens, so that activations hardly exist. Before every
layer's forward, after its backward, and around the update, each rank walks over everything that belongs to a parameter
and counts the bytes of the storages it finds, each once:

    weights     parameters (whole, or FSDP's shards), and the weights that FSDP has gathered
    gradients   `.grad`, `.main_grad`, FSDP's whole gradients that wait for the reduction, and reduced shards
    states      float32 masters or 16-bit remainders, moments, scales of packed moments

"held" is the largest sum of these over all moments and ranks, divided by the parameters of the whole model. Two things
are measured apart, since they do not grow with the model but with its largest layer: gradients that autograd has made
but that have not yet been added to an accumulator of another dtype or reduced, and the buffers of FSDP's collectives.
"of a layer" is the largest sum of them at a moment, divided by the parameters of a layer. Temporaries of the update are
bounded too (modellink/optim/mixed_precision.py: 4 million elements on a CPU) and not counted.

"limit" is the reference's table for d data-parallel ranks; layouts are plain (--zero-stage 0) and distributed
(--zero-stage 1, 2, 3). The run fails when a figure is above its limit.
"""

from __future__ import annotations

import argparse
import platform
import sys
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from ranks import on_ranks
from rich.console import Console
from rich.table import Table
from torch import Tensor, nn

from modellink.config.schema import Config, ModelConfig, OptimizerConfig, ParallelConfig
from modellink.optim.local import local_tensor
from modellink.parallel.apply import ParallelModel, build_model
from modellink.parallel.topology import Topology
from modellink.train.engine import Engine

LAYERS, MICRO_BATCHES = 4, 2
MODEL: dict[str, Any] = {
    "num_layers": LAYERS, "hidden_size": 128, "num_attention_heads": 4, "ffn_hidden_size": 384, "vocab_size": 64,
    "padded_vocab_size": 64, "max_position_embeddings": 16, "normalization": "RMSNorm", "activation": "silu",
    "gated_mlp": True, "position_embedding": "rope", "attention_dropout": 0.0, "hidden_dropout": 0.0,
    "qkv_bias": False, "attention_output_bias": False, "mlp_bias": False, "tie_word_embeddings": False,
}  # fmt: skip


@dataclass(frozen=True)
class Mode:
    """One precision mode: options of the optimizer, and the reference's bytes as (plain, distributed)."""

    options: dict[str, Any]
    plain: float
    distributed: Callable[[int], float]


HALF: dict[str, Any] = {"bf16": True, "release_fp32_grad": True}


def _fp32_gradients(d: int) -> float:
    return 6 + 12 / d


def _half_gradients(d: int) -> float:
    return 4 + 16 / d


MODES = {
    "fp32": Mode({}, 16, lambda d: 8 + 8 / d),
    "bf16": Mode({"bf16": True}, 18, _fp32_gradients),
    "bf16, split master": Mode({"bf16": True, "split_master": True}, 16, _fp32_gradients),
    "bf16, bf16 gradients": Mode(HALF, 20, _half_gradients),
    "bf16, bf16 gradients, split master": Mode(HALF | {"split_master": True}, 14, _half_gradients),
    "cadam": Mode(HALF | {"split_master": True, "optimizer": "cadam"}, 9, lambda d: 9),
    "adamw8bit": Mode(HALF | {"split_master": True, "optimizer": "adamw8bit"}, 14, _half_gradients),
    "muon": Mode(HALF | {"split_master": True, "optimizer": "muon"}, 14, _half_gradients),
}


class Meter:
    """The largest sums of bytes seen so far; `look` takes a measurement."""

    def __init__(self, engine: Engine) -> None:
        self.model, self.optimizer = engine.model, engine.optimizer
        # asked now: while FSDP has gathered a module, its parameters are the gathered ones
        self.parameters = [parameter for _, parameter in self.model.named_parameters()]
        self.held: dict[str, int] = {}
        self.passing = 0
        self.accumulating: set[int] = set()  # FSDP's parameters whose whole gradient waits for the reduction
        for chunk in self.model.chunks:
            for layer in chunk.layers.values():
                layer.register_forward_pre_hook(lambda *_: self.look())
                layer.register_full_backward_hook(lambda *_: self.look())

    def look(self) -> None:
        """Count what is alive now."""
        seen: set[int] = set()
        sharded = list(_fsdp_parameters(self.model))
        found = {"weights": _bytes([*self.parameters, *(p._sharded_param_data for p in sharded)], seen)}
        gathered = [t for p in sharded for t in (*p.all_gather_outputs, getattr(p, "_unsharded_param", None))]
        found["gathered"] = _bytes(gathered, seen)
        masters, moments = self.optimizer.state_tensors()
        found["masters"], found["moments"] = _bytes(masters, seen), _bytes(moments, seen)
        passing: list[Tensor | None] = []
        gradients: list[Tensor | None] = [p.unsharded_accumulated_grad for p in sharded]
        for group in _fsdp_groups(self.model):
            for sharded_parameter in group.fsdp_params:
                own = getattr(sharded_parameter, "_unsharded_param", None)
                gradient = own.grad if own is not None else None
                # autograd's own whole gradient is the accumulator where no other dtype is wanted, until it is reduced
                if gradient is None:
                    self.accumulating.discard(id(sharded_parameter))
                elif not group.reduce_grads and sharded_parameter.reduce_dtype in (None, gradient.dtype):
                    self.accumulating.add(id(sharded_parameter))
                (gradients if id(sharded_parameter) in self.accumulating else passing).append(gradient)
        for parameter in self.parameters:
            main = getattr(parameter, "main_grad", None)
            gradients.append(main if main is not None else parameter.grad)
            passing.append(parameter.grad if main is not None else None)
        found["gradients"] = _bytes(gradients, seen)
        if sum(found.values()) > sum(self.held.values()):
            self.held = found
        self.passing = max(self.passing, _bytes([*passing, *_buffers(self.model)], seen))


def _fsdp_groups(model: ParallelModel) -> Iterable[Any]:
    for module in model.fsdp_modules():
        yield from module._get_fsdp_state()._fsdp_param_groups


def _fsdp_parameters(model: ParallelModel) -> Iterable[Any]:
    for group in _fsdp_groups(model):
        yield from group.fsdp_params


def _buffers(model: ParallelModel) -> Iterable[Tensor | None]:
    """Inputs and outputs of FSDP's collectives that are kept alive."""
    for group in _fsdp_groups(model):
        results = [group._all_gather_result]
        if group.comm_ctx.all_gather_state is not None:
            results.append(group.comm_ctx.all_gather_state.all_gather_result)
        yield from (result.all_gather_output for result in results if result is not None)
        yield from (state.reduce_scatter_input for state in group.comm_ctx.reduce_scatter_states)


def _bytes(tensors: Iterable[Tensor | None], seen: set[int]) -> int:
    """Bytes of the storages of `tensors` that are not in `seen`, which they join."""
    total = 0
    for tensor in tensors:
        if tensor is None:
            continue
        storage = local_tensor(tensor).untyped_storage()
        if storage.nbytes() and storage.data_ptr() not in seen:
            seen.add(storage.data_ptr())
            total += storage.nbytes()
    return total


def measure(mode: Mode, topology: Topology, steps: int) -> dict[str, float]:
    """Bytes per parameter on this rank of the running group, by kind, their sum "held" and what passes, per layer."""
    config = Config(
        model=ModelConfig(**MODEL).resolve(),
        parallel=topology.parallel,
        optimizer=OptimizerConfig(lr=1e-3, **mode.options),
    )
    dtype, gradients = (getattr(torch, name) for name in (config.optimizer.dtype, config.optimizer.gradient_dtype))
    model = build_model(config.model, config.parallel, topology, torch.device("cpu"), dtype, 1, gradients)
    engine = Engine(model, config)
    count, layer = _numel(model.chunks[0]), _numel(next(iter(model.chunks[0].layers.values())))
    meter = Meter(engine)
    tokens = torch.randint(0, 64, (MICRO_BATCHES, 2), generator=torch.Generator().manual_seed(topology.rank))
    for _ in range(steps):
        engine.forward_backward({"tokens": tokens, "labels": tokens}, 1)
        engine.reduce_gradients()
        meter.look()
        engine.update()
        meter.look()
    result = {kind: number / count for kind, number in meter.held.items()}
    return result | {"held": sum(result.values()), "of a layer": meter.passing / layer}


def _numel(module: nn.Module) -> int:
    return sum(parameter.numel() for parameter in module.parameters())


def measure_all(modes: list[str], steps: int) -> list[tuple[str, int, dict[str, float]]]:
    """(mode, ZeRO stage, figures of this rank) of every mode and every layout that differs at this number of ranks."""
    rows = []
    for stage in range(4 if dist.get_world_size() > 1 else 1):
        topology = Topology(ParallelConfig(zero_stage=stage))
        rows += [(name, stage, measure(MODES[name], topology, steps)) for name in modes]
    return rows


def limit(mode: Mode, zero_stage: int, d: int) -> float:
    """The reference's bytes per parameter."""
    return mode.plain if zero_stage == 0 else mode.distributed(d)


def run(world_size: int, modes: list[str], steps: int) -> list[tuple[str, int, dict[str, float]]]:
    """Every mode and layout at one number of ranks: the figures of the rank that holds most."""
    ranks = on_ranks(measure_all, world_size, modes, steps)
    return [max(rows, key=lambda row: row[2]["held"]) for rows in zip(*ranks, strict=True)]


COLUMNS = ("weights", "gathered", "gradients", "masters", "moments", "held")


def row_of(name: str, stage: int, d: int, found: dict[str, float]) -> list[str]:
    bound = limit(MODES[name], stage, d)
    verdict = "yes" if found["held"] <= bound + 5e-3 else "NO"
    numbers = [f"{found[kind]:.2f}" for kind in COLUMNS]
    return [name, str(stage), str(d), *numbers, f"{bound:.2f}", verdict, f"{found['of a layer']:.1f}"]


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--ranks", type=int, nargs="+", default=[1, 2, 4, 8])
    parser.add_argument("--modes", nargs="+", choices=sorted(MODES), default=list(MODES))
    parser.add_argument("--steps", type=int, default=2)
    parser.add_argument("--output", type=Path, help="write the table as markdown")
    arguments = parser.parse_args()
    rows = []
    for d in arguments.ranks:
        rows += [row_of(name, stage, d, found) for name, stage, found in run(d, arguments.modes, arguments.steps)]
    rows.sort(key=lambda row: (arguments.modes.index(row[0]), row[1] != "0", row[1], int(row[2])))
    heads = ["mode", "ZeRO", "d", *COLUMNS, "limit", "within", "of a layer"]
    table = Table(*heads, title="bytes per parameter at the fullest moment of a step")
    for row in rows:
        table.add_row(*row)
    Console(width=150).print(table)
    if arguments.output is not None:
        about = f"{datetime.now(UTC).date()}, torch {torch.__version__}, {platform.machine()} CPU, gloo"
        lines = [f"# Bytes per parameter, {about}", "", f"`python benchmarks/memory_per_param.py`: {LAYERS} layers."]
        lines += ["", "| " + " | ".join(heads) + " |", "|---" * len(heads) + "|"]
        lines += ["| " + " | ".join(row) + " |" for row in rows]
        arguments.output.write_text("\n".join(lines) + "\n")
    return int(any("NO" in row for row in rows))


if __name__ == "__main__":
    sys.exit(main())
