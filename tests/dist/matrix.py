"""The table of features, and the rows that train them: each alone, and mixed with each other.

A feature is a value of an axis, written as a user would: flags. A row gives each axis at most one value. Which mixtures
exist is not said here: a row exists if the command line is accepted, so every pair of features is either trained and
compared with one process, or refused in a sentence. Rows are made by a greedy covering of pairs, the same every time.
"""

from __future__ import annotations

import contextlib
import functools
import io
import itertools
import os
from collections.abc import Callable, Iterable, Iterator

from equivalence import MODELS, ROWS, SEQUENCE

from modellink.config.flags import parse, spell
from modellink.config.load import load_config
from modellink.config.resolved import ResolvedConfig
from modellink.errors import ModelLinkError

RANKS = 4  # processes that a row may take
BASE = (
    f"--seq-length {SEQUENCE} --micro-batch-size 1 --global-batch-size {ROWS} --train-iters 3 --mock-data "
    "--lr 1e-3 --weight-decay 0.1 --clip-grad 0.5 --adam-eps 1e-5"
)
AXES: dict[str, dict[str, str]] = {
    "model": {"tied": "tied", "moe": "moe", "deepseek": "deepseek"},  # names of equivalence.MODELS; llama without one
    "documents": {"packed": "--reset-attention-mask --reset-position-ids"},
    "tensor": {
        "tp": "--tensor-parallel 2",
        "sp": "--tensor-parallel 2 --sequence-parallel",
        "sp-overlap": "--tensor-parallel 2 --sequence-parallel --use-mc2",
    },
    "pipeline": {
        "1f1b": "--pipeline-parallel 2 --pipeline-schedule 1f1b",
        "uneven": "--pipeline-parallel 2 --num-layer-list 1,3",
        "gpipe": "--pipeline-parallel 2 --pipeline-schedule gpipe",
        "interleaved": "--pipeline-parallel 2 --pipeline-schedule interleaved --layers-per-virtual-stage 1",
        "aiao": "--pipeline-parallel 2 --pipeline-schedule aiao --layers-per-virtual-stage 1",
        "zero-bubble": "--pipeline-parallel 2 --pipeline-schedule zero_bubble",
        "zbv": "--pipeline-parallel 2 --pipeline-schedule zbv",
        "dualpipev": "--pipeline-parallel 2 --pipeline-schedule dualpipev",
    },
    "context": {
        "ulysses": "--context-parallel 2",
        "ring": "--context-parallel 2 --context-parallel-algo megatron_cp_algo",
        "ring-overlap": "--context-parallel 2 --context-parallel-algo megatron_cp_algo --use-cp-send-recv-overlap",
        "gather": "--context-parallel 2 --context-parallel-algo allgather_cp_algo",
        "hybrid": "--context-parallel 4 --context-parallel-algo hybrid_cp_algo --ulysses-degree-in-cp 2",
        "full-mask": "--context-parallel 2 --context-parallel-algo megatron_cp_algo --cp-attention-mask-type full",
    },
    "experts": {
        "alltoall": "--expert-parallel 2",
        "allgather": "--expert-parallel 2 --moe-token-dispatcher-type allgather",
        "alltoall-overlap": "--expert-parallel 2 --moe-permutation-async-comm",
        "allgather-overlap": "--expert-parallel 2 --moe-token-dispatcher-type allgather --moe-permutation-async-comm",
    },
    "data": {
        "zero0": "--zero-stage 0",
        "zero0-apart": "--zero-stage 0 --no-overlap-grad-reduce",
        "zero1": "--zero-stage 1",
        "distributed-optimizer": "--use-distributed-optimizer",
        "zero2": "--zero-stage 2",
        "zero3": "--zero-stage 3",
        "zero3-ahead": "--zero-stage 3 --overlap-param-gather",
        "hsdp": "--zero-stage 3 --data-parallel-replicas 2",
    },
    "recomputation": {
        "selective": "--recompute-activations",
        "uniform": "--recompute-granularity full --recompute-method uniform --recompute-num-layers 2",
        "block": "--recompute-granularity full --recompute-method block --recompute-num-layers 1",
        "block-per-rank": "--recompute-granularity full --recompute-method block --recompute-num-layers 1 "
        "--enable-recompute-layers-per-pp-rank",
        "block-per-stage": "--recompute-granularity full --recomputation-layer-num 0,1",
        "modules": "--recompute-granularity selective --recompute-modules core_attn layernorm mla_up_proj mlp moe_act",
        "operators": "--recompute-granularity operators",
        "by-layer": "--recompute-layers 0-1:layer 2:core_attn+mlp_act+moe 3:mla_up_proj",
        "activation": "--recompute-activation-function",
        "block-activation": "--recompute-granularity full --recompute-method block --recompute-num-layers 1 "
        "--recompute-activation-function --recompute-activation-function-num-layers 1",
        "shared-inputs": "--recompute-granularity full --distribute-saved-activations",
    },
    "swap": {
        "swap": "--swap-attention",
        "swap-all": "--swap-attention --swap-modules input_norm,self_attention,post_attention_norm,mlp",
    },
    "output": {"slices": "--output-layer-slice-num 3"},
    "states": {"on-host": "--cpu-optimizer"},
    "optimizer": {
        "sgd": "--optimizer sgd",
        "cadam": "--optimizer cadam --lr 2e-4 --weight-decay 0.5",
        "muon": "--optimizer muon",
        "adamw8bit": "--optimizer adamw8bit",
        "decoupled-lr": "--decoupled-lr 5e-4",
    },
    "precision": {
        "bf16": "--bf16",
        "split": "--bf16 --reuse-fp32-param",
        "bf16-gradients": "--bf16 --release-fp32-grad",
        "fp16": "--fp16 --initial-loss-scale 1024",
    },
}
DATA_RANKS = {"hsdp": 4}  # the others of the axis: 2
# what a feature may need beside itself before its command line is accepted
COMPANIONS = (("data", "zero1"), ("model", "moe"), ("tensor", "tp"), ("pipeline", "1f1b"), ("pipeline", "interleaved"))
# Options of a layout that are no feature of it, or that one process of its own proves: field -> where.
ELSEWHERE = {
    "parallel.distributed_timeout_minutes": "says when to give up, not what to compute",
    "parallel.auto_recompute_device_size": "tests/dist/test_auto_recompute.py: chooses among the features of recomputation",
    "parallel.auto_recompute_profiling_step": "says how long to measure before that choice",
    "parallel.compile": "tests/dist/test_compile.py: compiling takes minutes",
    "parallel.optimized_pipeline": "tests/dist/test_pipeline.py",
    "parallel.manual_mbs": "tests/dist/test_pipeline.py",
}

Feature = tuple[str, str]  # axis, value
Row = tuple[Feature, ...]  # in the order of the axes, one value of each at most
ALL: tuple[Feature, ...] = tuple((axis, value) for axis, values in AXES.items() for value in values)


def row_of(features: Iterable[Feature]) -> Row:
    """The features in the order of their axes."""
    return tuple(sorted(features, key=ALL.index))


def name_of(row: Row) -> str:
    return "+".join(value for _, value in row) or "nothing"


def model_of(row: Row) -> str:
    """Name of the model in equivalence.MODELS, followed by "packed" for documents."""
    chosen = dict(row)
    return chosen.get("model", "llama") + (" packed" if "documents" in chosen else "")


def flags_of(row: Row) -> list[str]:
    """The command line of a row."""
    model = MODELS[dict(row).get("model", "llama")]
    words = [word for name, value in model.items() for word in spell(f"model.{name}", value).split()]
    words += BASE.split()
    return words + [word for axis, value in row if axis != "model" for word in AXES[axis][value].split()]


def ranks_of(row: Row) -> int:
    """Processes of a row: 2 for every axis that shares something, 4 where a value needs more."""
    chosen, given = dict(row), " ".join(flags_of(row))
    world = DATA_RANKS.get(chosen["data"], 2) if "data" in chosen else 1
    for flag in ("--tensor-parallel", "--pipeline-parallel", "--context-parallel"):
        words = given.split()
        world *= int(words[words.index(flag) + 1]) if flag in words else 1
    return world


@functools.cache
def resolve(row: Row) -> ResolvedConfig | str:
    """The configuration of a row, or the sentence that refuses it."""
    before = os.environ.get("WORLD_SIZE")
    os.environ["WORLD_SIZE"] = str(ranks_of(row))
    try:
        with contextlib.redirect_stderr(io.StringIO()):
            return load_config(flags_of(row))
    except ModelLinkError as error:
        return str(error)
    finally:
        os.environ.pop("WORLD_SIZE")
        if before is not None:
            os.environ["WORLD_SIZE"] = before


def exists(row: Row) -> bool:
    return ranks_of(row) <= RANKS and not isinstance(resolve(row), str)


def supported(features: Iterable[Feature]) -> Row | None:
    """The smallest row with these features that exists: as they are, or with up to three companions."""
    features = row_of(features)
    free = [each for each in COMPANIONS if each[0] not in dict(features)]
    for count in range(4):
        for more in itertools.combinations(free, count):
            if len({axis for axis, _ in more}) == count and exists(row_of((*features, *more))):
                return row_of((*features, *more))
    return None


def pairs_of(row: Row) -> Iterator[tuple[Feature, Feature]]:
    """The pairs that a row proves: half precision hides small errors, so there only its own."""
    for pair in itertools.combinations(row, 2):
        if "precision" not in dict(row) or "precision" in dict(pair):
            yield pair


def _grown(row: Row, gain: Callable[[Row], int]) -> Row:
    """`row` with a value of every other axis that adds to `gain`, while that exists."""
    for axis, values in AXES.items():
        if axis in dict(row) or axis == "precision":
            continue
        best = row
        for value in values:
            longer = row_of((*row, (axis, value)))
            if gain(longer) > gain(best) and exists(longer):
                best = longer
        row = best
    return row


def singles() -> list[Row]:
    """Every feature alone, with what it cannot do without."""
    rows = [supported([feature]) for feature in ALL]
    missing = [name_of((feature,)) for feature, row in zip(ALL, rows, strict=True) if row is None]
    assert not missing, f"no command line has {missing}"
    return list(dict.fromkeys(row for row in rows if row is not None))


def refused() -> dict[tuple[Feature, Feature], str]:
    """Pairs of features that no row has, and the sentence a user gets."""
    found = {}
    for pair in itertools.combinations(ALL, 2):
        if pair[0][0] != pair[1][0] and supported(pair) is None:
            row = supported([pair[0]])
            assert row is not None
            reason = resolve(row_of({**dict(row), **dict(pair)}.items()))
            found[pair] = reason if isinstance(reason, str) else "more ranks than a test starts"
    return found


def mixtures(at_least: int) -> list[Row]:
    """Rows in which every pair of axes occurs once, and every feature `at_least` times."""

    def axes(row: Row) -> set[tuple[str, str]]:
        return {(one[0], other[0]) for one, other in pairs_of(row)}

    missing_axes = set(itertools.combinations(AXES, 2))
    missing = dict.fromkeys(ALL, at_least)
    seen: set[tuple[Feature, Feature]] = set()

    def gain(row: Row) -> int:
        new = sum(pair not in seen for pair in pairs_of(row))
        return 100 * (len(axes(row) & missing_axes) + sum(missing[feature] for feature in row)) + new

    rows: list[Row] = []
    for one, other in [(feature, None) for feature in ALL] + list(itertools.combinations(ALL, 2)):
        while missing[one] if other is None else (one[0], other[0]) in missing_axes:
            # a row that was there already proves nothing new: another value beside the feature must
            seeds = [(one, beside) for beside in ALL if beside[0] != one[0]] if other is None else [(one, other)]
            grown = (_grown(row, gain) for row in (supported(seed) for seed in seeds) if row is not None)
            row = next((row for row in grown if row not in rows), None)
            if row is None:
                break
            rows.append(row)
            missing_axes -= axes(row)
            seen |= set(pairs_of(row))
            for feature in row:
                missing[feature] = max(0, missing[feature] - 1)
    return rows


def options_of(feature: Feature) -> dict[str, object]:
    """Field -> value that the flags of a feature set."""
    axis, value = feature
    if axis == "model":
        return {}
    found: dict[str, object] = {}
    for item in parse(AXES[axis][value].split(), "train"):
        found |= {item.flag.path: item.value} if item.flag.path else dict(item.flag.sets)
    return found
