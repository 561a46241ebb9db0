"""Options from a YAML file."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

import yaml

from modellink.config.flags import Given, parse_mapping
from modellink.errors import ModelLinkError


def read_yaml(path: str, program: str, word: str = "--config") -> list[Given]:
    """Options of a YAML file; a missing file, broken YAML and unknown keys raise ModelLinkError naming the file.

    `word` stands before its name in messages.
    """
    try:
        content = yaml.safe_load(Path(path).read_text(encoding="utf-8"))
    except OSError as error:
        raise ModelLinkError(f"{word} {path} cannot be read: {error.strerror}.") from error
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise ModelLinkError(f"{word} {path} is not valid YAML: {' '.join(str(error).split())}.") from error
    if not isinstance(content, Mapping):
        raise ModelLinkError(f"{word} {path} must be a mapping of option names to values.")
    return parse_mapping(content, program, Path(path).name)
