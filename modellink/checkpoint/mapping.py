"""Where our tensors lie in a family's Hugging Face files: names, fused rows, transposed matrices, one file per expert.

The family's row is the only source, for both directions (its `names`, `grouped`, `alternating`, `transposed`):

    one of ours  <->  one of theirs            most modules; a parameter keeps its last part (`.weight`, `.bias`)
    several      <->  one                      modules that share a name: their rows one part after the other, in the
                                               order of the table, or so for every key/value head (`grouped`), or
                                               so row by row (`alternating`)
    [out, in]    <->  [in, out]                `transposed`
    one [E, ...] <->  E                        a second "{}" in the name stands for the number of the expert

A `View` reads a region of one of ours from the regions of theirs that hold it, and nothing else.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from modellink.config.schema import ModelConfig
from modellink.models.families import FAMILIES, Family

_NUMBER = re.compile(r"(?<=\.)\d+(?=\.)")
Shape = tuple[int, ...]


def to_hf(family: Family, name: str) -> str:
    """Hugging Face name of the parameter whose canonical name is `name`, "{}" standing for the number of an expert.

    The table may name whole parameters or their modules. KeyError if the family has no such module.
    """
    number = _NUMBER.search(name)
    pattern = _pattern(family, name)
    theirs = family.names[pattern]
    if pattern.count(".") < name.count("."):
        theirs += "." + name.rpartition(".")[2]
    return theirs.replace("{}", number.group(), 1) if number else theirs


def _pattern(family: Family, name: str) -> str:
    """The key of the family's table that covers the parameter `name`."""
    whole = _NUMBER.sub("{}", name, count=1)
    return whole if whole in family.names else whole.rpartition(".")[0]


def is_ignored(config: ModelConfig, name: str) -> bool:
    """Whether the tensor `name` of the files belongs to no parameter: rotary tables and masks that old files carry,
    and layers after the last one that predict further tokens."""
    family, number = FAMILIES.get(config.family), _NUMBER.search(name)
    extra = family.extra_layers and number is not None and int(number.group()) >= (config.num_layers or 0)
    return extra or name.endswith(family.ignored_tensors)


@dataclass(frozen=True)
class HFTensor:
    """One tensor of the files, or one per expert, and the tensors of ours that lie in it.

    `parts` maps their canonical names to their shapes (of one expert), in stored order; along `dim` they alternate
    `groups` times.
    """

    name: str
    parts: Mapping[str, Shape]
    dim: int
    groups: int = 1
    transposed: bool = False
    experts: int | None = None

    @property
    def names(self) -> list[str]:
        """The names in the files: one, or one per expert."""
        if self.experts is None:
            return [self.name]
        return [self.name.replace("{}", str(expert)) for expert in range(self.experts)]

    @property
    def shape(self) -> Shape:
        """The shape that each of `names` has in the files."""
        shape = list(next(iter(self.parts.values())))
        shape[self.dim] = sum(part[self.dim] for part in self.parts.values())
        if self.transposed:
            shape[-2:] = shape[:-3:-1]
        return tuple(shape)

    def view(self, sources: list[Any], canonical: str) -> Any:
        """The tensor `canonical` of ours, sliced lazily out of `sources`, the stored tensors called `names`."""
        if len(self.parts) == 1 and not self.transposed and self.experts is None:
            return sources[0]
        return View(self, sources, canonical)

    def assemble(self, parts: Mapping[str, Tensor]) -> Iterator[tuple[str, Tensor]]:
        """Name and value of every tensor in the files, from all the tensors of ours in `parts`."""
        for expert, name in enumerate(self.names):
            one = [parts[part] if self.experts is None else parts[part][expert] for part in self.parts]
            whole = one[0]
            if len(one) > 1:
                rows = [part.unflatten(self.dim, (self.groups, -1)) for part in one]
                whole = torch.cat(rows, self.dim + 1).flatten(self.dim, self.dim + 1)
            if self.transposed:
                whole = whole.mT
            yield name, whole.contiguous() if self.experts is None else whole.contiguous().clone()


@dataclass(frozen=True)
class View:
    """One tensor of ours inside stored ones. Indexing by a tuple of slices of ours reads only what they cover."""

    tensor: HFTensor
    sources: list[Any]
    canonical: str

    def __getitem__(self, region: tuple[slice, ...]) -> Tensor:
        if self.tensor.experts is None:
            return self._read(self.sources[0], region)
        chosen = self.sources[region[0]]
        return torch.stack([self._read(source, region[1:]) for source in chosen])

    def _read(self, source: Any, region: tuple[slice, ...]) -> Tensor:
        dim, pieces = self.tensor.dim, []
        for run in self._runs(region[dim]):
            # files are read in contiguous ranges; a step is taken in memory, and what it skips is let go
            stored = [*region[:dim], slice(run.start, run.stop), *region[dim + 1 :]]
            if self.tensor.transposed:
                stored[-2:] = stored[:-3:-1]
            piece = source[tuple(stored)]
            piece = piece.mT if self.tensor.transposed else piece
            if run.step is not None:
                piece = piece[(slice(None),) * dim + (slice(None, None, run.step),)].contiguous()
            pieces.append(piece)
        return pieces[0] if len(pieces) == 1 else torch.cat(pieces, dim)

    def _runs(self, rows: slice) -> Iterator[slice]:
        """The stored rows of our `rows`, as few runs as possible."""
        sizes = {name: shape[self.tensor.dim] // self.tensor.groups for name, shape in self.tensor.parts.items()}
        size, stride = sizes[self.canonical], sum(sizes.values())
        names = list(sizes)
        offset = sum(sizes[name] for name in names[: names.index(self.canonical)])
        start, end, _ = rows.indices(size * self.tensor.groups)
        if start >= end:
            yield slice(0, 0)
            return
        if size == 1 and stride > 1:
            yield slice(start * stride + offset, (end - 1) * stride + offset + 1, stride)
            return
        for group in range(start // size, -(-end // size)):
            low, high = max(start - group * size, 0), min(end - group * size, size)
            yield slice(group * stride + offset + low, group * stride + offset + high)


def layout_of(config: ModelConfig, shapes: Mapping[str, Shape]) -> dict[str, HFTensor]:
    """Canonical name -> the tensor of the family's files that holds it, for parameters of the full `shapes`."""
    family = FAMILIES.get(config.family)
    order = {pattern: place for place, pattern in enumerate(family.names)}
    together: dict[str, list[str]] = {}
    for canonical in shapes:
        together.setdefault(to_hf(family, canonical), []).append(canonical)
    found = {}
    for name, canonicals in together.items():
        canonicals.sort(key=lambda canonical: order[_pattern(family, canonical)])
        experts = shapes[canonicals[0]][0] if "{}" in name else None
        parts = {canonical: shapes[canonical][experts is not None :] for canonical in canonicals}
        shape, module = parts[canonicals[0]], name.removesuffix(".weight").removesuffix(".bias")
        dim = max(len(shape) - (1 if name.endswith("bias") else 2), 0)
        groups = config.num_key_value_heads or 1 if module.endswith(family.grouped) else 1
        tensor = HFTensor(
            name=name,
            parts=parts,
            dim=dim,
            groups=shape[dim] if module.endswith(family.alternating) else groups,
            transposed=len(shape) > 1 and module.endswith(family.transposed),
            experts=experts,
        )
        found.update(dict.fromkeys(canonicals, tensor))
    return found
