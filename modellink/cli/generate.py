"""`modellink generate` and `inference.py`: prompts from the command line or a file, and the demo tasks."""

from __future__ import annotations

import os
from collections.abc import Sequence

from modellink.config.load import load_config


def run(argv: Sequence[str]) -> int:
    """Answer --prompt, or the file --input, or run the demonstrations (--task; all if none is given)."""
    config = load_config(argv, "generate").config
    if int(os.environ.get("RANK", "0")):
        return 0  # one process decodes
    from rich.console import Console

    from modellink.infer import run as jobs

    console = Console(soft_wrap=True)
    model = jobs.open_model(config)
    options = config.generate
    if options.prompt:
        jobs.answer_prompts(model, config, options.prompt, console)
    if options.input:
        jobs.answer_file(model, config, options.input, options.output, console)
    if options.task or not (options.prompt or options.input):
        jobs.demonstrate(model, config, options.task or jobs.DEMOS.names(), console)
    return 0
