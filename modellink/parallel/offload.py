"""Saved activations wait for backward in host memory (`--swap-attention`).

    forward    what a module saves ── side stream ──▶ pinned host memory; the device forgets it
    backward   module m needs its own; those of module m - 1, whose turn is next, travel back beside it

What autograd saves while a listed module runs passes a pair of hooks. Going out, a storage is copied once, however many
saved tensors are views of it, and the hook keeps the copy in place of the tensor. Coming back, the first tensor of a
module that backward asks for fetches all of that module and starts to fetch the one before it in the same pass; copies
that are neither are dropped from the device again (their host side stays until autograd lets go), so a backward that
visits the graph twice finds them. Each forward pass has its own order of modules, hence several micro-batches may be
under way. A layer that is recomputed saves nothing and is left alone.

Left on the device: parameters, gathered ones too, and their views; what all layers share (rotation tables, masks);
integers and booleans; storages below `SMALL` bytes. On a CPU device the same copies are made, one after the other.
"""

from __future__ import annotations

import weakref
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd.graph import saved_tensors_hooks
from torch.distributed._functional_collectives import AsyncCollectiveTensor
from torch.distributed.tensor import DTensor
from torch.multiprocessing.reductions import StorageWeakRef

from modellink import device
from modellink.config.schema import ParallelConfig
from modellink.config.swap import swapped_modules
from modellink.models.decoder import Decoder
from modellink.models.moe import Experts
from modellink.optim.local import like_parameter, local_tensor

SMALL = 2048


def _plain(tensor: Tensor) -> Tensor:
    """This rank's part of `tensor`, arrived."""
    local = local_tensor(tensor)
    return local.trigger_wait() if isinstance(local, AsyncCollectiveTensor) else local


def _address(tensor: Tensor) -> int:
    return _plain(tensor).untyped_storage().data_ptr()


class _Copy:
    """One storage in host memory, and on the device while backward is near."""

    def __init__(self, swap: Swap, storage: torch.UntypedStorage, place: torch.device) -> None:
        self.swap, self.place = swap, place
        self.original = StorageWeakRef(storage)  # while it lives, no other storage has its identity
        whole = torch.empty(0, dtype=torch.uint8, device=place).set_(storage)
        self.host = device.host_buffer(whole.numel(), torch.uint8)
        self.moved, self.arrived = device.new_event(), device.new_event()
        self.here: Tensor | None = None
        swap.leaving.wait_stream(device.current_stream())
        with device.use_stream(swap.leaving):
            self.host.copy_(whole, non_blocking=True)
            self.moved.record(swap.leaving)
        device.keep_for(whole, swap.leaving)
        swap.moved_bytes += whole.numel()

    def fetch(self) -> None:
        """Start to bring it back unless it is here or on its way."""
        if self.here is not None:
            return
        self.here = torch.empty(self.host.numel(), dtype=torch.uint8, device=self.place)
        self.swap.returning.wait_stream(device.current_stream())  # whoever had this memory before is done
        with device.use_stream(self.swap.returning):
            self.moved.wait(self.swap.returning)
            self.here.copy_(self.host, non_blocking=True)
            self.arrived.record(self.swap.returning)
        device.keep_for(self.here, self.swap.returning)
        self.swap.restored_bytes += self.host.numel()

    def storage(self) -> torch.UntypedStorage:
        """On the device, for work of the current stream."""
        self.fetch()
        assert self.here is not None
        self.arrived.wait(device.current_stream())
        return self.here.untyped_storage()


class _Module:
    """One run of a listed module: what it saved, and the run before it in the same forward pass."""

    def __init__(self, before: _Module | None) -> None:
        self.before = before
        self.copies: weakref.WeakSet[_Copy] = weakref.WeakSet()


class _Saved:
    """What autograd keeps in place of a tensor."""

    def __init__(self, copy: _Copy, run: _Module, tensor: Tensor, local: Tensor) -> None:
        self.copy, self.run = copy, run
        self.dtype, self.geometry = local.dtype, (local.storage_offset(), local.size(), local.stride())
        self.like = _stand_in(tensor) if isinstance(tensor, DTensor) else None

    def restore(self) -> Tensor:
        local = torch.empty(0, dtype=self.dtype, device=self.copy.place)
        local.set_(self.copy.storage(), *self.geometry)
        return local if self.like is None else like_parameter(self.like, local)


def _stand_in(tensor: DTensor) -> Tensor:
    """Placed and shaped as `tensor`, without its values."""
    local = local_tensor(tensor)
    return like_parameter(tensor, torch.empty((), dtype=local.dtype, device="meta").expand(local.shape))


class Swap:
    """The saved tensors of the listed modules of one decoder: where they are, and the bytes that moved."""

    def __init__(self) -> None:
        self.leaving, self.returning = device.new_stream(), device.new_stream()
        self.moved_bytes = self.restored_bytes = 0
        self._stays: set[int] = set()
        self._copies: weakref.WeakValueDictionary[int, _Copy] = weakref.WeakValueDictionary()
        self._last: _Module | None = None  # of the forward pass under way
        self._open: list[saved_tensors_hooks | None] = []
        self._near: tuple[_Module, ...] = ()

    # --- forward ------------------------------------------------------------------------------------------------------

    def start_pass(self, *_: Any) -> None:
        """A forward pass begins: its modules have an order of their own."""
        self._last = None

    def start_layer(self, layer: nn.Module, _: Any, context: dict[str, Any]) -> None:
        """Note what stays: the layer's parameters, gathered by now, and tensors that it shares with others."""
        shared = [t for value in context.values() if isinstance(value, tuple) for t in value if isinstance(t, Tensor)]
        self._stays = {_address(tensor) for tensor in (*layer.parameters(), *shared)}

    def gathered(self, module: nn.Module, _: Any) -> None:
        """Parameters inside a layer that were gathered only now."""
        self._stays |= {_address(parameter) for parameter in module.parameters()}

    def enter(self, *_: Any) -> None:
        """From here on what is saved is swapped, unless it will be recomputed."""
        if not torch.is_grad_enabled() or _is_recomputed():
            self._open.append(None)
            return
        run = self._last = _Module(self._last)
        hooks = saved_tensors_hooks(lambda tensor: self._pack(tensor, run), self._unpack)
        hooks.__enter__()
        self._open.append(hooks)

    def leave(self, *_: Any) -> None:
        """The end of what `enter` began, also after an error."""
        hooks = self._open.pop()
        if hooks is not None:
            hooks.__exit__(None, None, None)

    def _pack(self, tensor: Tensor, run: _Module) -> Tensor | _Saved:
        if not tensor.is_floating_point() or tensor.device.type != device.device_type():
            return tensor
        local = _plain(tensor)
        storage = local.untyped_storage()
        if storage.nbytes() < SMALL or storage.data_ptr() in self._stays:
            return tensor
        key = StorageWeakRef(storage).cdata
        copy = self._copies.get(key)
        if copy is None:
            copy = self._copies[key] = _Copy(self, storage, local.device)
        run.copies.add(copy)
        return _Saved(copy, run, tensor, local)

    # --- backward -----------------------------------------------------------------------------------------------------

    def _unpack(self, saved: Tensor | _Saved) -> Tensor:
        if isinstance(saved, Tensor):
            return saved
        if not self._near or self._near[0] is not saved.run:
            self._approach(saved.run)
        return saved.restore()

    def _approach(self, run: _Module) -> None:
        """Backward reaches `run`: fetch it and the one before, and drop what else is on the device."""
        near = (run,) if run.before is None else (run, run.before)
        wanted = [copy for each in near for copy in each.copies]
        for each in self._near:
            for copy in each.copies:
                if copy not in wanted:
                    copy.here = None
        for copy in wanted:
            copy.fetch()
        self._near = near


def _is_recomputed() -> bool:
    """Whether a checkpoint around this code drops what is saved, or is running it again."""
    hooks = torch._C._autograd._top_saved_tensors_default_hooks(False)
    return hooks is not None and hooks[0].__module__ == "torch.utils.checkpoint"


def apply_swap(model: Decoder, parallel: ParallelConfig) -> Swap | None:
    """Set up what `parallel` asks for; None when it is nothing."""
    if not parallel.swap_attention:
        return None
    swap, names = Swap(), swapped_modules(parallel.swap_modules)
    model.register_forward_pre_hook(swap.start_pass)
    for layer in model.layers.values():
        layer.register_forward_pre_hook(swap.start_layer, with_kwargs=True)
        for name in names:
            module = getattr(layer, name)
            if module is not None:
                module.register_forward_pre_hook(swap.enter)
                module.register_forward_hook(swap.leave, always_call=True)
        for module in layer.modules():
            if isinstance(module, Experts):
                module.register_forward_pre_hook(swap.gathered)
    return swap
