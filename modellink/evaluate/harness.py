"""Runs tasks on a model and writes what came out: `results.json` (figures) and `samples.jsonl` (every item).

Scoring is deterministic: items keep their order, generation is greedy, and neither depends on the batch size but
through rounding.
"""

from __future__ import annotations

import hashlib
import json
import math
import os
import re
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn
from rich.table import Table

import modellink
from modellink.data.templates import get_template
from modellink.errors import ModelLinkError
from modellink.evaluate.score import Request, log_likelihoods
from modellink.evaluate.task import Item, Task, builtin_tasks, load_items
from modellink.files import atomic_write
from modellink.infer.model import GPTModel


@dataclass(frozen=True)
class Format:
    """How questions are put: by a named template, by the tokenizer's own chat template, or as plain text (neither)."""

    template: str | None = None
    own: bool = False


@dataclass
class Outcome:
    """One task's result: a sample per item with its metrics (0 or 1), subject by subject."""

    task: Task
    samples: list[dict[str, Any]] = field(default_factory=list)

    def metric(self, name: str, subject: str | None = None) -> dict[str, float | int]:
        """Mean, its standard error, and the number of items."""
        values = [s["metrics"][name] for s in self.samples if subject in (None, s["subject"])]
        mean = sum(values) / len(values)
        error = math.sqrt(mean * (1 - mean) / (len(values) - 1)) if len(values) > 1 else 0.0
        return {"value": mean, "stderr": error, "n": len(values)}

    def subjects(self) -> list[str]:
        return list(dict.fromkeys(s["subject"] for s in self.samples))


def run_task(
    model: GPTModel,
    task: Task,
    style: Format,
    data_path: str | None = None,
    batch_size: int = 1,
    limit: int | None = None,
    progress: Progress | None = None,
) -> Outcome:
    """Score `task`; `limit` items of each subject at most. Raises ModelLinkError when data or tokenizer are missing."""
    if model.tokenizer is None:
        raise ModelLinkError(
            "evaluation needs a tokenizer: put it beside the weights or give --tokenizer-name-or-path."
        )
    items = _limited(load_items(task, data_path), limit)
    solved = load_items(task, data_path, task.few_shot_data) if task.few_shot_data else items
    pool = [item for _, item in solved]
    outcome = Outcome(task)
    conversations = []
    for number, (subject, item) in enumerate(items):
        messages = _messages(task, task.examples(pool, item), item)
        conversations.append(messages)
        outcome.samples.append(
            {
                "task": task.name,
                "subject": subject,
                "id": number,
                "question": messages[-1]["content"],
                "target": task.answer(item),
                "metrics": {},
            }
        )
    bar = progress.add_task(task.name, total=None) if progress is not None else None
    if {"acc", "acc_norm"} & set(task.metrics):
        _score_choices(
            model, task, style, conversations, [item for _, item in items], outcome, batch_size, progress, bar
        )
    if "exact_match" in task.metrics:
        _score_answers(model, task, style, conversations, outcome, batch_size, progress, bar)
    return outcome


def _limited(items: list[tuple[str, Item]], limit: int | None) -> list[tuple[str, Item]]:
    taken: dict[str, int] = {}
    kept = []
    for subject, item in items:
        taken[subject] = taken.get(subject, 0) + 1
        if limit is None or taken[subject] <= limit:
            kept.append((subject, item))
    return kept


def _messages(task: Task, examples: Sequence[Item], item: Item) -> list[dict[str, str]]:
    messages = []
    for example in examples:
        messages.append({"role": "user", "content": task.question(example)})
        messages.append({"role": "assistant", "content": task.answer(example)})
    return [*messages, {"role": "user", "content": task.question(item)}]


def _plain(task: Task, messages: list[dict[str, str]]) -> str:
    """A conversation as plain text that ends where the answer begins."""
    parts = [m["content"] + (task.answer_prefix if m["role"] == "user" else "\n\n") for m in messages]
    return "".join(parts)


def _context(model: GPTModel, task: Task, style: Format, messages: list[dict[str, str]]) -> tuple[list[int], Any]:
    """(token ids before the answer, tokenizer for the answer)."""
    from modellink.infer.prompts import build_prompts

    row = get_template(style.template) if style.template else None
    tokenizer = model.tokenizer_for(row)
    prompt: Any = messages if row or style.own else _plain(task, messages)
    return build_prompts(prompt, tokenizer, row, style.own).ids[0], tokenizer


def _score_choices(
    model: GPTModel,
    task: Task,
    style: Format,
    conversations: list[list[dict[str, str]]],
    items: list[Item],
    outcome: Outcome,
    batch_size: int,
    progress: Progress | None,
    bar: Any,
) -> None:
    """acc and acc_norm: the likeliest of the choices, in total or per byte, is the right one."""
    requests, owners = [], []
    for sample, messages, item in zip(outcome.samples, conversations, items, strict=True):
        context, tokenizer = _context(model, task, style, messages)
        sample["choices"] = task.options(item)
        if sample["target"] not in sample["choices"]:
            raise ModelLinkError(f"task {task.name}, item {sample['id']}: the target is none of the choices.")
        sample["log_likelihoods"] = []
        for choice in sample["choices"]:
            requests.append(Request(context, tokenizer.encode(choice, add_special_tokens=False)))
            owners.append(sample)
    if progress is not None:
        progress.update(bar, description=f"{task.name}: choices", total=len(requests), completed=0)
    scores = log_likelihoods(
        model, requests, batch_size, lambda done: progress.advance(bar, done) if progress is not None else None
    )
    for sample, score in zip(owners, scores, strict=True):
        sample["log_likelihoods"].append(score)
    for sample in outcome.samples:
        raw = sample["log_likelihoods"]
        per_byte = [score / len(choice.encode()) for score, choice in zip(raw, sample["choices"], strict=True)]
        for metric, values in (("acc", raw), ("acc_norm", per_byte)):
            if metric in task.metrics:
                best = sample["choices"][values.index(max(values))]
                sample["metrics"][metric] = int(best == sample["target"])


def _score_answers(
    model: GPTModel,
    task: Task,
    style: Format,
    conversations: list[list[dict[str, str]]],
    outcome: Outcome,
    batch_size: int,
    progress: Progress | None,
    bar: Any,
) -> None:
    """exact_match: the greedy answer, or what `extract` finds in it, is the target."""
    if progress is not None:
        progress.update(bar, description=f"{task.name}: answers", total=len(conversations), completed=0)
    for start in range(0, len(conversations), batch_size):
        batch = [_context(model, task, style, m)[0] for m in conversations[start : start + batch_size]]
        answers = model.generate(batch, template=style.template, **({"max_new_tokens": 128} | task.generation))
        for sample, answer in zip(outcome.samples[start : start + batch_size], answers, strict=True):
            found = re.search(task.extract, answer) if task.extract else None
            given = (found[1] if found else "") if task.extract else answer
            sample["answer"], sample["extracted"] = answer, given.strip()
            sample["metrics"]["exact_match"] = int(given.strip() == sample["target"].strip())
        if progress is not None:
            progress.advance(bar, len(batch))


def model_version(path: str | Path) -> str:
    """16 hex digits that change when the model's files do: SHA-256 over names, sizes, and both ends of every weight
    file.
    """
    digest = hashlib.sha256()
    folder = Path(path)
    for file in sorted(
        f for f in folder.rglob("*") if f.is_file() and f.suffix in (".safetensors", ".bin", ".distcp", ".json")
    ):
        size = file.stat().st_size
        digest.update(f"{file.relative_to(folder)}:{size}".encode())
        with open(file, "rb") as handle:
            digest.update(handle.read(1 << 20))
            handle.seek(max(0, size - (1 << 20)))
            digest.update(handle.read())
    return digest.hexdigest()[:16]


def report(outcomes: Sequence[Outcome]) -> Table:
    """The table a user sees: one line per task, subject and metric."""
    table = Table(title="evaluation")
    for column in ("task", "subject", "metric", "value", "stderr", "n"):
        table.add_column(column, justify="left" if column in ("task", "subject", "metric") else "right")
    for outcome in outcomes:
        subjects: list[str | None] = [*outcome.subjects(), None]
        for subject in subjects if len(subjects) > 2 else [None]:
            for name in outcome.task.metrics:
                figures = outcome.metric(name, subject)
                shown = (f"{figures['value']:.4f}", f"{figures['stderr']:.4f}", str(figures["n"]))
                table.add_row(outcome.task.name, subject or "total", name, *shown)
    return table


def _assign_paths(tasks: Sequence[Task], data_paths: Sequence[str]) -> dict[str, str]:
    """Task name -> the folder or file with its data."""
    assigned: dict[str, str] = {}
    for path in map(str, data_paths):
        names = [task.name for task in tasks if task.name in path] or [task.name for task in tasks if len(tasks) == 1]
        if not names:
            raise ModelLinkError(
                f"--task-data-path {path} belongs to none of the tasks {', '.join(task.name for task in tasks)}: a "
                "path of several must contain its task's name."
            )
        assigned |= dict.fromkeys(names, path)
    return assigned


def evaluate(
    model: GPTModel,
    tasks: Sequence[str],
    *,
    model_path: str = "",
    save_dir: str | os.PathLike[str] | None = None,
    data_paths: Sequence[str] = (),
    style: Format | None = None,
    batch_size: int = 1,
    limit: int | None = None,
    seed: int = 1234,
    console: Console | None = None,
) -> dict[str, Any]:
    """Run `tasks` (names) and return the content of results.json; write it and samples.jsonl to `save_dir` when
    given.

    A task's data is the last of `data_paths` whose path contains its name (a single task takes any path), else what
    comes with the package. Unknown names, with the nearest ones, and paths of no task raise ModelLinkError before
    anything runs.
    """
    known = builtin_tasks()
    rows = [known.get(name) for name in tasks]
    if not rows:
        raise ModelLinkError(f"no task was named: give --task with one or more of {', '.join(known.names())}.")
    paths = _assign_paths(rows, data_paths)
    console = console or Console(quiet=True)
    outcomes = []
    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn())
    with Progress(*columns, console=console) as progress:
        for task in rows:
            outcomes.append(run_task(model, task, style or Format(), paths.get(task.name), batch_size, limit, progress))
    console.print(report(outcomes))
    results = {
        "model": model_path,
        "model_version": model_version(model_path) if model_path else None,
        "modellink_version": modellink.__version__,
        "seed": seed,
        "format": {"template": (style or Format()).template, "own_chat_template": (style or Format()).own},
        "tasks": {
            outcome.task.name: {
                "version": outcome.task.version,
                "n": len(outcome.samples),
                "few_shot": outcome.task.few_shot,
                "metrics": {name: outcome.metric(name) for name in outcome.task.metrics},
                "subjects": {
                    subject: {name: outcome.metric(name, subject) for name in outcome.task.metrics}
                    for subject in outcome.subjects()
                },
            }
            for outcome in outcomes
        },
    }
    if save_dir is not None:
        samples = [json.dumps(sample, ensure_ascii=False) for outcome in outcomes for sample in outcome.samples]
        atomic_write(Path(save_dir) / "samples.jsonl", "\n".join(samples) + "\n")
        atomic_write(Path(save_dir) / "results.json", json.dumps(results, indent=2, ensure_ascii=False) + "\n")
        console.print(f"written: {Path(save_dir) / 'results.json'}, samples.jsonl", markup=False, highlight=False)
    return results
