"""Automatic recomputation: no step needs more than the memory given, no more is recomputed than it asks for, and the
numbers are those of a run that keeps everything.

Device memory of a process on a CPU is what its tensors hold (`MemoryMeter`): bytes, not a share of the machine.
"""

from __future__ import annotations

from typing import Any

import pytest
import torch
from equivalence import MODELS, batches, rows_of
from spawn import run_distributed

from modellink.config.schema import Config, ModelConfig, OptimizerConfig, ParallelConfig
from modellink.errors import ModelLinkError
from modellink.parallel.apply import build_model
from modellink.parallel.meter import MemoryMeter
from modellink.parallel.topology import Topology
from modellink.train.engine import Engine

SIZE = {"num_layers": 4, "hidden_size": 64, "ffn_hidden_size": 256, "max_position_embeddings": 512}
STEPS, LENGTH = 5, 256
SP, CHUNKS = {"tensor_parallel": 2, "sequence_parallel": True}, {"pipeline_parallel": 2, "layers_per_virtual_stage": 1}
FULL = {"recompute_granularity": "full"}
# the ranks of a pipeline choose apart, those of other layouts together
LAYOUTS: list[tuple[str, dict[str, Any]]] = [("llama", CHUNKS), ("moe", {"zero_stage": 3}), ("deepseek", SP)]


def run(model: str, options: dict[str, Any], steps: int = STEPS + 1) -> dict[str, Any]:
    """Loss of the last step, MB at the peak of the first steps and of the last one, and the seconds chosen."""
    parallel = ParallelConfig(**options)
    config = Config(
        model=ModelConfig(**MODELS[model] | SIZE).resolve(), parallel=parallel, optimizer=OptimizerConfig(lr=1e-3)
    )
    topology = Topology(parallel)
    built = build_model(config.model, parallel, topology, torch.device("cpu"), torch.float32, seed=7)
    engine = Engine(built, config)
    tokens = batches()[0]["tokens"].repeat(1, LENGTH // 16)
    mine = rows_of({"tokens": tokens, "labels": tokens}, 2, topology.dp, topology.dp_rank)
    peaks: list[float] = []
    for step in range(steps):
        if step in (0, 1, steps - 1):  # this meter slows the other down, and does not disturb it
            with MemoryMeter(engine.held()) as meter:
                loss = engine.step(mine, 2).loss.item()
            peaks.append(meter.peak / 2**20)
        else:
            engine.step(mine, 2)
    ways = list(engine.auto.choice.values()) if engine.auto is not None else []
    return {"loss": loss, "first": max(peaks[:2]), "last": peaks[-1], "ways": ways}


def cases(rank: int, world_size: int) -> list[Any]:
    found: list[Any] = []
    for model, layout in LAYOUTS:
        plain, full = run(model, layout), run(model, layout | FULL, 2)
        peaks = torch.tensor([plain["last"], full["last"]])
        torch.distributed.all_reduce(peaks, op=torch.distributed.ReduceOp.MAX)
        most, least = peaks.tolist()
        auto = {"auto_recompute_profiling_step": STEPS}
        found.append({"model": model, "most": most, "least": least, "plain": plain, "runs": {}})
        sizes = (int(least) + 2, int(1.5 * most)) if model == "llama" else (int(least) + 2,)
        for size in sizes:
            found[-1]["runs"][size] = run(model, layout | auto | {"auto_recompute_device_size": size})
        try:
            run(model, layout | auto | {"auto_recompute_device_size": max(1, int(least) - 1)}, 1)
        except ModelLinkError as error:
            found[-1]["error"] = str(error)
    return found


@pytest.mark.dist
def test_memory_stays_within_what_is_given() -> None:
    for rank in run_distributed(cases, 2, timeout=200):
        for case in rank:
            spread = case["most"] - case["least"]
            assert spread > 3, case  # so that there is something to choose
            for size, result in case["runs"].items():
                assert max(result["first"], result["last"]) <= size, (case["model"], size, result)
                assert result["loss"] == pytest.approx(case["plain"]["loss"], rel=1e-6)
            ways = [set(result["ways"]) for result in case["runs"].values()]
            assert ways[0] not in ({"none"}, {"layer"}), case
            assert len(ways) == 1 or ways[-1] == {"none"}
            assert "is too small: a step needs" in case["error"]
