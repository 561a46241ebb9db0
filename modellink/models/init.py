"""Initial weights, a pure function of (seed, parameter name, full shape): the same at every parallel layout.

Each tensor is drawn in full on the CPU from a generator seeded by its name and then cut to the local shard, so changing
the number of ranks or stages changes no bit of the start. normal(0, std); outputs of attention and MLP std / sqrt(2 L);
norms one (zero when stored minus one); biases zero. Source: Megatron-LM's initialisation (spec e.1).
"""

from __future__ import annotations

import hashlib
import math

import torch
from torch import Tensor

from modellink.config.schema import ModelConfig


def initial_value(name: str, shape: torch.Size, config: ModelConfig, seed: int) -> Tensor:
    """fp32 CPU tensor of the full `shape` for the parameter with canonical `name`."""
    if name.endswith(("bias", ".sinks")):
        return torch.zeros(shape)
    if len(shape) == 1:
        return torch.zeros(shape) if config.norm_offset else torch.ones(shape)
    digest = hashlib.sha256(f"{seed}:{name}".encode()).digest()
    generator = torch.Generator().manual_seed(int.from_bytes(digest[:8], "little") & (2**63 - 1))
    residual_output = name.endswith(("o_proj.weight", "down_proj.weight", "experts.down_proj"))
    std = config.init_std / math.sqrt(2.0 * config.num_layers) if residual_output else config.init_std
    return torch.empty(shape).normal_(0.0, std, generator=generator)
