"""What each layer recomputes, from flags: pure data, no model."""

from __future__ import annotations

from typing import Any

import pytest

from modellink.config.load import load_config
from modellink.config.recompute_plan import parse_layers, recompute_plan, spell_layers
from modellink.config.schema import ParallelConfig
from modellink.errors import ModelLinkError

BLOCK = {"recompute_granularity": "full", "recompute_method": "block"}


def plan(chunks: list[range], stage: int = 0, **options: Any) -> list[list[str]]:
    layers = max(layer for chunk in chunks for layer in chunk) + 1
    found = recompute_plan(ParallelConfig(**options), chunks, stage, layers)
    assert [sum(span.layers for span in spans) for spans in found] == [len(chunk) for chunk in chunks]
    return [[f"{span.layers}x{span}" if span.layers > 1 else str(span) for span in spans] for spans in found]


@pytest.mark.parametrize(
    ("options", "wanted"),
    [
        ({}, ["none"] * 5),
        ({"recompute_granularity": "full"}, ["layer"] * 5),
        ({"recompute_granularity": "full", "recompute_num_layers": 2}, ["2xlayer", "2xlayer", "layer"]),
        (BLOCK | {"recompute_num_layers": 2}, ["layer", "layer", "none", "none", "none"]),
        (BLOCK | {"recompute_num_layers": 9}, ["layer"] * 5),
        ({"recompute_granularity": "selective"}, ["core_attn"] * 5),
        (
            {"recompute_granularity": "selective", "recompute_modules": ["mlp", "layernorm"]},
            ["layernorm+mlp"] * 5,
        ),
        ({"recompute_granularity": "operators"}, ["operators"] * 5),
        ({"recompute_activation_function": True}, ["mlp_act+moe_act"] * 5),
        (
            BLOCK
            | {
                "recompute_num_layers": 1,
                "recompute_activation_function": True,
                "recompute_activation_function_num_layers": 2,
            },
            ["layer", "mlp_act+moe_act", "mlp_act+moe_act", "none", "none"],
        ),
        ({"recompute_layers": ["1-2:layer", "4:mlp+core_attn"]}, ["none", "layer", "layer", "none", "core_attn+mlp"]),
    ],
)
def test_one_chunk(options: dict[str, Any], wanted: list[str]) -> None:
    assert plan([range(5)], **options) == [wanted]


def test_a_count_over_virtual_stages_takes_turns() -> None:
    """Layer l of chunk v of V is recomputed if and only if l V + v < N."""
    chunks = [range(0, 3), range(6, 9)]
    for count in range(8):
        found = plan(chunks, **BLOCK, recompute_num_layers=count, recompute_layers_per_pp_rank=True)
        assert found == [["layer" if 2 * layer + v < count else "none" for layer in range(3)] for v in range(2)]
    per_chunk = plan(chunks, **BLOCK, recompute_num_layers=1)
    assert per_chunk == [["layer", "none", "none"]] * 2
    activation = {"recompute_activation_function": True, "recompute_activation_function_num_layers": 2}
    options = BLOCK | activation | {"recompute_num_layers": 1, "recompute_layers_per_pp_rank": True}
    act = "mlp_act+moe_act"
    assert plan(chunks, **options) == [["layer", act, "none"], [act, "none", "none"]]


def test_each_stage_has_its_own_count() -> None:
    listed = BLOCK | {"recompute_layers_per_stage": [3, 1]}
    assert plan([range(4)], 0, **listed) == [["layer", "layer", "layer", "none"]]
    assert plan([range(4, 8)], 1, **listed) == [["layer", "none", "none", "none"]]
    assert plan([range(0, 2), range(4, 6)], 0, **listed) == [["layer", "layer"], ["layer", "none"]]


def test_a_plan_by_layer_is_read_back_as_it_was_spelled() -> None:
    items = ["0-2:layer", "4:core_attn+mlp_act", "6-7:operators"]
    drops = parse_layers(items, 9)
    assert drops[3] == drops[8] == frozenset()
    assert spell_layers(drops) == items
    assert parse_layers(spell_layers(drops), 9) == drops


SMALL = (
    "--num-layers 4 --hidden-size 32 --num-attention-heads 4 --max-position-embeddings 64 --seq-length 32 --lr 1e-3 "
    "--micro-batch-size 1 --train-iters 20 --mock-data --vocab-size 64"
).split()
PIPELINE = ["--pipeline-model-parallel-size", "2"]
FULL = ["--recompute-granularity", "full"]


@pytest.mark.parametrize(
    ("flags", "world", "words"),
    [
        (["--recompute-modules", "mpl"], 1, ["mpl", "Did you mean 'mlp'"]),
        (["--recompute-modules", "layer"], 1, ["--recompute-modules takes", "--recompute-granularity full"]),
        ([*FULL, "--recompute-modules", "mlp"], 1, ["--recompute-modules", "selective, not full"]),
        (["--recompute-granularity", "operators", "--recompute-method", "block"], 1, ["leave it out with operators"]),
        (["--recompute-layers", "0-4:layer"], 1, ["0-4:layer", "0 to 3"]),
        (["--recompute-layers", "0:layer+mlp"], 1, ["layer and mlp exclude"]),
        (["--recompute-layers", "0:layer", *FULL], 1, ["--recompute-layers", "leave out --recompute-granularity full"]),
        (["--enable-recompute-layers-per-pp-rank", *FULL, *PIPELINE], 2, ["virtual stages", "there are none"]),
        (
            ["--enable-recompute-layers-per-pp-rank", *PIPELINE, "--num-layers-per-virtual-pipeline-stage", "1"],
            2,
            ["--recompute-method block"],
        ),
        (["--recomputation-layer-num", "1", "1", "1", *PIPELINE], 2, ["--recomputation-layer-num 1 1 1", "2 stage(s)"]),
        (["--recomputation-layer-num", "3", "0", *PIPELINE], 2, ["from 0 to the layers there (2 2)"]),
        (["--recompute-activation-function", *FULL], 1, ["--recompute-activation-function", "uniform", "block"]),
        (["--recompute-activation-function", "--recompute-activations"], 1, ["selective", "exclude"]),
        (["--auto-recompute-device-size", "0"], 1, ["--auto-recompute-device-size 0", "above 0"]),
        (
            ["--auto-recompute-device-size", "9", "--auto-recompute-profiling-step", "4"],
            1,
            ["--auto-recompute-profiling-step 4", "5 or more"],
        ),
        (["--auto-recompute-device-size", "9", *FULL], 1, ["leave out --recompute-granularity full"]),
        (["--auto-recompute-device-size", "9", "--compile"], 1, ["--compile"]),
    ],
)
def test_contradictions(flags: list[str], world: int, words: list[str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("WORLD_SIZE", str(world))
    with pytest.raises(ModelLinkError) as caught:
        load_config([*SMALL, "--global-batch-size", "4", *flags])
    assert all(word in str(caught.value) for word in words), caught.value


@pytest.mark.parametrize(
    ("flags", "world", "word"),
    [
        (["--recompute-modules", "moe_act"], 1, "moe_act: no effect"),
        (["--recompute-activation-function-num-layers", "2"], 1, "no effect without --recompute-activation-function"),
        (["--distribute-saved-activations", *FULL], 1, "one tensor-parallel rank"),
        (["--distribute-saved-activations", "--tensor-model-parallel-size", "2"], 2, "nothing is recomputed whole"),
        (
            ["--distribute-saved-activations", "--sequence-parallel", "--tensor-model-parallel-size", "2", *FULL],
            2,
            "shards them already",
        ),
        (["--auto-recompute-device-size", "9", "--auto-recompute-profiling-step", "20"], 1, "ends before"),
    ],
)
def test_without_effect(flags: list[str], world: int, word: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("WORLD_SIZE", str(world))
    assert any(word in warning for warning in load_config([*SMALL, *flags]).warnings)


def test_a_list_of_stages_overrides_what_the_old_switch_implies(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("WORLD_SIZE", "2")
    flags = [*PIPELINE, "--global-batch-size", "4", "--checkpoint-activations", "--recomputation-layer-num", "2,1"]
    parallel = load_config([*SMALL, *flags]).config.parallel
    assert (parallel.recompute_granularity, parallel.recompute_method) == ("full", "block")
    assert plan([range(2, 4)], 1, **vars(parallel)) == [["layer", "none"]]
