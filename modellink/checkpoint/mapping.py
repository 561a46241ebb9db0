"""Names of tensors in a family's Hugging Face files, both ways from the one table of its row.

A row maps module names (`layers.{}.self_attn.q_proj`); a parameter keeps its last part (`.weight`, `.bias`). The layer
number is the only thing that varies, so a name is looked up, never searched for.
"""

from __future__ import annotations

import re
from collections.abc import Mapping

from modellink.models.families import Family

_NUMBER = re.compile(r"(?<=\.)\d+(?=\.)")


def to_hf(family: Family, name: str) -> str:
    """Hugging Face name of the parameter whose canonical name is `name`; KeyError if the family has no such module."""
    return _translate(name, family.names)


def to_canonical(family: Family, name: str) -> str | None:
    """Canonical name of the Hugging Face tensor `name`, or None when the family's table does not know it."""
    try:
        return _translate(name, {theirs: ours for ours, theirs in family.names.items()})
    except KeyError:
        return None


def is_ignored(family: Family, name: str) -> bool:
    """Whether the tensor `name` holds nothing learned (rotary tables that old files carry)."""
    return name.endswith(family.ignored_tensors)


def _translate(name: str, table: Mapping[str, str]) -> str:
    module, _, last = name.rpartition(".")
    number = _NUMBER.search(module + ".")
    pattern = _NUMBER.sub("{}", module + ".", count=1)[:-1]
    return f"{table[pattern].format(number.group() if number else '')}.{last}"
