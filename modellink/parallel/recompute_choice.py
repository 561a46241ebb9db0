"""What to recompute so that a step fits into a budget, from measurements: pure data, no torch.

With everything recomputed, a step of a stage has the measured peaks p_s: in the backward pass of each layer, and
outside of all. A layer l that keeps k bytes more for backward keeps them once for each micro-batch under way. So the
peak of another choice is at most

    outside of layers           p + sum over l of under_way(l) k(l)
    while layer m goes back     p_m + the same without m itself, whose activations are all there in p_m already, and
                                without those after m in its chunk, which are done, once

and the chosen choice keeps all of these within the budget. Among these it looks for the least time: from "everything"
on, the step with the most seconds saved per byte comes first (the greedy of the multiple-choice knapsack on its convex
hull, which is off by less than one step), then what still fits.
"""

from __future__ import annotations

from dataclasses import dataclass, field

from modellink.config.recompute_plan import LAYER

OUTSIDE = -1
Choice = dict[int, str]  # layer (global number) -> parts, as `Span` spells them


@dataclass
class LayerProfile:
    """Bytes kept and seconds spent by each way of recomputing one layer, for one micro-batch."""

    kept: dict[str, int] = field(default_factory=dict)
    seconds: dict[str, float] = field(default_factory=dict)


@dataclass
class StageProfile:
    """What was measured on one rank (or the worst of the ranks of a stage)."""

    chunks: list[list[int]]
    under_way: list[int]  # most micro-batches of each chunk whose activations lived at once
    layers: dict[int, LayerProfile]
    peaks: dict[int, int]  # bytes, by the layer that went back, and OUTSIDE

    def least(self) -> int:
        """Bytes that the stage needs with everything recomputed."""
        return max(self.peaks.values())

    def peak(self, choice: Choice) -> int:
        """Upper bound of the bytes that the stage needs with `choice`."""
        kept = {layer: self.layers[layer].kept[parts] for layer, parts in choice.items()}
        alive = sum(
            count * sum(kept[layer] for layer in chunk)
            for chunk, count in zip(self.chunks, self.under_way, strict=True)
        )
        gone = dict.fromkeys(self.peaks, 0)
        for chunk in self.chunks:
            for place, layer in enumerate(chunk):
                gone[layer] = sum(kept[after] for after in chunk[place:])
        return max(peak + alive - gone[segment] for segment, peak in self.peaks.items())

    def seconds(self, choice: Choice) -> float:
        """Seconds of recomputation of one micro-batch."""
        return sum(self.layers[layer].seconds[parts] for layer, parts in choice.items())


def worst(profiles: list[StageProfile]) -> StageProfile:
    """Of the ranks of one stage, the most bytes and seconds of each kind."""
    first = profiles[0]
    merged = {
        layer: LayerProfile(
            {parts: max(p.layers[layer].kept[parts] for p in profiles) for parts in own.kept},
            {parts: max(p.layers[layer].seconds[parts] for p in profiles) for parts in own.seconds},
        )
        for layer, own in first.layers.items()
    }
    under_way = [max(counts) for counts in zip(*(p.under_way for p in profiles), strict=True)]
    return StageProfile(first.chunks, under_way, merged, {s: max(p.peaks[s] for p in profiles) for s in first.peaks})


def _steps(profile: LayerProfile) -> list[tuple[float, str]]:
    """Ways of one layer on the convex hull of (bytes, seconds) from "everything" on, with seconds saved per byte."""
    here = LAYER
    found: list[tuple[float, str]] = []
    while True:
        slopes = [
            ((profile.seconds[here] - profile.seconds[parts]) / max(size - profile.kept[here], 1), -size, parts)
            for parts, size in profile.kept.items()
            if profile.seconds[parts] < profile.seconds[here] and size >= profile.kept[here]
        ]
        if not slopes:
            return found
        slope, _, here = max(slopes)
        found.append((slope, here))


def choose(stage: StageProfile, budget: int) -> Choice:
    """The choice of least time whose peak is within `budget` bytes, which must be `stage.least()` at least."""
    choice = dict.fromkeys(stage.layers, LAYER)
    steps = [
        (slope, place, layer, parts)
        for layer, profile in stage.layers.items()
        for place, (slope, parts) in enumerate(_steps(profile))
    ]
    stuck = set[int]()
    for _, _, layer, parts in sorted(steps, key=lambda step: (-step[0], step[1], step[2])):
        if layer not in stuck and stage.peak(choice | {layer: parts}) <= budget:
            choice[layer] = parts
        else:
            stuck.add(layer)  # what follows on its hull keeps more still
    for layer, profile in stage.layers.items():  # ways off the hull may still fit
        for parts in sorted(profile.seconds, key=lambda parts: (profile.seconds[parts], parts)):
            if profile.seconds[parts] >= profile.seconds[choice[layer]]:
                break
            if stage.peak(choice | {layer: parts}) <= budget:
                choice[layer] = parts
                break
    return choice
