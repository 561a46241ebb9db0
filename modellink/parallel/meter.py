"""Bytes that a piece of code holds and sends, counted operation by operation.

    with Meter() as meter:
        loss = step(...)
    meter.peak, meter.sent

A dispatch mode sees every operation of its thread, those of backward on a CPU and collectives included, so both counts
are exact and repeat: they depend on shapes, not on an allocator or a network. What a kernel allocates and frees inside
is not seen. Buffers of host memory, to which things move out of the device's way, are not held by the device.
"""

from __future__ import annotations

import time
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch.multiprocessing.reductions import StorageWeakRef
from torch.utils._python_dispatch import TorchDispatchMode

from modellink import device


def _tensors(values: Any) -> Iterator[Tensor]:
    if isinstance(values, Tensor):
        yield values
    elif isinstance(values, list | tuple):
        for value in values:
            yield from _tensors(value)


def _bytes(values: Any) -> int:
    return sum(tensor.numel() * tensor.itemsize for tensor in _tensors(values))


def _size(arguments: Sequence[Any]) -> int:
    """Ranks of the process group among the arguments of a collective."""
    boxed = next(value for value in arguments if isinstance(value, torch.ScriptObject))
    return dist.ProcessGroup.unbox(boxed).size()


# what leaves this rank, by the arguments of a collective: nobody sends its own part to itself
_SENT: dict[str, Callable[[Sequence[Any]], float]] = {
    "send": lambda a: _bytes(a[0]),
    "alltoall_base_": lambda a: _bytes(a[1]) * (_size(a) - 1) / _size(a),
    "_allgather_base_": lambda a: _bytes(a[1]) * (_size(a) - 1),
    "_reduce_scatter_base_": lambda a: _bytes(a[1]) * (_size(a) - 1) / _size(a),
    "allreduce_": lambda a: _bytes(a[0]) * 2 * (_size(a) - 1) / _size(a),
}


_SETTLE_S = 0.005  # a thread of gloo lets go of its tensors a moment after the wait for them is over


class Meter(TorchDispatchMode):
    """Counts while it is entered. Tensors made before count only where `held` names them."""

    def __init__(self, held: Sequence[Tensor] = ()) -> None:
        super().__init__()
        self._communicated = False
        self._live: dict[StorageWeakRef, int] = {}
        self.peak = 0  # most bytes alive at once, at the end of an operation
        self.sent: Counter[str] = Counter()  # bytes that left this rank, by the name of the collective
        self._note(held)

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        communicates = func.namespace == "c10d"
        if self._communicated and not communicates:
            time.sleep(_SETTLE_S)
        self._communicated = communicates
        results = func(*args, **(kwargs or {}))
        if communicates:
            name = func._overloadpacket.__name__
            self.sent[name] += round(_SENT[name](args)) if name in _SENT else 0
        else:
            self._note(results)
        return results

    def _note(self, results: Any) -> None:
        for tensor in _tensors(results):
            if device.is_host_buffer(tensor):
                continue
            storage = tensor.untyped_storage()
            self._live.setdefault(StorageWeakRef(storage), storage.nbytes())
        self.peak = max(self.peak, self.held())

    def held(self) -> int:
        """Bytes alive now."""
        self._live = {storage: size for storage, size in self._live.items() if not storage.expired()}
        return sum(self._live.values())
