"""Pipeline parallelism: which layers a rank holds, and torch's schedules over them.

Layer placement follows Megatron: even stages hold L / PP consecutive layers; an uneven list gives prefix sums;
interleaved chunk c of stage p holds the layers from c * (L / V) + p * n on, n layers each, V chunks per rank.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.distributed.pipelining import PipelineStage, Schedule1F1B, ScheduleGPipe, ScheduleInterleaved1F1B
from torch.distributed.pipelining.schedules import _PipelineSchedule

from modellink.config.schema import ModelConfig, ParallelConfig
from modellink.models.decoder import Decoder
from modellink.parallel.topology import Topology


@dataclass(frozen=True)
class StageSpec:
    """One model chunk: its place in the pipeline and its layers (global indices)."""

    index: int
    layers: range
    first: bool
    last: bool


def stage_specs(model: ModelConfig, parallel: ParallelConfig, pp_rank: int) -> list[StageSpec]:
    """The chunks that pipeline rank `pp_rank` holds, in the order in which a sample passes them."""
    stages, layers = parallel.pipeline_parallel, model.num_layers
    if parallel.layers_per_stage:
        start = sum(parallel.layers_per_stage[:pp_rank])
        own = range(start, start + parallel.layers_per_stage[pp_rank])
        return [StageSpec(pp_rank, own, pp_rank == 0, pp_rank == stages - 1)]
    size = parallel.layers_per_virtual_stage or layers // stages
    chunks = layers // (stages * size)
    specs = []
    for chunk in range(chunks):
        index = chunk * stages + pp_rank
        own = range(index * size, (index + 1) * size)
        specs.append(StageSpec(index, own, index == 0, index == chunks * stages - 1))
    return specs


LossFunction = Callable[[Tensor, Tensor], Tensor]


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
        self.parallel, self.topology, self.device, self.dtype = parallel, topology, device, dtype
        self.total = parallel.pipeline_parallel * len(specs)
        self.has_first = any(spec.first for spec in specs)
        self.has_last = any(spec.last for spec in specs)
        self._schedules: dict[tuple[int, int, int, bool], _PipelineSchedule] = {}
        self._loss_fn: LossFunction | None = None

    def _stages(self, micro_batch: int, length: int) -> list[Any]:
        """Stages with their shapes declared, so that no run-time negotiation is needed."""
        config = self.chunks[0].config
        split = self.topology.size("tp")
        local = length // split if self.parallel.sequence_parallel else length
        hidden_dtype = torch.float32 if config.fp32_residual else self.dtype
        tokens = torch.empty(micro_batch, length, dtype=torch.long, device="meta")
        # requires_grad says that a gradient travels back along this edge
        edge: dict[str, Any] = {"device": "meta", "requires_grad": True}
        hidden = torch.empty(micro_batch, local, config.hidden_size, dtype=hidden_dtype, **edge)
        logits = torch.empty(micro_batch, length, config.padded_vocab_size // split, dtype=self.dtype, **edge)
        if self.parallel.output_layer_slice_num > 1:  # the last stage ends in losses
            logits = torch.empty(micro_batch, length, **edge)
        return [
            PipelineStage(
                chunk,
                spec.index,
                self.total,
                self.device,
                input_args=(tokens if spec.first else hidden,),
                output_args=(logits if spec.last else hidden,),
                group=self.topology.group("pp"),
            )
            for chunk, spec in zip(self.chunks, self.specs, strict=True)
        ]

    def _schedule(self, micro_batches: int, micro_batch: int, length: int, training: bool) -> _PipelineSchedule:
        key = (micro_batches, micro_batch, length, training)
        if key not in self._schedules:
            stages = self._stages(micro_batch, length)

            # read through self: the divisor in the loss changes from step to step
            def loss_fn(output: Tensor, target: Tensor) -> Tensor:
                return self._loss_fn(output, target)

            if len(stages) > 1:
                schedule: _PipelineSchedule = ScheduleInterleaved1F1B(
                    stages, micro_batches, loss_fn=loss_fn, scale_grads=False
                )
            else:
                # 1F1B cannot fill its warm-up with fewer micro-batches than stages; GPipe's order is then the same
                kind = Schedule1F1B if micro_batches >= self.total else ScheduleGPipe
                schedule = kind(stages[0], micro_batches, loss_fn=loss_fn, scale_grads=False)
            self._schedules[key] = schedule
        return self._schedules[key]

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

        tokens, labels: int [B, S] with B a multiple of `micro_batch`; `extra` tensors have B rows too and go to every
        stage by name.
        """
        self._loss_fn = loss_fn
        micro_batches, length = tokens_BS.shape[0] // micro_batch, tokens_BS.shape[1]
        schedule = self._schedule(micro_batches, micro_batch, length, training)
        inputs = (tokens_BS,) if self.has_first else ()
        target = labels_BS if self.has_last else None
        losses: list[Tensor] | None = [] if self.has_last else None
        # the sequence length travels by keyword: a later stage sees only its shard of the sequence
        context: dict[str, Any] = {"sequence_length": length, "return_outputs": False}
        context.update(extra or {})
        if training:
            schedule.step(*inputs, target=target, losses=losses, **context)
        else:
            with torch.no_grad():
                schedule.eval(*inputs, target=target, losses=losses, **context)
        if not losses:
            return torch.zeros((), dtype=torch.float32, device=self.device)
        return torch.stack([loss.detach() for loss in losses]).sum()
