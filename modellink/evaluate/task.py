"""A benchmark task is data: a YAML row says where items lie, how one becomes a prompt, and how an answer is scored.

    name, version, description
    data          file beside the YAML, or with --task-data-path a name (or glob) below that folder; .jsonl, .json, .csv
    columns       names of the columns of a .csv without a header
    prompt        text with {column} places; target: the right answer, likewise
    choices       column with the list of possible answers, or a list of texts with {column} places
    few_shot      number of solved examples before the question, from few_shot_data (default: the items themselves)
    answer_prefix what stands between a question and its answer when no chat template is used
    metrics       acc (the right choice is likeliest), acc_norm (per byte), exact_match (the generated answer)
    extract       regular expression whose first group is the answer in the generated text; default: all of it
    generation    max_new_tokens, stop

A new benchmark is such a file; nothing else changes.
"""

from __future__ import annotations

import csv
import json
from dataclasses import dataclass, field
from importlib import resources
from pathlib import Path
from typing import Any

import yaml

from modellink.errors import ModelLinkError
from modellink.registry import Registry

METRICS = ("acc", "acc_norm", "exact_match")
Item = dict[str, Any]


@dataclass(frozen=True)
class Task:
    """One row; see the module's text for the fields."""

    name: str
    version: int
    description: str
    data: str
    prompt: str
    target: str
    metrics: list[str]
    choices: str | list[str] | None = None
    columns: list[str] | None = None
    few_shot: int = 0
    few_shot_data: str | None = None
    answer_prefix: str = "\n"
    extract: str | None = None
    generation: dict[str, Any] = field(default_factory=dict)

    def question(self, item: Item) -> str:
        return self.prompt.format_map(item)

    def answer(self, item: Item) -> str:
        return self.target.format_map(item)

    def options(self, item: Item) -> list[str]:
        """The possible answers of an item, as text."""
        if isinstance(self.choices, str):
            return [str(choice) for choice in item[self.choices]]
        return [choice.format_map(item) for choice in self.choices or []]

    def examples(self, items: list[Item], item: Item) -> list[Item]:
        """The solved examples for `item`: the first ones that are not itself."""
        return [other for other in items if other is not item][: self.few_shot]


def read_task(text: str, where: str) -> Task:
    """A Task from YAML text; raises ModelLinkError naming `where` for unknown or missing fields."""
    content = yaml.safe_load(text)
    try:
        task = Task(**content)
    except TypeError as error:
        raise ModelLinkError(f"{where} is no task: {error}; see the fields in modellink/evaluate/task.py.") from error
    unknown = [metric for metric in task.metrics if metric not in METRICS]
    if unknown or not task.metrics:
        raise ModelLinkError(f"{where} has the metrics {task.metrics}: use some of {', '.join(METRICS)}.")
    if task.choices is None and set(task.metrics) != {"exact_match"}:
        raise ModelLinkError(f"{where} scores choices but names none: add `choices`, or use exact_match alone.")
    return task


def builtin_tasks() -> Registry[Task]:
    """The tasks that come with the package."""
    registry: Registry[Task] = Registry("task")
    for file in sorted(resources.files(__package__).joinpath("tasks").iterdir(), key=lambda f: f.name):
        if file.name.endswith(".yaml"):
            task = read_task(file.read_text(encoding="utf-8"), file.name)
            registry.add(task.name, task)
    return registry


def load_items(task: Task, data_path: str | None = None, source: str | None = None) -> list[tuple[str, Item]]:
    """(subject, item) pairs of a task; the subject is the file's name. `source` overrides which file or glob is read.

    `data_path` is a file, or a folder in which `task.data` is looked up; without it the data comes with the package.
    """
    wanted = source or task.data
    if data_path is None:
        return [(task.name, item) for item in _parse(_packaged(task, wanted), wanted, task.columns)]
    path = Path(data_path)
    files = [path] if path.is_file() else sorted(path.glob(wanted)) or sorted(path.glob(Path(wanted).name))
    if not files:
        raise ModelLinkError(
            f"task {task.name} finds no {wanted} in {path}: give --task-data-path the folder that holds it."
        )
    items = []
    for file in files:
        items += [(file.stem, item) for item in _parse(file.read_text(encoding="utf-8"), str(file), task.columns)]
    return items


def _packaged(task: Task, name: str) -> str:
    file = resources.files(__package__).joinpath("tasks", name)
    if not file.is_file():
        raise ModelLinkError(
            f"the data of task {task.name} does not come with the package: give --task-data-path FOLDER."
        )
    return file.read_text(encoding="utf-8")


def _parse(text: str, name: str, columns: list[str] | None) -> list[Item]:
    try:
        if name.endswith(".jsonl"):
            return [json.loads(line) for line in text.splitlines() if line.strip()]
        if name.endswith(".json"):
            content = json.loads(text)
            return content if isinstance(content, list) else content["examples"]
        return list(csv.DictReader(text.splitlines(keepends=True), fieldnames=columns))
    except (ValueError, KeyError) as error:
        raise ModelLinkError(f"{name} cannot be read as items ({error}): expected .jsonl, .json or .csv.") from error
