"""Writing Megatron's folders from a stream of full tensors, one in memory at a time.

A tensor is cut and appended to the files of all ranks that hold a piece of it as soon as those that share a tensor of
Megatron's with it have come, so a model of any size costs the memory of its largest tensors. Names and cuts:
megatron_names; folders and ranks: megatron_layout; the options: megatron_args; the files: megatron_files.
"""

from __future__ import annotations

import contextlib
import fcntl
import itertools
import os
import secrets
import shutil
import sys
from collections.abc import Collection, Iterable, Iterator
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from modellink.checkpoint.hf import copy_companions, expected_shapes
from modellink.checkpoint.megatron_args import unsaid, write_arguments
from modellink.checkpoint.megatron_files import TorchFileWriter
from modellink.checkpoint.megatron_layout import FILE, STEP, TRACKER, Layout, Rank, find_step
from modellink.checkpoint.megatron_names import (
    LEGACY,
    MCORE,
    NUMBER,
    TIED_HEAD,
    Place,
    Row,
    cut,
    cut_pieces,
    find_place,
    nested,
)
from modellink.config.schema import ModelConfig
from modellink.errors import ModelLinkError
from modellink.files import atomic_write, fsync_directory

_VOCABULARY = ("embed_tokens", "lm_head")
_EMBEDDING = "embed_tokens.weight"
_TEMPORARY = f".{STEP}.tmp-"


class _Step:
    """The files of one step while they are written: one per rank, each with one dictionary per model chunk.

    `only` restricts it to the files of these pipeline stages.
    """

    def __init__(self, folder: Path, config: ModelConfig, layout: Layout, only: Collection[int] | None = None) -> None:
        self.config, self.layout = config, layout
        self.chunks = layout.chunks(config.num_layers or 0)
        stages = range(layout.pipeline_parallel) if only is None else only
        self.states: dict[Rank, list[dict[str, Any]]] = {}
        self.files: dict[Rank, TorchFileWriter] = {}
        for numbers in itertools.product(range(layout.tensor_parallel), stages, range(layout.expert_parallel)):
            rank = Rank(*numbers)
            place = folder / rank.folder(layout.pipeline_parallel, layout.expert_parallel)
            place.mkdir()
            self.files[rank] = TorchFileWriter(place / FILE)
            self.states[rank] = [{} for _ in self.chunks[rank.stage]]
        self._waiting: dict[str, Tensor] = {}

    def take(self, canonical: str, tensor: Tensor) -> None:
        """Write a full tensor, once those that share a tensor of Megatron's with it have come too."""
        place = find_place(self.config, canonical, self.layout.dialect)
        if place.row.ours[0] in _VOCABULARY:
            tensor = _pad_rows(tensor[: self.config.vocab_size], self.layout.padded(self.config.vocab_size or 0))
        self._waiting[canonical] = tensor
        if all(name in self._waiting for name in place.ours):
            parts = [self._waiting.pop(name) for name in place.ours]
            stage, chunk, name = self._locate(place)
            if place.experts is None:
                self._write(stage, chunk, name, place.row, parts)
            else:
                self._write_experts(stage, chunk, name, place, parts)
            if canonical == _EMBEDDING and self.config.tie_word_embeddings and len(self.chunks) > 1:
                self._write(len(self.chunks) - 1, -1, f"{TIED_HEAD[self.layout.dialect]}.weight", place.row, parts)

    def _locate(self, place: Place) -> tuple[int, int, str]:
        """Stage, chunk, and the name there, where layers count from 0."""
        if place.layer is None:
            first = place.row.ours[0].startswith("embed")
            return (0, 0, place.name) if first else (len(self.chunks) - 1, -1, place.name)
        return next(
            (stage, number, NUMBER.sub(str(place.layer - layers.start), place.name, count=1))
            for stage, chunks in enumerate(self.chunks)
            for number, layers in enumerate(chunks)
            if place.layer in layers
        )

    def _ranks(self, stage: int, tensor: int) -> Iterator[Rank]:
        """The files of a stage and tensor-parallel rank, where they are written here."""
        ranks = (Rank(tensor, stage, expert) for expert in range(self.layout.expert_parallel))
        return (rank for rank in ranks if rank in self.files)

    def _write(self, stage: int, chunk: int, name: str, row: Row, parts: list[Tensor]) -> None:
        for tensor in range(self.layout.tensor_parallel):
            ranks = list(self._ranks(stage, tensor))
            pieces = cut_pieces(row, parts, tensor, self.layout.tensor_parallel, self.config)
            shape = (sum(map(len, pieces)), *pieces[0].shape[1:])
            for rank in ranks:
                self._note(rank, chunk, name, row, self.files[rank].add_pieces(shape, pieces[0].dtype, pieces))

    def _write_experts(self, stage: int, chunk: int, name: str, place: Place, parts: list[Tensor]) -> None:
        """Each expert-parallel rank takes the next of the stacked experts."""
        row, ranks, local = place.row, self.layout.tensor_parallel, len(parts[0]) // self.layout.expert_parallel
        for tensor in range(ranks):
            for rank in self._ranks(stage, tensor):
                held = range(rank.expert * local, (rank.expert + 1) * local)
                pieces = (cut(row, [part[e] for part in parts], tensor, ranks, self.config) for e in held)
                if self.layout.grouped_experts:
                    self._write_grouped(rank, chunk, name, row, pieces, local)
                    continue
                for number, piece in enumerate(pieces):
                    self._note(rank, chunk, name.format(number), row, self.files[rank].add(piece))

    def _write_grouped(
        self, rank: Rank, chunk: int, name: str, row: Row, pieces: Iterator[Tensor], experts: int
    ) -> None:
        """All experts of a rank as one tensor: one after the other, each [in, out]; its shape hides that."""
        first = next(pieces)
        rows, columns = first.shape
        number, shape = (2, (experts * columns, rows)) if row.cut == "columns" else (1, (columns, experts * rows))
        transposed = (piece.mT for piece in itertools.chain([first], pieces))
        added = self.files[rank].add_pieces(shape, first.dtype, transposed)
        self.states[rank][chunk][f"{name.partition('local_experts.')[0]}weight{number}"] = added

    def _note(self, rank: Rank, chunk: int, name: str, row: Row, added: Any) -> None:
        state = self.states[rank][chunk]
        state[name] = added
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
            "expert_model_parallel_size": layout.expert_parallel,
            "expert_tensor_parallel_size": layout.tensor_parallel,
            "moe_grouped_gemm": layout.grouped_experts,
            "virtual_pipeline_model_parallel_size": len(self.chunks[0]) if layout.layers_per_chunk else None,
            "num_layers_per_virtual_pipeline_stage": layout.layers_per_chunk,
            "num_layer_list": ",".join(map(str, layout.layers_per_stage)) if layout.layers_per_stage else None,
            "use_mcore_models": layout.dialect == MCORE,
            "use_legacy_models": layout.dialect == LEGACY,
        }
        options = write_arguments(self.config, extras, attributes, dtype)
        for rank, chunks in self.states.items():
            if layout.dialect == MCORE and rank.stage == len(self.chunks) - 1:
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
            self.files[rank].close(content)


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
    temporary = folder / f"{_TEMPORARY}{secrets.token_hex(4)}"
    temporary.mkdir()
    try:
        with _held(temporary):
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
    """Raise ModelLinkError unless the files of `layout` can hold `config`; warn of what options cannot say."""
    layout.check(config)
    layout.chunks(config.num_layers or 0)
    shapes = expected_shapes(config)
    for canonical in shapes:
        place = find_place(config, canonical, layout.dialect)
        if any(name not in shapes for name in place.ours):
            raise ModelLinkError(
                f"Megatron has no place for {canonical!r} without {', '.join(set(place.ours) - shapes.keys())}: use "
                "the native format."
            )
    if names := unsaid(config, layout.expert_parallel):
        print(
            f"modellink: warning: no option of Megatron says {', '.join(names)}: its own programs take other values; "
            "the files hold them under these names, for the way back.",
            file=sys.stderr,
        )


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
            del tensor  # the next one is made before this name would let go of it
        if missing:
            raise ModelLinkError(f"{len(missing)} tensors never came, the first is {min(missing)!r}.")
        files.finish(extras, written)
    finally:
        for file in files.files.values():
            with contextlib.suppress(ValueError):  # closed already
                file.abandon()


@contextlib.contextmanager
def _held(folder: Path) -> Iterator[None]:
    """Hold the lock of a folder, which ends with its process; BlockingIOError when another process holds it."""
    handle = os.open(folder, os.O_RDONLY)
    try:
        fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
        yield
    finally:
        os.close(handle)


def check_writable(folder: Path) -> None:
    """Refuse a folder that holds other things than step 1 of such a checkpoint; remove what dead writers left there."""
    if not folder.exists():
        return
    if folder.is_dir():
        for left in folder.glob(f"{_TEMPORARY}*"):
            try:
                with _held(left):
                    shutil.rmtree(left)
            except BlockingIOError:
                raise ModelLinkError(f"another conversion is writing {left}: wait for it to end.") from None
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
