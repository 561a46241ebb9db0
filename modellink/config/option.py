"""How an option is declared: a dataclass field with its help, choices and programs."""

from __future__ import annotations

import dataclasses
from dataclasses import field
from typing import Any


def option(
    default: Any = dataclasses.MISSING, *, help: str, choices: tuple[Any, ...] | None = None, **extra: Any
) -> Any:
    """Declare one option. Lists get a fresh copy per instance. `programs` in `extra` limits the programs that have
    it.
    """
    metadata = {"help": help, "choices": choices, **extra}
    if isinstance(default, list):
        return field(default_factory=lambda: list(default), metadata=metadata)
    if default is dataclasses.MISSING:
        return field(metadata=metadata)
    return field(default=default, metadata=metadata)
