"""Reference folders that other software made: logits, loss, gradient norm and greedy tokens of its own forward pass.

llama2_gqa and qwen2 come from transformers, internlm1, aquila and aquila2_gqa from the families' original code.
"""

from __future__ import annotations

import dataclasses
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F

from modellink.checkpoint.hf import load_hf, read_config
from modellink.models.cache import KVCache
from modellink.models.decoder import Decoder

FOLDERS = {
    "llama": "megatron/hf/llama2_gqa",
    "qwen2": "megatron/hf/qwen2",
    "internlm": "parity/internlm1",
    "aquila": "parity/aquila",
    "aquila with grouped queries": "parity/aquila2_gqa",
}


@pytest.mark.parametrize("name", FOLDERS)
def test_reference_figures(name: str, shared: Path) -> None:
    folder = shared / FOLDERS[name]
    reference = np.load(folder / "ref.npz")
    config = read_config(folder)
    model = Decoder(dataclasses.replace(config, padded_vocab_size=config.vocab_size)).eval()
    load_hf(model, folder, progress=False)
    tokens = torch.tensor(reference["input_ids"])
    logits = model(tokens)
    tolerance = 1e-4 if "megatron" in FOLDERS[name] else 2e-4
    torch.testing.assert_close(logits, torch.tensor(reference["logits"]), atol=tolerance, rtol=0)

    loss = F.cross_entropy(logits[:, :-1].flatten(0, 1), tokens[:, 1:].flatten())
    loss.backward()
    norm = torch.stack([parameter.grad.norm() for parameter in model.parameters()]).norm()
    assert loss.item() == pytest.approx(reference["loss"].item(), abs=1e-5)
    assert norm.item() == pytest.approx(reference["grad_norm"].item(), rel=1e-4)

    steps = reference["greedy"].shape[1]
    with torch.no_grad():
        cache, step, found = KVCache(config.num_layers), tokens, []
        for _ in range(steps):
            step = model(step, cache=cache, last_only=True).argmax(-1)
            found.append(step)
    assert torch.equal(torch.cat(found, 1), torch.tensor(reference["greedy"]))
