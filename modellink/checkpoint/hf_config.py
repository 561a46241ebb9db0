"""config.json of a Hugging Face folder: which family it is, its ModelConfig, and what else must survive a round trip.

The file is read by the family's own row (models/families), so nothing here knows an architecture. Nothing here imports
torch.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from modellink.config.schema import ModelConfig
from modellink.errors import ModelLinkError
from modellink.models.families import FAMILIES, Family
from modellink.models.families.family import all_families
from modellink.models.families.spelling import COSMETIC_KEYS, TOKEN_KEYS, words
from modellink.registry import suggest

CONFIG_NAME = "config.json"
# written afresh on export, or true only of the software that wrote the source
_NOT_CARRIED = words(
    """architectures model_type torch_dtype dtype transformers_version
    _name_or_path name_or_path _commit_hash"""
)


def is_hf_folder(path: str | Path) -> bool:
    """Whether `path` is a folder with a Hugging Face config.json (says nothing about its weights)."""
    try:
        content = _read_json(Path(path) / CONFIG_NAME)
    except ModelLinkError:
        return False
    return "model_type" in content or "architectures" in content


def family_of(folder: str | Path) -> str:
    """Name of the family of a Hugging Face folder, from `architectures`, else from `model_type`."""
    path = Path(folder) / CONFIG_NAME
    return _family(_read_json(path), path)[0].name


def read_config(folder: str | Path) -> ModelConfig:
    """The ModelConfig of a Hugging Face folder, sizes derived, padded vocabulary left open (it depends on the layout).

    Raises ModelLinkError naming file, key and value where a key that matters is missing, unknown or not implemented.
    """
    path = Path(folder) / CONFIG_NAME
    family, content = _family(_read_json(path), path)
    return family.read(content, str(path))


def read_extras(folder: str | Path) -> dict[str, Any]:
    """The keys of config.json that no ModelConfig field holds and an export repeats (token ids, auto_map, ...)."""
    content = _read_json(Path(folder) / CONFIG_NAME)
    return {key: value for key, value in content.items() if key in COSMETIC_KEYS - _NOT_CARRIED}


def write_config(config: ModelConfig, extras: dict[str, Any], dtype: str) -> dict[str, Any]:
    """Content of a config.json for `config`; raises ModelLinkError when the family of `config` cannot express it."""
    content = FAMILIES.get(config.family).write(config)
    return content | {"initializer_range": config.init_std, "use_cache": True} | extras | {"torch_dtype": dtype}


def token_ids(extras: dict[str, Any]) -> dict[str, Any]:
    """The known token ids among `extras`, which generation_config.json repeats."""
    return {key: value for key, value in extras.items() if key in TOKEN_KEYS and value is not None}


def _read_json(path: Path) -> dict[str, Any]:
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise ModelLinkError(
            f"{path} does not exist; a Hugging Face folder holds config.json beside its weights."
        ) from None
    except NotADirectoryError:
        raise ModelLinkError(f"{path.parent} is a file, not a Hugging Face folder.") from None
    except (UnicodeDecodeError, json.JSONDecodeError) as error:
        raise ModelLinkError(f"{path} is not valid JSON ({error}); fetch the file again.") from None
    if not isinstance(content, dict):
        raise ModelLinkError(f"{path} holds {type(content).__name__}, not an object; fetch the file again.")
    return content


def _family(content: dict[str, Any], path: Path) -> tuple[Family, dict[str, Any]]:
    """The family's row, and the part of the content that is meant for it."""
    architectures = content.get("architectures") or []
    model_type = content.get("model_type")
    rows = all_families()
    for row in rows:
        if set(row.architectures) & set(architectures) or (not architectures and row.model_type == model_type):
            return row, content
        if set(row.wrappers) & set(architectures):
            return row, _text_part(content, path)
    known = [row.architecture for row in rows]
    name = architectures[0] if architectures else model_type
    raise ModelLinkError(
        f"{path}: the architecture {name!r} is not supported.{suggest(str(name), known)} Supported: {', '.join(known)}."
    )


def _text_part(content: dict[str, Any], path: Path) -> dict[str, Any]:
    """text_config, with what the file says outside of it about all parts."""
    text = content.get("text_config")
    if not isinstance(text, dict):
        raise ModelLinkError(f"{path}: text_config = {text!r} should be an object; fetch the file again.")
    outside = ("quantization_config", "tie_word_embeddings")
    return {name: content[name] for name in outside if name in content} | text
