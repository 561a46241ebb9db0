"""`modellink chat`: a conversation in the terminal, or one piped in line by line."""

from __future__ import annotations

import os
from collections.abc import Sequence

from modellink.config.load import load_config


def run(argv: Sequence[str]) -> int:
    """Load the model, then talk until the user leaves."""
    config = load_config(argv, "chat").config
    if int(os.environ.get("RANK", "0")):
        return 0  # one process decodes
    from modellink.infer.run import open_model, talk

    talk(open_model(config), config)
    return 0
