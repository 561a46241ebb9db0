"""States in host memory (`--cpu-optimizer`): the same bits as beside the parameters, and only what must travel does."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import nn

from modellink.config.load import load_config
from modellink.errors import ModelLinkError
from modellink.optim.adamw import MixedPrecisionAdamW
from modellink.optim.cadam import MixedPrecisionCAdam
from modellink.optim.host import HostLink
from modellink.optim.mixed_precision import MixedPrecisionOptimizer
from modellink.optim.muon import MixedPrecisionMuon
from modellink.optim.sgd import MixedPrecisionSGD

SHAPES = {
    "embed_tokens.weight": (80, 60),
    "layers.0.mlp.up_proj.weight": (23, 9),
    "layers.0.none": (0, 4),
    "norm": (11,),
}
COUNT = 80 * 60 + 23 * 9 + 11
OPTIMIZERS: dict[str, Callable[..., MixedPrecisionOptimizer]] = {
    "adam": MixedPrecisionAdamW,
    "adamw8bit": lambda *args, **options: MixedPrecisionAdamW(*args, eight_bits=True, **options),
    "cadam": MixedPrecisionCAdam,
    "muon": MixedPrecisionMuon,
    "sgd": MixedPrecisionSGD,
}
# (weights, gradients, masters, bytes a parameter to the host and back)
MODES: dict[str, tuple[torch.dtype, torch.dtype, Any, int, int]] = {
    "fp32": (torch.float32, torch.float32, "none", 8, 4),
    "fp16": (torch.float16, torch.float16, "separate", 2, 2),
    "bf16": (torch.bfloat16, torch.float32, "separate", 4, 2),
    "bf16, bf16 gradients": (torch.bfloat16, torch.bfloat16, "separate", 2, 2),
    "split": (torch.bfloat16, torch.float32, "split", 6, 2),
}


def build(kind: str, mode: str, on_host: bool) -> tuple[dict[str, nn.Parameter], MixedPrecisionOptimizer]:
    generator = torch.Generator().manual_seed(0)
    dtype, _, master, _, _ = MODES[mode]
    params = {name: nn.Parameter(torch.randn(s, generator=generator).to(dtype)) for name, s in SHAPES.items()}
    options = {"lr": 1e-2, "weight_decay": 0.1, "bucket_elements": 1000, "master": master, "on_host": on_host}
    return params, OPTIMIZERS[kind](params.items(), **options)


def run(params: dict[str, nn.Parameter], optimizer: MixedPrecisionOptimizer, mode: str, steps: range) -> None:
    for step in steps:
        generator = torch.Generator().manual_seed(step)
        for param in params.values():
            gradient = torch.randn(param.shape, generator=generator).to(MODES[mode][1])
            if gradient.dtype == param.dtype:
                param.grad = gradient
            else:
                param.main_grad = gradient  # type: ignore[attr-defined]
        optimizer.step(torch.tensor(0.5) if step % 2 else 1.0)
        optimizer.zero_grad()


def assert_same(ours: dict[str, Any], theirs: dict[str, Any]) -> None:
    assert ours.keys() == theirs.keys()
    for name, value in ours.items():
        assert torch.equal(torch.as_tensor(value), torch.as_tensor(theirs[name])), name


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("kind", OPTIMIZERS)
def test_the_same_bits_and_only_gradients_and_weights_travel(kind: str, mode: str) -> None:
    beside, host = build(kind, mode, False), build(kind, mode, True)
    for params, optimizer in (beside, host):
        run(params, optimizer, mode, range(3))
    assert_same(host[0], beside[0])
    assert_same(host[1].state_dict(), beside[1].state_dict())
    assert_same(host[1].master_state(), beside[1].master_state())
    link = host[1].link
    assert isinstance(link, HostLink)
    *_, down, up = MODES[mode]
    scales = 4  # the one step whose scale is a tensor
    assert link.fetched_bytes == 3 * down * COUNT + scales
    assert link.sent_bytes == 3 * up * COUNT


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize(("first", "second"), [(True, False), (False, True)])
def test_a_run_continues_with_its_states_elsewhere(mode: str, first: bool, second: bool) -> None:
    straight = build("adam", mode, False)
    run(*straight, mode, range(4))
    old, new = build("adam", mode, first), build("adam", mode, second)
    run(*old, mode, range(2))
    with torch.no_grad():
        for param in new[0].values():
            param.fill_(7.0)
    new[1].load_master_state(old[1].master_state())
    new[1].load_state_dict(old[1].state_dict())
    run(*new, mode, range(2, 4))
    assert_same(new[0], straight[0])
    assert_same(new[1].state_dict(), straight[1].state_dict())


def test_flags() -> None:
    common = "--model tiny-llama --seq-length 8 --micro-batch-size 1 --train-iters 1 --lr 1e-3 --mock-data".split()
    for flags, wanted in (
        (["--cpu-optimizer"], True),
        (["--remote-device", "cpu"], True),
        (["--remote-device", "none"], False),
        ([], False),
    ):
        assert load_config([*common, *flags], "train").config.optimizer.cpu_optimizer == wanted
    with pytest.raises(ModelLinkError, match=r"--remote-device nvme is refused"):
        load_config([*common, "--remote-device", "nvme"], "train")
