"""Whole sparse models against what their original code computed (`ref.npz` beside weights and configuration)."""

from __future__ import annotations

import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from modellink.models.decoder import Decoder
from modellink.models.moe import MoE


def cut_expert_gradients(model: Decoder) -> None:
    """Pass no gradient through routed experts and their weights: some original code runs them so outside training."""
    blocks = [module for module in model.modules() if isinstance(module, MoE)]
    assert blocks
    for block in blocks:
        block.gate.register_forward_hook(lambda _, x, out: out._replace(weights_Tk=out.weights_Tk.detach()))
        block.experts.register_forward_hook(lambda _, x, out: out.detach())


def stack_experts(state: Mapping[str, Tensor], experts: Mapping[str, str]) -> dict[str, Tensor]:
    """`mlp.experts.E.NAME.weight` one by one -> `mlp.experts.OURS` [E, ...], `experts` saying NAME -> OURS."""
    out: dict[str, Tensor] = {}
    stacks: dict[str, dict[int, Tensor]] = {}
    for name, tensor in state.items():
        found = re.fullmatch(r"(.*\.experts)\.(\d+)\.(\w+)\.weight", name)
        if found and found[3] in experts:
            stacks.setdefault(f"{found[1]}.{experts[found[3]]}", {})[int(found[2])] = tensor
        else:
            out[name] = tensor
    return out | {name: torch.stack([parts[i] for i in range(len(parts))]) for name, parts in stacks.items()}


def assert_as_original(model: Decoder, folder: Path) -> Any:
    """Logits, loss and gradient norm are the original's; returns its figures."""
    reference = np.load(folder / "ref.npz")
    tokens = torch.tensor(reference["input_ids"])
    logits = model(tokens)
    torch.testing.assert_close(logits, torch.tensor(reference["logits"]), atol=2e-5, rtol=0)
    loss = F.cross_entropy(logits[:, :-1].flatten(0, 1), tokens[:, 1:].flatten())
    loss.backward()
    norm = torch.nn.utils.get_total_norm([p.grad for p in model.parameters() if p.grad is not None])
    assert loss.item() == pytest.approx(float(reference["loss"]), rel=1e-6)
    assert norm.item() == pytest.approx(float(reference["grad_norm"]), rel=1e-5)
    return reference
