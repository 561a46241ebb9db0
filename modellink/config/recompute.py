"""Rules between the options of recomputation, and what they say of themselves where they change nothing."""

from __future__ import annotations

from modellink.config.flags import flag_of, spell
from modellink.config.pipeline import stage_layers, stages_of
from modellink.config.recompute_plan import MODULES, check_parts, parse_layers
from modellink.config.resolved import ResolvedConfig
from modellink.errors import ModelLinkError

GRANULARITY = "parallel.recompute_granularity"


def check_recompute(resolved: ResolvedConfig) -> None:
    """Raise ModelLinkError for options that contradict each other; warn of those without effect."""
    parallel = resolved.config.parallel
    kind = parallel.recompute_granularity
    if kind is None and (parallel.recompute_method or parallel.recompute_num_layers):
        resolved.warnings.append(
            "--recompute-method and --recompute-num-layers: no effect without --recompute-granularity full"
        )
    if kind in ("selective", "operators") and parallel.recompute_method:
        raise ModelLinkError(f"--recompute-method belongs to --recompute-granularity full: leave it out with {kind}.")
    if kind != "selective" and parallel.recompute_modules:
        raise ModelLinkError(f"--recompute-modules belongs to --recompute-granularity selective, not {kind}.")
    _named_parts(resolved)
    _counts(resolved)
    _activation_function(resolved)
    _automatic(resolved)
    whole = kind in ("full", "operators") or parallel.recompute_layers
    if parallel.distribute_saved_activations:
        why = "nothing is recomputed whole" if not whole else None
        why = "--sequence-parallel shards them already" if parallel.sequence_parallel else why
        why = "there is one tensor-parallel rank" if parallel.tensor_parallel == 1 else why
        if why:
            resolved.warnings.append(f"--distribute-saved-activations: no effect, {why}")


def _named_parts(resolved: ResolvedConfig) -> None:
    model, parallel = resolved.config.model, resolved.config.parallel
    parts = check_parts(parallel.recompute_modules or (), "--recompute-modules")
    if parts - set(MODULES):
        raise ModelLinkError(f"--recompute-modules takes {', '.join(MODULES)}: for whole layers use {spell_full()}.")
    missing = {"mla_up_proj": model.multi_head_latent_attention, "moe": model.num_experts, "moe_act": model.num_experts}
    for part in sorted(parts):
        if not missing.get(part, True):
            resolved.warnings.append(f"--recompute-modules {part}: no effect, the model has no such module")
    if parallel.recompute_layers:
        parse_layers(parallel.recompute_layers, model.num_layers or 0)
        for path in (GRANULARITY, "parallel.recompute_activation_function"):
            if resolved.get(path):
                raise ModelLinkError(
                    f"{flag_of('parallel.recompute_layers')} says it all: leave out {spell(path, resolved.get(path))}."
                )


def spell_full() -> str:
    return spell(GRANULARITY, "full")


def _counts(resolved: ResolvedConfig) -> None:
    """Numbers of layers over virtual stages, and for each stage."""
    model, parallel = resolved.config.model, resolved.config.parallel
    listed, flag = parallel.recompute_layers_per_stage, flag_of("parallel.recompute_layers_per_stage")
    if listed:
        if parallel.recompute_granularity != "full":
            raise ModelLinkError(f"{flag} counts whole layers: use it with {spell_full()} or alone.")
        stages = parallel.pipeline_parallel
        layers = model.num_layers or 0
        held = stage_layers(layers, parallel)
        most = [sum(len(held[at]) for at in stages_of(rank, layers, parallel)) for rank in range(stages)]
        if len(listed) != stages or any(not 0 <= n <= limit for n, limit in zip(listed, most, strict=False)):
            raise ModelLinkError(
                f"{flag} {' '.join(map(str, listed))} must name one number for each of {stages} stage(s), from 0 to "
                f"the layers there ({' '.join(map(str, most))})."
            )
    if not parallel.recompute_layers_per_pp_rank:
        return
    flag = flag_of("parallel.recompute_layers_per_pp_rank")
    if not parallel.layers_per_virtual_stage:
        raise ModelLinkError(
            f"{flag} counts over virtual stages, but there are none: leave it out or give "
            f"{flag_of('parallel.layers_per_virtual_stage')}."
        )
    block = parallel.recompute_granularity == "full" and parallel.recompute_method == "block"
    if not block and not parallel.recompute_activation_function:
        raise ModelLinkError(
            f"{flag} counts layers of {spell_full()} --recompute-method block or --recompute-activation-function: "
            "give one of them or leave it out."
        )


def _activation_function(resolved: ResolvedConfig) -> None:
    parallel = resolved.config.parallel
    if not parallel.recompute_activation_function:
        if parallel.recompute_activation_function_num_layers is not None:
            resolved.warnings.append(
                "--recompute-activation-function-num-layers: no effect without --recompute-activation-function"
            )
        return
    if parallel.recompute_granularity is not None and parallel.recompute_method != "block":
        given = parallel.recompute_method or spell(GRANULARITY, parallel.recompute_granularity)
        raise ModelLinkError(
            f"--recompute-activation-function and {given} exclude each other: use --recompute-method block, or leave "
            "one out."
        )


def _automatic(resolved: ResolvedConfig) -> None:
    parallel = resolved.config.parallel
    if parallel.auto_recompute_device_size == -1:
        return
    given = spell("parallel.auto_recompute_device_size", parallel.auto_recompute_device_size)
    if parallel.auto_recompute_device_size <= 0:
        raise ModelLinkError(f"{given}: give a number of MB above 0, or -1 to switch it off.")
    if parallel.auto_recompute_profiling_step < 5:
        raise ModelLinkError(
            f"{spell('parallel.auto_recompute_profiling_step', parallel.auto_recompute_profiling_step)} is too few "
            "steps to measure: give 5 or more."
        )
    chosen = (GRANULARITY, "parallel.recompute_layers", "parallel.recompute_activation_function")
    for path in chosen:
        if resolved.get(path):
            raise ModelLinkError(f"{given} chooses what is recomputed: leave out {spell(path, resolved.get(path))}.")
    if parallel.distribute_saved_activations:
        raise ModelLinkError(f"{given} and --distribute-saved-activations exclude each other: leave one out.")
    if parallel.swap_attention:
        raise ModelLinkError(f"{given} and --swap-attention exclude each other: leave one out.")
    if parallel.compile:
        raise ModelLinkError(f"{given} changes layers while the run goes on, --compile fixes them: leave one out.")
    steps = resolved.config.train.train_iters
    if steps is not None and steps <= parallel.auto_recompute_profiling_step:
        resolved.warnings.append(f"{given}: no effect, the run ends before its profile does")
