"""Pipeline parallelism: which layers a rank holds, and torch's schedules over them.

Layer placement follows Megatron: even stages hold L / PP consecutive layers; an uneven list gives prefix sums;
interleaved chunk c of stage p holds the layers from c * (L / V) + p * n on, n layers each, V chunks per rank. V-shaped
schedules go down the ranks and up again (`config/pipeline.py`).
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.distributed.pipelining import (
    Schedule1F1B,
    ScheduleDualPipeV,
    ScheduleGPipe,
    ScheduleInterleaved1F1B,
    ScheduleInterleavedZeroBubble,
    ScheduleLoopedBFS,
    ScheduleZBVZeroBubble,
)
from torch.distributed.pipelining.schedules import (
    FORWARD,
    _Action,
    _add_send_recv,
    _add_unshard_reshard,
    _PipelineSchedule,
    _PipelineScheduleRuntime,
)

from modellink.config.pipeline import micro_batch_sizes, stage_layers, stages_of
from modellink.config.schema import ModelConfig, ParallelConfig
from modellink.models.decoder import Decoder
from modellink.parallel.recompute import recomputes_products
from modellink.parallel.stage import Stage
from modellink.parallel.topology import Topology

LossFunction = Callable[[Tensor, Tensor], Tensor]

KEPT = 8  # schedules kept for other numbers of micro-batches, in training and evaluation
SCHEDULES: dict[str, Callable[..., _PipelineSchedule]] = {
    "gpipe": ScheduleGPipe,
    "1f1b": Schedule1F1B,
    "interleaved": ScheduleInterleaved1F1B,
    "aiao": ScheduleLoopedBFS,
    "zero_bubble": ScheduleInterleavedZeroBubble,
    "zbv": ScheduleZBVZeroBubble,
    "dualpipev": ScheduleDualPipeV,
}


@dataclass(frozen=True)
class StageSpec:
    """One model chunk: its place in the pipeline and its layers (global indices)."""

    index: int
    layers: range
    first: bool
    last: bool


def stage_specs(model: ModelConfig, parallel: ParallelConfig, pp_rank: int) -> list[StageSpec]:
    """The chunks that pipeline rank `pp_rank` holds, in the order in which a sample passes them."""
    assert model.num_layers
    layers = stage_layers(model.num_layers, parallel)
    own = stages_of(pp_rank, model.num_layers, parallel)
    return [StageSpec(index, layers[index], index == 0, index == len(layers) - 1) for index in own]


class ForwardOnly(_PipelineScheduleRuntime):
    """All micro-batches through the first chunk of each rank, then through the next: evaluation for every schedule.

    `ranks` says which stages each pipeline rank holds.
    """

    def __init__(self, stages: list[Stage], micro_batches: int, loss_fn: LossFunction, ranks: list[list[int]]) -> None:
        super().__init__(stages, micro_batches, loss_fn=loss_fn, scale_grads=False)
        self._has_backward = False
        place = {stage: rank for rank, held in enumerate(ranks) for stage in held}
        self.stage_index_to_group_rank = place
        for stage in stages:
            stage.stage_index_to_group_rank = place
        orders = {}
        for rank, held in enumerate(ranks):
            passes = [_Action(stage, FORWARD, number) for stage in held for number in range(micro_batches)]
            orders[rank] = _add_unshard_reshard(passes)
        self.pipeline_order_with_comms = _add_send_recv(orders, place.__getitem__, len(place))


class Pipeline:
    """Runs micro-batches through this rank's chunks. Gradients of all micro-batches are summed; `loss_fn` must be a
    sum."""

    def __init__(
        self,
        chunks: list[Decoder],
        specs: list[StageSpec],
        parallel: ParallelConfig,
        topology: Topology,
        device: torch.device,
        dtype: torch.dtype,
    ) -> None:
        self.chunks, self.specs = chunks, specs
        self.parallel, self.topology, self.device = parallel, topology, device
        config = chunks[0].config
        self.hidden_size = config.hidden_size
        self.hidden_dtype = torch.float32 if config.fp32_residual else dtype
        assert config.num_layers
        layers = config.num_layers
        self.ranks = [stages_of(rank, layers, parallel) for rank in range(parallel.pipeline_parallel)]
        self.has_first = any(spec.first for spec in specs)
        self.has_last = any(spec.last for spec in specs)
        self.sizes = micro_batch_sizes(parallel)
        # called after gradients were added to weights without their hooks
        self.after_weights: Callable[[], None] | None = None
        self._schedules: OrderedDict[tuple[int, bool], tuple[_PipelineSchedule, list[Stage]]] = OrderedDict()
        self._loss_fn: LossFunction | None = None

    def _stages(self) -> list[Stage]:
        total = sum(map(len, self.ranks))
        group = self.topology.group("pp")
        return [
            Stage(chunk, spec.index, total, self.device, group, self.hidden_dtype)
            for chunk, spec in zip(self.chunks, self.specs, strict=True)
        ]

    def _schedule(self, micro_batches: int, training: bool) -> tuple[_PipelineSchedule, list[Stage]]:
        """The schedule of so many micro-batches and its stages, from those used last."""
        key = (micro_batches, training)
        if key not in self._schedules:
            # read through self: the divisor in the loss changes from step to step
            def loss_fn(output: Tensor, target: Tensor) -> Tensor:
                assert self._loss_fn is not None
                return self._loss_fn(output, target)

            stages = self._stages()
            if training:
                kind: Any = self.parallel.schedule
                if kind == "1f1b" and micro_batches < len(self.ranks):
                    kind = "gpipe"  # too few to fill its warm-up, and then the same order
                held = stages[0] if kind in ("gpipe", "1f1b") else stages
                schedule = SCHEDULES[kind](held, micro_batches, loss_fn=loss_fn, scale_grads=False)
            else:
                schedule = ForwardOnly(stages, micro_batches, loss_fn, self.ranks)
            self._schedules[key] = schedule, stages
            if len(self._schedules) > KEPT:
                self._schedules.popitem(last=False)
        self._schedules.move_to_end(key)
        return self._schedules[key]

    def _travelling(self, tokens_BS: Tensor) -> tuple[int, ...]:
        """Shape of the hidden states of a micro-batch between stages."""
        rows, length = tokens_BS.shape
        return rows, length // self.topology.size("tp") if self.parallel.sequence_parallel else length, self.hidden_size

    def run(
        self,
        tokens_BS: Tensor,
        labels_BS: Tensor,
        loss_fn: LossFunction,
        micro_batch: int,
        *,
        training: bool,
        extra: dict[str, Tensor] | None = None,
    ) -> Tensor:
        """Forward (and backward) of the rank's whole batch; returns the summed loss on the last stage, 0 elsewhere.

        tokens, labels: int [B, S] with B a multiple of `micro_batch`, or the sum of the sizes that --manual-mbs gives;
        `extra` tensors have B rows too and go to every stage by name.
        """
        self._loss_fn = loss_fn
        sizes = self.sizes if training and self.sizes else [micro_batch] * (len(tokens_BS) // micro_batch)
        tokens, labels = tokens_BS.split(sizes), labels_BS.split(sizes)
        schedule, stages = self._schedule(len(sizes), training)
        for chunk, stage in zip(self.chunks, stages, strict=True):
            stage.has_backward, stage.after_weights = training, self.after_weights
            stage.shapes = [self._travelling(part) for part in tokens]
            stage.split = not recomputes_products(chunk)
            stage.clear_runtime_states()
        # the sequence length travels by keyword: a later stage sees only its shard of the sequence
        context: list[dict[str, Any]] = [{"sequence_length": part.shape[1]} for part in tokens]
        for name, value in (extra or {}).items():
            for keywords, part in zip(context, value.split(sizes), strict=True):
                keywords[name] = part
        losses: list[Tensor] | None = [] if self.has_last else None
        with torch.set_grad_enabled(training):
            schedule._step_microbatches(
                [(part,) for part in tokens] if self.has_first else None,
                context,
                list(labels) if self.has_last else None,
                losses,
                return_outputs=False,
            )
        for stage in stages if training else ():
            stage.finish()
        if not losses:
            return torch.zeros((), dtype=torch.float32, device=self.device)
        return torch.stack([loss.detach() for loss in losses]).sum()
