"""Where optimizer states live and are updated: beside the parameters, or in host memory (`--cpu-optimizer`).

    device   gradients of bucket i + 1 ──┐                                ┌──▶ weights of bucket i - 1
                                      copies                           copies
    host                                 └──▶ update of bucket i ─────────┘        masters and moments stay here

A `Link` is the way between the two. The one to host memory copies through pinned buffers on two streams of its own, one
bucket ahead in one direction and one behind in the other, so that both directions and the update overlap. On a CPU
device the same copies are made and nothing overlaps. Source: ZeRO-Offload, Ren et al., arXiv:2101.06840.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Protocol

import torch
from torch import Tensor

from modellink import device
from modellink.optim.local import like_parameter, local_tensor

Arrival = Callable[[], list[Tensor]]


class Link(Protocol):
    """How an update reaches parameters and gradients. Tensors on this side of it are plain."""

    ahead: int  # buckets that are fetched before they are needed; 0: nothing travels, `fetch` gives the thing itself

    def like(self, param: Tensor) -> Tensor:
        """Shaped, typed and placed as `param`, on the device of its states; values mean nothing."""

    def fetch(self, tensors: list[Tensor]) -> Arrival:
        """Start to bring `tensors` to the update; what is returned waits for them and gives them."""

    def send(self, targets: list[Tensor], values: list[Tensor]) -> None:
        """Write `values` into tensors that `fetch` would bring; done after `finish`."""

    def finish(self) -> None:
        """Whatever the device does from now on sees what was sent."""


class Beside:
    """Parameters are updated where they are: nothing moves, and what is fetched is changed in place."""

    ahead = 0

    def like(self, param: Tensor) -> Tensor:
        return param

    def fetch(self, tensors: list[Tensor]) -> Arrival:
        return lambda: tensors

    def send(self, targets: list[Tensor], values: list[Tensor]) -> None:
        torch._foreach_copy_(targets, values)

    def finish(self) -> None:
        pass


class HostLink:
    """States live in host memory, and the update runs there. Counts the bytes that travel."""

    ahead = 1

    def __init__(self) -> None:
        self._down, self._up = device.new_stream(), device.new_stream()
        self.fetched_bytes = self.sent_bytes = 0

    def like(self, param: Tensor) -> Tensor:
        shard = local_tensor(param)
        # one element, seen as many: forms of states read sizes and devices only
        return like_parameter(param, torch.empty((), dtype=shard.dtype, device="cpu").expand(shard.shape))

    def fetch(self, tensors: list[Tensor]) -> Arrival:
        copies = _host_buffers(tensors)
        self._down.wait_stream(device.current_stream())
        with device.use_stream(self._down):
            for copy, tensor in zip(copies, tensors, strict=True):
                copy.copy_(tensor, non_blocking=True)
        arrived = device.new_event()
        arrived.record(self._down)
        self.fetched_bytes += _bytes(tensors)

        def wait() -> list[Tensor]:
            arrived.synchronize()
            return copies

        return wait

    def send(self, targets: list[Tensor], values: list[Tensor]) -> None:
        staged = _host_buffers(targets)
        torch._foreach_copy_(staged, values)
        with device.use_stream(self._up):  # the gradients' arrival said that the device is done with the old weights
            for target, value in zip(targets, staged, strict=True):
                target.copy_(value, non_blocking=True)
        self.sent_bytes += _bytes(targets)

    def finish(self) -> None:
        device.current_stream().wait_stream(self._up)


def _host_buffers(tensors: list[Tensor]) -> list[Tensor]:
    """Empty host tensors of these shapes in one dtype that holds all of theirs, in one piece of pinned memory."""
    dtype = functools.reduce(torch.promote_types, (tensor.dtype for tensor in tensors))
    sizes = [tensor.numel() for tensor in tensors]
    flat = device.host_buffer(sum(sizes), dtype)
    return [part.view(tensor.shape) for part, tensor in zip(flat.split(sizes), tensors, strict=True)]


def _bytes(tensors: list[Tensor]) -> int:
    return sum(tensor.numel() * tensor.element_size() for tensor in tensors)
