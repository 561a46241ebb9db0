"""One configuration from all its sources: flags, a YAML file, a preset, a checkpoint or Hugging Face folder,
defaults.

`load_config` merges them, remembers where each value came from, and checks the result. Flags win over the YAML file;
both must agree with a preset or a folder about the architecture: sources that contradict each other are an error,
never a silent choice. The same call gives the same result, or the same error, on every rank without communication.
"""

from __future__ import annotations

import dataclasses
import os
import sys
from collections.abc import Sequence
from typing import Any

import yaml

from modellink.config import architecture
from modellink.config.flags import Given, assignments, check_statuses, flag_of, parse, section_types
from modellink.config.resolved import ResolvedConfig
from modellink.config.schema import Config, SourceConfig
from modellink.config.show import describe, dump
from modellink.config.validate import validate
from modellink.config.yaml_file import read_yaml
from modellink.errors import ModelLinkError

__all__ = ["ConfigurationError", "ResolvedConfig", "dump_config", "load_config", "load_section", "set_tokenizer_size"]


class ConfigurationError(ModelLinkError):
    """A configuration that cannot be used. Every rank that sees the same files raises the same one."""


def load_config(argv: Sequence[str], program: str = "train") -> ResolvedConfig:
    """Read, merge, resolve and check the configuration of `program` ("train", "generate", "chat" or "evaluate").

    The world size is the launcher's WORLD_SIZE (1 without one). Warnings go to stderr on rank 0. With --print-config
    the result is printed by rank 0 and SystemExit(0) is raised, as --help does. Raises ModelLinkError for everything
    a user can get wrong.
    """
    try:
        given, source = _gather(argv, program)
        printing = source.print_config
        resolved = _merge(given, program, source.model, printing)
        validate(resolved, complete=not printing)
    except ModelLinkError as error:
        raise ConfigurationError(str(error)) from error
    if _rank() == 0:
        for warning in resolved.warnings:
            print(f"modellink: warning: {warning}", file=sys.stderr)
        if printing:
            print(describe(resolved))
    if printing:
        raise SystemExit(0)
    return resolved


def load_section(argv: Sequence[str], program: str) -> Any:
    """The dataclass of a program that has one section, "preprocess" or "convert", from flags and --config."""
    given, source = _gather(argv, program)
    warnings = check_statuses(given)
    found, more = assignments(given, lambda path: None)
    values = {path.split(".")[1]: value for path, (value, _) in found.items() if path.startswith(f"{program}.")}
    config = section_types(program)[program](**values)
    for warning in warnings + more:
        print(f"modellink: warning: {warning}", file=sys.stderr)
    if source.print_config:
        print(yaml.safe_dump({program: dataclasses.asdict(config)}, sort_keys=False, allow_unicode=True), end="")
        raise SystemExit(0)
    return config


def _gather(argv: Sequence[str], program: str) -> tuple[list[Given], SourceConfig]:
    """What the file named by --config and the flags give, flags last, and the options that steer the reading."""
    given = parse(argv, program)
    source = _source(given)
    if source.config:
        from_file = read_yaml(source.config, program)
        given = [*_without_overridden(from_file, given), *given]
        source = _source(given)
    return given, source


def _source(given: Sequence[Given]) -> SourceConfig:
    paths = {item.flag.path: item.value for item in given if item.flag.path}
    return SourceConfig(**{path.split(".")[1]: value for path, value in paths.items() if path.startswith("source.")})


def _rank() -> int:
    return int(os.environ.get("RANK", "0"))


def _without_overridden(from_file: Sequence[Given], flags: Sequence[Given]) -> list[Given]:
    """What a file gives, less the fields that flags set: a flag wins over the file whatever its spelling."""
    by_flags = {item.flag.path for item in flags if item.flag.path}
    by_flags |= {path for item in flags for path in item.flag.sets}
    return [item for item in from_file if not item.flag.path or item.flag.path not in by_flags]


def _merge(given: Sequence[Given], program: str, preset: str | None, printing: bool) -> ResolvedConfig:
    """Apply all sources in order of precedence and derive what is left."""
    config = Config()
    origins = {
        f"{section.name}.{option.name}": "default"
        for section in dataclasses.fields(config)
        for option in dataclasses.fields(getattr(config, section.name))
    }
    resolved = ResolvedConfig(config, origins, program)
    resolved.warnings += check_statuses(given)
    found, warnings = assignments(given, resolved.get)
    resolved.warnings += warnings
    for path, (value, origin) in found.items():
        if not path.startswith("source."):
            resolved.set(path, value, origin)
    _count_null_end(resolved)
    architecture.fill(resolved, preset)
    _derive(resolved, printing)
    return resolved


def _count_null_end(resolved: ResolvedConfig) -> None:
    """NullTokenizer appends an end-of-document id to the vocabulary that a user names (Megatron's rule); a resolved
    file, which names the padded vocabulary too, counts it already."""
    model, origin = resolved.config.model, resolved.origins["model.vocab_size"]
    named = model.vocab_size is not None and (origin.startswith("flag") or model.padded_vocab_size is None)
    if named and resolved.config.tokenizer.tokenizer_type == "NullTokenizer":
        resolved.set("model.vocab_size", (model.vocab_size or 0) + 1, f"{origin}, and 1 of NullTokenizer")


def _derive(resolved: ResolvedConfig, printing: bool) -> None:
    """Fill in what the given values imply."""
    config = resolved.config
    parallel, train = config.parallel, config.train
    model_parallel = parallel.tensor_parallel * parallel.pipeline_parallel * parallel.context_parallel
    resolved.world_size = int(os.environ.get("WORLD_SIZE", model_parallel if printing else 1))

    def derive(path: str, value: Any, why: str) -> None:
        if resolved.get(path) != value:
            resolved.set(path, value, f"derived: {why}")

    if parallel.sequence_parallel and parallel.tensor_parallel == 1:
        resolved.warnings.append(
            f"{resolved.origins['parallel.sequence_parallel']} is switched off: one tensor-parallel rank"
        )
        derive("parallel.sequence_parallel", False, "one tensor-parallel rank")
    if config.optimizer.bf16 and not config.optimizer.release_fp32_grad:
        derive("optimizer.fp32_grad_accumulation", True, "bf16 accumulates gradients in fp32")
    if parallel.recompute_modules and parallel.recompute_granularity is None:
        derive("parallel.recompute_granularity", "selective", "--recompute-modules")
    if parallel.recompute_layers_per_stage and parallel.recompute_granularity in (None, "full"):
        for path, value in (("granularity", "full"), ("method", "block")):
            derive(f"parallel.recompute_{path}", value, flag_of("parallel.recompute_layers_per_stage"))
    if parallel.recompute_granularity == "full":
        if parallel.recompute_method is None:
            derive("parallel.recompute_method", "uniform", "full recomputation")
        if parallel.recompute_num_layers is None:
            derive("parallel.recompute_num_layers", 1, "full recomputation")
    if parallel.zero_stage is None:
        derive("parallel.zero_stage", int(parallel.distributed_optimizer), "1 with a distributed optimizer, else 0")
    if train.stage == "sft":
        derive("data.instruction_data", True, "--stage sft trains on instructions")
    elif config.data.instruction_data:
        derive("train.stage", "sft", "the data are instructions")
    if train.global_batch_size is None and train.micro_batch_size and model_parallel and resolved.data_parallel:
        derive(
            "train.global_batch_size", train.micro_batch_size * resolved.data_parallel, "micro batch x data parallel"
        )
    before = dataclasses.asdict(config.model)
    config.model = config.model.resolve()
    for name, value in before.items():
        if getattr(config.model, name) != value:
            resolved.origins[f"model.{name}"] = "derived: from the other sizes"
    if config.model.vocab_size and config.model.padded_vocab_size is None:
        pad_vocabulary(resolved)


def pad_vocabulary(resolved: ResolvedConfig) -> None:
    """Set model.padded_vocab_size from model.vocab_size: the next multiple of vocab_multiple x tensor parallel."""
    model = resolved.config.model
    assert model.vocab_size
    multiple = model.vocab_multiple * resolved.config.parallel.tensor_parallel
    padded = -(-model.vocab_size // multiple) * multiple
    resolved.set("model.padded_vocab_size", padded, f"derived: vocabulary rounded up to a multiple of {multiple}")


def set_tokenizer_size(resolved: ResolvedConfig, size: int) -> None:
    """Tell the configuration how many ids the tokenizer has, before the model is built.

    Fills vocab_size and padded_vocab_size where no flag, preset or folder did; raises ModelLinkError when the
    embedding that was asked for, or that the weights have, is too small for the tokenizer.
    """
    model = resolved.config.model
    fixed = model.padded_vocab_size or 0
    by_flag = resolved.origins["model.vocab_size"].startswith("flag") and not _is_given(
        resolved, "model.padded_vocab_size"
    )
    if fixed >= size:
        if model.vocab_size is not None and model.vocab_size < size:
            # tokens that were added to the tokenizer take rows that padded the embedding
            resolved.set("model.vocab_size", size, "tokenizer")
        return
    if fixed and not by_flag:
        origin = resolved.origins[
            "model.padded_vocab_size" if _is_given(resolved, "model.padded_vocab_size") else "model.vocab_size"
        ]
        raise ModelLinkError(
            f"the tokenizer has {size} ids but the embedding only {fixed} rows ({origin}): use the tokenizer that "
            "belongs to these "
            f"weights, or give --padded-vocab-size {size} or more for a model that starts from random weights."
        )
    resolved.set("model.vocab_size", size, "tokenizer")
    pad_vocabulary(resolved)


def _is_given(resolved: ResolvedConfig, path: str) -> bool:
    origin = resolved.origins[path]
    return origin != "default" and not origin.startswith("derived")


def dump_config(resolved: ResolvedConfig) -> str:
    """The configuration as YAML text, each value with its origin as a comment; `--config` reads it back."""
    return dump(resolved)
