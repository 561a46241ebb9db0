"""AdamW and SGD with masters against torch's optimizers and hand-written float32 loops."""

import copy
import math

import pytest
import torch
from torch import nn

from modellink.errors import ModelLinkError
from modellink.optim.adamw import MixedPrecisionAdamW
from modellink.optim.grad_norm import clip_coefficient, global_grad_norm
from modellink.optim.scaler import LossScaler
from modellink.optim.sgd import MixedPrecisionSGD

SHAPES = {
    "embed.weight": (37, 11),
    "proj.weight": (23, 9),
    "proj.bias": (23,),
    "norm.weight": (11,),
    "one.weight": (1, 1),
}
OPTIONS = {"lr": 3e-3, "betas": (0.9, 0.95), "eps": 1e-8, "weight_decay": 0.1}


def make_params(dtype: torch.dtype, seed: int = 0) -> dict[str, nn.Parameter]:
    generator = torch.Generator().manual_seed(seed)
    return {name: nn.Parameter(torch.randn(s, generator=generator).to(dtype)) for name, s in SHAPES.items()}


def set_grads(params: dict[str, nn.Parameter], step: int, dtype: torch.dtype | None = None, scale: float = 1.0) -> None:
    generator = torch.Generator().manual_seed(1000 + step)
    for param in params.values():
        grad = torch.randn(param.shape, generator=generator) * scale
        if dtype in (None, param.dtype):
            param.grad = grad.to(param.dtype)
        else:
            param.main_grad = grad.to(dtype)


def torch_groups(params: dict[str, nn.Parameter]) -> list[dict]:
    plain = [p for p in params.values() if p.ndim > 1]
    return [{"params": plain}, {"params": [p for p in params.values() if p.ndim <= 1], "weight_decay": 0.0}]


def assert_same_bits(left: dict[str, torch.Tensor], right: dict[str, torch.Tensor]) -> None:
    assert left.keys() == right.keys()
    for name in left:
        width = {2: torch.int16, 4: torch.int32}[left[name].element_size()]
        assert torch.equal(left[name].detach().view(width), right[name].detach().view(width)), name


@pytest.mark.parametrize("bucket_elements", [1 << 24, 100])
def test_float32_with_clipping_follows_torch(bucket_elements: int):
    ours, theirs = make_params(torch.float32), make_params(torch.float32)
    optimizer = MixedPrecisionAdamW(ours.items(), master="none", bucket_elements=bucket_elements, **OPTIONS)
    reference = torch.optim.AdamW(torch_groups(theirs), fused=True, **OPTIONS)
    for step in range(50):
        set_grads(ours, step)
        set_grads(theirs, step)
        norm = global_grad_norm(ours.items())
        nn.utils.clip_grad_norm_(theirs.values(), 3.0)
        optimizer.step(clip_coefficient(norm, 3.0))
        reference.step()
    for name in ours:
        torch.testing.assert_close(ours[name], theirs[name], rtol=1e-6, atol=1e-7)


def test_float32_without_clipping_is_bitwise_torch():
    ours, theirs = make_params(torch.float32), make_params(torch.float32)
    optimizer = MixedPrecisionAdamW(ours.items(), master="none", **OPTIONS)
    reference = torch.optim.AdamW(torch_groups(theirs), fused=True, **OPTIONS)
    for step in range(50):
        set_grads(ours, step)
        set_grads(theirs, step)
        optimizer.step()
        reference.step()
    assert_same_bits(ours, theirs)


def test_bfloat16_against_a_float32_loop():
    params = make_params(torch.bfloat16)
    optimizer = MixedPrecisionAdamW(params.items(), master="separate", **OPTIONS)
    masters = {name: p.detach().double() for name, p in params.items()}
    first = {name: torch.zeros_like(m) for name, m in masters.items()}
    second = {name: torch.zeros_like(m) for name, m in masters.items()}
    beta1, beta2 = OPTIONS["betas"]
    for step in range(1, 51):
        lr = 3e-3 / step
        set_grads(params, step)
        for group in optimizer.param_groups:
            group["lr"] = lr
        optimizer.step(0.25)
        for name, param in params.items():
            grad = param.grad.double() * 0.25
            if param.ndim > 1:
                masters[name] *= 1 - lr * OPTIONS["weight_decay"]
            first[name] = beta1 * first[name] + (1 - beta1) * grad
            second[name] = beta2 * second[name] + (1 - beta2) * grad**2
            denominator = (second[name] / (1 - beta2**step)).sqrt() + OPTIONS["eps"]
            masters[name] -= lr * (first[name] / (1 - beta1**step)) / denominator
    for name, master in optimizer.master_state().items():
        assert master.dtype == torch.float32
        torch.testing.assert_close(master.double(), masters[name], rtol=1e-6, atol=1e-6)
        # half a bfloat16 step (2^-9 of the value, mantissa of 8 bits) is all that a weight may be away
        assert ((params[name].double() - master.double()).abs() <= master.double().abs() * 2.0**-8).all()
        assert not torch.equal(params[name].float(), master)


def run_200(master: str, grads: torch.dtype, bucket_elements: int) -> tuple[dict, MixedPrecisionAdamW]:
    params = make_params(torch.bfloat16)
    optimizer = MixedPrecisionAdamW(params.items(), master=master, bucket_elements=bucket_elements, **OPTIONS)
    generator = torch.Generator().manual_seed(7)
    wild = {}
    for index, (name, shape) in enumerate(SHAPES.items()):
        bits = torch.randint(-(2**31), 2**31, shape, generator=generator, dtype=torch.int64).to(torch.int32)
        wild[name] = bits.view(torch.float32).nan_to_num(nan=1.0, posinf=3e38, neginf=-3e38)
        if index % 2:  # ordinary weights in every second parameter, so that updates matter in the low bits
            wild[name] = torch.randn(shape, generator=generator)
    wild["embed.weight"].view(-1)[:4] = torch.tensor([1e-40, -1e-45, 3.4e38, 0.0])
    optimizer.load_master_state(wild)
    assert_same_bits(optimizer.master_state(), wild)
    for step in range(200):
        lr = 1e-2 * (1 + math.cos(math.pi * step / 200)) / 2
        for group in optimizer.param_groups:
            group["lr"] = lr
        set_grads(params, step, dtype=grads, scale=2.0 ** (step % 7 - 3))
        norm = global_grad_norm(params.items())
        optimizer.step(clip_coefficient(norm, 1.0))
    return params, optimizer


@pytest.mark.parametrize("grads", [torch.bfloat16, torch.float32])
def test_split_has_the_bits_of_separate(grads: torch.dtype):
    weights_a, separate = run_200("separate", grads, bucket_elements=150)
    weights_b, split = run_200("split", grads, bucket_elements=150)
    assert_same_bits(weights_a, weights_b)
    assert_same_bits(separate.master_state(), split.master_state())
    a, b = separate.state_dict(), split.state_dict()
    assert a.pop("step") == b.pop("step") == 200
    assert_same_bits(a, b)


@pytest.mark.parametrize("master", ["separate", "split"])
def test_ties_round_away_from_zero_on_loading_and_on_stepping(master: str):
    bits = torch.tensor([0x3F808000, 0x3F818000, 0x00008000, 0x7F7E8000], dtype=torch.int32)
    ties = torch.cat([bits.view(torch.float32), -bits.view(torch.float32)])
    param = nn.Parameter(torch.zeros(8, dtype=torch.bfloat16))
    optimizer = MixedPrecisionAdamW([("w", param)], master=master, **{**OPTIONS, "lr": 0.0})
    param.grad = torch.zeros_like(param)
    for change in (lambda: optimizer.load_master_state({"w": ties}), optimizer.step):
        change()
        assert (param.detach().float().abs() > ties.abs()).all()
        assert_same_bits(optimizer.master_state(), {"w": ties})


def test_bucket_size_does_not_matter():
    _, a = run_200("split", torch.bfloat16, bucket_elements=1 << 24)
    _, b = run_200("split", torch.bfloat16, bucket_elements=64)
    for name, master in a.master_state().items():
        torch.testing.assert_close(master, b.master_state()[name], rtol=1e-6, atol=1e-7)


def test_overflow_trajectory_of_float16():
    """A scale that overflows is lowered, skipped steps change nothing, and good ones equal float32 training."""
    half, full = make_params(torch.float16), make_params(torch.float16)
    full = {name: nn.Parameter(p.detach().float()) for name, p in full.items()}
    optimizer = MixedPrecisionAdamW(half.items(), master="separate", **OPTIONS)
    reference = MixedPrecisionAdamW(full.items(), master="none", **OPTIONS)
    scaler = LossScaler(initial=2.0**20, window=4, hysteresis=1)
    skipped = 0
    for step in range(40):
        set_grads(full, step)
        for name, param in half.items():
            param.grad = (full[name].grad * scaler.scale).half()
            full[name].grad = (param.grad.float() / scaler.scale).clone()
        found_inf = not all(p.grad.isfinite().all() for p in half.values())
        if found_inf:
            skipped += 1
        else:
            optimizer.step(scaler.inverse)
            reference.step()
        scaler.update(found_inf)
    assert 5 < skipped < 30
    for name, master in optimizer.master_state().items():
        torch.testing.assert_close(master, full[name].detach(), rtol=1e-6, atol=1e-7)
        assert torch.equal(half[name].detach(), master.half())


def test_main_grad_wins_and_missing_gradients_are_left_alone():
    params = make_params(torch.bfloat16)
    optimizer = MixedPrecisionAdamW(params.items(), master="split", **OPTIONS)
    before = copy.deepcopy(optimizer.master_state())
    params["proj.weight"].main_grad = torch.ones(SHAPES["proj.weight"])
    params["proj.weight"].grad = -torch.ones(SHAPES["proj.weight"], dtype=torch.bfloat16)
    optimizer.step()
    after = optimizer.master_state()
    assert (after["proj.weight"] < before["proj.weight"] * (1 - 3e-4)).all()
    assert all(torch.equal(after[name], before[name]) for name in SHAPES if name != "proj.weight")
    optimizer.zero_grad()
    assert params["proj.weight"].grad is None
    assert params["proj.weight"].main_grad is None


@pytest.mark.parametrize(("dtype", "master"), [("float32", "none"), ("bfloat16", "separate"), ("bfloat16", "split")])
def test_resume_from_state_is_bitwise(dtype: str, master: str):
    def train(optimizer: MixedPrecisionAdamW, params: dict, steps: range) -> None:
        for step in steps:
            set_grads(params, step)
            optimizer.step(0.5)

    whole = make_params(getattr(torch, dtype))
    straight = MixedPrecisionAdamW(whole.items(), master=master, **OPTIONS)
    train(straight, whole, range(10))
    saved = copy.deepcopy((straight.state_dict(), straight.master_state()))
    train(straight, whole, range(10, 20))

    params = make_params(getattr(torch, dtype), seed=5)
    resumed = MixedPrecisionAdamW(params.items(), master=master, **OPTIONS)
    resumed.load_state_dict(saved[0])
    resumed.load_master_state(saved[1])
    train(resumed, params, range(10, 20))
    assert_same_bits(whole, params)
    assert_same_bits(straight.master_state(), resumed.master_state())


@pytest.mark.parametrize("master", ["separate", "split"])
def test_reload_masters_from_params(master: str):
    params = make_params(torch.bfloat16)
    optimizer = MixedPrecisionAdamW(params.items(), master=master, **OPTIONS)
    set_grads(params, 0)
    optimizer.step()
    with torch.no_grad():
        params["proj.weight"].fill_(0.5)
    optimizer.reload_masters_from_params()
    for name, value in optimizer.master_state().items():
        assert torch.equal(value, params[name].detach().float())


def test_groups():
    optimizer = MixedPrecisionAdamW(
        make_params(torch.float32).items(), master="none", decoupled=lambda name: name.startswith("embed"), **OPTIONS
    )
    groups = {tuple(g["names"]): (g["weight_decay"], g["decoupled_lr"]) for g in optimizer.param_groups}
    assert groups == {
        ("embed.weight",): (0.1, True),
        ("proj.weight", "one.weight"): (0.1, False),
        ("proj.bias", "norm.weight"): (0.0, False),
    }


@pytest.mark.parametrize(
    ("weights", "grads", "master", "total", "held"),
    [
        (torch.float32, torch.float32, "none", 16, 8),
        (torch.bfloat16, torch.float32, "separate", 18, 12),
        (torch.bfloat16, torch.bfloat16, "separate", 16, 12),
        (torch.bfloat16, torch.float32, "split", 16, 10),
        (torch.bfloat16, torch.bfloat16, "split", 14, 10),
    ],
)
def test_bytes_per_parameter(weights, grads, master, total, held):
    params = make_params(weights)
    optimizer = MixedPrecisionAdamW(params.items(), master=master, **OPTIONS)
    set_grads(params, 0, dtype=grads)
    optimizer.step()
    assert sum(optimizer.bytes_per_parameter().values()) == total
    assert optimizer.state_bytes_per_parameter() == held


@pytest.mark.parametrize("momentum", [0.9, 0.0])
def test_sgd_is_torch_sgd(momentum: float):
    ours, theirs = make_params(torch.float32), make_params(torch.float32)
    optimizer = MixedPrecisionSGD(ours.items(), lr=0.05, momentum=momentum, weight_decay=0.1, master="none")
    reference = torch.optim.SGD(torch_groups(theirs), lr=0.05, momentum=momentum, weight_decay=0.1, foreach=True)
    for step in range(20):
        set_grads(ours, step)
        set_grads(theirs, step)
        optimizer.step()
        reference.step()
    assert_same_bits(ours, theirs)
    assert len(optimizer.state_dict()) == 1 + (len(SHAPES) if momentum else 0)


@pytest.mark.parametrize(
    ("dtype", "master", "words"),
    [
        (torch.bfloat16, "none", "needs a float32 master"),
        (torch.float16, "split", "--reuse-fp32-param"),
        (torch.float8_e4m3fn, "separate", "float32, bfloat16 or float16"),
    ],
)
def test_dtype_errors(dtype, master, words):
    param = nn.Parameter(torch.ones(2, 2).to(dtype))
    with pytest.raises(ModelLinkError, match=words):
        MixedPrecisionAdamW([("w", param)], master=master, **OPTIONS)


def test_name_and_shape_errors():
    params = make_params(torch.float32)
    optimizer = MixedPrecisionAdamW(params.items(), master="none", **OPTIONS)
    state = optimizer.state_dict()
    with pytest.raises(ModelLinkError, match=r"1 entries are missing.*exp_avg\.proj\.bias"):
        optimizer.load_state_dict({key: value for key, value in state.items() if key != "exp_avg.proj.bias"})
    with pytest.raises(ModelLinkError, match=r"exp_avg\.proj\.bias.*\(3,\).*\(23,\)"):
        optimizer.load_state_dict({**state, "exp_avg.proj.bias": torch.zeros(3)})
    with pytest.raises(ModelLinkError, match="two parameters are named"):
        MixedPrecisionAdamW([*params.items(), *params.items()], master="none", **OPTIONS)
    with pytest.raises(ModelLinkError, match="not contiguous"):
        MixedPrecisionAdamW([("w", nn.Parameter(torch.ones(2, 3).t()))], master="none", **OPTIONS)
