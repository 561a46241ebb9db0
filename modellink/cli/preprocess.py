"""`modellink preprocess` and `preprocess_data.py`."""

from __future__ import annotations

from collections.abc import Sequence

from modellink.config.load import load_section


def run(argv: Sequence[str]) -> int:
    """Read the options, then convert or merge."""
    config = load_section(argv, "preprocess")
    from modellink.data.preprocess import preprocess

    preprocess(config)
    return 0
