"""Swapping, sliced losses and optimizer states in host memory, at other layouts: the numbers of one process."""

from __future__ import annotations

from typing import Any

import pytest
from equivalence import compare, name_of, train
from spawn import run_distributed

pytestmark = pytest.mark.dist

TOLERANCE = 1e-5
SP, PP = {"tensor_parallel": 2, "sequence_parallel": True}, {"pipeline_parallel": 2}
SWAP: dict[str, Any] = {"swap_attention": True}
SWAP_ALL = SWAP | {"swap_modules": "input_layernorm,self_attention,post_attention_layernorm,mlp"}
BLOCK = {"recompute_granularity": "full", "recompute_method": "block", "recompute_num_layers": 1}
HOST: dict[str, Any] = {"cpu_optimizer": True}
MUON: dict[str, Any] = {"optimizer": "muon"}
Case = tuple[str, dict[str, Any], int, dict[str, Any]]


def slices(count: int) -> dict[str, int]:
    return {"output_layer_slice_num": count}


# (model, layout, rows of a micro-batch, optimizer); 16 positions, 8 on a rank with SP
CASES: list[Case] = [
    ("llama", SP | SWAP, 2, HOST),
    ("gemma2", SP | SWAP_ALL | slices(8), 2, {}),
    ("deepseek", SP | SWAP_ALL | {"recompute_granularity": "selective"}, 2, {}),
    ("tied", {"tensor_parallel": 2} | slices(5), 2, {}),
    ("tied", PP | SWAP_ALL | slices(3), 2, HOST | MUON),
    ("deepseek", PP | SWAP | {"layers_per_virtual_stage": 1} | slices(16), 2, {}),
    ("llama", {"zero_stage": 1} | SWAP_ALL | BLOCK | slices(4), 2, HOST),
    ("gemma2", {"zero_stage": 3} | SWAP_ALL | slices(7), 2, {}),
    ("moe", {"zero_stage": 3, "expert_parallel": 2} | SWAP_ALL, 2, HOST | MUON),
    ("sinks", {"context_parallel": 2, "context_parallel_algo": "megatron_cp_algo"} | SWAP | slices(3), 2, HOST),
]
HALF: list[Case] = [
    ("tied", SP | SWAP_ALL | slices(3), 2, HOST | {"bf16": True, "split_master": True}),
    ("deepseek", PP | SWAP_ALL | slices(4), 2, HOST | {"bf16": True}),
    ("llama", {"zero_stage": 2} | SWAP | slices(4), 2, HOST | {"bf16": True}),
]


def run(rank: int, world_size: int, cases: list[Case]) -> list[dict[str, Any]]:
    return [train(model, parallel, rows, **optimizer) for model, parallel, rows, optimizer in cases]


@pytest.fixture(scope="module")
def results() -> list[list[dict[str, Any]]]:
    return run_distributed(run, 2, [*CASES, *HALF])


def alone(case: Case, **without: Any) -> dict[str, Any]:
    """The same model and optimizer in one process, with nothing of this module."""
    model, _, rows, optimizer = case
    return train(model, {}, rows, **{key: value for key, value in (optimizer | without).items() if key not in HOST})


def test_layouts_equal_one_process(results: list[list[dict[str, Any]]]) -> None:
    wrong, references = {}, {}
    for place, case in enumerate(CASES):
        key = str((case[0], case[2], MUON.items() <= case[3].items()))
        if key not in references:
            references[key] = alone(case)
        errors = compare([rank[place] for rank in results], references[key])
        if max(errors.values()) > TOLERANCE:
            wrong[name_of(case[:3])] = errors
    assert not wrong


def test_half_precision_is_no_further_from_fp32_than_one_process(results: list[list[dict[str, Any]]]) -> None:
    wrong = {}
    for place, case in enumerate(HALF, start=len(CASES)):
        exact = alone(case, bf16=False, split_master=False)
        own = compare([alone(case)], exact)
        errors = compare([rank[place] for rank in results], exact)
        if any(errors[kind] > 3 * own[kind] + 1e-3 for kind in errors):
            wrong[name_of(case[:3])] = (errors, own)
    assert not wrong


def test_slices_of_one_process_differ_in_the_last_bits_only() -> None:
    whole = train("tied", {}, 2)
    for count in (2, 3, 16, 40):
        errors = compare([train("tied", slices(count), 2)], whole)
        assert max(errors["loss"], errors["evaluation"], errors["norm"]) <= 1e-6, (count, errors)
        # through four layers and three steps; the gradients of the loss alone: tests/unit/test_sliced_losses.py
        assert errors["gradient"] <= TOLERANCE, (count, errors)
