"""The device layer on CPU: every function has a meaning there, and what it cannot do it says."""

from __future__ import annotations

import json
import random
from types import SimpleNamespace

import numpy as np
import pytest
import torch

from modellink import device
from modellink.cli import env
from modellink.errors import ModelLinkError


@pytest.fixture(autouse=True)
def on_cpu(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(device.ENVIRONMENT_VARIABLE, "cpu")


def test_cpu_is_the_device() -> None:
    assert device.device_type() == "cpu"
    assert device.set_device(3) == device.current_device() == torch.device("cpu")
    assert device.backend() == device.backend(with_host=False) == device.host_backend() == "gloo_serial"
    assert device.device_count() == 1
    assert device.device_name()


@pytest.mark.parametrize(("value", "message"), [("cdua", "Did you mean 'cuda'"), ("npu", "does not find")])
def test_wrong_override_is_one_sentence(monkeypatch: pytest.MonkeyPatch, value: str, message: str) -> None:
    monkeypatch.setenv(device.ENVIRONMENT_VARIABLE, value)
    with pytest.raises(ModelLinkError, match=message):
        device.device_type()


def test_accelerator_backends_and_rank_limit(monkeypatch: pytest.MonkeyPatch) -> None:
    """The accelerator's branch, with a stand-in for the module that torch would give."""
    bound: list[int] = []
    module = SimpleNamespace(device_count=lambda: 2, set_device=bound.append, current_device=lambda: bound[-1])
    monkeypatch.setattr(device, "device_type", lambda: "cuda")
    monkeypatch.setattr(device, "_module", lambda: module)
    assert device.backend() == "cpu:gloo_serial,cuda:nccl"
    assert device.backend(with_host=False) == "nccl"
    assert device.set_device(1) == torch.device("cuda", 1)
    with pytest.raises(ModelLinkError, match="local rank 2 has no cuda device: this machine shows 2"):
        device.set_device(2)
    monkeypatch.setattr(device, "device_type", lambda: "npu")
    assert device.backend() == "cpu:gloo_serial,npu:hccl"


def test_seed_and_random_state_cover_all_three_generators() -> None:
    def draw() -> tuple[float, float, list[float], list[float]]:
        return random.random(), float(np.random.rand()), torch.rand(3).tolist(), torch.randn(2).tolist()

    device.seed_all(7)
    first = draw()
    random.gauss(0, 1)  # leaves a cached half of the pair, which the state must carry too
    np.random.standard_normal()
    state = device.rng_state()
    after = (draw(), random.gauss(0, 1), np.random.standard_normal())
    assert all(tensor.dtype == torch.uint8 and tensor.ndim == 1 for tensor in state.values())
    device.set_rng_state(state)
    assert (draw(), random.gauss(0, 1), np.random.standard_normal()) == after
    device.seed_all(7)
    assert draw() == first
    device.seed_all(8)
    assert draw() != first


def test_memory_follows_allocations() -> None:
    device.reset_peak_memory()
    before = device.memory_stats()
    block = torch.ones(16 << 20)  # 64 MiB, written, so that it is resident
    held = device.memory_stats()
    assert held.allocated - before.allocated > 60 << 20
    assert held.peak_allocated >= held.allocated - (4 << 20)
    assert before.peak_allocated < held.peak_allocated <= device.total_memory()
    del block
    assert device.memory_stats().allocated < held.allocated - (60 << 20)


def test_peak_memory_resets() -> None:
    block = torch.ones(16 << 20)
    high = device.memory_stats().peak_allocated
    del block
    device.reset_peak_memory()
    if device.memory_stats().peak_allocated == high:
        pytest.skip("this system does not let a process reset its peak (no writable /proc/self/clear_refs)")
    assert device.memory_stats().peak_allocated < high - (60 << 20)


def test_streams_and_events_are_no_ops() -> None:
    stream = device.new_stream()
    start, end = device.new_event(timing=True), device.new_event(timing=True)
    start.record()
    with device.use_stream(stream):
        total = torch.ones(100, 100).sum().item()
    stream.wait_stream(device.current_stream())
    end.record(stream)
    end.wait()
    end.synchronize()
    device.synchronize()
    device.empty_cache()
    assert total == 10_000
    assert end.query() and start.elapsed_time(end) > 0
    with pytest.raises(RuntimeError, match="must be recorded"):
        start.elapsed_time(device.new_event())


@pytest.mark.parametrize(
    ("name", "dtype", "expected"),
    [
        ("NVIDIA H200", torch.bfloat16, 989e12),
        ("NVIDIA H100 80GB HBM3", torch.float16, 989e12),
        ("NVIDIA H100 80GB HBM3", torch.float8_e4m3fn, 1979e12),
        ("NVIDIA H100 PCIe", torch.bfloat16, 756e12),
        ("NVIDIA H20", torch.bfloat16, 148e12),
        ("NVIDIA A100-SXM4-80GB", torch.bfloat16, 312e12),
        ("NVIDIA A100-SXM4-80GB", torch.float32, 19.5e12),
        ("NVIDIA A10", torch.bfloat16, 125e12),
        ("NVIDIA L4", torch.bfloat16, 121e12),
        ("NVIDIA GeForce RTX 4090", torch.bfloat16, 165.2e12),
        ("Ascend910B3", torch.bfloat16, 313e12),
        ("Ascend910B2", torch.bfloat16, 376e12),
    ],
)
def test_published_peaks(name: str, dtype: torch.dtype, expected: float) -> None:
    value, source = device._published_peak(name, dtype) or (0.0, "")
    assert value == expected
    assert "data sheet" in source or "whitepaper" in source


def test_unlisted_devices_and_types_have_no_published_peak() -> None:
    assert device._published_peak("Some Future Chip", torch.bfloat16) is None
    assert device._published_peak("NVIDIA A100-SXM4-80GB", torch.float8_e4m3fn) is None


def test_cpu_peak_is_measured_once_and_says_so() -> None:
    first = device.peak_flops(torch.float32)
    assert 1e8 < first < 1e15
    assert device.peak_flops(torch.float32) == first
    assert device.peak_flops_source(torch.float32).startswith("measured here")


def test_features() -> None:
    assert device.supports("bf16") and device.supports("fused_adamw") and device.supports("flash_attention")
    assert not any(device.supports(name) for name in ("streams", "symmetric_memory", "float8", "liger", "triton"))
    with pytest.raises(ModelLinkError, match="Did you mean 'float8'"):
        device.supports("flaot8")


def test_fused_adamw_claim_holds() -> None:
    weight = torch.nn.Parameter(torch.ones(8))
    weight.grad = torch.ones(8)
    torch.optim.AdamW([weight], lr=0.1, fused=True).step()
    assert bool((weight < 1).all())


def test_env_prints_json_and_tables(capsys: pytest.CaptureFixture[str]) -> None:
    assert env.run(["--json"]) == 0
    facts = json.loads(capsys.readouterr().out)
    # an installed package's version may leave out the build, as in 2.13.0+cu130
    assert facts["versions"]["torch"].split("+")[0] == torch.__version__.split("+")[0]
    assert facts["device"]["type"] == "cpu" and facts["backends"]["used"] == "gloo_serial"
    assert facts["kernels"]["math_attention"] and not facts["kernels"]["liger"]
    assert set(env.KERNELS) == {*device.features(), "math_attention"}
    assert env.run([]) == 0
    printed = capsys.readouterr().out
    assert "kernels" in printed and "fused_adamw" in printed and ".[gpu]" in "".join(printed.split())
    with pytest.raises(ModelLinkError, match="only --json"):
        env.run(["--jsn"])
