"""Native checkpoints: sharded, hashed, and either complete or absent.

One step is one folder, ``SAVE/iter_0000500/``: the tensors as ``torch.distributed.checkpoint`` shards, which load at
any other layout; ``modellink.yaml``, the resolved configuration; ``extra.json``, the small training state (consumed
samples, schedule, loss scale); ``rank_00003.safetensors``, what belongs to one rank alone (random states);
``manifest.json``, the size and SHA-256 of all of these. A save goes through the phases below, so a process that dies in
any of them leaves the previous step loadable:

    open      rank 0 makes SAVE/.iter_0000500.tmp-1a2b3c4d
    write     every rank writes and syncs its own files
    seal      every rank hashes its own files, rank 0 writes the manifest
    publish   rank 0 renames the folder to its final name: from here on the step exists
    track     latest_checkpointed_iteration.txt is replaced, for tools that look for it
    prune     steps beyond `keep` are removed, oldest first

SAVE must be one folder that all ranks see. All public methods but `read_tensor_names` and `load_full` are collective:
every rank calls them, in the same order, and all of them return or raise together.
"""

from __future__ import annotations

import contextlib
import json
import logging
import os
import re
import secrets
import shutil
import time
from collections.abc import Collection, Iterator, Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from safetensors.torch import load_file, save

from modellink import device
from modellink.checkpoint.agree import everywhere, on_first, together
from modellink.checkpoint.manifest import (
    MANIFEST,
    DamagedStep,
    FileRecord,
    Manifest,
    check_hashes,
    check_sizes,
    hash_file,
    read_manifest,
    write_synced,
)
from modellink.checkpoint.shards import (
    INDEX,
    TensorInfo,
    iterate_tensors,
    read_index,
    read_shards,
    stage,
    tensor_infos,
    write_shards,
)
from modellink.errors import ModelLinkError
from modellink.files import atomic_write, fsync_directory

CONFIG = "modellink.yaml"
EXTRA = "extra.json"
TRACKER = "latest_checkpointed_iteration.txt"
STEP_NAME = re.compile(r"iter_(\d{7,})")

log = logging.getLogger(__name__)


def step_name(iteration: int) -> str:
    """Return the folder name of a step: ``iter_0000500`` for 500."""
    return f"iter_{iteration:07d}"


def rank_file(rank: int) -> str:
    return f"rank_{rank:05d}.safetensors"


def is_native_step(path: Path) -> bool:
    """Tell whether `path` is a step folder of this format, whole or damaged (other formats use the same name)."""
    return path.is_dir() and any((path / name).exists() for name in (MANIFEST, CONFIG, INDEX))


def holds_native(path: Path) -> bool:
    """Tell whether `path` is a step, or a folder with a complete one: what a run's folder counts as, export or not."""
    return is_native_step(path) or bool(CheckpointStore(path, local=True).iterations())


def read_tensor_names(step: str | os.PathLike[str]) -> dict[str, TensorInfo]:
    """Return name -> global shape and dtype of every tensor in the step folder `step`; reads the index alone."""
    return tensor_infos(read_index(Path(step)))


def load_full(
    path: str | os.PathLike[str], names: Collection[str] | None = None, *, verify: bool = True
) -> Iterator[tuple[str, torch.Tensor]]:
    """Yield (name, whole CPU tensor) of a native checkpoint, one tensor in memory at a time, without a process group.

    `path` is a step folder or a folder of steps (then the newest complete one); `names` selects, in its own order. With
    `verify` the SHA-256 sums are checked first. Raises ModelLinkError for a damaged step or an unknown name.
    """
    yield from iterate_tensors(sound_step(path, verify=verify), names)


def sound_step(path: str | os.PathLike[str], *, verify: bool = True) -> Path:
    """The step folder that `path` is, or the newest complete one in it, without a process group.

    With `verify` the SHA-256 sums are checked. Raises ModelLinkError when there is none or it is damaged.
    """
    step = Path(path)
    if not is_native_step(step):
        return CheckpointStore(step, local=True).resolve(verify=verify)
    try:
        manifest = check_sizes(step)
        if verify:
            check_hashes(step, manifest.files.items())
    except DamagedStep as damage:
        raise ModelLinkError(f"checkpoint {step} is damaged: {damage}; use another step.") from damage
    return step


@dataclass(frozen=True)
class _Content:
    """Everything one rank contributes to one step; `staged` holds the copies that a background save writes."""

    iteration: int
    tensors: Mapping[str, torch.Tensor]
    staged: Mapping[str, torch.Tensor] | None
    extra_text: str
    per_rank: bytes
    config_text: str


class CheckpointStore:
    """The native checkpoints of one run in `folder`.

    `keep` is how many complete steps stay on disk (None: all). With `async_save` a save returns as soon as the tensors
    have been copied to host memory, and a thread with a process group of its own does the rest; `wait` before leaving
    the process group, and see there what went wrong. `local` makes this object ignore an existing process group.
    """

    def __init__(
        self,
        folder: str | os.PathLike[str],
        *,
        keep: int | None = None,
        async_save: bool = False,
        local: bool = False,
    ) -> None:
        if keep is not None and keep < 1:
            raise ModelLinkError(f"the number of checkpoints to keep is {keep}; it must be at least 1.")
        self.folder = Path(folder)
        self.keep = keep
        self.async_save = async_save
        self.local = local
        self._group: dist.ProcessGroup | None = None
        self._writer: ThreadPoolExecutor | None = None
        self._pending: Future[None] | None = None
        self._buffers: dict[str, torch.Tensor] = {}
        self._verified: set[tuple[Path, float]] = set()
        self._warned: set[str] = set()

    # --- saving ---------------------------------------------------------------------------------------------------

    def save(
        self,
        iteration: int,
        tensors: Mapping[str, torch.Tensor],
        *,
        extra: Mapping[str, Any],
        per_rank: Mapping[str, torch.Tensor],
        config_text: str,
    ) -> None:
        """Write step `iteration`: `tensors` (plain tensors or DTensors; a pipeline rank passes those it holds),
        `extra` (JSON values; rank 0's is stored), `per_rank` (this rank's own tensors) and the configuration as YAML.

        Waits for the save before it, and raises its failure. A failure in any phase is raised on every rank as
        ModelLinkError, for a background save by the next `save` or `wait`. A step of the same number is replaced.
        """
        self.wait()
        self._join()
        content = _Content(
            iteration=iteration,
            tensors=dict(tensors),
            staged=stage(tensors, self._buffers) if self.async_save else None,
            extra_text=json.dumps(dict(extra), indent=1),
            per_rank=save({name: tensor.detach().cpu().contiguous() for name, tensor in per_rank.items()}),
            config_text=config_text,
        )
        if not self.async_save:
            self._save(content)
            return
        if self._writer is None:
            self._writer = ThreadPoolExecutor(1, thread_name_prefix="checkpoint")
        self._pending = self._writer.submit(self._save, content)

    def wait(self) -> None:
        """Return when no save is under way any more; raise, once and on every rank, what went wrong in the last one."""
        pending, self._pending = self._pending, None
        if pending is not None:
            pending.result()

    def _save(self, content: _Content) -> None:
        group = self._group
        temporary = on_first(group, lambda: self._open(content.iteration))
        try:
            self._write(temporary, content)
            self._seal(temporary, content)
        except ModelLinkError:
            if self._rank == 0:
                shutil.rmtree(temporary, ignore_errors=True)  # a full disk gets its space back
            raise
        on_first(group, lambda: self._publish(temporary, content.iteration))
        on_first(group, lambda: self._track(content.iteration))
        on_first(group, self._prune)

    def _open(self, iteration: int) -> Path:
        self.folder.mkdir(parents=True, exist_ok=True)
        self._restore_replaced()
        for leftover in (*self.folder.glob(".iter_*.tmp-*"), *self.folder.glob(".iter_*.old-*")):
            shutil.rmtree(leftover, ignore_errors=True)
        temporary = self._hidden(iteration, "tmp")
        temporary.mkdir()
        return temporary

    def _write(self, temporary: Path, content: _Content) -> None:
        write_shards(temporary, content.tensors, self._group, content.staged)
        everywhere(self._group, lambda: self._write_own(temporary, content))

    def _write_own(self, temporary: Path, content: _Content) -> None:
        write_synced(temporary / rank_file(self._rank), content.per_rank)
        if self._rank == 0:
            write_synced(temporary / CONFIG, content.config_text)
            write_synced(temporary / EXTRA, content.extra_text)

    def _seal(self, temporary: Path, content: _Content) -> None:
        shares = everywhere(self._group, lambda: self._hash_own(temporary))
        files = {name: record for share in shares for name, record in sorted(share.items())}
        manifest = Manifest(content.iteration, len(shares), time.time(), files)
        on_first(self._group, lambda: self._write_manifest(temporary, manifest))

    def _hash_own(self, temporary: Path) -> dict[str, FileRecord]:
        # the shards of a rank are named after it: __3_0.distcp
        own = [path.name for path in temporary.glob(f"__{self._rank}_*")] + [rank_file(self._rank)]
        if self._rank == 0:
            own += [INDEX, CONFIG, EXTRA]
        return {name: hash_file(temporary / name) for name in own}

    def _write_manifest(self, temporary: Path, manifest: Manifest) -> None:
        write_synced(temporary / MANIFEST, manifest.dump())
        fsync_directory(temporary)

    def _publish(self, temporary: Path, iteration: int) -> None:
        final = self.folder / step_name(iteration)
        if final.exists():
            # a folder cannot be renamed over a full one; `_restore_replaced` undoes this if we die in between
            os.rename(final, self._hidden(iteration, "replaced"))
        os.rename(temporary, final)
        fsync_directory(self.folder)
        for replaced in self.folder.glob(f".{final.name}.replaced-*"):
            self._discard(replaced, iteration)

    def _track(self, iteration: int) -> None:
        atomic_write(self.folder / TRACKER, f"{iteration}\n")

    def _prune(self) -> None:
        if self.keep is not None:
            complete, _ = self._survey()
            for iteration in list(complete)[self.keep :]:
                self._discard(self.folder / step_name(iteration), iteration)

    def _discard(self, path: Path, iteration: int) -> None:
        # renamed first, so that a removal cut short does not look like a damaged step
        hidden = self._hidden(iteration, "old")
        os.rename(path, hidden)
        shutil.rmtree(hidden, ignore_errors=True)

    def _restore_replaced(self) -> None:
        for replaced in self.folder.glob(".iter_*.replaced-*"):
            final = self.folder / replaced.name[1:].split(".")[0]
            if final.exists():
                shutil.rmtree(replaced, ignore_errors=True)
            else:
                with contextlib.suppress(FileNotFoundError):  # another process was faster
                    os.rename(replaced, final)

    def _hidden(self, iteration: int, purpose: str) -> Path:
        return self.folder / f".{step_name(iteration)}.{purpose}-{secrets.token_hex(4)}"

    # --- choosing a step ------------------------------------------------------------------------------------------

    def iterations(self) -> list[int]:
        """Return the complete steps in ascending order (sizes are checked, content is not)."""
        self.wait()
        return on_first(self._join(), lambda: sorted(self._survey()[0]))

    def latest(self) -> int | None:
        """Return the complete step that was saved last, or None when there is none; damaged ones are warned about."""
        self.wait()
        return on_first(self._join(), lambda: self._newest({}))

    def resolve(self, step: int | None = None, *, verify: bool = True) -> Path:
        """Return the folder of `step`, or of the newest complete step, the same on every rank.

        With `verify` the SHA-256 sums are checked, each rank reading a part of the files. Without `step` a damaged step
        is refused with a warning that names it, and the next older one is taken. Raises ModelLinkError, listing what
        there is, when `step` is missing or damaged or no step is left.
        """
        self.wait()
        group = self._join()
        refused: dict[int, str] = {}
        while True:
            iteration = on_first(group, lambda: self._choose(step, refused))
            path = self.folder / step_name(iteration)
            damage = self._find_damage(path) if verify else None
            if damage is None:
                return path
            refused[iteration] = damage

    def _find_damage(self, path: Path) -> str | None:
        """Return what is wrong with the content of `path`, the same on every rank; None when nothing is."""
        world_size = 1 if self._group is None else dist.get_world_size(self._group)
        manifest = on_first(self._group, lambda: read_manifest(path))
        if (path, manifest.saved_at) in self._verified:
            return None

        def check_share() -> str | None:
            largest_first = sorted(manifest.files.items(), key=lambda item: -item[1].size)
            try:
                check_hashes(path, largest_first[self._rank :: world_size])
            except DamagedStep as damage:
                return str(damage)
            return None

        damage = next((found for found in everywhere(self._group, check_share) if found), None)
        if damage is None:
            self._verified.add((path, manifest.saved_at))
        return damage

    def _survey(self) -> tuple[dict[int, Manifest], dict[int, str]]:
        """Return the complete steps, newest save first, and what is wrong with the others."""
        complete: dict[int, Manifest] = {}
        damaged: dict[int, str] = {}
        for path in sorted(self.folder.glob("iter_*")):
            match = STEP_NAME.fullmatch(path.name)
            if match is None or not is_native_step(path):
                continue
            try:
                complete[int(match[1])] = check_sizes(path)
            except DamagedStep as damage:
                damaged[int(match[1])] = str(damage)
        # by time of saving: after going back to step 300 and saving 350, an abandoned step 500 is not the newest
        newest_first = sorted(complete.items(), key=lambda item: (item[1].saved_at, item[0]), reverse=True)
        return dict(newest_first), damaged

    def _newest(self, refused: Mapping[int, str]) -> int | None:
        if self.folder.is_dir() and os.access(self.folder, os.W_OK):
            self._restore_replaced()
        complete, damaged = self._survey()
        chosen = next((iteration for iteration in complete if iteration not in refused), None)
        instead = "no other step is complete" if chosen is None else f"using step {chosen} instead"
        for iteration, damage in {**damaged, **refused}.items():
            self._warn(f"checkpoint {self.folder / step_name(iteration)} is refused: {damage}; {instead}")
        tracked = self._tracked()
        if tracked is not None and chosen is not None and tracked != chosen and tracked not in {**damaged, **refused}:
            state = "an older save" if tracked in complete else "not there"
            self._warn(f"{self.folder / TRACKER} says step {tracked}, which is {state}; using step {chosen}")
        return chosen

    def _choose(self, step: int | None, refused: Mapping[int, str]) -> int:
        if step is None:
            newest = self._newest(refused)
            if newest is None:
                _, damaged = self._survey()
                names = ", ".join(f"{step_name(i)}: {why}" for i, why in sorted({**damaged, **refused}.items()))
                raise ModelLinkError(
                    f"{self.folder} holds no complete checkpoint ({names or 'there is no step in it'}); "
                    "give a folder with a sound one."
                )
            return newest
        complete, damaged = self._survey()
        sound = ", ".join(str(i) for i in sorted(complete) if i not in refused) or "none"
        damage = {**damaged, **refused}.get(step)
        if damage is not None:
            raise ModelLinkError(f"checkpoint step {step} in {self.folder} is damaged: {damage}; sound steps: {sound}.")
        if step not in complete:
            raise ModelLinkError(f"checkpoint step {step} does not exist in {self.folder}; steps there: {sound}.")
        return step

    def _tracked(self) -> int | None:
        try:
            text = (self.folder / TRACKER).read_text().strip()
        except OSError:
            return None
        return int(text) if text.isdecimal() else None

    def _warn(self, sentence: str) -> None:
        if sentence not in self._warned:
            self._warned.add(sentence)
            log.warning(sentence)

    # --- loading --------------------------------------------------------------------------------------------------

    def load(
        self,
        tensors: Mapping[str, torch.Tensor],
        step: int | None = None,
        *,
        strict: bool = True,
        prefix: str | tuple[str, ...] = "",
    ) -> dict[str, Any]:
        """Fill `tensors` (plain or DTensor, any layout) in place from `step` (None: the newest); return `extra`.

        Only names that start with `prefix` count, on both sides. With `strict` every name must be on both sides (a
        pipeline rank passes those it holds; the union counts); without it, what is on both sides is loaded. Floating
        types are converted. Raises ModelLinkError for a name or shape that does not fit, before anything is changed.
        """
        path = self.resolve(step)
        infos = together(self._group, lambda: tensor_infos(read_index(path)))
        stored = {name: info for name, info in infos.items() if name.startswith(prefix)}
        wanted = {name: tensor for name, tensor in tensors.items() if name.startswith(prefix)}
        unexpected = self._names_nobody_wants(wanted, stored) if strict else []
        together(self._group, lambda: _check_fit(path, wanted, stored, unexpected, strict))
        read_shards(path, {name: tensor for name, tensor in wanted.items() if name in stored}, self._group)
        return self._extra_of(path)

    def read_extra(self, step: int | None = None) -> dict[str, Any]:
        """Return the `extra` of `step` (None: the newest) without reading any tensor."""
        return self._extra_of(self.resolve(step, verify=False))

    def _extra_of(self, path: Path) -> dict[str, Any]:
        return together(self._group, lambda: json.loads((path / EXTRA).read_text()))

    def load_per_rank(self, rank: int, step: int | None = None) -> dict[str, torch.Tensor]:
        """Return what `rank` stored for itself (CPU tensors); {} when the step was written by fewer ranks."""
        path = self.resolve(step) / rank_file(rank)
        return together(self._group, lambda: load_file(path) if path.exists() else {})

    def _names_nobody_wants(self, wanted: Collection[str], stored: Mapping[str, TensorInfo]) -> list[str]:
        # one byte a name instead of every rank's list of names: a large run has thousands of each
        claimed_N = torch.tensor([name in wanted for name in stored], dtype=torch.uint8)
        if self._group is not None:
            dist.all_reduce(claimed_N, op=dist.ReduceOp.MAX, group=self._group)
        return [name for name, claimed in zip(stored, claimed_N.tolist(), strict=True) if not claimed]

    @property
    def _rank(self) -> int:
        return 0 if self._group is None else dist.get_rank(self._group)

    def _join(self) -> dist.ProcessGroup | None:
        # a gloo group of its own: host objects need no accelerator, and a background save must not meet other traffic
        if self._group is None and not self.local and dist.is_initialized() and dist.get_world_size() > 1:
            self._group = dist.new_group(backend=device.host_backend())
        return self._group


def _few(names: list[str]) -> str:
    return ", ".join(names[:3]) + (f" and {len(names) - 3} more" if len(names) > 3 else "")


def _check_fit(
    step: Path,
    wanted: Mapping[str, torch.Tensor],
    stored: Mapping[str, TensorInfo],
    unexpected: list[str],
    strict: bool,
) -> None:
    """Raise ModelLinkError when `wanted` cannot be filled from what `stored` lists."""
    problems = []
    missing = [name for name in wanted if name not in stored]
    if strict and missing:
        problems.append(f"it lacks {_few(missing)}")
    if unexpected:
        problems.append(f"it has {_few(unexpected)}, which the run does not")
    shapes, types = [], []
    for name in wanted.keys() & stored.keys():
        have, want = stored[name], wanted[name]
        if have.shape != tuple(want.shape):
            shapes.append(f"{name} is {list(have.shape)} instead of {list(want.shape)}")
        elif have.dtype != want.dtype and not (have.dtype.is_floating_point and want.dtype.is_floating_point):
            types.append(f"{name} is {have.dtype} instead of {want.dtype}")
    problems += [_few(sorted(found)) for found in (shapes, types) if found]
    if problems:
        raise ModelLinkError(
            f"checkpoint {step} does not fit: {'; '.join(problems)}; compare this run's options with {step / CONFIG}."
        )
