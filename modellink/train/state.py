"""What a checkpoint of a run holds, and how it comes back at any layout.

Weights are stored as their exact fp32 masters under ``model.NAME``, whatever form the run keeps them in (fp32
parameters, separate masters, split masters, FSDP shards), optimizer states as ``optimizer.STATE.NAME``. So a file knows
no layout and no precision mode: each run reads it into its own. Everything small (sample counts, schedule, loss scale)
is JSON; random states are per rank and come back only at the same layout, where they make a resumed run bitwise that of
an uninterrupted one.
"""

from __future__ import annotations

import random
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from modellink import device
from modellink.checkpoint.store import CheckpointStore, read_tensor_names
from modellink.config.schema import CheckpointConfig
from modellink.errors import ModelLinkError
from modellink.optim.schedule import ParameterSchedule
from modellink.train.engine import Engine


@dataclass
class Progress:
    """How far a run is. The loader's whole state is `consumed_samples`."""

    iteration: int = 0
    consumed_samples: int = 0
    consumed_valid_samples: int = 0
    skipped_iterations: int = 0
    tokens: int = 0


def _layout(engine: Engine) -> dict[str, int]:
    return {**engine.topology.sizes, "zero_stage": engine.topology.zero_stage}


def seed_everything(seed: int) -> None:
    """Seed Python, NumPy and the framework's generators on host and device."""
    random.seed(seed)
    np.random.seed(seed % 2**32)
    device.seed_all(seed)


def random_state() -> dict[str, Tensor]:
    """State of the framework's generators on this rank, as byte tensors."""
    return device.rng_state()


def save_state(
    store: CheckpointStore,
    engine: Engine,
    schedule: ParameterSchedule,
    progress: Progress,
    config: CheckpointConfig,
    config_text: str,
    hf_extras: dict[str, Any],
) -> None:
    """Write one step: weights, and what `config` allows of optimizer and random states.

    `hf_extras` are keys of a config.json that no option holds (token ids, ...), for a later export.
    """
    weights = {**engine.optimizer.master_state(), **_fixed_weights(engine)}
    tensors = {f"model.{name}": tensor for name, tensor in weights.items()}
    extra: dict[str, Any] = {"progress": asdict(progress), "layout": _layout(engine), "hf_extras": hf_extras}
    if config.save_optimizer:
        states: dict[str, Any] = dict(engine.optimizer.state_dict())
        extra["optimizer_step"] = states.pop("step")
        extra["schedule"] = schedule.state_dict()
        extra["scaler"] = engine.scaler.state_dict() if engine.scaler is not None else None
        tensors |= {f"optimizer.{name}": tensor for name, tensor in states.items()}
    per_rank = random_state() if config.save_rng else {}
    store.save(progress.iteration, tensors, extra=extra, per_rank=per_rank, config_text=config_text)


def _fixed_weights(engine: Engine) -> dict[str, Tensor]:
    """The parameters that no optimizer moves, sharing storage with the model."""
    return {name: p.detach() for name, p in engine.model.named_parameters() if not p.requires_grad}


def load_weights(store: CheckpointStore, engine: Engine, step: int | None) -> dict[str, Any]:
    """Read only the weights, at any layout; returns the step's small state."""
    masters = engine.optimizer.master_state()
    weights = {**masters, **_fixed_weights(engine)}
    extra = store.load({f"model.{name}": t for name, t in weights.items()}, step, prefix="model.")
    engine.optimizer.load_master_state(masters)
    return extra


def load_state(
    store: CheckpointStore, engine: Engine, schedule: ParameterSchedule, step: int | None, config: CheckpointConfig
) -> Progress:
    """Continue a run: weights, progress and, unless switched off, optimizer, schedule, loss scale and random states."""
    path = store.resolve(step)
    extra = load_weights(store, engine, step)
    progress = Progress(**extra["progress"])
    if config.load_optimizer:
        _load_optimizer(store, path, engine, schedule, extra, step)
    if config.load_rng and extra["layout"] == _layout(engine):
        states = store.load_per_rank(engine.topology.rank, step)
        if states:
            device.set_rng_state(states)
    return progress


def _load_optimizer(
    store: CheckpointStore,
    path: Path,
    engine: Engine,
    schedule: ParameterSchedule,
    extra: dict[str, Any],
    step: int | None,
) -> None:
    if "optimizer_step" not in extra:
        raise ModelLinkError(
            f"checkpoint {path} holds no optimizer states: give --no-load-optim to start them afresh, or --finetune."
        )
    states: dict[str, Any] = dict(engine.optimizer.state_dict())
    states.pop("step")
    store.load({f"optimizer.{name}": t for name, t in states.items()}, step, prefix="optimizer.")
    engine.optimizer.load_state_dict({**states, "step": extra["optimizer_step"]})
    schedule.load_state_dict(extra["schedule"])
    if engine.scaler is not None and extra["scaler"]:
        engine.scaler.load_state_dict(extra["scaler"])


def stored_vocabulary(path: Path) -> int | None:
    """Rows of the embedding in a native step, None when it holds none."""
    info = read_tensor_names(path).get("model.embed_tokens.weight")
    return info.shape[0] if info is not None else None


def is_finite(value: Tensor) -> bool:
    """Whether a scalar is neither inf nor NaN (one synchronisation with the device)."""
    return bool(torch.isfinite(value))
