"""ModelLink: train, fine-tune, convert, evaluate and chat with large language models on PyTorch's own engine.

Importing this package costs nothing: each name below is loaded, and torch with it, when it is first used (PEP 562).
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from modellink import compat as compat
    from modellink import data as data
    from modellink.checkpoint.convert import convert as convert
    from modellink.infer.model import GPTModel as GPTModel

__version__ = "0.1.0"

_LAZY = {
    "GPTModel": ("modellink.infer.model", "GPTModel"),
    "compat": ("modellink.compat", None),
    "convert": ("modellink.checkpoint.convert", "convert"),
    "data": ("modellink.data", None),
}
__all__ = ["GPTModel", "__version__", "compat", "convert", "data"]


def __getattr__(name: str) -> Any:
    if name not in _LAZY:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    module_name, attribute = _LAZY[name]
    module = importlib.import_module(module_name)
    return module if attribute is None else getattr(module, attribute)


def __dir__() -> list[str]:
    return sorted({*globals(), *_LAZY})
