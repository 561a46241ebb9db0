"""LoRA adapters, merged into a stream of weights: W + scale * B A, wherever the weights come from and go to.

Two kinds of folder hold adapters: those of PEFT, under the names of the family's Hugging Face code, and checkpoints of
Megatron with adapters of its fused, sharded modules. One pair of factors may serve several tensors of ours (query, key
and value; gate and up): each gets its rows of B. That the adapter fits the model is checked from the headers of files
before the first tensor passes; factors are read when their tensor passes. Sums are computed in float32, or wider where
a factor or a weight is wider, and rounded once.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path

import torch
from torch import Tensor

from modellink.checkpoint.lora_megatron import AdaptedFolder, MegatronAdapter
from modellink.checkpoint.lora_parts import Adapter
from modellink.checkpoint.lora_peft import PEFT_CONFIG, PeftAdapter
from modellink.checkpoint.megatron import find_step
from modellink.checkpoint.work import fingerprint
from modellink.config.schema import ModelConfig
from modellink.errors import ModelLinkError

__all__ = ["AdaptedFolder", "Adapter", "Merge", "merged", "open_adapter"]


def open_adapter(
    folder: str | Path, *, rank: int | None = None, alpha: float | None = None, targets: Sequence[str] | None = None
) -> Adapter:
    """The adapter in `folder`, of either kind.

    `rank`, `alpha` and `targets` (ends of the names of the modules that it changes) are what the caller knows of it:
    they say what the files leave open, and must agree with what the files say. Raises ModelLinkError when there is no
    adapter, for damaged files, for methods other than plain LoRA, and for contradictions.
    """
    place = Path(folder)
    if (place / PEFT_CONFIG).is_file():
        return PeftAdapter(place, rank, alpha, targets)
    if place.is_dir() and find_step(place) is not None:
        return MegatronAdapter(place, rank, alpha, targets)
    raise ModelLinkError(
        f"{place} holds no adapter: give a PEFT folder with {PEFT_CONFIG}, or a Megatron checkpoint with LoRA weights."
    )


class Merge:
    """An adapter bound to a model: a function of one tensor at a time, in any order, as often as it is asked.

    Changed tensors are rounded once, to `dtype` (default: their own). Raises ModelLinkError, before a tensor is read,
    when the adapter does not fit a model of `config`.
    """

    def __init__(self, config: ModelConfig, adapter: Adapter, dtype: torch.dtype | None = None) -> None:
        self.changes = adapter.changes(config)
        self._config, self._adapter, self._dtype = config, adapter, dtype

    def __str__(self) -> str:
        return str(self._adapter.folder.absolute())

    def __repr__(self) -> str:
        """Equal for equal results: a conversion that goes on tells by it that the adapter is the same."""
        scales = {name: [change.scale for change in kinds.values()] for name, kinds in self.changes.items()}
        return f"{self} {fingerprint(self._adapter.folder, deep=True)} {self._dtype} {scales}"

    def __call__(self, canonical: str, base: Tensor) -> Tensor:
        """The merged tensor, or `base` itself where the adapter changes nothing.

        `base` is the full CPU tensor, a vocabulary's padding included. Raises ModelLinkError for NaN and overflow, and
        for a base that the adapter was not trained on.
        """
        self._adapter.check(self._config, canonical, base)
        if canonical not in self.changes:
            return base
        whole = base.to(self._dtype or base.dtype, copy=True)
        for expert, change in self.changes[canonical].items():
            place = ... if expert is None else expert
            if not change.apply(base[place], whole[place]):
                raise ModelLinkError(
                    f"{self._adapter.folder}: {canonical!r} merged holds NaN or infinity as {whole.dtype}: the base is"
                    " damaged, or the weights need a wider type."
                )
        return whole


def merged(
    tensors: Iterable[tuple[str, Tensor]], config: ModelConfig, adapter: Adapter, dtype: torch.dtype | None = None
) -> Iterator[tuple[str, Tensor]]:
    """All of a model's `tensors`, pairs of canonical name and full CPU tensor, with `adapter` merged.

    Raises ModelLinkError at once as `Merge` does, on the way as calling it does, and at the end for changed tensors
    that never came.
    """
    merge = Merge(config, adapter, dtype)

    def stream() -> Iterator[tuple[str, Tensor]]:
        missing = set(merge.changes)
        for name, base in tensors:
            missing.discard(name)
            yield name, merge(name, base)
        if missing:
            raise ModelLinkError(f"{adapter.folder}: the tensor {min(missing)!r} that it changes never came.")

    return stream()
