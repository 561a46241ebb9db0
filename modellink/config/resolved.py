"""A configuration with the origin of each value."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

from modellink.config.schema import Config


@dataclass
class ResolvedConfig:
    """A checked configuration: values, where each came from (`origins["section.field"]`), and the number of
    processes.
    """

    config: Config
    origins: dict[str, str]
    program: str = "train"
    world_size: int = 1
    warnings: list[str] = field(default_factory=list)

    @property
    def data_parallel(self) -> int:
        """Devices that see different samples: world / (tensor x pipeline x context)."""
        parallel = self.config.parallel
        return self.world_size // (parallel.tensor_parallel * parallel.pipeline_parallel * parallel.context_parallel)

    def get(self, path: str) -> Any:
        """Value of "section.field"."""
        section, name = path.split(".")
        return getattr(getattr(self.config, section), name)

    def set(self, path: str, value: Any, origin: str) -> None:
        """Store a value and where it came from."""
        section, name = path.split(".")
        setattr(getattr(self.config, section), name, value)
        self.origins[path] = origin

    def is_default(self, path: str) -> bool:
        return self.origins[path] == "default"
