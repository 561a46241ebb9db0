"""The configuration as text: YAML that `--config` reads back, with origins, and the summary of `--print-config`."""

from __future__ import annotations

import dataclasses
import json
from typing import Any

from modellink.config.flags import PROGRAM_SECTIONS
from modellink.config.resolved import ResolvedConfig
from modellink.models.count import count_parameters


def _scalar(value: Any) -> str:
    """JSON is YAML, except that YAML 1.1 takes 1e-05 for text: exponents need a point."""
    if isinstance(value, float):
        text = repr(value)
        return text.replace("e", ".0e") if "e" in text and "." not in text else text
    return json.dumps(value, ensure_ascii=False)


def dump(resolved: ResolvedConfig) -> str:
    """Every section of the program as YAML; each line ends with the origin of its value."""
    lines: list[str] = []
    for section in PROGRAM_SECTIONS[resolved.program]:
        part = getattr(resolved.config, section)
        lines.append(f"{section}:")
        for option in dataclasses.fields(part):
            text = f"  {option.name}: {_scalar(getattr(part, option.name))}"
            lines.append(f"{text:<56}  # {resolved.origins[f'{section}.{option.name}']}")
    return "\n".join(lines) + "\n"


def describe(resolved: ResolvedConfig) -> str:
    """What --print-config prints: the YAML and, as comments, parameter count and layout."""
    model, parallel, train = resolved.config.model, resolved.config.parallel, resolved.config.train
    count = count_parameters(model)
    known = model.padded_vocab_size or model.vocab_size
    note = "" if known else " without the vocabulary, whose size comes from the tokenizer"
    lines = [
        f"# parameters: {count} ({count / 1e6:,.1f} million){note}",
        f"# world size: {resolved.world_size} = tensor {parallel.tensor_parallel} x pipeline "
        f"{parallel.pipeline_parallel}"
        f" x context {parallel.context_parallel} x data {resolved.data_parallel}",
        f"# data-parallel size: {resolved.data_parallel}",
    ]
    if train.micro_batch_size and train.global_batch_size:
        lines.append(
            f"# micro-batches per step: {train.global_batch_size // (train.micro_batch_size * resolved.data_parallel)}"
        )
    return dump(resolved) + "\n".join(lines)
