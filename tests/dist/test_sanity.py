"""`--sanity-checks` notices one replica that differs in one bit and names it; what is meant to differ may."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from equivalence import MODELS
from spawn import run_distributed

from modellink.config.schema import ModelConfig, ParallelConfig
from modellink.errors import RunFailure
from modellink.optim.local import local_tensor
from modellink.parallel.apply import ParallelModel, build_model
from modellink.parallel.sanity import check_replicas
from modellink.parallel.topology import Topology

pytestmark = pytest.mark.dist

# layout -> parameter that one rank changes, and the rank
LAYOUTS: list[tuple[dict[str, Any], str, int]] = [
    ({"tensor_parallel": 4}, "layers.1.input_layernorm.weight", 3),
    ({"tensor_parallel": 2, "sequence_parallel": True, "zero_stage": 1}, "norm.weight", 1),
    ({"zero_stage": 0}, "layers.0.self_attn.q_proj.weight", 2),
    ({"zero_stage": 3, "data_parallel_replicas": 2}, "layers.3.mlp.up_proj.weight", 1),
    ({"pipeline_parallel": 4}, "embed_tokens.weight", 0),
]


def verdict(model: ParallelModel) -> str:
    try:
        check_replicas(model)
    except RunFailure as failure:
        return str(failure)
    return ""


def spoil(rank: int, world_size: int) -> list[tuple[str, str]]:
    config, outcomes = ModelConfig(**MODELS["tied"]).resolve(), []
    for layout, name, culprit in LAYOUTS:
        parallel = ParallelConfig(**layout)
        model = build_model(config, parallel, Topology(parallel), torch.device("cpu"), torch.float32, seed=3)
        before = verdict(model)
        if rank == culprit:
            shard = local_tensor(dict(model.named_parameters())[name]).view(-1)
            shard.view(torch.int32)[0] ^= 1  # the lowest bit of the first value
        outcomes.append((before, verdict(model)))
    return outcomes


def test_one_flipped_bit_is_found() -> None:
    per_rank = run_distributed(spoil, 4)
    for case, (layout, name, culprit) in enumerate(LAYOUTS):
        assert {outcomes[case][0] for outcomes in per_rank} == {""}, layout
        told = {outcomes[case][1] for outcomes in per_rank} - {""}
        assert told and all(name in text and str(culprit) in text for text in told), (layout, told)
