"""The three kinds of folder that a conversion writes, each as parts that can be written apart from one another.

Hugging Face     512 MB of neighbouring tensors, put into their places in the safetensors files
native           one shard of about 1 GB of a step
Megatron         the files of all ranks of one pipeline stage
"""

from __future__ import annotations

import dataclasses
import json
import os
import shutil
import time
from collections.abc import Callable, Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from modellink.checkpoint.hf import HFWriter, copy_companions, without_padding
from modellink.checkpoint.manifest import MANIFEST, FileRecord, Manifest, hash_file, write_synced
from modellink.checkpoint.megatron import TRACKER, Layout, check_layout, stage_names, write_stages
from modellink.checkpoint.megatron_names import find_place
from modellink.checkpoint.pump import Part, cut_parts, merge_groups
from modellink.checkpoint.shards import INDEX, Written, write_index, write_shard
from modellink.checkpoint.source import Source
from modellink.checkpoint.store import CONFIG, EXTRA, step_name

_HF_PART, _NATIVE_SHARD = 512_000_000, 1_000_000_000
STEP = step_name(1)
Size = Callable[[Iterable[str]], int]


class HFSink:
    """A Hugging Face folder."""

    def __init__(self, folder: Path, source: Source, dtypes: Mapping[str, torch.dtype], size: Size) -> None:
        self.folder, self._companions = folder, source.companions
        self._writer = HFWriter(folder, source.config, dtypes, source.extras)
        groups = merge_groups(source.groups, self._writer.groups)
        self.parts = cut_parts(groups, size, _HF_PART, "tensors {}")

    def create(self) -> None:
        self._writer.create()

    def write(self, part: Part, groups: Iterator[dict[str, Tensor]]) -> None:
        self._writer.write(groups)

    def finish(self, reports: Mapping[str, Any]) -> None:
        self._writer.finish(self._companions)


class NativeSink:
    """Step 1 of a native checkpoint, with the run's configuration `config_text`."""

    def __init__(self, folder: Path, source: Source, size: Size, config_text: str) -> None:
        self.folder, self._step = folder, folder / STEP
        self._source, self._config_text = source, config_text
        groups = merge_groups(source.groups)
        self.parts = cut_parts(groups, size, _NATIVE_SHARD, "__0_{}.distcp")

    def create(self) -> None:
        self._step.mkdir(exist_ok=True)

    def write(self, part: Part, groups: Iterator[dict[str, Tensor]]) -> dict[str, Any]:
        path = self._step / part.name
        written = write_shard(path, ((f"model.{name}", tensor) for name, tensor in _each(groups)))
        return {
            "tensors": [dataclasses.asdict(each) for each in written],
            "file": dataclasses.asdict(hash_file(path)),
        }

    def finish(self, reports: Mapping[str, Any]) -> None:
        written = [Written(**each) for part in self.parts for each in reports[part.name]["tensors"]]
        write_index(self._step, written)
        write_synced(self._step / CONFIG, self._config_text)
        extra = {"progress": {}, "layout": {}, "hf_extras": self._source.extras}
        write_synced(self._step / EXTRA, json.dumps(extra, indent=1))
        files = {part.name: FileRecord(**reports[part.name]["file"]) for part in self.parts}
        files |= {name: hash_file(self._step / name) for name in (INDEX, CONFIG, EXTRA)}
        write_synced(self._step / MANIFEST, Manifest(1, 1, time.time(), files).dump())
        write_synced(self.folder / TRACKER, "1\n")
        if self._source.companions is not None:
            copy_companions(self._source.companions, self.folder)


class MegatronSink:
    """Step 1 of a folder of Megatron-Core or -Legacy, cut as `layout` says."""

    def __init__(self, folder: Path, source: Source, size: Size, layout: Layout) -> None:
        self.folder, self._step = folder, folder / STEP
        self._source, self._layout = source, layout
        self._config = without_padding(source.config)
        check_layout(self._config, layout)
        together = [find_place(self._config, name, layout.dialect).ours for name in source.dtypes]
        groups = merge_groups(source.groups, together)
        self.parts = []
        for stage, held in enumerate(map(set, stage_names(self._config, layout))):
            self.parts.append(Part(str(stage), [group for group in groups if group[0] in held]))

    def create(self) -> None:
        self._step.mkdir(exist_ok=True)

    def write(self, part: Part, groups: Iterator[dict[str, Tensor]]) -> None:
        apart = self.folder / f".stage-{part.name}"
        shutil.rmtree(apart, ignore_errors=True)
        apart.mkdir()
        stages = [int(part.name)]
        write_stages(apart, _each(groups), self._config, self._layout, stages=stages, extras=self._source.extras)
        for rank in apart.iterdir():
            shutil.rmtree(self._step / rank.name, ignore_errors=True)
            os.rename(rank, self._step / rank.name)
        apart.rmdir()

    def finish(self, reports: Mapping[str, Any]) -> None:
        write_synced(self.folder / TRACKER, "1")
        if self._source.companions is not None:
            copy_companions(self._source.companions, self.folder)


def _each(groups: Iterator[dict[str, Tensor]]) -> Iterator[tuple[str, Tensor]]:
    return (named for tensors in groups for named in tensors.items())
