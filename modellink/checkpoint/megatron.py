"""Folders of Megatron-Core and Megatron-Legacy, read and written tensor by tensor.

    DIR/latest_checkpointed_iteration.txt             "1", or the word release
    DIR/iter_0000001/mp_rank_TT[_PPP]/model_optim_rng.pt

TT is the tensor-parallel rank, PPP the pipeline stage where there are several. A file holds `args` (the options of the
run) and `model`, or `model0`, `model1`, ... with an interleaved pipeline. Layers count from 0 in each of these chunks;
in the order chunk by chunk, stage by stage, their counts give the layer of the whole model, whatever rule placed them.
Weights alone are read and written. Names and cuts: megatron_names; the options: megatron_args; the files themselves,
of which nothing is executed: megatron_files.
"""

from __future__ import annotations

import contextlib
import dataclasses
import re
import secrets
import shutil
from collections.abc import Collection, Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from modellink.checkpoint.digest import is_finite
from modellink.checkpoint.hf import copy_companions, expected_shapes
from modellink.checkpoint.megatron_args import read_arguments, read_extras, write_arguments
from modellink.checkpoint.megatron_files import FileTensor, TorchFileWriter, read_torch_file
from modellink.checkpoint.megatron_names import (
    LEGACY,
    MCORE,
    NUMBER,
    TIED_HEAD,
    Row,
    cut,
    find_row,
    flattened,
    join,
    nested,
    normalised,
    rows_of,
)
from modellink.config.schema import ModelConfig
from modellink.errors import ModelLinkError
from modellink.files import atomic_write, fsync_directory

TRACKER, FILE = "latest_checkpointed_iteration.txt", "model_optim_rng.pt"
STEP = "iter_0000001"
_RANK = re.compile(r"mp_rank_(\d{2})(?:_(\d{3}))?(?:_(\d{3}))?")
_MODEL = re.compile(r"model(\d*)")
_VOCABULARY = ("embed_tokens", "lm_head")
_EMBEDDING = "embed_tokens.weight"


def find_step(folder: Path) -> Path | None:
    """The step folder of Megatron's that `folder` is or tracks; None when there is none."""
    tracker = folder / TRACKER
    names = []
    if tracker.is_file():
        text = tracker.read_text(encoding="utf-8", errors="replace").strip()
        names = [f"iter_{int(text):07d}" if text.isdigit() else "release"]
    for step in (folder, *(folder / name for name in names)):
        if step.is_dir() and any(_RANK.fullmatch(path.name) for path in step.iterdir()):
            return step
    return None


@dataclass(frozen=True)
class Layout:
    """How the files are cut: `dialect` "mcore" or "legacy", sizes, and which layers each stage holds."""

    dialect: str = MCORE
    tensor_parallel: int = 1
    pipeline_parallel: int = 1
    layers_per_stage: tuple[int, ...] | None = None
    layers_per_chunk: int | None = None
    vocab_multiple: int = 1

    def chunks(self, layers: int) -> list[list[range]]:
        """The layers of every stage's model chunks (one, unless the pipeline is interleaved)."""
        stages, counts = self.pipeline_parallel, self.layers_per_stage
        if counts is not None:
            if self.layers_per_chunk is not None:
                raise ModelLinkError("a list of layers per stage and an interleaved pipeline exclude each other.")
            if len(counts) != stages or sum(counts) != layers or min(counts) < 1:
                raise ModelLinkError(
                    f"the layers per stage {','.join(map(str, counts))} must be {stages} numbers of at least 1 that "
                    f"sum to the model's {layers} layers."
                )
            return [[range(sum(counts[:stage]), sum(counts[: stage + 1]))] for stage in range(stages)]
        size = self.layers_per_chunk or layers // stages
        if size < 1 or layers % (size * stages) or (self.layers_per_chunk and stages == 1):
            raise ModelLinkError(
                f"{layers} layers do not divide into {stages} pipeline stages"
                + (f" of chunks of {size} layers" if self.layers_per_chunk else "")
                + ": change the sizes, or give the layers of each stage."
            )
        starts = range(0, layers, size)
        return [[range(start, start + size) for start in starts[stage::stages]] for stage in range(stages)]

    def check(self, config: ModelConfig) -> None:
        """Raise unless tensor parallelism divides what it cuts."""
        for what, size in (
            ("query heads", config.num_attention_heads),
            ("key/value heads", config.num_key_value_heads),
            ("MLP width", config.ffn_hidden_size),
        ):
            if self.tensor_parallel < 1 or (size or 0) % self.tensor_parallel:
                raise ModelLinkError(
                    f"tensor parallel size {self.tensor_parallel} does not divide the {what} ({size}): use one that"
                    " does."
                )

    def padded(self, vocabulary: int) -> int:
        """Rows of the vocabulary matrices in the files."""
        multiple = self.vocab_multiple * self.tensor_parallel
        return -(-vocabulary // multiple) * multiple


class MegatronFolder:
    """One step of Megatron's, its files opened but no tensor read. Raises ModelLinkError for what is not whole."""

    def __init__(self, folder: Path) -> None:
        step = find_step(folder)
        if step is None:
            raise ModelLinkError(f"{folder} holds no checkpoint of Megatron: {TRACKER} and a step folder are needed.")
        self.step = step
        self._contents = self._open(self._ranks())
        first = self._contents[0, 0]
        self.arguments: dict[str, Any] = dict(vars(first["args"])) if hasattr(first.get("args"), "__dict__") else {}
        self._check_sizes()
        self.dialect = LEGACY if "language_model" in first.get("model", first.get("model0", {})) else MCORE
        self._shares = self._collect()
        self._known: tuple[ModelConfig, list[tuple[str, Row, str, str]]] | None = None

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
        return [
            {f"{ours.format(layer)}.{suffix}": self._shares[name][0].dtype for ours in row.ours}
            for name, row, suffix, layer in self._planned(config)
        ]

    def tensors(self, config: ModelConfig, names: Collection[str] | None = None) -> Iterator[tuple[str, Tensor]]:
        """Yield (canonical name, full tensor as stored, vocabulary padding included), in the order of the model.

        `names` selects the stored tensors that hold any of these. Raises ModelLinkError as `contents` does, before a
        value is read, and for NaN and infinity in a tensor when its turn comes.
        """
        for name, row, suffix, layer in self._planned(config):
            if names is not None and not any(f"{ours.format(layer)}.{suffix}" in names for ours in row.ours):
                continue
            shares = [self._read(name, share) for share in self._shares[name]]
            if row.cut == "whole" or (row.cut == "columns" and suffix == "bias"):
                self._check_same(name, shares)
            for ours, tensor in zip(row.ours, join(row, shares, config), strict=True):
                yield f"{ours.format(layer)}.{suffix}", tensor

    def _ranks(self) -> dict[tuple[int, int], Path]:
        found: dict[tuple[int, int], Path] = {}
        for path in sorted(self.step.iterdir()):
            match = _RANK.fullmatch(path.name)
            if match is None:
                continue
            if match[3]:
                raise ModelLinkError(f"{path} belongs to an expert-parallel checkpoint: only dense models are read.")
            found[int(match[1]), int(match[2] or 0)] = path / FILE
        many = any(path.parent.name.count("_") == 3 for path in found.values())
        for tensor in range(1 + max(rank for rank, _ in found)):
            for stage in range(1 + max(stage for _, stage in found)):
                path = found.get((tensor, stage), self.step / _rank_name(tensor, stage, many) / FILE)
                if not path.is_file():
                    raise ModelLinkError(f"{path} is missing: copy the files of every rank.")
        return found

    def _open(self, files: dict[tuple[int, int], Path]) -> dict[tuple[int, int], dict[str, Any]]:
        contents: dict[tuple[int, int], dict[str, Any]] = {}
        for rank, file in files.items():
            content = read_torch_file(file)
            if not isinstance(content, dict) or not any(
                _MODEL.fullmatch(str(key)) and isinstance(value, dict) for key, value in content.items()
            ):
                raise ModelLinkError(f"{file} is not a checkpoint of Megatron: it holds no 'model'.")
            kept = {str(key): value for key, value in content.items()}
            contents[rank] = {key: value for key, value in kept.items() if key == "args" or _MODEL.fullmatch(key)}
        self.tensor_parallel = 1 + max(rank for rank, _ in files)
        self.pipeline_parallel = 1 + max(stage for _, stage in files)
        return contents

    def _check_sizes(self) -> None:
        for name, found in (
            ("tensor_model_parallel_size", self.tensor_parallel),
            ("pipeline_model_parallel_size", self.pipeline_parallel),
        ):
            stated = self.arguments.get(name)
            if stated is not None and stated != found:
                raise ModelLinkError(
                    f"{self.step}: the files say {name} {stated}, but there are folders for {found}: copy the files "
                    "of every rank, and of this checkpoint only."
                )

    def _collect(self) -> dict[str, list[FileTensor]]:
        """Name in the whole model -> what each tensor-parallel rank holds of it."""
        shares: dict[str, list[FileTensor]] = {}
        chunks = sorted(
            {
                (int(match[1] or 0), stage)
                for (_, stage), content in self._contents.items()
                for key in content
                if (match := _MODEL.fullmatch(key))
            }
        )
        before = 0
        for chunk, stage in chunks:
            layers = 0
            for tensor in range(self.tensor_parallel):
                content = self._contents[tensor, stage]
                model = content.get(f"model{chunk}", content.get("model") if chunk == 0 else None)
                if not isinstance(model, dict):
                    raise ModelLinkError(f"{self._file(tensor, stage)} lacks the model chunk {chunk} that others have.")
                for stored, value in flattened(model).items():
                    name = normalised(str(stored))
                    if name.endswith("_extra_state"):
                        continue
                    if not isinstance(value, FileTensor):
                        raise ModelLinkError(f"{self._file(tensor, stage)}: {stored!r} is not a tensor.")
                    if number := NUMBER.search(name):
                        layers = max(layers, int(number[0]) + 1)
                        name = NUMBER.sub(str(int(number[0]) + before), name, count=1)
                    shares.setdefault(name, []).append(value)
            before += layers
        for name, held in shares.items():
            if len(held) != self.tensor_parallel:
                raise ModelLinkError(
                    f"{self.step}: {name!r} is in the files of {len(held)} tensor-parallel ranks, not of all"
                    f" {self.tensor_parallel}: the files do not belong together."
                )
        return shares

    def _planned(self, config: ModelConfig) -> list[tuple[str, Row, str, str]]:
        """The plan for `config`, made once: a conversion asks for the tensors group by group."""
        if self._known is None or self._known[0] != config:
            shapes = expected_shapes(dataclasses.replace(config, padded_vocab_size=self._rows()))
            self._known = (dataclasses.replace(config), self._plan(config, shapes))
        return self._known[1]

    def _plan(self, config: ModelConfig, shapes: dict[str, tuple[int, ...]]) -> list[tuple[str, Row, str, str]]:
        """(stored name, row, weight or bias, layer) of everything the model needs; raises for too little or much."""
        plan: dict[str, tuple[str, Row, str, str]] = {}
        for canonical in shapes:
            row, theirs, suffix, layer = find_row(config, canonical, self.dialect)
            name = f"{theirs.format(layer)}.{suffix}"
            if name not in self._shares:
                raise ModelLinkError(
                    f"{self.step} lacks {name!r} of a model of {config.num_layers} layers of its kind."
                )
            if name not in plan:
                self._check_shapes(name, row, [shapes[f"{ours.format(layer)}.{suffix}"] for ours in row.ours])
            plan[name] = (name, row, suffix, layer)
        head = f"{TIED_HEAD[self.dialect]}.weight"
        for name in self._shares.keys() - plan.keys():
            if name == head and config.tie_word_embeddings:
                self._check_tied(name)
                continue
            raise ModelLinkError(
                f"{self.step}: {name!r} fits nowhere in a dense model of {config.num_layers} layers of this"
                " configuration."
            )
        return list(plan.values())

    def _check_shapes(self, name: str, row: Row, full: list[tuple[int, ...]]) -> None:
        """Every rank holds its share of tensors of the shapes `full`."""
        rows, *rest = full[0]
        if row.cut == "columns" and rest:
            rest = [rest[0] // self.tensor_parallel]
        elif row.cut not in ("whole", "columns"):
            rows = sum(shape[0] for shape in full) // self.tensor_parallel
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

    def _check_same(self, name: str, shares: list[Tensor]) -> None:
        if not all(torch.equal(share, shares[0]) for share in shares[1:]):
            raise ModelLinkError(f"{self.step}: tensor-parallel ranks disagree about {name!r}: files were mixed up.")

    def _read(self, name: str, share: FileTensor) -> Tensor:
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

    def _file(self, tensor: int, stage: int) -> Path:
        return self.step / _rank_name(tensor, stage, self.pipeline_parallel > 1) / FILE


def _embedding(dialect: str) -> str:
    return f"{rows_of(ModelConfig())['embed_tokens'].name(dialect)}.weight"


def _rank_name(tensor: int, stage: int, many: bool) -> str:
    return f"mp_rank_{tensor:02d}_{stage:03d}" if many else f"mp_rank_{tensor:02d}"


class _Step:
    """The files of one step while they are written: one per rank, each with one dictionary per model chunk.

    `only` restricts it to the files of these pipeline stages.
    """

    def __init__(self, folder: Path, config: ModelConfig, layout: Layout, only: Collection[int] | None = None) -> None:
        self.config, self.layout = config, layout
        self.chunks = layout.chunks(config.num_layers or 0)
        stages, tensors = range(layout.pipeline_parallel), range(layout.tensor_parallel)
        self.states: dict[tuple[int, int], list[dict[str, Any]]] = {}
        self.files: dict[tuple[int, int], TorchFileWriter] = {}
        for rank in ((tensor, stage) for tensor in tensors for stage in (stages if only is None else only)):
            place = folder / _rank_name(*rank, len(stages) > 1)
            place.mkdir()
            self.files[rank] = TorchFileWriter(place / FILE)
            self.states[rank] = [{} for _ in self.chunks[rank[1]]]
        self._waiting: dict[str, Tensor] = {}

    def take(self, canonical: str, tensor: Tensor) -> None:
        """Write a full tensor, once those that share a tensor of Megatron's with it have come too."""
        row, theirs, suffix, layer = find_row(self.config, canonical, self.layout.dialect)
        if row.ours[0] in _VOCABULARY:
            tensor = _pad_rows(tensor[: self.config.vocab_size], self.layout.padded(self.config.vocab_size or 0))
        self._waiting[canonical] = tensor
        group = [f"{name.format(layer)}.{suffix}" for name in row.ours]
        if all(name in self._waiting for name in group):
            parts = [self._waiting.pop(name) for name in group]
            for stage, chunk, name in self._places(theirs, int(layer) if layer else None, row):
                self._write(stage, chunk, f"{name}.{suffix}", row, parts)
            if canonical == _EMBEDDING and self.config.tie_word_embeddings and len(self.chunks) > 1:
                self._write(-1, -1, f"{TIED_HEAD[self.layout.dialect]}.weight", row, parts)

    def _places(self, name: str, layer: int | None, row: Row) -> list[tuple[int, int, str]]:
        if layer is None:
            first = row.ours[0].startswith("embed")
            return [(0, 0, name) if first else (-1, -1, name)]
        return [
            (stage, number, name.format(layer - layers.start))
            for stage, chunks in enumerate(self.chunks)
            for number, layers in enumerate(chunks)
            if layer in layers
        ]

    def _write(self, stage: int, chunk: int, name: str, row: Row, parts: list[Tensor]) -> None:
        stage %= len(self.chunks)
        if (0, stage) not in self.files:
            return
        for tensor in range(self.layout.tensor_parallel):
            piece = cut(row, parts, tensor, self.layout.tensor_parallel, self.config)
            state = self.states[tensor, stage][chunk]
            state[name] = self.files[tensor, stage].add(piece)
            if row.linear and self.layout.dialect == MCORE:
                state[f"{name.rpartition('.')[0]}._extra_state"] = None

    def finish(self, extras: dict[str, Any] | None, dtype: torch.dtype) -> None:
        layout = self.layout
        attributes = {
            "padded_vocab_size": layout.padded(self.config.vocab_size or 0),
            "make_vocab_size_divisible_by": layout.vocab_multiple,
            "tensor_model_parallel_size": layout.tensor_parallel,
            "pipeline_model_parallel_size": layout.pipeline_parallel,
            "transformer_pipeline_model_parallel_size": layout.pipeline_parallel,
            "expert_model_parallel_size": 1,
            "virtual_pipeline_model_parallel_size": len(self.chunks[0]) if layout.layers_per_chunk else None,
            "num_layers_per_virtual_pipeline_stage": layout.layers_per_chunk,
            "num_layer_list": ",".join(map(str, layout.layers_per_stage)) if layout.layers_per_stage else None,
            "use_mcore_models": layout.dialect == MCORE,
            "use_legacy_models": layout.dialect == LEGACY,
        }
        options = write_arguments(self.config, extras, attributes, dtype)
        for (tensor, stage), chunks in self.states.items():
            if layout.dialect == MCORE and stage == len(self.chunks) - 1:
                chunks[-1].setdefault(f"{TIED_HEAD[MCORE]}._extra_state", None)
            models = [nested(state) for state in chunks] if layout.dialect == LEGACY else chunks
            names = (
                ["model"] if layout.layers_per_chunk is None else [f"model{number}" for number in range(len(models))]
            )
            content = {
                "args": options,
                "checkpoint_version": 3.0,
                "iteration": 1,
                **dict(zip(names, models, strict=True)),
                "num_floating_point_operations_so_far": 0,
            }
            self.files[tensor, stage].close(content)


def _pad_rows(tensor: Tensor, rows: int) -> Tensor:
    """Rows beyond the last repeat it."""
    if tensor.shape[0] == rows:
        return tensor
    return torch.cat((tensor, tensor[-1:].expand(rows - tensor.shape[0], *tensor.shape[1:])))


def write_megatron(
    folder: Path,
    tensors: Iterable[tuple[str, Tensor]],
    config: ModelConfig,
    layout: Layout,
    *,
    extras: dict[str, Any] | None = None,
    tokenizer_from: Path | None = None,
    dtype: torch.dtype | None = None,
) -> None:
    """Write step 1 of a Megatron folder from pairs of canonical name and full CPU tensor, one in memory at a time.

    The vocabulary is cut to `config.vocab_size` and padded by repeating its last row. The step appears complete or not
    at all; one that exists is replaced only when the folder holds nothing else but it. Raises ModelLinkError when the
    layout or the dialect cannot hold the model.
    """
    check_layout(config, layout)
    check_writable(folder)
    created = not folder.exists()
    folder.mkdir(parents=True, exist_ok=True)
    temporary = folder / f".{STEP}.tmp-{secrets.token_hex(4)}"
    temporary.mkdir()
    try:
        write_stages(temporary, tensors, config, layout, extras=extras, dtype=dtype)
        _publish(temporary, folder)
        created = False
    finally:
        shutil.rmtree(temporary, ignore_errors=True)
        if created:
            shutil.rmtree(folder, ignore_errors=True)
    if tokenizer_from is not None:
        copy_companions(tokenizer_from, folder)


def check_layout(config: ModelConfig, layout: Layout) -> None:
    """Raise ModelLinkError unless the files of `layout` can hold a model of `config`."""
    layout.check(config)
    layout.chunks(config.num_layers or 0)
    for canonical in expected_shapes(config):
        find_row(config, canonical, layout.dialect)


def stage_names(config: ModelConfig, layout: Layout) -> list[list[str]]:
    """The canonical names of the tensors in the files of each pipeline stage."""
    stages: list[list[str]] = [[] for _ in range(layout.pipeline_parallel)]
    chunks = layout.chunks(config.num_layers or 0)
    for canonical in expected_shapes(config):
        number = NUMBER.search(canonical)
        if number:
            held = [place for place, layers in enumerate(chunks) if any(int(number[0]) in each for each in layers)]
        elif canonical == _EMBEDDING and config.tie_word_embeddings:
            held = sorted({0, len(stages) - 1})
        else:
            held = [0 if canonical.startswith("embed") else len(stages) - 1]
        for place in held:
            stages[place].append(canonical)
    return stages


def write_stages(
    step: Path,
    tensors: Iterable[tuple[str, Tensor]],
    config: ModelConfig,
    layout: Layout,
    *,
    stages: Collection[int] | None = None,
    extras: dict[str, Any] | None = None,
    dtype: torch.dtype | None = None,
) -> None:
    """Write the files of pipeline `stages` (default: all) into the folder `step`, from the tensors that they hold."""
    names = stage_names(config, layout)
    missing = {name for stage in (range(len(names)) if stages is None else stages) for name in names[stage]}
    files = _Step(step, config, layout, stages)
    written = dtype or torch.float32
    try:
        for name, tensor in tensors:
            missing.discard(name)
            written = dtype or tensor.dtype
            files.take(name, tensor.to(written))
        if missing:
            raise ModelLinkError(f"{len(missing)} tensors never came, the first is {min(missing)!r}.")
        files.finish(extras, written)
    finally:
        for file in files.files.values():
            with contextlib.suppress(ValueError):  # closed already
                file.abandon()


def check_writable(folder: Path) -> None:
    """Refuse a folder that holds other things than step 1 of such a checkpoint."""
    if not folder.exists():
        return
    ours = folder.is_dir() and (
        not any(folder.iterdir()) or ((folder / TRACKER).is_file() and find_step(folder) == folder / STEP)
    )
    others = [path.name for path in folder.glob("iter_*") if path.name != STEP] if ours else []
    if not ours or others:
        raise ModelLinkError(f"{folder} exists and is not an empty folder: give another one or remove it yourself.")


def _publish(temporary: Path, folder: Path) -> None:
    final = folder / STEP
    old = temporary.with_name(temporary.name.replace(".tmp-", ".old-"))
    fsync_directory(temporary)
    if final.exists():
        final.rename(old)
    temporary.rename(final)
    fsync_directory(folder)
    atomic_write(folder / TRACKER, "1")
    shutil.rmtree(old, ignore_errors=True)
