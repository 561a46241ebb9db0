"""Data: Megatron ``.bin/.idx`` files, the datasets over them, tokenizers, preprocessing and the batch loader.

Names are loaded on first use, so importing this package costs neither torch nor numpy.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from modellink.data.blend import BlendedDataset, build_datasets
    from modellink.data.gpt import GPTDataset
    from modellink.data.indexed import IndexedDataset, IndexedDatasetWriter
    from modellink.data.loader import BatchLoader
    from modellink.data.mock import MockDataset
    from modellink.data.tokenizer import build_tokenizer

_HOME = {
    "IndexedDataset": "indexed",
    "IndexedDatasetWriter": "indexed",
    "GPTDataset": "gpt",
    "BlendedDataset": "blend",
    "build_datasets": "blend",
    "MockDataset": "mock",
    "BatchLoader": "loader",
    "build_tokenizer": "tokenizer",
}

__all__ = [
    "BatchLoader",
    "BlendedDataset",
    "GPTDataset",
    "IndexedDataset",
    "IndexedDatasetWriter",
    "MockDataset",
    "build_datasets",
    "build_tokenizer",
]


def __getattr__(name: str) -> Any:
    if name not in _HOME:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(importlib.import_module(f"{__name__}.{_HOME[name]}"), name)
