"""The accelerator, and the only file that names one: the rest asks here and runs unchanged on CPU, CUDA and Ascend NPU.

The device is found once per process (CUDA, then NPU through `torch_npu`, then CPU); the environment variable
`MODELLINK_DEVICE` (`cpu`, `cuda`, `npu`) overrides it. `torch_npu` mirrors the `torch.cuda` interface, so one code
path serves both, and each function has a CPU meaning, so tests without an accelerator run the same callers.
"""

from __future__ import annotations

import contextlib
import functools
import importlib
import importlib.util
import json
import os
import random
import re
import sys
import time
import weakref
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch

from modellink.errors import ModelLinkError
from modellink.registry import suggest

ENVIRONMENT_VARIABLE = "MODELLINK_DEVICE"
_COLLECTIVES = {"cpu": "gloo_serial", "cuda": "nccl", "npu": "hccl"}


# ---------------------------------------------------------------------------------------------------------------- which


def _available(kind: str) -> bool:
    if kind == "cuda":
        return torch.cuda.is_available()
    if kind == "npu":
        if importlib.util.find_spec("torch_npu") is None:
            return False
        importlib.import_module("torch_npu")  # registers the backend as torch.npu
        return bool(torch.get_device_module("npu").is_available())
    return kind == "cpu"


@functools.cache
def _resolve(override: str) -> str:
    if not override:
        return next(kind for kind in ("cuda", "npu", "cpu") if _available(kind))
    if override not in _COLLECTIVES:
        raise ModelLinkError(
            f"{ENVIRONMENT_VARIABLE}={override!r} is no device.{suggest(override, _COLLECTIVES)} Use cpu, cuda or npu."
        )
    if not _available(override):
        raise ModelLinkError(
            f"{ENVIRONMENT_VARIABLE}={override} asks for a device that torch {torch.__version__} does not find on this "
            "machine: unset the variable, or install the driver and the matching torch build (see `modellink env`)."
        )
    return override


def device_type() -> str:
    """Return "cuda", "npu" or "cpu": the kind of device this process computes on."""
    return _resolve(os.environ.get(ENVIRONMENT_VARIABLE, "").strip().lower())


def is_accelerated() -> bool:
    """Whether this process computes on something other than the CPU."""
    return device_type() != "cpu"


def _module() -> Any:
    """The torch module of the accelerator (`torch.cuda` or `torch.npu`); never called on CPU."""
    assert is_accelerated()
    return torch.get_device_module(device_type())


def device_count() -> int:
    """Number of devices of this machine that this process may use; 1 on CPU."""
    return int(_module().device_count()) if is_accelerated() else 1


def set_device(local_rank: int) -> torch.device:
    """Bind this process to the accelerator number `local_rank` (no effect on CPU) and return it."""
    if is_accelerated():
        if not 0 <= local_rank < device_count():
            raise ModelLinkError(
                f"local rank {local_rank} has no {device_type()} device: this machine shows {device_count()}; start at "
                f"most that many processes per machine (torchrun --nproc-per-node {device_count()}), or set "
                f"{ENVIRONMENT_VARIABLE}=cpu."
            )
        _module().set_device(local_rank)
    return current_device()


def current_device() -> torch.device:
    """Return the device this process is bound to, with its index on an accelerator."""
    if is_accelerated():
        return torch.device(device_type(), _module().current_device())
    return torch.device("cpu")


def device_name() -> str:
    """Return the marketing name of the device ("NVIDIA H200", "Ascend910B3", a CPU model)."""
    if is_accelerated():
        return str(_module().get_device_name(current_device()))
    cpuinfo = Path("/proc/cpuinfo")
    found = re.search(r"^model name\s*:\s*(.+)$", cpuinfo.read_text(), re.MULTILINE) if cpuinfo.exists() else None
    return found[1].strip() if found else "CPU"


def toolkit_version() -> str | None:
    """Return the version of the CUDA toolkit that torch was built with; None for a build without it."""
    return torch.version.cuda


def _gloo_serial(group: Any, _: object) -> Any:
    """gloo with one worker thread; `group` is torch's `DistributedBackendOptions`.

    torch starts two workers for each group, and both write the name of the collective they finished last to one
    string without a lock. The name of a gather of DTensors is too long to be kept inside the string, so that now and
    then one worker frees what the other writes: a run on a busy machine dies of a broken heap
    (`ProcessGroupGloo::runLoop` of torch 2.13).
    """
    gloo: Any = torch.distributed.ProcessGroupGloo  # its type stubs lack the options
    options = gloo._Options()
    interfaces = [name for name in os.environ.get("GLOO_SOCKET_IFNAME", "").split(",") if name]
    options._devices = [gloo.create_device(interface=name) for name in interfaces] or [gloo.create_default_device()]
    options._threads = 1
    options._timeout = group.timeout
    options.group_name, options.global_ranks_in_group = group.group_id, group.global_ranks_in_group
    return gloo(group.store, group.group_rank, group.group_size, options)


@functools.cache
def host_backend() -> str:
    """Name of the `torch.distributed` backend for CPU tensors and objects: gloo whose groups do one thing at a time."""
    name = _COLLECTIVES["cpu"]
    torch.distributed.Backend.register_backend(name, _gloo_serial, extended_api=True, devices=["cpu"])
    return name


def backend(with_host: bool = True) -> str:
    """Return the `torch.distributed` backend of this device.

    With `with_host` an accelerator also gets `host_backend` for CPU tensors ("cpu:gloo_serial,cuda:nccl"): offloaded
    parameters and object collectives then need no second process group. On CPU it is `host_backend` either way.
    """
    kind, host = device_type(), host_backend()
    if not is_accelerated():
        return host
    return f"cpu:{host},{kind}:{_COLLECTIVES[kind]}" if with_host else _COLLECTIVES[kind]


# --------------------------------------------------------------------------------------------------------------- random


def _to_bytes(state: object) -> torch.Tensor:
    return torch.tensor(list(json.dumps(state).encode()), dtype=torch.uint8)


def _from_bytes(state: torch.Tensor) -> Any:
    return json.loads(bytes(state.tolist()))


def seed_all(seed: int) -> None:
    """Seed Python, NumPy, torch on the CPU and torch on every accelerator."""
    random.seed(seed)
    np.random.seed(seed % 2**32)
    torch.manual_seed(seed)


def rng_state() -> dict[str, torch.Tensor]:
    """Return every random state of this process as uint8 tensors, ready for a checkpoint (nothing is pickled)."""
    numpy_state: Any = np.random.get_state(legacy=False)
    numpy_state["state"]["key"] = numpy_state["state"]["key"].tolist()
    state = {
        "python": _to_bytes(random.getstate()),
        "numpy": _to_bytes(numpy_state),
        "host": torch.get_rng_state(),
    }
    if is_accelerated():
        state["accelerator"] = _module().get_rng_state()
    return state


def set_rng_state(state: dict[str, torch.Tensor]) -> None:
    """Restore what `rng_state` returned; the accelerator's part is left out when it was saved on CPU or is not here."""
    version, words, gauss = _from_bytes(state["python"])
    random.setstate((version, tuple(words), gauss))
    numpy_state = _from_bytes(state["numpy"])
    numpy_state["state"]["key"] = np.array(numpy_state["state"]["key"], dtype=np.uint32)
    np.random.set_state(numpy_state)
    torch.set_rng_state(state["host"])
    if is_accelerated() and "accelerator" in state:
        _module().set_rng_state(state["accelerator"])


# --------------------------------------------------------------------------------------------------------------- memory


@dataclass(frozen=True)
class MemoryStats:
    """Memory of this process in bytes. On CPU, allocated = reserved = resident set size."""

    allocated: int
    reserved: int
    peak_allocated: int
    peak_reserved: int


def _resident() -> tuple[int, int]:
    """Resident set size of this process, now and at its peak, in bytes."""
    import resource

    unit = 1 if sys.platform == "darwin" else 1024
    highest = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit
    status = Path("/proc/self/status")
    lines = re.findall(r"^(VmRSS|VmHWM):\s*(\d+) kB", status.read_text(), re.MULTILINE) if status.exists() else []
    sizes = {name: int(kilobytes) * 1024 for name, kilobytes in lines}
    return sizes.get("VmRSS", highest), sizes.get("VmHWM", highest)


def memory_stats() -> MemoryStats:
    """Return what this process holds on its device now, and the peak since the start or `reset_peak_memory`."""
    if is_accelerated():
        module = _module()
        return MemoryStats(
            module.memory_allocated(),
            module.memory_reserved(),
            module.max_memory_allocated(),
            module.max_memory_reserved(),
        )
    now, peak = _resident()
    return MemoryStats(now, now, peak, peak)


def reset_peak_memory() -> None:
    """Start a new peak measurement. On CPU this needs Linux; elsewhere the peak is that of the whole process."""
    if is_accelerated():
        _module().reset_peak_memory_stats()
        return
    with contextlib.suppress(OSError):  # no /proc, or a container that mounts it read-only
        Path("/proc/self/clear_refs").write_text("5")  # 5 resets VmHWM, see proc(5)


def total_memory() -> int:
    """Return the memory of the device in bytes; on CPU that of the machine, or of the container where that is less."""
    if is_accelerated():
        return int(_module().get_device_properties(current_device()).total_memory)
    total = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    for limit in ("/sys/fs/cgroup/memory.max", "/sys/fs/cgroup/memory/memory.limit_in_bytes"):
        with contextlib.suppress(OSError, ValueError):  # no such file, or the word "max"
            total = min(total, int(Path(limit).read_text()))
    return total


def empty_cache() -> None:
    """Give cached blocks back to the driver (no effect on CPU)."""
    if is_accelerated():
        _module().empty_cache()


def host_buffer(elements: int, dtype: torch.dtype) -> torch.Tensor:
    """Return uninitialised host memory that the device can copy from and to while it computes (pinned)."""
    if is_accelerated():
        storage = torch.empty(elements, dtype=dtype, device="cpu", pin_memory=True).untyped_storage()
    else:
        storage = torch.UntypedStorage(elements * dtype.itemsize)
    _host_buffers[storage._cdata] = storage
    return torch.empty(0, dtype=dtype).set_(storage)


_host_buffers: weakref.WeakValueDictionary[int, torch.UntypedStorage] = weakref.WeakValueDictionary()


def is_host_buffer(tensor: torch.Tensor) -> bool:
    """Whether `tensor` lies in memory of `host_buffer`: also where the device is the CPU, it does not count as its."""
    return tensor.untyped_storage()._cdata in _host_buffers


# -------------------------------------------------------------------------------------------------------------- streams


def synchronize() -> None:
    """Wait for all work queued on the device (CPU work is already done)."""
    if is_accelerated():
        _module().synchronize()


class HostStream:
    """What a stream is on CPU: work is done when the call returns, so there is nothing to wait for."""

    def synchronize(self) -> None:
        pass

    def wait_stream(self, stream: Any) -> None:
        pass

    def wait_event(self, event: Any) -> None:
        pass


class HostEvent:
    """What an event is on CPU: the moment of its recording."""

    def __init__(self) -> None:
        self.seconds: float | None = None

    def record(self, stream: Any = None) -> None:
        self.seconds = time.perf_counter()

    def wait(self, stream: Any = None) -> None:
        pass

    def synchronize(self) -> None:
        pass

    def query(self) -> bool:
        return True

    def elapsed_time(self, end: HostEvent) -> float:
        """Milliseconds from this event to `end`, as `torch.cuda.Event.elapsed_time` gives them."""
        if self.seconds is None or end.seconds is None:
            raise RuntimeError("both events must be recorded before the time between them is asked")
        return (end.seconds - self.seconds) * 1e3


def new_stream() -> Any:
    """Return a new stream of the current device; on CPU a `HostStream`."""
    return _module().Stream() if is_accelerated() else HostStream()


def current_stream() -> Any:
    """Return the stream that work of this thread goes to; on CPU a `HostStream`."""
    return _module().current_stream() if is_accelerated() else HostStream()


def use_stream(stream: Any) -> contextlib.AbstractContextManager[Any]:
    """Context manager: work inside goes to `stream`."""
    return _module().stream(stream) if is_accelerated() else contextlib.nullcontext(stream)


def keep_for(tensor: torch.Tensor, stream: Any) -> None:
    """Let the memory of `tensor` be used again only after the work that `stream` has now (no effect on CPU)."""
    if is_accelerated():
        tensor.record_stream(stream)


def new_event(timing: bool = False) -> Any:
    """Return a new event with `record`, `wait`, `synchronize`, `query` and, with `timing`, `elapsed_time` (ms)."""
    return _module().Event(enable_timing=timing) if is_accelerated() else HostEvent()


# ---------------------------------------------------------------------------------------------------------------- speed


@dataclass(frozen=True)
class _Peak:
    """Dense FLOP/s of one device. `half` is bf16 and fp16 with fp32 accumulation; 0 where the type has no unit."""

    pattern: str
    half: float
    tf32: float
    fp32: float
    fp8: float
    source: str


# First match wins. Vendors print the figure with 2:4 sparsity for several of these; kept here is the dense one (half).
_PEAKS = (
    _Peak(r"GB200|B300", 2500e12, 1250e12, 80e12, 5000e12, "NVIDIA Blackwell data sheet, dense"),
    _Peak(r"B200", 2250e12, 1125e12, 75e12, 4500e12, "NVIDIA B200 data sheet, dense"),
    _Peak(r"H100 PCIe", 756e12, 378e12, 51e12, 1513e12, "NVIDIA H100 PCIe data sheet, dense"),
    _Peak(r"H100 NVL", 835e12, 417e12, 60e12, 1671e12, "NVIDIA H100 NVL data sheet, dense"),
    _Peak(r"H100|H200|H800|GH200", 989e12, 494e12, 67e12, 1979e12, "NVIDIA H100/H200 SXM data sheet, dense"),
    _Peak(r"H20\b", 148e12, 74e12, 44e12, 296e12, "NVIDIA H20 data sheet, dense"),
    _Peak(r"A100|A800", 312e12, 156e12, 19.5e12, 0, "NVIDIA A100 data sheet, dense"),
    _Peak(r"L40S", 362e12, 183e12, 91.6e12, 733e12, "NVIDIA L40S data sheet, dense"),
    _Peak(r"\bL4\b", 121e12, 60e12, 30.3e12, 242e12, "NVIDIA L4 data sheet, dense"),
    _Peak(r"\bA10\b", 125e12, 62.5e12, 31.2e12, 0, "NVIDIA A10 data sheet, dense"),
    _Peak(r"RTX 5090", 209.5e12, 104.8e12, 104.8e12, 419e12, "NVIDIA RTX Blackwell whitepaper, fp32 accumulation"),
    _Peak(r"RTX 4090", 165.2e12, 82.6e12, 82.6e12, 330.3e12, "NVIDIA Ada whitepaper, fp32 accumulation"),
    _Peak(r"RTX 3090", 71e12, 35.6e12, 35.6e12, 0, "NVIDIA Ampere GA102 whitepaper, fp32 accumulation"),
    _Peak(r"V100", 125e12, 15.7e12, 15.7e12, 0, "NVIDIA V100 data sheet (fp16)"),
    _Peak(r"\bT4\b", 65e12, 8.1e12, 8.1e12, 0, "NVIDIA T4 data sheet (fp16)"),
    _Peak(r"910B4", 280e12, 0, 0, 0, "Huawei Atlas 800T A2 data sheet, 280 TFLOPS variant"),
    _Peak(r"910B3", 313e12, 0, 0, 0, "Huawei Atlas 800T A2 data sheet, 313 TFLOPS variant"),
    _Peak(r"910B", 376e12, 0, 0, 0, "Huawei Atlas 800T A2 data sheet, 376 TFLOPS variant"),
    _Peak(r"910", 256e12, 0, 0, 0, "Huawei Atlas 800 (model 9000) data sheet, 256 TFLOPS variant"),
)


def _published_peak(name: str, dtype: torch.dtype) -> tuple[float, str] | None:
    """Dense FLOP/s of the device called `name`, and where the figure is from; None when no table row knows it."""
    row = next((row for row in _PEAKS if re.search(row.pattern, name, re.IGNORECASE)), None)
    if row is None:
        return None
    if dtype.itemsize == 1:
        value = row.fp8
    elif dtype.itemsize == 2:
        value = row.half
    else:
        value = row.tf32 if torch.get_float32_matmul_precision() != "highest" else row.fp32
    return (value, row.source) if value else None


@functools.cache
def _measured_peak(kind: str, dtype: torch.dtype) -> tuple[float, str]:
    """FLOP/s of a square matmul of `dtype`, best of several within about 0.2 s."""
    size = 512 if kind == "cpu" else 8192
    # ramps, not random numbers: a measurement must not move the generators of a run
    left, right = (torch.linspace(-1, 1, size * size, device=current_device()).view(size, size).to(dtype),) * 2
    best = float("inf")
    stop = time.perf_counter() + 0.2
    for attempt in range(1000):
        start = time.perf_counter()
        torch.mm(left, right)
        synchronize()
        now = time.perf_counter()
        if attempt:  # the first call pays for the library's start
            best = min(best, now - start)
            if now > stop:
                break
    return 2 * size**3 / best, f"measured here: best {size} x {size} matmul in {dtype}"


def _peak(dtype: torch.dtype) -> tuple[float, str]:
    if is_accelerated():
        published = _published_peak(device_name(), dtype)
        if published:
            return published
    # no matmul is defined for one-byte types without scales, so an unlisted device is measured in bf16
    return _measured_peak(device_type(), torch.bfloat16 if dtype.itemsize == 1 else dtype)


def peak_flops(dtype: torch.dtype) -> float:
    """Return the dense FLOP/s of this device in `dtype`, the denominator of MFU.

    From a table of data sheets for known accelerators. CPUs and unknown accelerators are measured once per process by
    a short matmul; `peak_flops_source` says which. float32 counts TF32 units when
    `torch.get_float32_matmul_precision` allows them.
    """
    return _peak(dtype)[0]


def peak_flops_source(dtype: torch.dtype) -> str:
    """Return where the figure of `peak_flops` comes from: a data sheet, or "measured here: ..."."""
    return _peak(dtype)[1]


# ------------------------------------------------------------------------------------------------------------- features


def _capability() -> tuple[int, int]:
    """CUDA compute capability; (0, 0) on anything else."""
    return torch.cuda.get_device_capability() if device_type() == "cuda" else (0, 0)


def _bf16() -> bool:
    if device_type() == "cuda":
        return torch.cuda.is_bf16_supported(including_emulation=False)
    return True


def _flash_attention() -> bool:
    if device_type() == "cuda":
        return torch.backends.cuda.is_flash_attention_available() and _capability() >= (8, 0)
    return True  # the CPU has its own flash kernel, and torch_npu maps SDPA to its fused attention


def _symmetric_memory() -> bool:
    return _capability() >= (9, 0) and sys.platform == "linux" and device_count() > 1


def _installed(package: str, capability: tuple[int, int]) -> bool:
    return _capability() >= capability > (0, 0) and importlib.util.find_spec(package) is not None


_FEATURES: dict[str, Callable[[], bool]] = {
    "bf16": _bf16,
    "flash_attention": _flash_attention,
    "efficient_attention": lambda: device_type() == "cuda",
    "fused_adamw": lambda: device_type() in ("cpu", "cuda"),
    "streams": is_accelerated,
    "symmetric_memory": _symmetric_memory,
    "float8": lambda: _installed("torchao", (8, 9)),
    "triton": lambda: _installed("triton", (7, 0)),
    "liger": lambda: _installed("triton", (7, 0)) and _installed("liger_kernel", (7, 0)),
}


def features() -> list[str]:
    """Return the names `supports` knows."""
    return list(_FEATURES)


def supports(feature: str) -> bool:
    """Whether this device (and what is installed beside torch) can do `feature`; see `features` for the names."""
    if feature not in _FEATURES:
        raise ModelLinkError(f"unknown device feature {feature!r}.{suggest(feature, _FEATURES)}")
    return _FEATURES[feature]()


# fused attention that returns its log-sum-exp, the preferred one first (the rows of `models.blockwise.KERNELS`)
_ATTENTION_KERNELS = {"cpu": ("host",), "cuda": ("flash", "efficient")}


@functools.cache
def attention_kernels(kind: str) -> tuple[str, ...]:
    """Names of the fused attention kernels for tensors on a device of this `kind`; none where no such kernel is known.

    torch_npu's `npu_fusion_attention` is not among them: it returns the maximum and the sum of a softmax, each eight
    times, instead of a log-sum-exp, and its backward wants those of the very block it is asked for.
    """
    names = _ATTENTION_KERNELS.get(kind, ())
    return tuple(name for name in names if name != "flash" or supports("flash_attention"))
