"""Every kind of recomputation trains like one process that keeps everything, at every layout it has to live with."""

from __future__ import annotations

from typing import Any

import pytest
from equivalence import run_cases, wrong_cases
from spawn import run_distributed

TOLERANCE = 1e-5
TP, SP = {"tensor_parallel": 2}, {"tensor_parallel": 2, "sequence_parallel": True}
CHUNKS = {"pipeline_parallel": 2, "layers_per_virtual_stage": 1}
ZERO3 = {"zero_stage": 3}
BLOCK = {"recompute_granularity": "full", "recompute_method": "block"}
OPERATORS, ACTIVATION = {"recompute_granularity": "operators"}, {"recompute_activation_function": True}
SHARED = TP | {"distribute_saved_activations": True}


def modules(*names: str) -> dict[str, Any]:
    return {"recompute_granularity": "selective", "recompute_modules": list(names)}


CASES: list[tuple[str, dict[str, Any], int]] = [
    ("llama", SP | modules("core_attn", "layernorm", "mlp_act"), 2),
    ("llama", ZERO3 | modules("layernorm", "mlp"), 2),
    ("gpt", TP | ACTIVATION, 2),
    ("moe", SP | modules("moe_act", "layernorm"), 2),
    ("moe", ZERO3 | ACTIVATION, 2),
    ("moe", {"expert_parallel": 2} | ZERO3 | modules("moe"), 2),
    ("deepseek", SP | modules("mla_up_proj", "mlp", "moe"), 2),
    ("deepseek", ZERO3 | modules("mla_up_proj", "core_attn", "moe_act", "mlp_act"), 2),
    ("deepseek", SP | ACTIVATION, 2),
    ("deepseek", CHUNKS | modules("mla_up_proj"), 2),
    ("sigmoid", SP | modules("core_attn", "moe_act"), 2),
    ("llama", SP | OPERATORS, 2),
    ("moe", ZERO3 | OPERATORS, 2),
    ("deepseek", SP | OPERATORS, 2),
    ("deepseek", {"expert_parallel": 2} | OPERATORS, 2),
    ("llama", {"context_parallel": 2, "context_parallel_algo": "megatron_cp_algo"} | OPERATORS, 2),
    ("llama", CHUNKS | OPERATORS, 2),
    ("tied", CHUNKS | BLOCK | {"recompute_num_layers": 1, "recompute_layers_per_pp_rank": True}, 2),
    ("llama", CHUNKS | BLOCK | {"recompute_layers_per_stage": [2, 1]}, 2),
    ("moe", CHUNKS | BLOCK | ACTIVATION | {"recompute_num_layers": 1, "recompute_layers_per_pp_rank": True}, 2),
    ("llama", BLOCK | ACTIVATION | {"recompute_num_layers": 1, "recompute_activation_function_num_layers": 2}, 2),
    ("llama", SHARED | {"recompute_granularity": "full"}, 2),
    ("deepseek", SHARED | {"recompute_granularity": "full", "recompute_num_layers": 2}, 2),
    ("tied", SHARED | BLOCK | {"recompute_num_layers": 3}, 1),
    ("deepseek", ZERO3 | {"recompute_layers": ["0:layer", "1-2:mla_up_proj+moe_act", "3:operators"]}, 2),
]


@pytest.mark.dist
def test_recomputation_equals_one_process() -> None:
    assert not wrong_cases(CASES, run_distributed(run_cases, 2, CASES, [], timeout=200), TOLERANCE)
