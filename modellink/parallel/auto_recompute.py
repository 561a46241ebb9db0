"""Automatic recomputation: measure the first steps, then recompute no more than the given device memory asks for.

While it measures, everything is recomputed, so no step can need more than the rest of the run. In the first
micro-batch of a step every layer is also tried in each way of recomputing it, on the input that it has: what stays
alive after its forward pass is what that way keeps, and the time that its parts take to come back is what it costs.
Bytes and times are taken in turns of steps, because counting storages on a CPU slows operators down. The decision
(`recompute_choice`) is made from the measurements of all ranks on each of them, so all make the same.
"""

from __future__ import annotations

import contextlib
import time
import weakref
from collections.abc import Callable, Iterable, Iterator
from functools import partial
from typing import Any

import torch
import torch.distributed as dist
from rich.console import Console
from rich.table import Table
from torch import Tensor
from torch.distributed.fsdp import FSDPModule

from modellink import device
from modellink.config.flags import spell
from modellink.config.recompute_plan import LAYER, OPERATORS, Span, spell_layers
from modellink.config.schema import ParallelConfig
from modellink.errors import ModelLinkError
from modellink.models.decoder import Decoder, DecoderLayer, LayerCall, run_layers_plainly
from modellink.models.mla import LatentAttention
from modellink.models.moe import MoE
from modellink.parallel.meter import MemoryMeter
from modellink.parallel.recompute import Recomputed, apply_recompute, drop_inside, keep_expensive
from modellink.parallel.recompute_choice import OUTSIDE, Choice, LayerProfile, StageProfile, choose, worst

NOTHING = "none"


def ways_of(layer: DecoderLayer) -> list[frozenset[str]]:
    """What may be dropped of `layer`: each part that it has alone, those that are cheap together, or all."""
    sparse = isinstance(layer.mlp, MoE)
    activation, whole = ("moe_act", "moe") if sparse else ("mlp_act", "mlp")
    latent = ["mla_up_proj"] if isinstance(layer.self_attn, LatentAttention) else []
    cheap = ["layernorm", activation]
    found = [[], ["core_attn"], *([part] for part in [*cheap, *latent]), cheap, [*cheap, *latent, "core_attn"]]
    found += [[whole], ["layernorm", whole], [OPERATORS], [LAYER]]
    return [frozenset(parts) for parts in dict.fromkeys(tuple(parts) for parts in found)]


def _rebuild(output: Tensor) -> None:
    """Ask for the first tensor that `output` has saved for backward, which brings the recomputed part back."""
    seen, waiting = set[Any](), [output.grad_fn]
    while waiting:
        node = waiting.pop(0)
        if node is None or node in seen:
            continue
        seen.add(node)
        names = ("saved_tensors", *(name for name in dir(node) if name.startswith("_saved_")))
        for name in names:
            saved = getattr(node, name, None)
            if isinstance(saved, Tensor) or (isinstance(saved, tuple) and any(isinstance(s, Tensor) for s in saved)):
                return
        waiting += [following for following, _ in node.next_functions]


class _Noted(Recomputed):
    """Remembers the results of the parts that it runs, so that their recomputation can be timed."""

    def __init__(self, outputs: list[Tensor], *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.outputs = outputs

    def __call__(self, function: Callable[..., Tensor], *inputs: Any) -> Tensor:
        output = super().__call__(function, *inputs)
        self.outputs.append(output)
        return output


class _Token:
    """Lives as long as the graph of one micro-batch."""


class _ChunkProfiler:
    """Runs a chunk with every layer recomputed, and watches it."""

    def __init__(self, owner: AutoRecompute, number: int, chunk: Decoder) -> None:
        self.owner, self.number, self.chunk = owner, number, chunk
        self.recompute = Recomputed()
        self.alive = 0

    def _gone(self) -> None:
        self.alive -= 1

    def __call__(self, layers: list[LayerCall], x_BSD: Tensor) -> Tensor:
        if not torch.is_grad_enabled():
            return run_layers_plainly(layers, x_BSD)
        token, owner = _Token(), self.owner
        weakref.finalize(token, self._gone)
        self.alive += 1
        owner.under_way[self.number] = max(owner.under_way[self.number], self.alive)
        trying, owner.untried[self.number] = owner.untried[self.number], False
        for index, call in zip(self.chunk.layers, layers, strict=True):
            owner.segment(OUTSIDE)
            if trying:
                owner.try_layer(int(index), call, x_BSD)
            x_BSD = self.recompute(self._run, int(index), call, token, [], x_BSD)
        return x_BSD

    def _run(self, layer: int, call: LayerCall, _token: _Token, before: list[bool], x_BSD: Tensor) -> Tensor:
        if before:
            self.owner.segment(layer)
        before.append(True)
        return call(x_BSD)


class AutoRecompute:
    """Profiles `steps` steps of the chunks of this rank, then chooses; `held` gives tensors that outlive a step."""

    def __init__(
        self, chunks: list[Decoder], parallel: ParallelConfig, stage: int, held: Callable[[], Iterable[Tensor]]
    ) -> None:
        self.chunks, self.stage, self.held = chunks, stage, held
        self.given = spell("parallel.auto_recompute_device_size", parallel.auto_recompute_device_size)
        self.budget = parallel.auto_recompute_device_size * 2**20
        self.steps, self.done = parallel.auto_recompute_profiling_step, 0
        self.meter = MemoryMeter()
        self.under_way = [0] * len(chunks)
        self.untried = [False] * len(chunks)
        self.layers = {int(index): LayerProfile() for chunk in chunks for index in chunk.layers}
        self.peaks = dict.fromkeys((OUTSIDE, *self.layers), 0)
        self.here: int | None = None
        self.counting = False
        self.choice: Choice = {}
        for number, chunk in enumerate(chunks):
            apply_recompute(chunk, [Span(1)] * len(chunk.layers))
            chunk.run_layers = _ChunkProfiler(self, number, chunk)

    # --- one step ----------------------------------------------------------------------------------------------------

    @contextlib.contextmanager
    def watch(self) -> Iterator[None]:
        """Around a whole step: measures it while the profile lasts, and chooses after its last step."""
        if self.done == self.steps:
            yield
            return
        self.counting = self.done % 2 == 0  # the first step, in which optimizer states are made, is counted
        self.untried = [True] * len(self.chunks)
        if self.counting:
            self.meter.hold(self.held())
            with self.meter:
                self.here = OUTSIDE
                yield
                self.segment(None)
        else:
            yield
        self.done += 1
        if self.done == 1:
            self._check(self._stages())
        elif self.done == self.steps:
            self._decide()

    def segment(self, following: int | None) -> None:
        """A new part of the step begins: note the peak of the last one."""
        if not self.counting:
            return
        if self.here is not None:
            self.peaks[self.here] = max(self.peaks[self.here], self.meter.peak)
        self.meter.reset_peak()
        self.here = following

    def try_layer(self, number: int, call: Any, x_BSD: Tensor) -> None:
        """Run one layer in every way; note the bytes, or the seconds, of each."""
        layer, profile = call.func, self.layers[number]
        if isinstance(layer, FSDPModule):
            layer.unshard()
        random = device.rng_state()
        for drops in ways_of(layer):
            parts = str(Span(1, drops))
            outputs: list[Tensor] = []
            noted = partial(_Noted, outputs)
            drop_inside(layer, drops, noted)
            run = partial(layer.forward, **call.keywords)
            policy = keep_expensive if OPERATORS in drops else None
            whole = bool(drops & {LAYER, OPERATORS})
            before, x = self.meter.live, x_BSD.detach().requires_grad_()
            y = noted(policy=policy)(run, x) if whole else run(x)
            if self.counting:
                kept = self.meter.live - before - y.numel() * y.element_size()
                profile.kept[parts] = max(profile.kept.get(parts, 0), kept, 0)
            else:
                device.synchronize()
                recomputes, begin = bool(outputs), time.perf_counter()
                while outputs:  # what is measured is let go: trials must not add up
                    _rebuild(outputs.pop())
                device.synchronize()
                seconds = time.perf_counter() - begin if recomputes else 0.0
                profile.seconds[parts] = min(profile.seconds.get(parts, seconds), seconds)
            del y, x
            outputs.clear()
            device.set_rng_state(random)
        drop_inside(layer, frozenset())
        if self.counting:
            self.meter.reset_peak()  # trials are no part of the steps to come

    # --- the decision ------------------------------------------------------------------------------------------------

    def _stages(self) -> dict[int, StageProfile]:
        """What the ranks of each stage have measured, the worst of each; the same on every rank."""
        numbers = [[int(index) for index in chunk.layers] for chunk in self.chunks]
        mine = (self.stage, StageProfile(numbers, self.under_way, self.layers, self.peaks))
        every: list[Any] = [mine]
        if dist.is_initialized():
            every = [None] * dist.get_world_size()
            dist.all_gather_object(every, mine)
        return {
            stage: worst([profile for other, profile in every if other == stage])
            for stage in sorted({stage for stage, _ in every})
        }

    def _check(self, stages: dict[int, StageProfile]) -> None:
        least = max(profile.least() for profile in stages.values())
        if least > self.budget:
            size = spell("parallel.auto_recompute_device_size", -(-least // 2**20))
            raise ModelLinkError(
                f"{self.given} is too small: a step needs {least / 2**20:.1f} MB with everything recomputed; give "
                f"{size} or more, or a layout with more devices."
            )

    def _decide(self) -> None:
        stages = self._stages()
        self._check(stages)
        choices = {stage: choose(profile, self.budget) for stage, profile in stages.items()}
        for stage, choice in choices.items():
            self.choice |= choice if stage == self.stage else {}
        for chunk in self.chunks:
            spans = [Span(1, _parts(self.choice[int(index)])) for index in chunk.layers]
            apply_recompute(chunk, spans)
        if not dist.is_initialized() or dist.get_rank() == 0:
            self._show(stages, choices)
        self.meter = MemoryMeter()

    def _show(self, stages: dict[int, StageProfile], choices: dict[int, Choice]) -> None:
        table = Table("stage", "layers", "recomputed", "kept MB", "ms", title=f"{self.given}: what is recomputed")
        every: Choice = {}
        for stage, choice in choices.items():
            every |= choice
            profile = stages[stage]
            for parts in dict.fromkeys(choice.values()):
                layers = [layer for layer, chosen in choice.items() if chosen == parts]
                kept = sum(profile.layers[layer].kept[parts] for layer in layers) / 2**20
                seconds = sum(profile.layers[layer].seconds[parts] for layer in layers)
                table.add_row(str(stage), _ranges(layers), parts, f"{kept:.2f}", f"{1e3 * seconds:.2f}")
            least, most = profile.least() / 2**20, profile.peak(choice) / 2**20
            spent, all_of_it = profile.seconds(choice), profile.seconds(dict.fromkeys(choice, LAYER))
            table.add_row(
                str(stage), "all", f"peak {least:.1f} MB if all were, now at most {most:.1f} MB", "",
                f"{1e3 * spent:.2f} of {1e3 * all_of_it:.2f}", end_section=True,
            )  # fmt: skip
        Console().print(table)
        items = spell_layers([_parts(every[layer]) for layer in sorted(every)])
        print(spell("parallel.recompute_layers", items) if items else "nothing is recomputed", flush=True)


def _parts(spelled: str) -> frozenset[str]:
    return frozenset() if spelled == NOTHING else frozenset(spelled.split("+"))


def _ranges(layers: list[int]) -> str:
    return " ".join(item.partition(":")[0] for item in spell_layers(_marked(layers)))


def _marked(layers: list[int]) -> list[frozenset[str]]:
    return [frozenset((LAYER,)) if number in layers else frozenset() for number in range(max(layers) + 1)]
