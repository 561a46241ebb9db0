"""Folders of Megatron-Core and Megatron-Legacy, read tensor by tensor; writing them is megatron_write.

Whatever layout wrote them, what is read is the model as a whole. In the order chunk by chunk, stage by stage, the
counts of their layers give the layer of the whole model, whatever rule placed them; experts follow the ranks that hold
them. What several ranks hold alike is compared. Weights alone are read. Folders and ranks: megatron_layout; names and
cuts: megatron_names; the options: megatron_args; the files themselves, of which nothing is executed: megatron_files,
and megatron_torch_dist for the format that has no files of ranks.
"""

from __future__ import annotations

import dataclasses
import itertools
import re
import sys
from collections.abc import Collection, Iterator
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from modellink.checkpoint.digest import is_finite
from modellink.checkpoint.hf import expected_shapes
from modellink.checkpoint.megatron_args import read_arguments, read_extras
from modellink.checkpoint.megatron_files import FileTensor, read_torch_file
from modellink.checkpoint.megatron_layout import FILE, RANK, TRACKER, Layout, Rank, find_step, is_distributed
from modellink.checkpoint.megatron_names import (
    LEGACY,
    MCORE,
    NUMBER,
    TIED_HEAD,
    Place,
    Row,
    find_place,
    flattened,
    join,
    normalised,
    rows_of,
)
from modellink.checkpoint.megatron_torch_dist import DistributedTensor, read_step
from modellink.checkpoint.megatron_write import (
    check_layout,
    check_writable,
    stage_names,
    write_megatron,
    write_stages,
)
from modellink.config.schema import ModelConfig
from modellink.errors import ModelLinkError

__all__ = [
    "TRACKER",
    "Layout",
    "MegatronFolder",
    "check_layout",
    "check_writable",
    "find_step",
    "is_distributed",
    "stage_names",
    "write_megatron",
    "write_stages",
]

Share = FileTensor | DistributedTensor
_MODEL = re.compile(r"model(\d*)")
_LOCAL = re.compile(r"(?<=\.local_experts\.)\d+(?=\.)")
_GROUPED = re.compile(r"(.*\.mlp\.)experts\.weight([12])")
_STATE = re.compile(r"_extra_state\d*$")
_FURTHER = "mtp."
_SIZES = {
    "tensor_model_parallel_size": "tensor",
    "pipeline_model_parallel_size": "stage",
    "expert_model_parallel_size": "expert",
}


class MegatronFolder:
    """One step of Megatron's, its files opened but no tensor read. Raises ModelLinkError for what is not whole."""

    def __init__(self, folder: Path) -> None:
        step = find_step(folder)
        if step is None:
            raise ModelLinkError(f"{folder} holds no checkpoint of Megatron: {TRACKER} and a step folder are needed.")
        self.step = step
        self.arguments: dict[str, Any] = {}
        self.dialect = MCORE
        self.sizes = Rank(1, 1, 1)
        # what a further expert-parallel rank holds of a name, for every tensor-parallel rank
        self._copies: dict[str, list[list[FileTensor]]] = {}
        self._shares: dict[str, list[Any]]
        if is_distributed(step):
            distributed, self.arguments = read_step(step)
            self._shares = {name: [tensor] for name, tensor in distributed.items() if not _STATE.search(name)}
        else:
            self._contents = self._open()
            first = self._contents[Rank(0)]
            self.dialect = LEGACY if "language_model" in first.get("model", first.get("model0", {})) else MCORE
            self._shares = self._collect()
        if further := {name for name in self._shares if name.startswith(_FURTHER)}:
            print(
                f"modellink: warning: {step}: {len(further)} tensors that predict further tokens are left out, one of "
                f"them {min(further)}.",
                file=sys.stderr,
            )
            self._shares = {name: shares for name, shares in self._shares.items() if name not in further}
        self._upstream = any(".linear_kv_down_proj." in name for name in self._shares)
        self._known: tuple[ModelConfig, list[Place]] | None = None

    @property
    def tensor_parallel(self) -> int:
        return self.sizes.tensor

    def config(self, family: str | None = None) -> ModelConfig:
        """The architecture that the files describe."""
        config = read_arguments(self.arguments, f"{self.step}: the args", family)
        rows = self._rows()
        if config.vocab_size is None or config.vocab_size > rows:
            config.vocab_size = rows
        return config

    @property
    def extras(self) -> dict[str, Any]:
        return read_extras(self.arguments)

    def contents(self, config: ModelConfig) -> list[dict[str, torch.dtype]]:
        """Canonical names and their dtypes, those that lie in one stored tensor together, in the order of the model.

        Raises ModelLinkError for names and shapes that are not the model's; no value is read.
        """
        return [dict.fromkeys(place.ours, self._shares[place.names[0]][0].dtype) for place in self._planned(config)]

    def tensors(self, config: ModelConfig, names: Collection[str] | None = None) -> Iterator[tuple[str, Tensor]]:
        """Yield (canonical name, full tensor as stored, vocabulary padding included), in the order of the model.

        `names` selects the stored tensors that hold any of these. Raises ModelLinkError as `contents` does, before a
        value is read, and for NaN and infinity in a tensor when its turn comes.
        """
        wanted = None if names is None else set(names)
        for place in self._planned(config):
            if wanted is None or not wanted.isdisjoint(place.ours):
                yield from self._read_place(place, config)

    def _read_place(self, place: Place, config: ModelConfig) -> Iterator[tuple[str, Tensor]]:
        if place.experts is None:
            yield from zip(place.ours, self._join(place, place.name, config), strict=True)
            return
        stacked: list[Tensor] = []
        for expert, name in enumerate(place.names):
            parts = self._join(place, name, config)
            stacked = stacked or [torch.empty((place.experts, *part.shape), dtype=part.dtype) for part in parts]
            for whole, part in zip(stacked, parts, strict=True):
                whole[expert] = part
        yield from zip(place.ours, stacked, strict=True)

    def _join(self, place: Place, name: str, config: ModelConfig) -> list[Tensor]:
        """The full tensors of ours in the stored tensor `name`, once all copies of it have been compared."""
        shares = [self._read(name, share) for share in self._shares[name]]
        for share, copies in zip(shares, self._copies.get(name, ()), strict=False):
            self._check_same(name, [share, *(copy.read() for copy in copies)], "expert-parallel")
        if place.row.cut in ("whole", "stack") or (place.row.cut == "columns" and shares[0].dim() == 1):
            self._check_same(name, shares, "tensor-parallel")
        return join(place.row, shares, config)

    def _open(self) -> dict[Rank, dict[str, Any]]:
        """The contents of every rank's file."""
        paths = {
            tuple(int(number) for number in match.groups() if number): path / FILE
            for path in sorted(self.step.iterdir())
            if (match := RANK.fullmatch(path.name))
        }
        contents = {numbers: self._open_file(file) for numbers, file in paths.items() if file.is_file()}
        if not contents:
            raise ModelLinkError(f"{self.step} holds no {FILE}: copy the files of every rank.")
        arguments = contents[min(contents)].get("args")
        self.arguments = dict(vars(arguments)) if hasattr(arguments, "__dict__") else {}
        # a second number is the stage, or the expert-parallel rank where there is one stage
        staged = self.arguments.get("pipeline_model_parallel_size") != 1
        experts = not staged and (self.arguments.get("expert_model_parallel_size") or 1) > 1
        ranks = {
            numbers: Rank(numbers[0], 0, numbers[1]) if experts and len(numbers) == 2 else Rank(*numbers)
            for numbers in paths
        }
        self.sizes = Rank(*(1 + max(numbers) for numbers in zip(*ranks.values(), strict=True)))
        found = {ranks[numbers]: content for numbers, content in contents.items()}
        for numbers in itertools.product(*map(range, self.sizes)):
            if Rank(*numbers) not in found:
                raise ModelLinkError(f"{self._file(Rank(*numbers))} is missing: copy the files of every rank.")
        self._check_sizes()
        return found

    def _open_file(self, file: Path) -> dict[str, Any]:
        content = read_torch_file(file)
        if not isinstance(content, dict) or not any(
            _MODEL.fullmatch(str(key)) and isinstance(value, dict) for key, value in content.items()
        ):
            raise ModelLinkError(f"{file} is not a checkpoint of Megatron: it holds no 'model'.")
        kept = {str(key): value for key, value in content.items()}
        return {key: value for key, value in kept.items() if key == "args" or _MODEL.fullmatch(key)}

    def _check_sizes(self) -> None:
        for name, size in _SIZES.items():
            stated, found = self.arguments.get(name), getattr(self.sizes, size)
            if stated is not None and stated != found:
                raise ModelLinkError(
                    f"{self.step}: the files say {name} {stated}, but there are folders for {found}: copy the files "
                    "of every rank, and of this checkpoint only."
                )
        inner = self.arguments.get("expert_tensor_parallel_size")
        if self.arguments.get("num_experts") and inner not in (None, self.sizes.tensor):
            raise ModelLinkError(
                f"{self.step}: the experts are cut into {inner} tensor-parallel ranks and the rest into "
                f"{self.sizes.tensor}: save it with --expert-tensor-parallel-size {self.sizes.tensor} or as torch_dist."
            )

    def _collect(self) -> dict[str, list[FileTensor]]:
        """Name in the whole model -> what each tensor-parallel rank holds of it."""
        held: dict[str, dict[Rank, FileTensor]] = {}
        chunks = sorted(
            {
                (int(match[1] or 0), rank.stage)
                for rank, content in self._contents.items()
                for key in content
                if (match := _MODEL.fullmatch(key))
            }
        )
        before = 0
        for chunk, stage in chunks:
            layers = 0
            for tensor, expert in itertools.product(range(self.sizes.tensor), range(self.sizes.expert)):
                rank = Rank(tensor, stage, expert)
                for name, share in self._tensors_of(rank, chunk).items():
                    if number := NUMBER.search(name):
                        layers = max(layers, int(number[0]) + 1)
                        name = NUMBER.sub(str(int(number[0]) + before), name, count=1)
                    held.setdefault(name, {})[rank] = share
            before += layers
        return {name: self._by_tensor_rank(name, shares) for name, shares in held.items()}

    def _tensors_of(self, rank: Rank, chunk: int) -> dict[str, FileTensor]:
        """A chunk's tensors in the file of a rank, layers counted from 0 and experts over the whole model."""
        content = self._contents[rank]
        model = content.get(f"model{chunk}", content.get("model") if chunk == 0 else None)
        if not isinstance(model, dict):
            raise ModelLinkError(f"{self._file(rank)} lacks the model chunk {chunk} that others have.")
        found: dict[str, FileTensor] = {}
        for stored, value in flattened(model).items():
            name = normalised(str(stored))
            if _STATE.search(name):
                continue
            if not isinstance(value, FileTensor):
                raise ModelLinkError(f"{self._file(rank)}: {stored!r} is not a tensor.")
            found[name] = value
        for name in [name for name in found if _GROUPED.fullmatch(name)]:
            found |= self._ungrouped(name, found.pop(name), found, rank)
        local = [int(match[0]) for match in map(_LOCAL.search, found) if match]
        first = rank.expert * (1 + max(local, default=0))
        return {_LOCAL.sub(lambda match: str(int(match[0]) + first), name): value for name, value in found.items()}

    def _ungrouped(self, name: str, group: FileTensor, found: dict[str, FileTensor], rank: Rank) -> dict[str, Any]:
        """Single experts in the grouped tensor `name`: there one follows the other, each [in, out]."""
        match = _GROUPED.fullmatch(name)
        assert match is not None
        router = found.get(f"{match[1]}router.weight")
        experts = router.shape[0] // self.sizes.expert if router is not None else 0
        outer = 1 if match[2] == "1" else 0
        if len(group.shape) != 2 or experts < 1 or group.shape[outer] % experts or not group.is_contiguous:
            raise ModelLinkError(f"{self._file(rank)}: {name!r} does not divide into the experts of its router.")
        columns = group.shape[1] // (experts if outer else 1)
        rows = group.shape[0] // (1 if outer else experts)
        return {
            f"{match[1]}experts.local_experts.{expert}.linear_fc{match[2]}.weight": dataclasses.replace(
                group, offset=group.offset + expert * rows * columns, shape=(columns, rows), stride=(1, columns)
            )
            for expert in range(experts)
        }

    def _by_tensor_rank(self, name: str, held: dict[Rank, FileTensor]) -> list[FileTensor]:
        """What each tensor-parallel rank holds; what other expert-parallel ranks hold of it goes to the copies."""
        shares = []
        for tensor in range(self.sizes.tensor):
            stages = {rank.stage for rank in held}
            copies = [share for rank, share in held.items() if rank.tensor == tensor]
            whole = 1 if _LOCAL.search(name) else self.sizes.expert
            if len(copies) != whole * len(stages):
                raise ModelLinkError(
                    f"{self.step}: {name!r} is in the files of {len(held)} ranks, not of all that share it: the files "
                    "do not belong together."
                )
            shares.append(copies[0])
            if len(copies) > 1:
                self._copies.setdefault(name, []).append(copies[1:])
        return shares

    def _planned(self, config: ModelConfig) -> list[Place]:
        """The plan for `config`, made once: a conversion asks for the tensors group by group."""
        if self._known is None or self._known[0] != config:
            shapes = expected_shapes(dataclasses.replace(config, padded_vocab_size=self._rows()))
            self._known = (dataclasses.replace(config), self._plan(config, shapes))
        return self._known[1]

    def _plan(self, config: ModelConfig, shapes: dict[str, tuple[int, ...]]) -> list[Place]:
        """Where everything that the model needs lies; raises for too little or too much."""
        plan: dict[str, Place] = {}
        for canonical in shapes:
            place = find_place(config, canonical, self.dialect, self._upstream)
            if place.name in plan:
                continue
            full = [shapes[name] for name in place.ours if name in shapes]
            for name in place.names:
                if name not in self._shares or len(full) != len(place.ours):
                    raise ModelLinkError(
                        f"{self.step} lacks {name!r} of a model of {config.num_layers} layers of its kind."
                    )
                if place.row.cut == "either":
                    split = self._shares[name][0].shape[0] != full[0][0]
                    place = place._replace(row=place.row._replace(cut="rows" if split else "whole"))
                self._check_shapes(name, place.row, [shape[place.experts is not None :] for shape in full])
            if len(dtypes := {share.dtype for name in place.names for share in self._shares[name]}) > 1:
                raise ModelLinkError(f"{self.step}: {place.name!r} is stored as {' and as '.join(map(str, dtypes))}.")
            plan[place.name] = place
        head = f"{TIED_HEAD[self.dialect]}.weight"
        for name in self._shares.keys() - {name for place in plan.values() for name in place.names}:
            if name == head and config.tie_word_embeddings:
                self._check_tied(name)
                continue
            raise ModelLinkError(
                f"{self.step}: {name!r} fits nowhere in a model of {config.num_layers} layers of this configuration."
            )
        return list(plan.values())

    def _check_shapes(self, name: str, row: Row, full: list[tuple[int, ...]]) -> None:
        """Every rank holds its share of tensors of the shapes `full`."""
        rows, *rest = full[0]
        if row.cut == "columns" and rest:
            rest = [rest[0] // self.tensor_parallel]
        elif row.cut not in ("whole", "columns"):
            rows = sum(shape[0] for shape in full) // (1 if row.cut == "stack" else self.tensor_parallel)
        for share in self._shares[name]:
            if share.shape != (rows, *rest):
                raise ModelLinkError(
                    f"{share.file}: {name!r} has shape {list(share.shape)}, one of {self.tensor_parallel} "
                    f"tensor-parallel ranks of this model holds {[rows, *rest]}: its configuration does not belong to "
                    "these files."
                )

    def _check_tied(self, head: str) -> None:
        name = _embedding(self.dialect)
        for copy, original in zip(self._shares[head], self._shares[name], strict=True):
            if copy.shape != original.shape or not torch.equal(copy.read(), original.read()):
                raise ModelLinkError(f"{self.step}: {head!r} differs from {name!r} although the two are tied.")

    def _check_same(self, name: str, shares: list[Tensor], ranks: str) -> None:
        if not all(torch.equal(share, shares[0]) for share in shares[1:]):
            raise ModelLinkError(f"{self.step}: {ranks} ranks disagree about {name!r}: files were mixed up.")

    def _read(self, name: str, share: Share) -> Tensor:
        if not share.dtype.is_floating_point:
            raise ModelLinkError(f"{share.file}: {name!r} is stored as {share.dtype}; quantised weights are not read.")
        tensor = share.read()
        if not is_finite(tensor):
            raise ModelLinkError(f"{share.file}: tensor {name!r} holds NaN or infinity.")
        return tensor

    def _rows(self) -> int:
        name = _embedding(self.dialect)
        if name not in self._shares:
            raise ModelLinkError(f"{self.step} lacks {name!r}.")
        return sum(share.shape[0] for share in self._shares[name])

    def _file(self, rank: Rank) -> Path:
        return self.step / rank.folder(self.sizes.stage, self.sizes.expert) / FILE


def _embedding(dialect: str) -> str:
    return f"{rows_of(ModelConfig())['embed_tokens'].name(dialect)}.weight"
