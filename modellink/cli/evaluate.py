"""`modellink evaluate` and `evaluation.py`: score a model on benchmark tasks."""

from __future__ import annotations

import os
from collections.abc import Sequence

from modellink.config.load import load_config


def run(argv: Sequence[str]) -> int:
    """Load the model, run every --task, write results.json and samples.jsonl to --save-dir."""
    config = load_config(argv, "evaluate").config
    from modellink.errors import ModelLinkError
    from modellink.evaluate.task import builtin_tasks

    options = config.evaluate
    known = builtin_tasks()
    if not options.task:
        raise ModelLinkError(f"no task was named: give --task with one or more of {', '.join(known.names())}.")
    for name in options.task:
        known.get(name)  # a misspelt name fails before the model is loaded, on every rank
    if int(os.environ.get("RANK", "0")):
        return 0  # one process evaluates
    from rich.console import Console

    from modellink.evaluate.harness import Format, evaluate
    from modellink.infer.run import open_model

    model = open_model(config)
    template = config.data.prompt_type
    has_own = bool(getattr(model.tokenizer, "chat_template", None))
    own = config.generate.hf_chat_template or (not template and has_own and options.chat_template)
    evaluate(
        model,
        options.task,
        model_path=config.checkpoint.load or config.checkpoint.pretrained_checkpoint or "",
        save_dir=options.save_dir,
        data_paths=options.task_data_path or (),
        style=Format(template, own),
        batch_size=options.evaluation_batch_size,
        limit=options.max_eval_samples,
        seed=config.train.seed,
        console=Console(),
    )
    return 0
