"""What adapters of every kind are made of: stored factors, the changes they make to tensors, and what must hold."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

import torch
from torch import Tensor

from modellink.checkpoint.digest import is_finite
from modellink.config.schema import ModelConfig
from modellink.errors import ModelLinkError
from modellink.registry import suggest

EMBEDDING, HEAD = "embed_tokens.weight", "lm_head.weight"
VOCABULARY = ("embed_tokens.", "lm_head.")
# a factor's name: module, whether of an embedding, A or B, and PEFT's name of the adapter where files keep it
FACTOR = re.compile(r"(.+)\.lora_(embedding_)?([AB])(?:\.(?!(?:weight|bias)$)[^.]+)?(?:\.weight)?")
_BLOCK = 1 << 17  # elements summed at a time: float32 blocks that stay in the cache of a core


@dataclass(frozen=True)
class Stored:
    """One tensor of an adapter's file; nothing is read before `read`."""

    file: Path
    name: str
    shape: tuple[int, ...]
    load: Callable[[], Tensor]

    def read(self) -> Tensor:
        tensor = self.load()
        if not tensor.dtype.is_floating_point or tensor.dtype.itemsize < 2:
            raise ModelLinkError(
                f"{self.file}: {self.name!r} is stored as {tensor.dtype}; quantised adapters are not read."
            )
        if not is_finite(tensor):
            raise ModelLinkError(f"{self.file}: tensor {self.name!r} holds NaN or infinity.")
        return tensor


@dataclass(frozen=True)
class Change:
    """What happens to one tensor of ours, or to the matrix of one of its experts.

    `value`, where given, takes the tensor's place; then scale * up @ down is added, up [rows, r], down [r, columns], or
    for all experts at once [E, rows, r] and [E, r, columns]. Rows beyond theirs, the padding of a vocabulary, stay. The
    callables read the files.
    """

    value: Callable[[], Tensor] | None = None
    factors: Callable[[], tuple[Tensor, Tensor]] | None = None
    scale: float = 1.0

    def apply(self, base: Tensor, target: Tensor) -> bool:
        """Write `base`, changed, into `target`, a tensor of its shape; whether all of that is finite."""
        if self.value is not None:
            base = self.value()
            target[: len(base)] = base
        if self.factors is None:
            return is_finite(target)
        up, down = self.factors()
        stacked = zip(base, target, up, down, strict=True) if up.dim() == 3 else [(base, target, up, down)]
        return all([self._add(*matrices) for matrices in stacked])

    def _add(self, base: Tensor, target: Tensor, up: Tensor, down: Tensor) -> bool:
        wide = torch.promote_types(torch.promote_types(base.dtype, up.dtype), torch.float32)
        up, down = up.to(wide), down.to(wide)
        rows, step, finite = min(len(up), len(base)), max(1, _BLOCK // base.shape[1]), True
        for start in range(0, rows, step):
            block = slice(start, min(start + step, rows))
            target[block] = base[block].to(wide).addmm(up[block], down, alpha=self.scale)
            finite &= is_finite(target[block])
        return finite


Changes = dict[str, dict[int | None, Change]]  # canonical name -> number of an expert, or None for the tensor -> change


class Adapter(Protocol):
    """An opened adapter, not yet bound to a model."""

    folder: Path

    def changes(self, config: ModelConfig) -> Changes:
        """What the adapter does to a model of this architecture; ModelLinkError unless all of it fits."""

    def check(self, config: ModelConfig, canonical: str, tensor: Tensor) -> None:
        """Raise ModelLinkError when the base's `tensor` cannot be that which the adapter was trained on."""


def numberless(module: str) -> str:
    """The module's name without the number of its layer."""
    return re.sub(r"(?<=\.)\d+(?=\.)", "{}", module, count=1)


def check_agrees(where: Path, name: str, stated: object, flag: str, given: object) -> None:
    """What the caller believes of an adapter must not contradict what its files say."""
    if None not in (stated, given) and stated != given:
        raise ModelLinkError(f"{flag} {given} contradicts {where}, which says {name} {stated}: leave the flag out.")


def check_alpha(where: Path, alpha: object) -> float:
    if not isinstance(alpha, int | float):
        raise ModelLinkError(f"{where} does not say lora_alpha, the scale of the adapter: give --lora-alpha.")
    return float(alpha)


def check_shape(stored: Stored, shape: tuple[int, ...], matrix: tuple[int, ...]) -> None:
    """`stored` has the `shape` that a factor of the base's `matrix` has."""
    if stored.shape != shape:
        raise ModelLinkError(
            f"{stored.file}: {stored.name!r} has shape {list(stored.shape)}, the base's tensor of shape"
            f" {list(matrix)} wants {list(shape)}: the adapter belongs to another model."
        )


def check_pair(module: str, pair: Mapping[str, Stored]) -> None:
    """`pair` maps "A" and "B", or "embedding_A" and "embedding_B", to factors: both must be there."""
    kinds = {key.removesuffix("A").removesuffix("B") for key in pair}
    for lacking in (f"{kind}{side}" for kind in kinds for side in "AB"):
        if lacking not in pair:
            held = next(iter(pair.values()))
            raise ModelLinkError(
                f"{held.file} lacks lora_{lacking} of {module!r} beside {held.name!r}: fetch or save it again."
            )


def check_complete(where: Path, changed: Iterable[str], modules: Iterable[str]) -> None:
    """Where one layer's module is changed, that of every layer among `modules` is."""
    there = set(changed)
    kinds = {numberless(module) for module in there}
    for module in modules:
        if module not in there and numberless(module) in kinds:
            raise ModelLinkError(
                f"{where} changes other layers but has no lora_A and lora_B of {module!r}: it belongs to a model of"
                " fewer layers, or is not whole."
            )


def check_targets(where: Path, targets: Sequence[str], changed: Iterable[str]) -> None:
    """--lora-target-modules names all the modules that the adapter changes, and no other."""
    modules = list(changed)
    for target in targets:
        if not any(_ends(module, target) for module in modules):
            there = sorted({module.rpartition(".")[2] for module in modules})
            raise ModelLinkError(
                f"--lora-target-modules {target}: the adapter in {where} changes no such module, but"
                f" {', '.join(there)}.{suggest(target, there)}"
            )
    for module in modules:
        if not any(_ends(module, target) for target in targets):
            raise ModelLinkError(
                f"the adapter in {where} also changes {module!r}: name it in --lora-target-modules, or leave the"
                " option out."
            )


def _ends(module: str, target: str) -> bool:
    return f".{module}".endswith(f".{target}")
