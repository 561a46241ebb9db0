"""A Hugging Face folder straight into models that are sharded over four gloo processes, and bad folders on two."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from spawn import run_distributed
from torch import Tensor
from torch.distributed.tensor import DTensor

from modellink.checkpoint.hf import load_hf, read_config
from modellink.config.schema import ParallelConfig
from modellink.errors import ModelLinkError
from modellink.models.decoder import Decoder
from modellink.parallel.apply import build_model
from modellink.parallel.topology import Topology

PADDED = 256
LAYOUTS: list[dict[str, Any]] = [
    {"tensor_parallel": 4},
    {"tensor_parallel": 2, "zero_stage": 3},
    {"tensor_parallel": 2, "zero_stage": 1},
    {"zero_stage": 2, "data_parallel_replicas": 2},
    {"pipeline_parallel": 2, "tensor_parallel": 2},
    {"pipeline_parallel": 2, "zero_stage": 1},
]


def make(folder: Path, tied: bool) -> None:
    torch.manual_seed(0)
    config = transformers.Qwen2Config(
        vocab_size=203, hidden_size=48, intermediate_size=80, num_hidden_layers=3, num_attention_heads=8,
        num_key_value_heads=4, max_position_embeddings=64, tie_word_embeddings=tied,
    )  # fmt: skip
    model = transformers.Qwen2ForCausalLM(config)
    for parameter in model.parameters():
        parameter.data.normal_()
    model.save_pretrained(folder, max_shard_size="60KB")


def whole(folder: Path) -> dict[str, Tensor]:
    model = Decoder(dataclasses.replace(read_config(folder), padded_vocab_size=PADDED))
    load_hf(model, folder, progress=False)
    return model.state_dict()


def load_everywhere(rank: int, world_size: int, folder: str) -> int:
    """Number of parameters compared on this rank, over all layouts."""
    config = dataclasses.replace(read_config(folder), padded_vocab_size=PADDED)
    expected, compared = whole(Path(folder)), 0
    for layout in LAYOUTS:
        parallel = ParallelConfig(**layout)
        topology = Topology(parallel)
        model = build_model(config, parallel, topology, torch.device("cpu"), torch.float32, seed=None)
        for chunk in model.chunks:
            load_hf(chunk, folder, progress=False)
        for name, parameter in model.named_parameters():
            value = parameter.full_tensor() if isinstance(parameter, DTensor) else parameter
            assert torch.equal(value, expected[name]), (layout, name)
            compared += 1
    return compared


@pytest.mark.parametrize("tied", [False, True])
def test_every_layout_gets_its_own_pieces(tied: bool, tmp_path: Path) -> None:
    make(tmp_path, tied)
    counts = run_distributed(load_everywhere, 4, str(tmp_path))
    parameters = 3 * 12 + 3 - tied
    assert all(4 * parameters < count < 6 * parameters for count in counts)


def fail(rank: int, world_size: int, folder: str) -> str:
    parallel = ParallelConfig(tensor_parallel=2)
    config = dataclasses.replace(read_config(folder), padded_vocab_size=PADDED)
    model = build_model(config, parallel, Topology(parallel), torch.device("cpu"), torch.float32, seed=None)
    try:
        load_hf(model.chunks[0], folder, progress=False)
    except ModelLinkError as error:
        return str(error)
    return ""


def test_a_damaged_file_is_named_on_every_rank(tmp_path: Path) -> None:
    make(tmp_path, tied=False)
    file = sorted(tmp_path.glob("*.safetensors"))[-1]
    file.write_bytes(file.read_bytes()[:-100])
    for sentence in run_distributed(fail, 2, str(tmp_path), timeout=60):
        assert f"{file} is damaged or cut short" in sentence
