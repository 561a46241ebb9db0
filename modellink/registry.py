"""One registry: name -> factory. Unknown names raise with the nearest suggestions."""

from __future__ import annotations

import difflib
from collections.abc import Callable, Iterable, Iterator
from typing import Generic, TypeVar

from modellink.errors import ModelLinkError

T = TypeVar("T")


def suggest(name: str, known: Iterable[str], count: int = 3) -> str:
    """Return " Did you mean 'a' or 'b'?" for the names nearest to `name`, or "" when nothing is near."""
    near = difflib.get_close_matches(name, list(known), n=count, cutoff=0.5)
    return f" Did you mean {' or '.join(repr(n) for n in near)}?" if near else ""


class Registry(Generic[T]):
    """A named collection of things of one kind, such as families, handlers, templates or tasks.

    `kind` is the word used in error messages ("template"). Entries keep their order of registration.
    """

    def __init__(self, kind: str) -> None:
        self.kind = kind
        self._entries: dict[str, T] = {}

    def add(self, name: str, entry: T, *aliases: str) -> T:
        """Register `entry` under `name` and `aliases`; a name taken twice is a programming error."""
        for key in (name, *aliases):
            assert key not in self._entries, f"{self.kind} {key!r} is registered twice"
            self._entries[key] = entry
        return entry

    def register(self, name: str, *aliases: str) -> Callable[[T], T]:
        """Decorator form of `add`."""
        return lambda entry: self.add(name, entry, *aliases)

    def get(self, name: str) -> T:
        """Return the entry called `name`; raises ModelLinkError naming the nearest ones when there is none."""
        if name not in self._entries:
            raise ModelLinkError(
                f"unknown {self.kind} {name!r}.{suggest(name, self._entries)} "
                f"Known: {', '.join(sorted(self._entries))}."
            )
        return self._entries[name]

    def names(self) -> list[str]:
        return list(self._entries)

    def __contains__(self, name: object) -> bool:
        return name in self._entries

    def __iter__(self) -> Iterator[str]:
        return iter(self._entries)
