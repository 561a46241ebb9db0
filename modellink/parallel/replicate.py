"""Data parallelism without sharding (ZeRO-0): every rank holds all weights and sums its gradients with the others'.

    backward:   layer 3 | layer 2 | layer 1 | layer 0
    all-reduce:           layer 3 | layer 2 | layer 1 | layer 0

Weights, masters and states lie as in one process, so every precision mode has one process's bytes a parameter; FSDP
would add a gathered copy of the weights. The gradients of a layer are summed in one collective, in the dtype in which
they were accumulated. It starts when autograd has added the last of them and runs beside the rest of backward; without
`overlap` all collectives start after it.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, field

import torch
import torch.distributed as dist
from torch import nn

from modellink.models.decoder import Decoder
from modellink.models.moe import Experts
from modellink.optim.local import gradient_of, like_parameter, local_tensor, set_gradient
from modellink.parallel.topology import Topology


@dataclass
class _Bucket:
    """Parameters of one layer (or outside the layers) that the same ranks hold."""

    group: dist.ProcessGroup
    parameters: list[nn.Parameter] = field(default_factory=list)
    waits_for: int = 0  # gradients that autograd has yet to add in this step
    work: dist.Work | None = None
    launched: bool = False


class ReplicatedGradients:
    """Sums gradients over the ranks that hold the same weights, once a step, between `begin` and `finish`."""

    def __init__(self, chunks: Iterable[Decoder], topology: Topology, overlap: bool) -> None:
        self._overlap = overlap
        self.started = 0  # sums of this step that have begun
        self._buckets = [bucket for chunk in reversed(list(chunks)) for bucket in _buckets(chunk, topology)]
        for bucket in self._buckets:
            for parameter in bucket.parameters:
                # after the hook that accumulates in float32: hooks run in the order in which they were added
                parameter.register_post_accumulate_grad_hook(lambda _, bucket=bucket: self._arrived(bucket))

    def begin(self, micro_batches: int) -> None:
        """A step of `micro_batches` backward passes starts."""
        self.started = 0
        for bucket in self._buckets:
            bucket.waits_for, bucket.launched = micro_batches * len(bucket.parameters), False

    def _arrived(self, bucket: _Bucket) -> None:
        if bucket.launched:
            raise RuntimeError("a gradient was added after it had been summed: begin() was told too few micro-batches")
        bucket.waits_for -= 1
        # in one order on all ranks, whatever the order in which autograd finishes
        while self._overlap and self.started < len(self._buckets) and self._buckets[self.started].waits_for == 0:
            self._launch(self._buckets[self.started])

    @torch.no_grad()
    def _launch(self, bucket: _Bucket) -> None:
        """Start the sum of a bucket's gradients; they become views of the one buffer that travels."""
        self.started += 1
        bucket.launched = True
        gradients = [gradient for parameter in bucket.parameters if (gradient := gradient_of(parameter)) is not None]
        assert len(gradients) == len(bucket.parameters), "a parameter took no part in the step"
        locals_ = [local_tensor(gradient) for gradient in gradients]
        if len(locals_) == 1 and locals_[0].is_contiguous():
            flat = locals_[0].view(-1)
        else:
            flat = torch.cat([local.reshape(-1) for local in locals_])
        for parameter, gradient, piece in zip(
            bucket.parameters, gradients, flat.split([local.numel() for local in locals_]), strict=True
        ):
            set_gradient(parameter, like_parameter(gradient, piece.view(local_tensor(gradient).shape)))
        bucket.work = dist.all_reduce(flat, group=bucket.group, async_op=True)

    def finish(self) -> None:
        """Sum what is left and wait for all; gradients are then those of the whole batch."""
        while self.started < len(self._buckets):
            self._launch(self._buckets[self.started])
        for bucket in self._buckets:
            if bucket.work is not None:
                bucket.work.wait()
                bucket.work = None


def _buckets(chunk: Decoder, topology: Topology) -> list[_Bucket]:
    """The buckets of a chunk in the order in which backward finishes them."""
    experts = {id(p) for module in chunk.modules() if isinstance(module, Experts) for p in module.parameters()}
    apart = topology.experts is not None
    buckets: dict[tuple[str, bool, torch.dtype], _Bucket] = {}
    for name, parameter in reversed(list(chunk.named_parameters())):
        expert = apart and id(parameter) in experts
        group = topology.group("expert_replicate" if expert else "dp_replicate")
        if group is None or not parameter.requires_grad:
            continue
        parts = name.split(".")
        place = ".".join(parts[: 2 if parts[0] == "layers" else 1])
        buckets.setdefault((place, expert, parameter.dtype), _Bucket(group)).parameters.append(parameter)
    return list(buckets.values())
