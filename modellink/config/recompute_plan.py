"""What each layer recomputes in backward, as data: flags -> one plan. Needs neither torch nor devices.

A chunk of the model (what one stage holds; several where the pipeline is interleaved) is a row of spans, each with the
parts that its layers drop in forward and rebuild in backward:

    layer        everything; the span is one group that keeps its input (Chen et al., arXiv:1604.06174)
    operators    everything but the results of products, attention kernels and communication
    core_attn    what attention keeps between q, k, v and its output (Korthikanti et al., arXiv:2205.05198)
    layernorm    what norms keep besides input and output
    mla_up_proj  queries, keys and values of latent attention, which grow out of kept latents
    mlp_act      what lies between the two halves of a dense MLP: the activation and its product with the other half
    moe_act      the same inside experts
    mlp, moe     the whole dense MLP; router, experts and shared experts
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

from modellink.config.schema import ParallelConfig
from modellink.errors import ModelLinkError
from modellink.registry import suggest

LAYER, OPERATORS = "layer", "operators"
MODULES = ("core_attn", "layernorm", "mla_up_proj", "mlp_act", "moe_act", "mlp", "moe")
ACTIVATIONS = frozenset(("mlp_act", "moe_act"))


@dataclass(frozen=True)
class Span:
    """Neighbouring layers of a chunk and what they drop; `layer` drops them together, the rest acts on each."""

    layers: int
    drops: frozenset[str] = frozenset()

    def __str__(self) -> str:
        return "+".join(sorted(self.drops)) or "none"


ChunkPlan = tuple[Span, ...]
Plan = tuple[ChunkPlan, ...]


def check_parts(parts: Iterable[str], where: str) -> frozenset[str]:
    """`parts` as a set; raises ModelLinkError for a name that is none, or that cannot stand beside another."""
    found = frozenset(parts)
    known = (LAYER, OPERATORS, *MODULES)
    for part in sorted(found - set(known)):
        raise ModelLinkError(f"{where}: nothing called {part} can be recomputed.{suggest(part, known)} Known: {known}.")
    if len(found) > 1 and found & {LAYER, OPERATORS}:
        raise ModelLinkError(f"{where}: {' and '.join(sorted(found))} exclude each other: layer or operators alone.")
    return found


def parse_layers(items: Sequence[str], layers: int) -> list[frozenset[str]]:
    """What each of the model's `layers` drops, from items such as "0-3:layer" and "5:core_attn+mlp_act".

    Layers that no item names drop nothing. Raises ModelLinkError for anything else.
    """
    found = [frozenset[str]()] * layers
    for item in items:
        numbers, _, parts = item.partition(":")
        first, _, last = numbers.partition("-")
        if not (first.isdigit() and (last or first).isdigit() and int(first) <= int(last or first) < layers and parts):
            raise ModelLinkError(
                f"--recompute-layers {item} is not FIRST-LAST:PARTS with layers 0 to {layers - 1}: "
                "write 0-3:layer or 5:core_attn+mlp_act."
            )
        drops = check_parts(parts.split("+"), f"--recompute-layers {item}")
        for layer in range(int(first), int(last or first) + 1):
            found[layer] = drops
    return found


def spell_layers(drops: Sequence[frozenset[str]]) -> list[str]:
    """The items that `parse_layers` reads back as `drops`."""
    items, start = [], 0
    for end in range(1, len(drops) + 1):
        if end == len(drops) or drops[end] != drops[start]:
            numbers = f"{start}-{end - 1}" if end - start > 1 else str(start)
            if drops[start]:
                items.append(f"{numbers}:{Span(1, drops[start])}")
            start = end
    return items


def recompute_plan(parallel: ParallelConfig, chunks: Sequence[Sequence[int]], stage: int, layers: int) -> Plan:
    """The plan of pipeline rank `stage`, whose chunks hold these layers (global numbers) of all `layers`."""
    if parallel.auto_recompute_device_size > 0:  # until it is chosen
        return tuple((Span(1, frozenset((LAYER,))),) * len(chunk) for chunk in chunks)
    if parallel.recompute_layers:
        drops = parse_layers(parallel.recompute_layers, layers)
        return tuple(tuple(Span(1, drops[layer]) for layer in chunk) for chunk in chunks)
    return tuple(_chunk(parallel, len(chunk), number, len(chunks), stage) for number, chunk in enumerate(chunks))


def _chunk(parallel: ParallelConfig, size: int, number: int, chunks: int, stage: int) -> ChunkPlan:
    if parallel.recompute_granularity == "full" and parallel.recompute_method != "block":
        group, whole_layers = parallel.recompute_num_layers or 1, frozenset((LAYER,))
        groups, rest = divmod(size, group)
        return (Span(group, whole_layers),) * groups + (Span(rest, whole_layers),) * (rest > 0)
    per_rank, whole = parallel.recompute_layers_per_pp_rank, 0
    if parallel.recompute_granularity == "full":
        whole = size if parallel.recompute_num_layers is None else parallel.recompute_num_layers
        if parallel.recompute_layers_per_stage:
            per_rank, whole = True, parallel.recompute_layers_per_stage[stage]
    inside = frozenset[str]()
    if parallel.recompute_granularity == "operators":
        inside = frozenset((OPERATORS,))
    elif parallel.recompute_granularity == "selective":
        inside = frozenset(parallel.recompute_modules or ("core_attn",))
    elif parallel.recompute_activation_function:
        inside = ACTIVATIONS

    def up_to(turn: int) -> int:
        """Layers of this chunk before `turn`: the chunks of a rank take turns, so that a count is spread evenly."""
        return min(size, max(0, math.ceil((turn - number) / chunks)) if per_rank else turn)

    count = parallel.recompute_activation_function_num_layers
    full = up_to(whole)
    some = max(full, up_to(whole + count)) if inside == ACTIVATIONS and count is not None else size
    rows = ((full, frozenset((LAYER,))), (some - full, inside), (size - some, frozenset[str]()))
    return tuple(itertools.chain.from_iterable((Span(1, drops),) * layers for layers, drops in rows))
