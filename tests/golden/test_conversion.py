"""Memory of a conversion in every direction, on a model that is larger than it may take; and what comes back."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors import safe_open

from modellink.checkpoint.hf import expected_shapes, save_hf
from modellink.config.schema import ModelConfig

# VmHWM is reset before each conversion, so that each has its own peak
CHAIN = """
import json, re, sys
from pathlib import Path
from modellink.checkpoint.convert import convert
peaks = {}
folder, steps = Path(sys.argv[1]), json.loads(sys.argv[2])
for before, after, to, sizes in steps:
    Path("/proc/self/clear_refs").write_text("5")
    convert(folder / before, folder / after, to, *sizes, workers=2, progress=False)
    status = Path("/proc/self/status").read_text()
    peaks[after] = int(re.search(r"VmHWM:\\s+(\\d+) kB", status)[1]) * 1024
print(json.dumps(peaks))
"""
STEPS: list[tuple[str, str, str, list[int]]] = [
    ("hf", "mcore", "mcore", [2, 2]),
    ("mcore", "native", "native", []),
    ("native", "legacy", "legacy", [1, 2]),
    ("legacy", "back", "hf", []),
    ("hf", "direct", "native", []),
    ("direct", "again", "hf", []),
]


def files_tensors(folder: Path) -> dict[str, torch.Tensor]:
    found = {}
    for file in folder.glob("*.safetensors"):
        with safe_open(file, framework="pt") as handle:
            found |= {name: handle.get_tensor(name) for name in handle.keys()}  # noqa: SIM118
    return found


@pytest.mark.skipif(not Path("/proc/self/clear_refs").exists(), reason="peak memory is read from /proc")
def test_memory_is_that_of_the_largest_tensor(tmp_path: Path, root: Path) -> None:
    """Peak memory <= twice the largest tensor + 500 MB, libraries and mapped files included, verification too."""
    config = ModelConfig(
        num_layers=12,
        hidden_size=1024,
        ffn_hidden_size=4096,
        num_attention_heads=16,
        num_key_value_heads=8,
        vocab_size=16000,
        padded_vocab_size=16000,
        max_position_embeddings=512,
        gated_mlp=True,
        activation="silu",
        normalization="RMSNorm",
        position_embedding="rope",
        tie_word_embeddings=False,
        qkv_bias=False,
        attention_output_bias=False,
        mlp_bias=False,
    ).resolve()
    shapes = expected_shapes(config)
    # one set of random values under all names of a shape, in another order each time
    values = {shape: torch.empty(shape, dtype=torch.bfloat16).normal_(0.0, 0.02) for shape in set(shapes.values())}
    state = {name: values[shape].roll(number, 0) for number, (name, shape) in enumerate(shapes.items())}
    largest, total = (choose(tensor.nbytes for tensor in state.values()) for choose in (max, sum))
    bound = 2 * largest + 500_000_000
    save_hf(tmp_path / "hf", state.items(), config, max_shard_bytes=150_000_000)
    command = [sys.executable, "-c", CHAIN, str(tmp_path), json.dumps(STEPS)]
    environment = os.environ | {"PYTHONPATH": str(root), "OMP_NUM_THREADS": "1"}
    done = subprocess.run(command, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    peaks = json.loads(done.stdout)
    assert peaks.keys() == {after for _, after, _, _ in STEPS}
    assert {after: peak for after, peak in peaks.items() if peak > bound} == {}
    assert min(peaks.values()) + total > bound  # a conversion that held the model would not have passed
    source = files_tensors(tmp_path / "hf")
    for name in ("back", "again"):
        found = files_tensors(tmp_path / name)
        assert found.keys() == source.keys()
        assert all(torch.equal(found[each], tensor) for each, tensor in source.items())
        report = json.loads((tmp_path / name / "conversion_report.json").read_text())
        assert report["bytes"] == total and report["verification"]["logits_max_difference"] == 0.0
