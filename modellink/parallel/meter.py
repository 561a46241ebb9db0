"""Bytes that a piece of code holds and sends.

    with Meter() as meter:
        loss = step(...)
    meter.peak, meter.sent

A dispatch mode sees every operation of its thread, those of backward on a CPU and collectives included, so both counts
are exact and repeat: they depend on shapes, not on an allocator or a network. What a kernel allocates and frees inside
is not seen. Buffers of host memory, to which things move out of the device's way, are not held by the device.

`MemoryMeter` asks the allocator where there is one, on accelerators, and a `Meter` on a CPU. Both count what is alive,
so that differences and peaks mean the same.
"""

from __future__ import annotations

import time
import weakref
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch.utils._python_dispatch import (
    TorchDispatchMode,
    is_traceable_wrapper_subclass,
    is_traceable_wrapper_subclass_type,
)

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


_SETTLE_S = 0.02  # a thread of gloo lets go of its tensors a moment after the wait for them is over


class Meter(TorchDispatchMode):
    """Counts while it is entered. Tensors made before count only where `held` names them.

    Every storage that an operation returns is followed from its first appearance to its end by a weak reference.
    """

    def __init__(self, held: Iterable[Tensor] = ()) -> None:
        super().__init__()
        self._communicated = False
        self._live = 0
        self._sizes: dict[int, int] = {}
        self._references: dict[int, weakref.ref[Any]] = {}
        self.peak = 0  # most bytes alive at once, at the end of an operation
        # bytes that left this rank, by the name of the collective; without functional ones, which are DTensor's
        self.sent: Counter[str] = Counter()
        self.hold(held)

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if any(is_traceable_wrapper_subclass_type(kind) for kind in types):
            return NotImplemented  # a sharded tensor takes itself apart; its parts come by again
        results = func(*args, **(kwargs or {}))
        if func.namespace.endswith(("c10d", "c10d_functional")):
            self._communicated = True
            name = func._overloadpacket.__name__
            self.sent[name] += round(_SENT[name](args)) if name in _SENT else 0
        self.hold(_tensors(results))
        return results

    def hold(self, held: Iterable[Tensor]) -> None:
        """Count these from now on."""
        for tensor in held:
            if not (is_traceable_wrapper_subclass(tensor) or tensor.is_meta or device.is_host_buffer(tensor)):
                self._follow(tensor.untyped_storage())
        if self._live > self.peak:
            self.peak = max(self.peak, self.live)

    def _follow(self, storage: torch.UntypedStorage) -> None:
        key, size = storage._cdata, storage.nbytes()
        known = self._sizes.get(key)
        if known is None:
            self._references[key] = weakref.ref(storage, lambda _: self._forget(key))
        if known != size:
            self._sizes[key] = size
            self._live += size - (known or 0)

    def _forget(self, key: int) -> None:
        self._live -= self._sizes.pop(key)
        del self._references[key]

    @property
    def live(self) -> int:
        """Bytes alive now."""
        if self._communicated:
            time.sleep(_SETTLE_S)
            self._communicated = False
        # sharded data parallelism empties storages that stay alive
        for reference in list(self._references.values()):
            storage = reference()
            if storage is not None:
                self._follow(storage)
        return self._live


class MemoryMeter:
    """Context manager: `live` and `peak` bytes on this process's device; nested use is not meant.

    `held` are tensors that exist before (weights, gradients, optimizer states); a CPU knows them only so.
    """

    def __init__(self, held: Iterable[Tensor] = ()) -> None:
        self._storages = None if device.is_accelerated() else Meter(held)

    def hold(self, held: Iterable[Tensor]) -> None:
        """Count these as well."""
        if self._storages is not None:
            self._storages.hold(held)

    def __enter__(self) -> MemoryMeter:
        if self._storages is not None:
            self._storages.__enter__()
        self.reset_peak()
        return self

    def __exit__(self, *error: Any) -> None:
        if self._storages is not None:
            self._storages.__exit__(*error)

    @property
    def live(self) -> int:
        """Bytes held now."""
        return device.memory_stats().allocated if self._storages is None else self._storages.live

    @property
    def peak(self) -> int:
        """Most bytes held at once since the start or `reset_peak`."""
        return device.memory_stats().peak_allocated if self._storages is None else self._storages.peak

    def reset_peak(self) -> None:
        """Start a new peak from what is held now."""
        if self._storages is None:
            device.reset_peak_memory()
        else:
            self._storages.peak = self._storages.live
