"""One chunk of a model as a stage of torch's pipeline runtime, with what that runtime leaves to its users.

torch's `PipelineStage` keeps a receive buffer per micro-batch, all of one shape, for as long as it lives. Here buffers
are made when a micro-batch arrives, in its own shape, and dropped after its backward pass: micro-batches may differ in
rows and length, from step to step and within one, and memory is that of the micro-batches under way.

Schedules may take the backward pass apart (`BACKWARD_INPUT`, `BACKWARD_WEIGHT`). Weight gradients are then added by
hand, where no hook of a parameter sees them, so `after_weights` is called instead. What runs once in a whole backward
pass runs once here too: torch's weight pass starts at the operations that use a weight and goes nowhere else.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.fsdp import FSDPModule, fully_shard
from torch.distributed.pipelining import PipelineStage

from modellink.models.decoder import Decoder


class Stage(PipelineStage):
    """`chunk` as stage `index` of `total`. Hidden states between stages have dtype `hidden_dtype`.

    `shapes` is set before each step: the shape [B, S, D] of the hidden states of every micro-batch, as they travel; so
    is `split`. A stage that does not split its backward computes all gradients where a schedule has those of inputs.
    """

    def __init__(
        self,
        chunk: Decoder,
        index: int,
        total: int,
        device: torch.device,
        group: dist.ProcessGroup | None,
        hidden_dtype: torch.dtype,
    ) -> None:
        # torch asks for shapes in advance; these have no elements, and `_receive` brings the real ones
        tokens = torch.empty(0, dtype=torch.long, device="meta")
        hidden = torch.empty(0, dtype=hidden_dtype, device="meta", requires_grad=True)
        args = tokens if index == 0 else hidden
        super().__init__(chunk, index, total, device, input_args=(args,), output_args=(hidden,), group=group)
        self._runtime_validate = False
        self._nothing = torch.empty(0, dtype=hidden_dtype, device=device)
        self.split = True
        self.shapes: list[tuple[int, ...]] = []
        self.after_weights: Callable[[], None] | None = None

    def _validate_fwd_input(self, args: Any, kwargs: Any) -> None:
        """torch 2.11 compares shapes with those given in advance."""

    def _validate_fwd_outputs(self, outputs: tuple[Tensor, ...]) -> None:
        """The same for outputs."""

    def _get_init_p2p_neighbors_ops(self) -> list[dist.P2POp]:
        """torch 2.11 introduces neighbours to each other; in a V the neighbour may be this rank itself."""
        return [op for op in super()._get_init_p2p_neighbors_ops() if op.group_peer != self.group_rank]

    def _receive(self, infos: dict[int, Any], micro_batch: int) -> None:
        for info in infos[micro_batch]:
            info.buffer = self._nothing.new_empty(self.shapes[micro_batch])

    def _release(self, micro_batch: int) -> None:
        if not self.is_first:
            self.args_recv_info[micro_batch][0].buffer = self._nothing
        if not self.is_last:
            self.grad_recv_info[micro_batch][0].buffer = self._nothing

    def get_fwd_recv_ops(self, fwd_chunk_id: int) -> list[dist.P2POp]:
        """As torch's, into a new buffer."""
        if not self.is_first:
            self._receive(self.args_recv_info, fwd_chunk_id)
        return super().get_fwd_recv_ops(fwd_chunk_id)

    def get_bwd_recv_ops(self, bwd_chunk_id: int) -> list[dist.P2POp]:
        """As torch's, into a new buffer."""
        if not self.is_last:
            self._receive(self.grad_recv_info, bwd_chunk_id)
        return super().get_bwd_recv_ops(bwd_chunk_id)

    def get_fwd_send_ops(self, fwd_chunk_id: int) -> list[dist.P2POp]:
        """As torch's; without a backward pass nobody needs the output again."""
        ops = super().get_fwd_send_ops(fwd_chunk_id)
        if not self.has_backward:
            del self.fwd_cache[fwd_chunk_id]
        return ops

    def _retrieve_recv_activations(self, fwd_chunk_id: int) -> tuple[Tensor, ...]:
        received = tuple(super()._retrieve_recv_activations(fwd_chunk_id))
        return tuple(tensor.requires_grad_(self.has_backward) for tensor in received)

    def forward_one_chunk(
        self, fwd_chunk_id: int, args: Any, kwargs: dict[str, Any] | None = None, save_forward_output: bool = True
    ) -> Any:
        """As torch's; keywords get no gradient, and without a backward pass the logits are not kept."""
        output = super().forward_one_chunk(fwd_chunk_id, args, kwargs, save_forward_output)
        outputs, inputs = self.fwd_cache.pop(fwd_chunk_id)
        if self.has_backward or not self.is_last:
            self.fwd_cache[fwd_chunk_id] = outputs, inputs[:1]  # torch 2.11 expects all of them to be tensors
        return output

    def backward_one_chunk(
        self, bwd_chunk_id: int, loss: Tensor | None = None, full_backward: bool = True, last_backward: bool = False
    ) -> None:
        """As torch's; all of it when the stage does not split."""
        super().backward_one_chunk(bwd_chunk_id, loss, full_backward or not self.split, last_backward)
        self._release(bwd_chunk_id)

    def backward_weight_one_chunk(self, bwd_chunk_id: int, last_backward: bool = False) -> None:
        """As torch's; gradients join those of earlier micro-batches in the dtype of accumulation."""
        if not self.split:
            return
        super().backward_weight_one_chunk(bwd_chunk_id, last_backward)
        if self.after_weights is not None:
            self.after_weights()
        self._end_backward(reduce=False, wait=False)

    def perform_reduce_grad(self, grad_scale_factor: int) -> None:
        """Start reducing over data ranks, now that the last micro-batch has been here; `finish` waits for the end."""
        assert grad_scale_factor == 1
        self._end_backward(reduce=True, wait=False)

    def finish(self) -> None:
        """Wait for the reduction."""
        self._end_backward(reduce=True, wait=True)

    def _end_backward(self, reduce: bool, wait: bool) -> None:
        """What FSDP does when a backward pass is over: accumulate or reduce, and `wait` or leave that for later.

        Without waiting, the reduction of one chunk goes on beside the backward pass of the next.
        """
        if not isinstance(self.submod, FSDPModule):
            return
        self.submod.set_requires_gradient_sync(reduce)
        self.submod.set_reshard_after_backward(reduce)
        self.submod.set_is_last_backward(wait)
        # as torch's own stages do: passes that stop at the stage's input end without FSDP's last hook
        state: Any = fully_shard.state(self.submod)  # type: ignore[attr-defined]
        state._root_post_backward_final_callback()
