"""Scoring against `transformers`, the harness end to end, and the text that is on every machine."""

from __future__ import annotations

import dataclasses
import json
import math
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers

from modellink.cli.main import main
from modellink.data import python_docs
from modellink.errors import ModelLinkError
from modellink.evaluate import harness
from modellink.evaluate.harness import Format, evaluate, run_task
from modellink.evaluate.score import Request, log_likelihoods
from modellink.evaluate.task import builtin_tasks, load_items, read_task
from modellink.infer.model import GPTModel

TASK = """
name: colours
version: 3
description: test
data: "*.jsonl"
prompt: "Colour of {thing}?"
target: "{colour}"
choices: ["red", "blue", "green"]
metrics: [acc, acc_norm, exact_match]
generation: {max_new_tokens: 4}
"""


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A Hugging Face folder of a tiny random model whose tokenizer has one token per byte."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers

    path = tmp_path_factory.mktemp("hf")
    letters = sorted(pre_tokenizers.ByteLevel.alphabet())
    raw = Tokenizer(models.BPE(vocab={"<s>": 0, "</s>": 1} | {c: i + 2 for i, c in enumerate(letters)}, merges=[]))
    raw.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    raw.decoder = decoders.ByteLevel()
    transformers.PreTrainedTokenizerFast(
        tokenizer_object=raw, bos_token="<s>", eos_token="</s>", clean_up_tokenization_spaces=False
    ).save_pretrained(path)
    torch.manual_seed(0)
    config = transformers.LlamaConfig(
        vocab_size=258,
        hidden_size=32,
        intermediate_size=64,
        num_hidden_layers=2,
        num_attention_heads=4,
        max_position_embeddings=512,
        initializer_range=0.3,
        bos_token_id=0,
        eos_token_id=1,
    )
    transformers.LlamaForCausalLM(config).float().save_pretrained(path)
    return path


@pytest.fixture(scope="module")
def model(folder: Path) -> GPTModel:
    return GPTModel.from_pretrained(folder, dtype="float32", device="cpu")


@pytest.mark.parametrize("batch_size", [1, 3])
def test_log_likelihoods_equal_transformers(folder: Path, model: GPTModel, batch_size: int) -> None:
    theirs = transformers.AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    generator = torch.Generator().manual_seed(1)
    requests = [
        Request(*(torch.randint(2, 258, (n,), generator=generator).tolist() for n in sizes))
        for sizes in ((5, 3), (1, 1), (17, 4), (2, 9), (8, 8))
    ]
    wanted = []
    for request in requests:
        tokens = torch.tensor([request.context + request.continuation])
        log_p = theirs(tokens).logits[0].detach().log_softmax(-1)
        first = len(request.context)
        wanted.append(sum(float(log_p[first + i - 1, t]) for i, t in enumerate(request.continuation)))
    found = log_likelihoods(model, requests, batch_size)
    assert all(math.isclose(a, b, rel_tol=1e-5, abs_tol=1e-4) for a, b in zip(found, wanted, strict=True))
    with pytest.raises(ModelLinkError, match="one token"):
        log_likelihoods(model, [Request([], [1])])


class Oracle(GPTModel):
    """Answers every question about colours with the first letters it was told."""

    def __init__(self, model: GPTModel, answers: dict[str, str]) -> None:
        super().__init__(model.decoder, model.tokenizer)
        self.answers = answers
        self.asked: list[str] = []

    def generate(self, prompt: Any, **options: Any) -> Any:
        texts = [self.tokenizer.decode(ids) for ids in prompt]
        self.asked += texts
        return [next(answer for key, answer in self.answers.items() if key in text) for text in texts]


@pytest.fixture
def data(tmp_path: Path) -> Path:
    rows = {
        "plants": [("rose", "red"), ("leaf", "green")],
        "sky": [("day", "blue"), ("dawn", "red"), ("night", "blue")],
    }
    for subject, items in rows.items():
        lines = [json.dumps({"thing": thing, "colour": colour}) for thing, colour in items]
        (tmp_path / f"{subject}.jsonl").write_text("\n".join(lines))
    return tmp_path


def test_harness_counts_right_answers_by_subject(model: GPTModel, data: Path) -> None:
    task = read_task(TASK.replace("exact_match]", "exact_match]\nextract: 'it is (\\w+)'"), "test")
    answers = {"rose": "it is red.", "leaf": "it is blue", "day": "it is blue", "dawn": "red", "night": "it is blue!"}
    oracle = Oracle(model, answers)
    outcome = run_task(oracle, task, Format(), str(data), batch_size=2)
    assert outcome.metric("exact_match") == {"value": 0.6, "stderr": math.sqrt(0.6 * 0.4 / 4), "n": 5}
    assert outcome.metric("exact_match", "plants")["value"] == 0.5
    assert [s["extracted"] for s in outcome.samples] == ["red", "blue", "blue", "", "blue"]
    assert oracle.asked[0] == "Colour of rose?\n"
    limited = run_task(oracle, task, Format(), str(data), limit=1)
    assert [s["subject"] for s in limited.samples] == ["plants", "sky"]


def test_choices_are_scored_by_likelihood(model: GPTModel, data: Path) -> None:
    task = read_task(TASK.replace(", exact_match]", "]"), "test")
    outcome = run_task(model, task, Format("default"), str(data), batch_size=4)
    again = run_task(model, task, Format("default"), str(data), batch_size=1)
    for sample, other in zip(outcome.samples, again.samples, strict=True):
        prompt = model.tokenizer.encode(f"Human: {sample['question']}\nAssistant:", add_special_tokens=False)
        for choice, score in zip(sample["choices"], sample["log_likelihoods"], strict=True):
            ids = prompt + model.tokenizer.encode(choice, add_special_tokens=False)
            log_p = model(torch.tensor([ids]))[0].detach().log_softmax(-1)
            wanted = sum(float(log_p[i - 1, ids[i]]) for i in range(len(prompt), len(ids)))
            assert math.isclose(score, wanted, rel_tol=1e-4)
        best = max(range(3), key=lambda i: sample["log_likelihoods"][i] / len(sample["choices"][i]))
        assert sample["metrics"]["acc_norm"] == int(sample["choices"][best] == sample["target"])
        assert sample["metrics"] == other["metrics"]


def test_few_shot_examples_come_first_and_leave_the_item_out(model: GPTModel, data: Path) -> None:
    task = read_task(TASK.replace("[acc, acc_norm, exact_match]", "[exact_match]") + "few_shot: 1\n", "test")
    oracle = Oracle(model, {"Colour": "red"})
    run_task(oracle, task, Format(), str(data))
    assert oracle.asked[0] == "Colour of leaf?\ngreen\n\nColour of rose?\n"
    assert oracle.asked[1] == "Colour of rose?\nred\n\nColour of leaf?\n"


def test_results_and_samples_are_written(folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    flags = ["evaluate", "--load", str(folder), "--task", "python_docs", "--max-eval-samples", "5"]
    flags += ["--evaluation-batch-size", "4", "--prompt-type", "default"]
    for name in ("a", "b"):
        assert main([*flags, "--save-dir", str(tmp_path / name)]) == 0
    shown = capsys.readouterr().out
    assert "exact_match" in shown and "python_docs" in shown
    results = json.loads((tmp_path / "a" / "results.json").read_text())
    task = results["tasks"]["python_docs"]
    assert (task["n"], task["version"], results["seed"]) == (5, 1, 1234)
    assert set(task["metrics"]) == {"acc", "acc_norm", "exact_match"}
    assert set(task["metrics"]["acc"]) == {"value", "stderr", "n"}
    assert len(results["model_version"]) == 16
    samples = [json.loads(line) for line in (tmp_path / "a" / "samples.jsonl").read_text().splitlines()]
    assert len(samples) == 5 and all(len(s["log_likelihoods"]) == 4 and "answer" in s for s in samples)
    for name in ("results.json", "samples.jsonl"):
        assert (tmp_path / "a" / name).read_bytes() == (tmp_path / "b" / name).read_bytes()


def test_unknown_tasks_are_suggested(folder: Path, model: GPTModel, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["evaluate", "--load", str(folder), "--task", "python_doc"]) == 2
    assert "'python_docs'" in capsys.readouterr().err
    with pytest.raises(ModelLinkError, match="python_docs"):
        evaluate(model, [])


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (("version: 3", "versoin: 3"), "versoin"),
        (("[acc, acc_norm, exact_match]", "[accuracy]"), "accuracy"),
        (('choices: ["red", "blue", "green"]\n', ""), "choices"),
    ],
)
def test_wrong_task_files_are_explained(change: tuple[str, str], words: str) -> None:
    with pytest.raises(ModelLinkError, match=words):
        read_task(TASK.replace(*change), "colours.yaml")


def test_missing_data_is_named(tmp_path: Path) -> None:
    task = read_task(TASK, "test")
    with pytest.raises(ModelLinkError, match="--task-data-path"):
        load_items(task, str(tmp_path))
    with pytest.raises(ModelLinkError, match="--task-data-path"):
        load_items(task)


def test_tables_with_and_without_header(tmp_path: Path) -> None:
    (tmp_path / "x_test.csv").write_text('"1 + 1, is?",2,3,4,5,A\n')
    text = TASK.replace('"*.jsonl"', "test.csv").replace('"{colour}"', '"{answer}"')
    task = read_task(text + "columns: [question, A, B, C, D, answer]\n", "test")
    [(subject, item)] = load_items(task, str(tmp_path / "x_test.csv"))
    assert subject == "x_test" and item["question"] == "1 + 1, is?" and item["answer"] == "A"


def test_embedded_items_are_sound() -> None:
    task = builtin_tasks().get("python_docs")
    items = [item for _, item in load_items(task)]
    assert 40 <= len(items) <= 100
    assert len({item["name"] for item in items}) == len({item["answer"] for item in items}) == len(items)
    for item in items:
        assert len(set(task.options(item))) == 4 and task.answer(item) in task.options(item)
    places = [item["choices"].index(item["answer"]) for item in items]
    assert max(places.count(i) for i in range(4)) < len(items) / 2, "always guessing one place must not score"


def test_questions_begin_with_what_the_task_asks(tmp_path: Path) -> None:
    count = python_docs.write_questions(tmp_path / "questions.json", limit=300)
    rows = json.loads((tmp_path / "questions.json").read_text())
    assert count == len(rows) == 300
    assert len({row["instruction"] for row in rows}) == 300
    task = builtin_tasks().get("python_docs")
    asked = {task.question(item): task.answer(item) for _, item in load_items(task)}
    assert {row["instruction"]: row["output"] for row in rows[: len(asked)]} == asked
    assert {
        "instruction": "What does `len` do?",
        "input": "",
        "output": "Return the number of items in a container.",
    } in rows


@pytest.mark.parametrize(
    ("docstring", "wanted"),
    [
        ("Return the sum.\n\nMore.", "Return the sum."),
        ("Return the sum\nof all items. Then more", "Return the sum of all items."),
        ("sum(iterable) -> number", None),
        ("Short", None),
        ("x" * 200, None),
    ],
)
def test_first_sentence(docstring: str, wanted: str | None) -> None:
    assert python_docs.first_sentence(docstring) == wanted


def test_corpus_is_real_and_repeatable(tmp_path: Path) -> None:
    counts = [python_docs.write_corpus(tmp_path / name) for name in ("a.jsonl", "b.jsonl")]
    content = (tmp_path / "a.jsonl").read_bytes()
    assert content == (tmp_path / "b.jsonl").read_bytes()
    rows = [json.loads(line) for line in content.splitlines()]
    assert counts[0] == len(rows) > 300 and len(content) > 1.5e6
    assert any("The for statement" in row["text"] or '"for" statement' in row["text"] for row in rows)


def test_version_changes_with_the_weights(folder: Path, tmp_path: Path) -> None:
    import shutil

    copy = tmp_path / "copy"
    shutil.copytree(folder, copy)
    assert harness.model_version(copy) == harness.model_version(folder)
    weights = copy / "model.safetensors"
    content = bytearray(weights.read_bytes())
    content[-1] ^= 1
    weights.write_bytes(content)
    assert harness.model_version(copy) != harness.model_version(folder)


def test_a_data_path_of_no_task_is_refused() -> None:
    known = builtin_tasks().get("python_docs")
    first, second = (dataclasses.replace(known, name=name) for name in ("mmlu", "boolq"))
    assert harness._assign_paths([first, second], ["data/mmlu", "data/boolq", "new/mmlu"]) == {
        "mmlu": "new/mmlu",
        "boolq": "data/boolq",
    }
    assert harness._assign_paths([first], ["elsewhere"]) == {"mmlu": "elsewhere"}
    with pytest.raises(ModelLinkError, match="--task-data-path elsewhere belongs to none of the tasks mmlu, boolq"):
        harness._assign_paths([first, second], ["elsewhere"])
