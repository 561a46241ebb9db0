"""`modellink train`, `pretrain_gpt.py` and `trainer.py`."""

from __future__ import annotations

from collections.abc import Sequence

from modellink.config.load import load_config


def run(argv: Sequence[str]) -> int:
    """Resolve the configuration, then train."""
    resolved = load_config(argv, "train")
    from modellink.train.trainer import train

    return train(resolved)
