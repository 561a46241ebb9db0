"""cadam, Muon and 8-bit AdamW train at every layout like one process; their states move between layouts.

Steps of cadam are signs, so a momentum that is zero but for rounding would turn into full steps of random sign; the
models here have no gradient like that.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from equivalence import LLAMA, MODELS, batches, compare, relative_error, rows_of, train, whole
from spawn import run_distributed
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import Shard, distribute_tensor

from modellink.checkpoint.store import CheckpointStore
from modellink.config.schema import CheckpointConfig, Config, ModelConfig, OptimizerConfig, ParallelConfig
from modellink.optim.muon import MixedPrecisionMuon
from modellink.optim.schedule import ParameterSchedule
from modellink.parallel.apply import build_model
from modellink.parallel.topology import Topology
from modellink.train.engine import Engine
from modellink.train.state import Progress, load_state, save_state

pytestmark = pytest.mark.dist

TOLERANCE = 1e-5
SP, PP, EP = {"tensor_parallel": 2, "sequence_parallel": True}, {"pipeline_parallel": 2}, {"expert_parallel": 2}
CADAM: dict[str, Any] = {"optimizer": "cadam", "lr": 2e-4, "weight_decay": 0.5}
MUON: dict[str, Any] = {"optimizer": "muon"}
Case = tuple[str, dict[str, Any], int, dict[str, Any]]
EIGHT: dict[str, Any] = {"optimizer": "adamw8bit"}  # the stacked experts alone are large enough for 8 bits
Case = tuple[str, dict[str, Any], int, dict[str, Any]]
CASES: dict[int, list[Case]] = {
    2: [
        ("llama", SP, 2, CADAM),
        ("llama", PP, 2, CADAM),
        ("llama", {"zero_stage": 3}, 2, CADAM),
        ("odd", EP | {"zero_stage": 1}, 2, CADAM),
        ("llama", SP, 2, MUON),
        ("llama", PP, 2, MUON),
        ("llama", {"zero_stage": 3}, 2, MUON),
        ("odd", EP | {"zero_stage": 1}, 2, MUON),
    ],
    4: [
        ("odd", EP | SP, 2, CADAM),
        ("llama", SP | {"zero_stage": 3}, 2, MUON),
        ("odd", EP | SP | {"zero_stage": 1}, 2, MUON),
    ],
}
# Two steps at the first layout, saved, the third at the second.
MOVES: list[tuple[str, dict[str, Any], dict[str, Any], dict[str, Any]]] = [
    ("llama", SP, {"zero_stage": 3}, CADAM),
    ("llama", {"zero_stage": 0}, SP, MUON),
    ("odd", EP | {"zero_stage": 1}, SP, CADAM),
    ("odd", SP, EP | {"zero_stage": 1}, MUON),
    ("odd", {"zero_stage": 1}, SP, EIGHT),
]


def move(folder: Path, model: str, first: dict[str, Any], second: dict[str, Any], options: dict[str, Any]) -> Any:
    """Two steps at layout `first`, a checkpoint, a third step at layout `second`: (its loss, weights)."""
    loss = 0.0
    for parallel, steps in ((first, batches()[:2]), (second, batches()[2:])):
        config = Config(
            model=ModelConfig(**MODELS[model]).resolve(),
            parallel=ParallelConfig(**parallel),
            optimizer=OptimizerConfig(
                **{"lr": 1e-3, "weight_decay": 0.1, "clip_grad": 0.5, "adam_eps": 1e-5} | options
            ),
        )
        topology = Topology(config.parallel)
        seed = 7 if parallel is first else 8
        built = build_model(config.model, config.parallel, topology, torch.device("cpu"), torch.float32, seed=seed)
        engine, store = Engine(built, config), CheckpointStore(folder)
        schedule = ParameterSchedule(config.optimizer.lr or 0.0, 0, lr_decay_style="constant")
        kept = CheckpointConfig(load_rng=False)
        if parallel is second:
            load_state(store, engine, schedule, None, kept)
        for batch in steps:
            loss = engine.step(rows_of(batch, 2, topology.dp, topology.dp_rank), 2).loss.item()
        if parallel is first:
            save_state(store, engine, schedule, Progress(iteration=2), kept, "", {})
    return loss, {name: whole(parameter) for name, parameter in built.named_parameters()}


SHAPES = {"layers.0.rows": (6, 8), "layers.0.columns": (5, 12), "layers.0.few": (3, 4), "layers.0.experts": (4, 6, 8)}
SPLITS = {"layers.0.rows": 0, "layers.0.columns": 1, "layers.0.few": 0, "layers.0.experts": 1}


def muon_steps(world_size: int) -> dict[str, torch.Tensor]:
    """Three steps of Muon, matrices split over the ranks if there are several; some ranks have no rows at all."""
    mesh = init_device_mesh("cpu", (world_size,)) if world_size > 1 else None

    def place(name: str, value: torch.Tensor) -> torch.Tensor:
        return value if mesh is None else distribute_tensor(value, mesh, [Shard(SPLITS[name])])

    generator = torch.Generator().manual_seed(0)
    params = {name: nn.Parameter(place(name, torch.randn(s, generator=generator))) for name, s in SHAPES.items()}
    optimizer = MixedPrecisionMuon(params.items(), lr=1e-2, dtype=torch.float32)
    for _ in range(3):
        for name, param in params.items():
            param.grad = place(name, torch.randn(SHAPES[name], generator=generator))
        optimizer.step()
    return {name: whole(param) for name, param in params.items()}


def run(rank: int, world_size: int, folder: str) -> dict[str, list[Any]]:
    moves = MOVES if world_size == 2 else []
    return {
        "cases": [train(model, parallel, size, **options) for model, parallel, size, options in CASES[world_size]],
        "moves": [move(Path(folder, str(index)), *case) for index, case in enumerate(moves)],
        "muon": [muon_steps(world_size)],
    }


@pytest.fixture(scope="module")
def reference() -> Any:
    """One process, trained once per model and optimizer."""
    done: dict[tuple[str, str], dict[str, Any]] = {}

    def look(model: str, options: dict[str, Any]) -> dict[str, Any]:
        key = (model, options["optimizer"])
        if key not in done:
            done[key] = train(model, {}, 2, **options)
        return done[key]

    return look


@pytest.mark.parametrize("world", sorted(CASES))
def test_layouts_equal_one_process(world: int, reference: Any, tmp_path: Path) -> None:
    per_rank = run_distributed(run, world, str(tmp_path), timeout=300)
    wrong = {}
    for place, (model, parallel, _, options) in enumerate(CASES[world]):
        errors = compare([rank["cases"][place] for rank in per_rank], reference(model, options))
        if max(errors.values()) > TOLERANCE:
            wrong[f"{model} {options['optimizer']} {parallel}"] = errors
    alone = muon_steps(1)
    for rank in per_rank:
        for name, value in rank["muon"][0].items():
            torch.testing.assert_close(value, alone[name], rtol=1e-5, atol=1e-6)
    for place, (model, first, second, options) in enumerate(MOVES if world == 2 else []):
        want = reference(model, options)
        # blocks of 256 lie otherwise on another layout, and so round otherwise
        tolerance = 1e-3 if options is EIGHT else TOLERANCE
        for rank in per_rank:
            loss, weights = rank["moves"][place]
            errors = [abs(loss / want["losses"][2] - 1)]
            errors += [relative_error(v, want["weights"][name], LLAMA["init_std"]) for name, v in weights.items()]
            if not max(errors) <= tolerance:
                wrong[f"{model} {options['optimizer']} {first} to {second}"] = max(errors)
    assert not wrong
