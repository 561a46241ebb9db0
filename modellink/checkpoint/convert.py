"""Whole-folder conversion between Hugging Face, Megatron's and native checkpoints, tensor by tensor.

Nothing is computed but the sum of weights and an adapter (`lora`): names are mapped, rows of vocabulary padding come or
go, bytes are copied. A source (`source`) yields any of its tensors under canonical names; a sink (`sinks`) is a folder
of parts that each need some of them; the pump moves them on several threads in the memory of the largest; the work
folder (`work`) holds the target until it is complete, and survives an interruption; `verify` reads it back and compares
logits before it takes the target's name. Tokenizer, model code and the keys of config.json that no option holds travel
with the weights.
"""

from __future__ import annotations

import dataclasses
import json
import os
import resource
import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

import modellink
from modellink.checkpoint.hf import check_replaceable, is_hf_folder
from modellink.checkpoint.lora import Adapter, Merge, open_adapter
from modellink.checkpoint.megatron import Layout, check_writable, find_step, is_distributed
from modellink.checkpoint.pump import Pump, Sink, digests
from modellink.checkpoint.sinks import HFSink, MegatronSink, NativeSink
from modellink.checkpoint.source import (
    Source,
    find_original,
    has_tokenizer,
    open_hf,
    open_megatron,
    open_native,
)
from modellink.checkpoint.store import holds_native
from modellink.checkpoint.verify import verify_written
from modellink.checkpoint.work import WorkFolder, fingerprint
from modellink.config.load import dump_config, load_config
from modellink.config.resolved import ResolvedConfig
from modellink.config.schema import Config
from modellink.errors import ModelLinkError, RunFailure

MEGATRON = ("mcore", "legacy")
FORMATS = ("hf", "native", *MEGATRON)
EXPORT = "mg2hf"  # where a conversion into the folder of the original Hugging Face model puts its result
REPORT = "conversion_report.json"
_TOKENIZER = "tokenizer.tokenizer_name_or_path"


@dataclass
class _Job:
    """One conversion: everything that decides what is written, and how it is done."""

    source: Source
    target: Path
    to: str
    layout: Layout
    dtype: torch.dtype | None = None
    verify: bool = True
    report: bool = True
    workers: int = 1
    progress: bool = False
    resolved: ResolvedConfig | None = None
    adapter: Any = None  # what identifies an adapter that the source's tensors are changed by

    def run(self) -> None:
        """Write the target, or leave it as it was."""
        work, threads = WorkFolder(self.target, self._identity()), torch.get_num_threads()
        torch.set_num_threads(1)  # the workers are the threads: theirs would only wait for one another
        try:
            with work:
                self._fill(work)
        except OSError as error:
            raise RunFailure(
                f"writing {self.target} failed: {error.strerror or error}; what was there is unchanged: make room or "
                "fix the cause, and run the same command again."
            ) from error
        finally:
            torch.set_num_threads(threads)

    def _fill(self, work: WorkFolder) -> None:
        started, resumed = time.perf_counter(), work.resumed
        pump = Pump(self.source, self.dtype, self.workers, self.progress)
        sink = self._sink(work.content, pump)
        sent: dict[str, str] = {}
        todo = [part for part in sink.parts if part.name not in work.finished]
        if resumed:
            print(
                f"modellink: going on with an interrupted conversion: {resumed} of {len(sink.parts)} parts are there.",
                file=sys.stderr,
            )
        sink.create()

        def write(part: Any, groups: Any) -> None:
            found: dict[str, str] = {}
            notes = sink.write(part, digests(groups, found))
            work.record(part.name, {"digests": found, "notes": notes})

        pump.run(todo, write, "Converting")
        for report in work.finished.values():
            sent |= report["digests"]
        sink.finish({name: report["notes"] for name, report in work.finished.items()})
        written = time.perf_counter()
        difference, skipped = None, "verification was switched off"
        if self.verify:
            difference, skipped = self._verify(work.content, pump, sent)
        if self.report:
            seconds = {"convert": written - started, "verify": time.perf_counter() - written}
            facts = self._facts(pump, sent, seconds) | {"parts_resumed": resumed}
            facts["verification"] = {
                "tensors": "every tensor read back equals the one sent" if self.verify else "skipped",
                "logits_max_difference": difference,
                "logits_skipped": skipped,
            }
            text = json.dumps(facts, indent=2, ensure_ascii=False) + "\n"
            (work.content / REPORT).write_text(text, encoding="utf-8")
        keep = [path.name for path in self.target.iterdir()] if self.target.is_dir() else []
        work.publish([name for name in keep if self.to in MEGATRON and not name.startswith(".")])

    def _sink(self, folder: Path, pump: Pump) -> Sink:
        if self.to == "hf":
            return HFSink(folder, self.source, pump.dtypes, pump.size)
        if self.to == "native":
            assert self.resolved is not None
            return NativeSink(folder, self.source, pump.size, dump_config(self.resolved))
        return MegatronSink(folder, self.source, pump.size, self.layout)

    def _verify(self, folder: Path, pump: Pump, sent: dict[str, str]) -> tuple[float | None, str | None]:
        """Read `folder` back, as its own configuration describes it."""
        written = self._reopen(folder)
        written.config = dataclasses.replace(written.config, vocab_size=self.source.config.vocab_size)
        reader = Pump(written, None, self.workers, self.progress)
        return verify_written(self.source, reader, pump.dtypes, sent, str(self.target))

    def _reopen(self, folder: Path) -> Source:
        if self.to == "hf":
            return open_hf(folder)
        if self.to == "native":
            return open_native(folder, verify=False)
        return open_megatron(folder, None, self.source.config.family, self.source.config.vocab_size)

    def _identity(self) -> dict[str, Any]:
        source = self.source
        return {
            "versions": [modellink.__version__, torch.__version__],
            "source": [str(source.folder.absolute()), fingerprint(source.folder, deep=source.kind != "hf")],
            "config": dataclasses.asdict(source.config),
            "extras": source.extras,
            "companions": str(source.companions.absolute()) if source.companions else None,
            "adapter": self.adapter,
            "to": [self.to, dataclasses.asdict(self.layout), str(self.dtype), str(self.target.absolute())],
        }

    def _facts(self, pump: Pump, sent: dict[str, str], seconds: dict[str, float]) -> dict[str, Any]:
        size = pump.size(sent)
        kinds = {str(pump.dtypes[name]).removeprefix("torch.") for name in sent}
        peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)
        layout = dataclasses.asdict(self.layout) if self.to in MEGATRON else None
        return {
            "modellink": modellink.__version__,
            "source": {"path": str(self.source.folder.absolute()), "format": self.source.kind},
            "merged": [str(change) for change in self.source.changes],
            "target": {"path": str(self.target.absolute()), "format": self.to, "layout": layout},
            "dtypes": sorted(kinds),
            "tensors": len(sent),
            "bytes": size,
            "seconds": {name: round(value, 3) for name, value in seconds.items()},
            "gigabytes_per_second": round(size / 1e9 / max(seconds["convert"], 1e-9), 3),
            "peak_memory_bytes": peak,
        }


def hf_to_native(source: Path, target: Path, dtype: torch.dtype | None = None) -> None:
    """Write step 1 of a native checkpoint with the weights of a Hugging Face folder, by default each in its dtype."""
    opened = open_hf(source)
    resolved = _described_by_hf(opened, target)
    _Job(opened, target, "native", Layout(), dtype, verify=False, report=False, resolved=resolved).run()


def native_to_hf(source: Path, target: Path, dtype: torch.dtype | None = None, *, progress: bool = False) -> None:
    """Write a Hugging Face folder from the newest complete step (or the step folder) `source`."""
    check_replaceable(target)
    opened = open_native(source)
    _Job(opened, target, "hf", Layout(), dtype, verify=False, report=False, progress=progress).run()


def _described_by_hf(source: Source, target: Path) -> ResolvedConfig:
    resolved = load_config(["--hf-path", str(source.folder)], program="generate")
    resolved.program = "train"  # what is written describes a run
    resolved.set("model.padded_vocab_size", source.config.padded_vocab_size, "converted weights")
    if resolved.get(_TOKENIZER):
        resolved.set(_TOKENIZER, str(target.absolute()), "converted tokenizer")
    return resolved


def _described(source: Source, target: Path) -> ResolvedConfig:
    """A run's configuration that knows its architecture and tokenizer, and nothing else."""
    config = Config()
    origins = {
        f"{section.name}.{option.name}": "default"
        for section in dataclasses.fields(config)
        for option in dataclasses.fields(getattr(config, section.name))
    }
    resolved = ResolvedConfig(config, origins, "train")
    for option in dataclasses.fields(source.config):
        resolved.set(f"model.{option.name}", getattr(source.config, option.name), "converted weights")
    resolved.set("model.padded_vocab_size", source.config.vocab_size, "converted weights")
    if source.companions is not None and has_tokenizer(source.companions):
        resolved.set("tokenizer.tokenizer_type", "PretrainedFromHF", "converted tokenizer")
        resolved.set(_TOKENIZER, str(target.absolute()), "converted tokenizer")
    return resolved


def convert(
    load_dir: str | Path,
    save_dir: str | Path,
    to: str,
    tensor_parallel: int = 1,
    pipeline_parallel: int = 1,
    dtype: torch.dtype | None = None,
    *,
    expert_parallel: int = 1,
    grouped_experts: bool = False,
    layers_per_stage: Sequence[int] | None = None,
    layers_per_virtual_stage: int | None = None,
    vocab_multiple: int = 1,
    vocab_size: int | None = None,
    family: str | None = None,
    config_from: str | Path | None = None,
    lora_load: str | Path | None = None,
    lora_r: int | None = None,
    lora_alpha: float | None = None,
    lora_target_modules: Sequence[str] | None = None,
    verify: bool = True,
    workers: int | None = None,
    progress: bool = True,
) -> None:
    """Convert the checkpoint in `load_dir` to format `to` ("hf", "native", "mcore" or "legacy") in `save_dir`.

    What `load_dir` holds is found out. The parallel sizes, layers per stage (or per chunk of an interleaved pipeline),
    `grouped_experts` (one tensor for the experts of a rank) and the multiple that pads the vocabulary shape Megatron's
    files, "mcore" and "legacy"; the other formats load at every layout. Reading Megatron's files, the architecture
    comes from the Hugging Face folder `config_from` (default: a config.json in `load_dir` or `save_dir`), else from the
    files themselves, with `vocab_size` real rows and the Hugging Face spelling of `family`. Written as "hf" into a
    folder that holds the original model, the result lies in its subfolder mg2hf. `dtype` casts the weights (default: as
    stored). A run's folder that holds steps and an export counts as native.

    The LoRA adapter in the folder `lora_load`, of PEFT or of Megatron, is merged into the weights, and then the format
    may stay the same; its rank, alpha and target modules are what its files say, or the arguments where they say
    nothing. The result is verified (unless `verify` is false) and described in its conversion_report.json. `workers`
    threads (default: one per core, at most four) share the memory of the largest tensor; their number changes no byte.
    The target appears complete or stays as it was; the same call goes on where an interrupted one stopped. Raises
    ModelLinkError for what does not exist, is damaged or cannot be expressed, RunFailure when writing fails.
    """
    source, target = Path(load_dir), Path(save_dir)
    if to not in FORMATS:
        raise ModelLinkError(f"the format {to!r} is unknown: give one of {', '.join(FORMATS)}.")
    if not source.is_dir():
        raise ModelLinkError(f"no checkpoint at {source}: give a Hugging Face, Megatron or native checkpoint folder.")
    if workers is not None and workers < 1:
        raise ModelLinkError(f"the number of workers is {workers}; it must be at least 1.")
    layout = Layout(
        to,
        tensor_parallel,
        pipeline_parallel,
        tuple(layers_per_stage) if layers_per_stage else None,
        layers_per_virtual_stage,
        vocab_multiple,
        expert_parallel,
        grouped_experts,
    )
    if to not in MEGATRON and layout != Layout(to):
        raise ModelLinkError(f"the format {to} loads at every layout: leave out the sizes of Megatron's files.")
    adapter = None
    if lora_load is not None:
        adapter = open_adapter(lora_load, rank=lora_r, alpha=lora_alpha, targets=lora_target_modules)
    opened, target = _open(source, target, to, family, vocab_size, config_from, adapter)
    if adapter is not None:
        opened.changes.append(Merge(opened.config, adapter, dtype))
    job = _Job(opened, target, to, layout, dtype, verify, workers=workers or _cores(), progress=progress)
    if lora_load is not None:
        files = fingerprint(Path(lora_load), deep=True)
        job.adapter = [str(Path(lora_load).absolute()), files, lora_r, lora_alpha, lora_target_modules]
    if to == "hf":
        check_replaceable(target)
    elif to == "native":
        _check_empty(target)
        job.resolved = (_described_by_hf if opened.kind == "hf" else _described)(opened, target)
    else:
        check_writable(target)
        job.layout.check(opened.config)
    job.run()


def _open(
    source: Path,
    target: Path,
    to: str,
    family: str | None,
    vocab_size: int | None,
    config_from: str | Path | None,
    adapter: Adapter | None,
) -> tuple[Source, Path]:
    """The source, and the folder that is really written."""
    native = holds_native(source) and not is_distributed(source)
    if not native and find_step(source) is not None:
        opened = open_megatron(source, find_original(config_from, source, target), family, vocab_size, adapter)
        return opened, target / EXPORT if to == "hf" and is_hf_folder(target) else target
    if not native and is_hf_folder(source):
        if to == "hf" and adapter is None:
            raise ModelLinkError(f"{source} already is a Hugging Face folder: copy it, or convert to native.")
        return open_hf(source), target
    if to == "native" and adapter is None:
        raise ModelLinkError(f"{source} already is native: it loads at every layout.")
    return open_native(source), target


def _cores() -> int:
    return min(len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1, 4)


def _check_empty(target: Path) -> None:
    if target.exists() and not (target.is_dir() and not any(target.iterdir())):
        raise ModelLinkError(f"{target} exists and is not an empty folder: give another one or remove it yourself.")
