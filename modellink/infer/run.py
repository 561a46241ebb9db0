"""The jobs of `modellink generate` and `modellink chat`: demonstrations, prompts, files of prompts, conversations.

Each takes the resolved configuration and a loaded model; all printing goes through one console.
"""

from __future__ import annotations

import json
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.progress import track

from modellink.checkpoint.store import step_name
from modellink.config.schema import Config
from modellink.errors import ModelLinkError
from modellink.files import atomic_path
from modellink.infer.chat import Chat, converse
from modellink.infer.model import GPTModel
from modellink.registry import Registry

DEMO_PROMPT = "how are you?"
BATCH = 8  # prompts of a file that are answered together; the answers do not depend on it


def open_model(config: Config) -> GPTModel:
    """The model of --load (or --pretrained-checkpoint) in the dtype of --bf16 / --fp16, fp32 without either."""
    path = config.checkpoint.load or config.checkpoint.pretrained_checkpoint
    assert path, "the configuration was checked"
    if config.checkpoint.ckpt_step is not None:
        path = str(Path(path) / step_name(config.checkpoint.ckpt_step))
    named = config.tokenizer.tokenizer_name_or_path
    return GPTModel.from_pretrained(path, dtype=config.optimizer.dtype, tokenizer=named)


def decoding(config: Config) -> dict[str, Any]:
    """Arguments of `GPTModel.generate` from the decoding flags."""
    generate = config.generate
    return {
        "max_new_tokens": generate.max_new_tokens,
        "max_length": generate.max_length,
        "do_sample": generate.do_sample,
        "temperature": generate.temperature,
        "top_k": generate.top_k,
        "top_p": generate.top_p,
        "num_beams": generate.num_beams,
        "length_penalty": generate.length_penalty,
        "stop": tuple(generate.add_eos_token or ()),
        "template": config.data.prompt_type,
        "hf_chat_template": generate.hf_chat_template,
        "seed": config.train.seed,
        "use_kv_cache": generate.use_kv_cache,
    }


# --- demonstrations -------------------------------------------------------------------------------------------------

DEMOS: Registry[dict[str, Any]] = Registry("task")
DEMOS.add("greedy", {"do_sample": False, "num_beams": 1})
DEMOS.add("do_sample", {"do_sample": True, "num_beams": 1, "prompts": 2})
DEMOS.add("beam_search", {"do_sample": False, "num_beams": 2})
DEMOS.add("beam_search_with_sampling", {"do_sample": True, "num_beams": 2})
DEMOS.add("return_output_log_probs", {"do_sample": False, "num_beams": 1})
DEMOS.add("chat", {})


def demonstrate(model: GPTModel, config: Config, tasks: Sequence[str], console: Console) -> None:
    """Run the demo tasks (spec f.2); an unknown name raises ModelLinkError before the first runs."""
    for task in tasks:
        DEMOS.get(task)
    for task in tasks:
        if task == "chat":
            talk(model, config)
            continue
        options = decoding(config) | DEMOS.get(task)
        count = options.pop("prompts", 1)
        prompt: Any = DEMO_PROMPT if count == 1 else [DEMO_PROMPT] * count
        start = time.monotonic()
        if task == "return_output_log_probs":
            _show_probabilities(model, prompt, options, console)
        else:
            answer = model.generate(prompt, **options)
            for text in [answer] if isinstance(answer, str) else answer:
                show_answer(console, task, DEMO_PROMPT, text)
        console.print(f"elapsed: {time.monotonic() - start:.2f} s\n", markup=False, highlight=False)


def _show_probabilities(model: GPTModel, prompt: str, options: dict[str, Any], console: Console) -> None:
    """The likeliest tokens of every position, then four beams with their scores."""
    answer, rows = model.generate(prompt, **options, return_output_log_probs=True)
    show_answer(console, "return_output_log_probs", prompt, answer)
    console.print(f"probabilities {list(rows.shape)} (new tokens x vocabulary); largest: ", end="", markup=False)
    console.print(" ".join(f"{p:.3f}" for p in rows.max(-1).values.tolist()), markup=False, highlight=False)
    beams = options | {"num_beams": 4, "num_return_sequences": 4}
    answers, scores = model.generate(prompt, **beams, return_output_log_probs=True)
    for text, score in zip(answers, scores, strict=True):
        show_answer(console, f"beam, score {float(score):.4g}", prompt, text)


def show_answer(console: Console, title: str, prompt: str, answer: str) -> None:
    """One exchange under a title."""
    console.rule(title)
    console.print(f"You:\n{prompt}\n\nModelLink:\n{answer}", markup=False, highlight=False)


# --- prompts --------------------------------------------------------------------------------------------------------


def read_prompts(path: str) -> list[Any]:
    """Prompts of a file: .jsonl with "prompt" (text) or "messages" (a conversation) per line, any other: one per
    line.
    """
    file = Path(path)
    try:
        lines = file.read_text(encoding="utf-8").splitlines()
    except (OSError, UnicodeDecodeError) as error:
        raise ModelLinkError(f"--input {path} cannot be read: {error}; give a text or .jsonl file.") from error
    if file.suffix != ".jsonl":
        return [line for line in lines if line.strip()]
    prompts = []
    for number, line in enumerate(lines, 1):
        if not line.strip():
            continue
        try:
            row = json.loads(line)
            prompts.append(row["prompt"] if "prompt" in row else row["messages"])
        except (ValueError, KeyError, TypeError) as error:
            raise ModelLinkError(
                f'{path} line {number} must be a JSON object with "prompt" or "messages": fix or remove the line.'
            ) from error
    return prompts


def answer_file(model: GPTModel, config: Config, source: str, target: str | None, console: Console) -> None:
    """Answer every prompt of `source`; write {"prompt", "answer"} lines to `target`, or show them."""
    prompts = read_prompts(source)
    if target is None:
        for prompt, answer in _answers(model, config, prompts, console):
            show_answer(console, "prompt", str(prompt), answer)
        return
    with atomic_path(target) as temporary, open(temporary, "w", encoding="utf-8") as handle:
        for prompt, answer in _answers(model, config, prompts, console):
            handle.write(json.dumps({"prompt": prompt, "answer": answer}, ensure_ascii=False) + "\n")
    console.print(f"{len(prompts)} answers in {target}", markup=False, highlight=False)


def _answers(model: GPTModel, config: Config, prompts: list[Any], console: Console) -> Iterator[tuple[Any, str]]:
    options = decoding(config)
    batches = [prompts[i : i + BATCH] for i in range(0, len(prompts), BATCH)]
    for batch in track(batches, "Generating", console=console):
        yield from zip(batch, model.generate(batch, **options), strict=True)


def answer_prompts(model: GPTModel, config: Config, prompts: Sequence[str], console: Console) -> None:
    """Answer prompts of the command line, streaming them one by one with --stream."""
    options = decoding(config)
    if not config.generate.stream:
        for prompt, answer in zip(prompts, model.generate(list(prompts), **options), strict=True):
            show_answer(console, "prompt", prompt, answer)
        return
    for prompt in prompts:
        shown = ""
        console.print(f"You:\n{prompt}\n\nModelLink:", markup=False, highlight=False)
        for answer in model.generate(prompt, **options, stream=True):
            console.print(answer[len(shown) :], end="", markup=False, highlight=False, soft_wrap=True)
            shown = answer
        console.print()


def talk(model: GPTModel, config: Config) -> None:
    """An interactive conversation on standard input and output."""
    options = decoding(config)
    template, own = options.pop("template"), options.pop("hf_chat_template")
    converse(Chat(model, config.generate.history_turns, template, own, **options))
