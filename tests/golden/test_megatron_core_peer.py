"""Megatron-Core itself reads what is written here: its own GPTModel (local spec, on the CPU) takes every rank's file
with no key missing, left over or of another shape, and computes the logits of the source.

Megatron-Core runs in a process of its own (`megatron_core/peer.py`), with the options the files state.
"""

from __future__ import annotations

import importlib.metadata
import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import transformers

import modellink


def installed() -> str:
    try:
        return importlib.metadata.version("megatron-core")
    except importlib.metadata.PackageNotFoundError:
        return "missing"


# what stands in for the accelerator is fitted to these versions
pytestmark = pytest.mark.skipif(
    not installed().startswith("0.16."),
    reason=f"needs megatron-core 0.16, it is {installed()}: pip install --no-deps megatron-core==0.16.1",
)

PEER = Path(__file__).parent / "megatron_core" / "peer.py"
COMMON: dict[str, Any] = {
    **{"vocab_size": 77, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 4, "rms_norm_eps": 1e-5},
    **{"num_attention_heads": 4, "num_key_value_heads": 2, "max_position_embeddings": 64, "rope_theta": 5e5},
    **{"tie_word_embeddings": False, "dtype": "float32"},
}
EXPERTS = {"num_experts_per_tok": 2}
SHARED = {"moe_intermediate_size": 16, "shared_expert_intermediate_size": 32, "num_experts": 4}
MODELS: dict[str, Any] = {
    "llama": transformers.LlamaConfig(**COMMON),
    "llama tied": transformers.LlamaConfig(**COMMON | {"tie_word_embeddings": True}),
    "qwen2": transformers.Qwen2Config(**COMMON),
    "mixtral": transformers.MixtralConfig(**COMMON | EXPERTS, num_local_experts=4, head_dim=8),
    "qwen2 moe": transformers.Qwen2MoeConfig(**COMMON | EXPERTS | SHARED),
}
WITH_EXPERTS = ("mixtral", "qwen2 moe")
CASES = [(name, False) for name in MODELS] + [(name, True) for name in WITH_EXPERTS]  # grouped experts or not
TOKENS = torch.randint(0, 77, (2, 11), generator=torch.Generator().manual_seed(1))


def make_source(name: str, folder: Path) -> torch.Tensor:
    """A folder of transformers with random weights and biases; the logits [B, S, V] of TOKENS there."""
    torch.manual_seed(0)
    model = transformers.AutoModelForCausalLM.from_config(MODELS[name]).eval()
    with torch.no_grad():
        for key, value in model.named_parameters():
            value.normal_(1.0 if "norm" in key else 0.0, 0.1)
        model.save_pretrained(folder)
        return model(TOKENS).logits


def ask_megatron(folders: list[Path], tmp_path: Path) -> list[list[str]]:
    """The ranks of every folder that Megatron-Core loaded; of a folder of one rank it leaves the logits beside it."""
    jobs = [{"folder": str(folder), "tokens": TOKENS.tolist(), "logits": f"{folder}.npy"} for folder in folders]
    (tmp_path / "jobs.json").write_text(json.dumps(jobs))
    environment = os.environ | {"OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": "", "PYTHONWARNINGS": "ignore"}
    command = [sys.executable, str(PEER), str(tmp_path / "jobs.json")]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=300, check=False)
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout.splitlines()[-1])


def test_logits_are_those_of_megatron_core(tmp_path: Path) -> None:
    """One rank, experts apart and grouped: Megatron-Core, transformers and this package compute the same numbers."""
    wanted = {name: make_source(name, tmp_path / name) for name in MODELS}
    folders = [tmp_path / f"{name}{', grouped' if grouped else ''}, Megatron" for name, grouped in CASES]
    for (name, grouped), folder in zip(CASES, folders, strict=True):
        modellink.convert(tmp_path / name, folder, "mcore", grouped_experts=grouped, vocab_multiple=16, verify=False)
    assert ask_megatron(folders, tmp_path) == [["mp_rank_00"]] * len(CASES)
    differences: dict[str, list[float]] = {}
    for (name, _), folder in zip(CASES, folders, strict=True):
        megatrons = torch.from_numpy(np.load(f"{folder}.npy"))[..., :77]
        model = modellink.GPTModel.from_pretrained(tmp_path / name, dtype="float32", device="cpu")
        with torch.no_grad():
            ours = model(TOKENS)[..., :77]
        assert megatrons.std() > 0.1  # logits that say something
        differences[folder.name] = [(megatrons - other).abs().max().item() for other in (wanted[name], ours)]
    print("largest difference of a logit from transformers and from this package:", differences)
    assert max(max(pair) for pair in differences.values()) <= 1e-5, differences


def test_every_rank_is_what_megatron_core_expects(tmp_path: Path) -> None:
    """Two tensor and two pipeline ranks, two expert ranks where there are experts."""
    for name in MODELS:
        make_source(name, tmp_path / name)
    folders = [tmp_path / f"{name}{', grouped' if grouped else ''}, Megatron" for name, grouped in CASES]
    for (name, grouped), folder in zip(CASES, folders, strict=True):
        modellink.convert(
            tmp_path / name, folder, "mcore", 2, 2, expert_parallel=2 if name in WITH_EXPERTS else 1,
            grouped_experts=grouped, vocab_multiple=16, verify=False,
        )  # fmt: skip
    for (name, _), folder, loaded in zip(CASES, folders, ask_megatron(folders, tmp_path), strict=True):
        assert len(loaded) == (8 if name in WITH_EXPERTS else 4)
        assert loaded == sorted(path.name for path in (folder / "iter_0000001").iterdir())
