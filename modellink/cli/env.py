"""`modellink env`: versions, devices, communication backends and the kernels that are active on this machine."""

from __future__ import annotations

import importlib.metadata
import json
import platform
from collections.abc import Sequence
from typing import Any

from modellink.errors import ModelLinkError

USAGE = (
    "usage: modellink env [--json]\n\nShow versions, devices, backends and active kernels; --json prints one object."
)
# distribution -> the extra of this package that installs it ("" for a dependency that is always there)
PACKAGES = {
    "torch": "",
    "torch-npu": "",
    "numpy": "",
    "transformers": "",
    "tokenizers": "",
    "safetensors": "",
    "sentencepiece": "",
    "pyarrow": "",
    "triton": "gpu",
    "liger-kernel": "gpu",
    "torchao": "gpu",
    "peft": "test",
    "fastapi": "serve",
    "datasets": "hub",
    "lm-eval": "lm-eval",
    "wandb": "",
}
# feature of `device.supports` -> what it brings, and what to do where it is absent
KERNELS = {
    "flash_attention": ("SDPA flash attention", "needs a CUDA GPU of compute capability 8.0 or newer"),
    "efficient_attention": ("SDPA memory-efficient attention", "needs a CUDA GPU"),
    "math_attention": ("SDPA reference attention", "always there"),
    "fused_adamw": ("AdamW in one kernel", "needs CPU or CUDA; elsewhere the for-each form runs"),
    "bf16": ("bfloat16 arithmetic", "needs a GPU of compute capability 8.0 or newer; use --fp16 here"),
    "float8": ("float8 matmuls by torchao", "needs compute capability 8.9 and pip install -e '.[gpu]'"),
    "liger": ("fused RMSNorm, SwiGLU, cross entropy", "needs a CUDA GPU and pip install -e '.[gpu]'"),
    "triton": ("torch.compile on the GPU", "needs a CUDA GPU and pip install -e '.[gpu]'"),
    "symmetric_memory": ("async tensor parallelism", "needs two GPUs of compute capability 9.0 on one machine"),
    "streams": ("communication beside computation", "needs an accelerator"),
}


def run(argv: Sequence[str]) -> int:
    """Print the tables, or one JSON object with `--json`."""
    unknown = [text for text in argv if text not in ("--json", "--debug", "-h", "--help")]
    if unknown:
        raise ModelLinkError(f"env takes no {unknown[0]!r}: only --json.")
    if "-h" in argv or "--help" in argv:
        print(USAGE)
        return 0
    facts = collect()
    if "--json" in argv:
        print(json.dumps(facts, indent=2))
    else:
        _print_tables(facts)
    return 0


def _version(package: str) -> str | None:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return None


def collect() -> dict[str, Any]:
    """Return what `modellink env --json` prints: `versions`, `device`, `backends`, `kernels`."""
    import torch
    import torch.distributed as dist

    import modellink
    from modellink import device

    versions = {"modellink": modellink.__version__, "python": platform.python_version()}
    precision = torch.bfloat16 if device.supports("bf16") else torch.float16
    return {
        "versions": versions | {package: _version(package) for package in PACKAGES},
        "device": {
            "type": device.device_type(),
            "name": device.device_name(),
            "count": device.device_count(),
            "memory_gib": round(device.total_memory() / 2**30, 1),
            "peak_tflops": round(device.peak_flops(precision) / 1e12, 3),
            "peak_source": device.peak_flops_source(precision),
            "toolkit": device.toolkit_version(),
            "threads": torch.get_num_threads(),
            "system": platform.platform(),
        },
        "backends": {
            "used": device.backend(),
            "gloo": dist.is_gloo_available(),
            "nccl": dist.is_nccl_available(),
            "mpi": dist.is_mpi_available(),
        },
        "kernels": {name: name == "math_attention" or device.supports(name) for name in KERNELS},
    }


def _print_tables(facts: dict[str, Any]) -> None:
    from rich.console import Console
    from rich.table import Table

    console = Console()
    versions = Table("package", "version", "if missing", title="versions")
    for package, version in facts["versions"].items():
        extra = PACKAGES.get(package, "")
        remedy = f"pip install -e '.\\[{extra}]'" if extra else f"pip install {package} (optional)"
        versions.add_row(package, version or "-", "" if version else remedy)
    described = Table("what", "value", title="device and backends")
    for what, value in (facts["device"] | {f"backend {k}": v for k, v in facts["backends"].items()}).items():
        described.add_row(what.replace("_", " "), _word(value))
    kernels = Table("kernel", "active", "what it brings", "if absent", title="kernels")
    for name, active in facts["kernels"].items():
        brings, remedy = KERNELS[name]
        kernels.add_row(name, _word(active), brings, "" if active else remedy.replace("[", "\\["))
    for table in (versions, described, kernels):
        console.print(table)


def _word(value: object) -> str:
    if isinstance(value, bool):
        return "yes" if value else "no"
    return "-" if value is None else str(value)
