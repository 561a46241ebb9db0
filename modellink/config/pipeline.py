"""Schedules of a pipeline as data: how many chunks a rank holds, where they lie, which options and batches they need.

stages      s = 0 .. p * v - 1, neighbouring layers each; p ranks, v chunks a rank
looped      rank r holds stages r, p + r, 2 p + r, ...
V           rank r holds stages r and 2 p - 1 - r: first and last stage lie on rank 0
"""

from __future__ import annotations

from itertools import accumulate

from modellink.config.flags import flag_of, spell
from modellink.config.resolved import ResolvedConfig
from modellink.config.schema import ParallelConfig
from modellink.errors import ModelLinkError

V_SHAPED = ("zbv", "dualpipev")
SPLIT = ("zero_bubble", *V_SHAPED)  # backward in two halves: gradients of inputs, gradients of weights
LOOPED = ("interleaved", "aiao")
ROUNDS = ("interleaved", "zero_bubble")  # micro-batches go round the chunks in groups of equal size

# Micro-batch sizes of the steps of an optimized pipeline. Only size, number and sum are known of the reference's lists
# (16 steps, sum 64; 24 steps, sum 96; ramps 1, 2, 3, 4 and a plateau of 5): these are the ones that fit.
MANUAL_SIZES = {
    "example-config-1": [1, 2, 3, 4, *[5] * 9, 4, 3, 2],
    "example-config-2": [1, 2, 3, 4, 4, 4, *[5] * 12, 4, 4, 4, 3, 2, 1],
}


def chunks_per_rank(layers: int, parallel: ParallelConfig) -> int:
    """Model chunks that each pipeline rank holds."""
    if parallel.pipeline_parallel == 1:
        return 1
    if parallel.schedule in V_SHAPED:
        return 2
    if parallel.layers_per_virtual_stage is None:
        return 1
    return layers // (parallel.pipeline_parallel * parallel.layers_per_virtual_stage)


def stages_of(rank: int, layers: int, parallel: ParallelConfig) -> list[int]:
    """The stages that pipeline rank `rank` holds, in the order in which a sample passes them."""
    stages = parallel.pipeline_parallel
    if parallel.schedule in V_SHAPED and stages > 1:
        return [rank, 2 * stages - 1 - rank]
    return [chunk * stages + rank for chunk in range(chunks_per_rank(layers, parallel))]


def stage_layers(layers: int, parallel: ParallelConfig) -> list[range]:
    """The layers (global indices) of every stage."""
    total = parallel.pipeline_parallel * chunks_per_rank(layers, parallel)
    sizes = parallel.layers_per_stage or [layers // total] * total
    return [range(end - size, end) for size, end in zip(sizes, accumulate(sizes), strict=True)]


def micro_batch_sizes(parallel: ParallelConfig) -> list[int] | None:
    """Rows of each micro-batch of a step, None where all are --micro-batch-size."""
    if parallel.manual_mbs is None:
        return None
    if parallel.manual_mbs in MANUAL_SIZES:
        return MANUAL_SIZES[parallel.manual_mbs]
    try:
        sizes = [int(part) for part in parallel.manual_mbs.split(",")]
    except ValueError:
        sizes = [0]
    if min(sizes) < 1:
        known = ", ".join(MANUAL_SIZES)
        raise ModelLinkError(
            f"--manual-mbs {parallel.manual_mbs} is neither a list of positive sizes like 1,2,2,1 nor one of {known}."
        )
    return sizes


def live_micro_batches(rank: int, micro_batches: int, layers: int, parallel: ParallelConfig) -> float:
    """Micro-batches whose activations pipeline rank `rank` holds at once, one on all of its chunks counting 1."""
    stages, kind = parallel.pipeline_parallel, parallel.schedule
    chunks = chunks_per_rank(layers, parallel)
    if kind in ("gpipe", "aiao"):
        return micro_batches
    if kind == "zbv":
        held = 2 * stages
    elif kind == "dualpipev":
        held = 2 * stages + 1
    elif kind == "zero_bubble":
        held = chunks * stages
    elif chunks == 1:
        held = stages - rank
    else:
        held = 2 * (stages - rank - 1) + (chunks - 1) * stages + 1
    return min(held, chunks * micro_batches) / chunks


def check_schedule(resolved: ResolvedConfig) -> None:
    """Raise ModelLinkError for a schedule that the other options contradict."""
    parallel, layers = resolved.config.parallel, resolved.config.model.num_layers
    kind, chunk_flag = parallel.schedule, flag_of("parallel.layers_per_virtual_stage")
    given = spell("parallel.pipeline_schedule", kind)
    assert layers
    _check_manual(parallel)
    if parallel.pipeline_parallel == 1:
        for what in [given] * (parallel.pipeline_schedule is not None) + ["--manual-mbs"] * parallel.optimized_pipeline:
            resolved.warnings.append(f"{what}: no effect without {flag_of('parallel.pipeline_parallel')}")
        return
    if kind in LOOPED and parallel.layers_per_virtual_stage is None:
        raise ModelLinkError(f"{given} passes several chunks of each rank: give {chunk_flag} N, layers of one chunk.")
    if kind in ("gpipe", "1f1b", *V_SHAPED) and parallel.layers_per_virtual_stage is not None:
        held = "always two chunks" if kind in V_SHAPED else "one chunk"
        raise ModelLinkError(f"{given} places {held} on a rank: leave out {chunk_flag}, or choose interleaved.")
    if kind in SPLIT and parallel.compile:
        raise ModelLinkError(f"{given} takes apart the backward pass that --compile joins: leave one out.")
    if kind in SPLIT and parallel.recompute_granularity in ("full", "operators"):
        resolved.warnings.append(
            f"{given}: chunks with layers that are recomputed whole keep a whole backward pass, and with it their "
            "bubbles; --recompute-granularity selective leaves the halves apart"
        )


def _check_manual(parallel: ParallelConfig) -> None:
    if parallel.optimized_pipeline != (parallel.manual_mbs is not None):
        names = ", ".join(MANUAL_SIZES)
        raise ModelLinkError(
            f"--optimized-pipeline and --manual-mbs LIST (sizes like 1,2,2,1, or {names}) go together."
        )
    if parallel.manual_mbs is not None and parallel.schedule != "1f1b":
        raise ModelLinkError(
            f"--optimized-pipeline varies the micro-batches of 1f1b, not of {parallel.schedule}: leave out one of them."
        )


def check_micro_batches(resolved: ResolvedConfig, batch_size: int) -> None:
    """Raise ModelLinkError for a global batch that the schedule cannot cut into micro-batches."""
    parallel, rows = resolved.config.parallel, resolved.config.train.micro_batch_size or 1
    stages, at_once = parallel.pipeline_parallel, rows * resolved.data_parallel
    if stages == 1:
        return
    count, kind = batch_size // at_once, parallel.schedule
    batch_flag = flag_of("train.global_batch_size")
    sizes = micro_batch_sizes(parallel)
    if sizes is not None and (len(sizes) != count or sum(sizes) * resolved.data_parallel != batch_size):
        raise ModelLinkError(
            f"--manual-mbs {parallel.manual_mbs} has {len(sizes)} micro-batches of {sum(sizes)} rows together, but "
            f"{batch_flag} {batch_size} needs {count} of {batch_size // resolved.data_parallel} on each of "
            f"{resolved.data_parallel} data-parallel ranks: change one."
        )
    multiple = at_once * stages
    if kind in ROUNDS and count % max(1, count // stages):
        raise ModelLinkError(
            f"{spell('parallel.pipeline_schedule', kind)} needs a multiple of {stages} micro-batches per step, not "
            f"{count}: use a {batch_flag} divisible by {multiple}."
        )
    if kind == "dualpipev" and count < 2 * stages:
        raise ModelLinkError(
            f"{spell('parallel.pipeline_schedule', kind)} needs at least {2 * stages} micro-batches per step, not "
            f"{count}: use a {batch_flag} of {2 * multiple} or more."
        )
