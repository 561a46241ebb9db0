"""What automatic recomputation chooses from measurements: within the budget, and close to the best there is."""

from __future__ import annotations

import itertools
import random

from modellink.config.recompute_plan import LAYER
from modellink.parallel.recompute_choice import OUTSIDE, Choice, LayerProfile, StageProfile, choose, worst


def stage(seed: int, layers: int = 4, chunks: int = 1) -> StageProfile:
    draw = random.Random(seed)
    found = {}
    for layer in range(layers):
        kept, seconds = {LAYER: 0, "none": 1000 + draw.randrange(200)}, {LAYER: 10.0, "none": 0.0}
        for parts in ("core_attn", "mlp", "layernorm+mlp_act"):
            kept[parts], seconds[parts] = draw.randrange(100, 1000), draw.uniform(0.5, 9.0)
        found[layer] = LayerProfile(kept, seconds)
    size = layers // chunks
    numbers = [list(range(start, start + size)) for start in range(0, layers, size)]
    peaks = {OUTSIDE: 3000} | {layer: 3000 + 100 * layer + draw.randrange(900) for layer in range(layers)}
    return StageProfile(numbers, [draw.randrange(1, 3) for _ in numbers], found, peaks)


def every_choice(profile: StageProfile) -> list[Choice]:
    ways = [list(layer.kept) for layer in profile.layers.values()]
    return [dict(zip(profile.layers, parts, strict=True)) for parts in itertools.product(*ways)]


def test_the_choice_is_within_the_budget_and_near_the_best() -> None:
    whole = 0.0
    for seed in range(6):
        profile = stage(seed, chunks=1 + seed % 2)
        choices = [(profile.peak(choice), profile.seconds(choice)) for choice in every_choice(profile)]
        least, most = profile.least(), max(peak for peak, _ in choices)
        for budget in range(least, most + 400, 400):
            found = choose(profile, budget)
            assert profile.peak(found) <= budget
            best = min(seconds for peak, seconds in choices if peak <= budget)
            assert profile.seconds(found) - best <= 10.0  # one layer's recomputation
            whole += profile.seconds(found) - best
        assert profile.seconds(choose(profile, most)) == 0
        assert choose(profile, least - 1) == dict.fromkeys(profile.layers, LAYER)
    assert whole / 6 < 20


def test_a_layer_that_goes_back_is_not_counted_twice() -> None:
    layers = {layer: LayerProfile({LAYER: 0, "none": 100}, {LAYER: 1.0, "none": 0.0}) for layer in (0, 1)}
    profile = StageProfile([[0, 1]], [1], layers, {OUTSIDE: 500, 0: 800, 1: 900})
    assert profile.peak({0: LAYER, 1: LAYER}) == 900
    assert profile.peak({0: LAYER, 1: "none"}) == 900  # its activations are in the 900 already
    assert profile.peak({0: "none", 1: "none"}) == 1000
    assert profile.peak({0: "none", 1: LAYER}) == 1000
    # a second micro-batch under way keeps all of it once more
    profile.under_way = [2]
    assert profile.peak({0: "none", 1: "none"}) == 1200
    found = choose(profile, 1100)
    assert (profile.seconds(found), profile.peak(found) <= 1100) == (1.0, True)
    assert choose(profile, 1200) == {0: "none", 1: "none"}


def test_ranks_of_a_stage_agree_on_the_worst() -> None:
    one, other = stage(1), stage(2)
    merged = worst([one, other])
    assert merged.least() == max(one.least(), other.least())
    for layer in one.layers:
        for parts in one.layers[layer].kept:
            pair = (one.layers[layer], other.layers[layer])
            assert merged.layers[layer].kept[parts] == max(p.kept[parts] for p in pair)
            assert merged.layers[layer].seconds[parts] == max(p.seconds[parts] for p in pair)
