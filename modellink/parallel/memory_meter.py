"""Device memory of a step, measured: bytes that live tensors hold, now and at the peak.

On an accelerator the allocator counts. On a CPU, where the size of the process says little about tensors, every storage
that an operator makes is followed from its first appearance to its end by a weak reference: weights, gradients,
optimizer states, activations, and what operators hold for a moment between themselves. Both count what is alive, so
that differences and peaks mean the same. (`meter.Meter` counts operations of one piece of code, and what it sends.)
"""

from __future__ import annotations

import weakref
from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode, is_traceable_wrapper_subclass_type
from torch.utils._pytree import tree_leaves

from modellink import device


class _StorageMeter(TorchDispatchMode):
    """Follows storages from operator to operator."""

    def __init__(self) -> None:
        super().__init__()
        self.live = self.peak = 0
        self._sizes: dict[int, int] = {}
        self._references: dict[int, weakref.ref[Any]] = {}

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if any(is_traceable_wrapper_subclass_type(kind) for kind in types):
            return NotImplemented  # a sharded tensor takes itself apart; its parts come by again
        found = func(*args, **(kwargs or {}))
        for leaf in tree_leaves(found):
            if type(leaf) is Tensor or isinstance(leaf, torch.nn.Parameter):
                self.see(leaf)
        return found

    def see(self, tensor: Tensor) -> None:
        if tensor.device.type == "meta" or device.is_host_buffer(tensor):
            return
        storage = tensor.untyped_storage()
        key, size = storage._cdata, storage.nbytes()
        known = self._sizes.get(key)
        if known is None:
            self._references[key] = weakref.ref(storage, lambda _: self._forget(key))
        if known != size:
            self._sizes[key] = size
            self.live += size - (known or 0)
        if self.live > self.peak:
            self.settle()
            self.peak = max(self.peak, self.live)

    def _forget(self, key: int) -> None:
        self.live -= self._sizes.pop(key)
        del self._references[key]

    def settle(self) -> None:
        """Sharded data parallelism empties storages that stay alive: look at each again before a peak is believed."""
        for key, reference in list(self._references.items()):
            storage = reference()
            size = 0 if storage is None else storage.nbytes()
            if storage is not None and size != self._sizes[key]:
                self.live += size - self._sizes[key]
                self._sizes[key] = size


class MemoryMeter:
    """Context manager: `live` and `peak` bytes on this process's device; nested use is not meant.

    `held` are tensors that exist before (weights, gradients, optimizer states); a CPU knows them only so.
    """

    def __init__(self, held: Iterable[Tensor] = ()) -> None:
        self._storages = None if device.is_accelerated() else _StorageMeter()
        self.hold(held)

    def hold(self, held: Iterable[Tensor]) -> None:
        """Count these as well."""
        if self._storages is not None:
            for tensor in held:
                self._storages.see(tensor)

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
        if self._storages is None:
            return device.memory_stats().allocated
        self._storages.settle()
        return self._storages.live

    @property
    def peak(self) -> int:
        """Most bytes held at once since the start or `reset_peak`."""
        return device.memory_stats().peak_allocated if self._storages is None else self._storages.peak

    def reset_peak(self) -> None:
        """Start a new peak from what is held now."""
        if self._storages is None:
            device.reset_peak_memory()
        else:
            self._storages.peak = self.live
