"""The quickstart: from real text to a model that answers, each step by the command that a user would type.

It checks what it claims: the loss has fallen, the resumed run went on where it stopped, the chat knows the answers, the
score has risen. Anything else is an error that says so.
"""

from __future__ import annotations

import argparse
import json
import shutil
import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.markup import escape
from rich.table import Table

from modellink.errors import ModelLinkError, RunFailure
from modellink.files import atomic_write
from modellink.quickstart.runner import INTERRUPTED, WIDTH, Runner, as_typed
from modellink.train.metrics import METRICS_FILE, read_lines

MARKER = "quickstart.json"  # lies in every folder that this program may empty
ASKED = (0, 41)  # of the questions, those that the chat is asked
STOP_AT = 140
MODEL = """\
# a Llama of two layers, 1.4 million parameters
family: llama
num-layers: 2
hidden-size: 128
ffn-hidden-size: 384
num-attention-heads: 4
num-key-value-heads: 2
max-position-embeddings: 512
normalization: RMSNorm
position-embedding: rope
activation: silu
gated-mlp: true
untie-embeddings-and-output-weights: true
no-qkv-bias: true
no-attention-output-bias: true
no-mlp-bias: true
attention-dropout: 0
hidden-dropout: 0
"""
# OUT stands for the output folder
TEXT = "python -m modellink.data.python_docs OUT/text --questions 100"
TOKENIZER = (
    "python -m modellink.data.train_tokenizer --input OUT/text/corpus.jsonl --output OUT/tokenizer --vocab-size 4096"
)
DATASET = (
    "modellink preprocess --input OUT/text/corpus.jsonl --output-prefix OUT/data/docs "
    "--tokenizer-name-or-path OUT/tokenizer --append-eod --workers 2"
)
PRETRAIN = (
    "torchrun --standalone --nproc-per-node 2 -m modellink train --tensor-parallel 2 "
    "--config OUT/model.yaml --tokenizer-name-or-path OUT/tokenizer --data-path OUT/data/docs_text_document "
    "--split 98,2,0 --seq-length 128 --micro-batch-size 8 --global-batch-size 8 --train-iters 280 --lr 4e-3 "
    "--decoupled-lr 4e-2 --lr-decay-style cosine --lr-warmup-iters 20 --weight-decay 0.1 --adam-beta2 0.95 "
    "--eval-iters 4 --eval-interval 70 --log-interval 10 --save OUT/pretrain --load OUT/pretrain"
)
EXPORT = "modellink convert --load-dir OUT/pretrain --save-dir OUT/hf --save-model-type hf"
SFT_DATASET = (
    "modellink preprocess --input OUT/text/questions.json --output-prefix OUT/data/questions "
    "--tokenizer-name-or-path OUT/tokenizer --handler-name AlpacaStyleInstructionHandler --prompt-type chatml"
)
SFT = (
    "torchrun --standalone --nproc-per-node 2 -m modellink train --stage sft --load OUT/hf "
    "--tokenizer-name-or-path OUT/tokenizer --data-path OUT/data/questions --split 100,0,0 --seq-length 128 "
    "--variable-seq-lengths --micro-batch-size 8 --global-batch-size 16 --train-iters 240 --lr 5e-3 "
    "--lr-decay-style cosine --lr-warmup-iters 10 --eval-iters 0 --log-interval 10 --save OUT/sft --save-format hf"
)
# each question stands alone, as in the data of the fine-tuning
CHAT = "modellink chat --load OUT/sft --hf-chat-template --history-turns 0"
EVALUATE = "modellink evaluate --load OUT/%s --task python_docs --evaluation-batch-size 16 --save-dir OUT/score-%s"


@dataclass
class Row:
    """One line of the closing table."""

    stage: str
    seconds: float
    made: str
    result: str


@dataclass
class Job:
    """The stages in order. Paths are written as the user would type them, relative to where the program runs."""

    output: Path
    console: Console
    rows: list[Row] = field(default_factory=list)
    facts: dict[str, Any] = field(default_factory=dict)

    def __post_init__(self) -> None:
        self.runner = Runner(self.console, self.output / "logs")

    def run(self) -> None:
        """Run everything; raises RunFailure where a stage fails or does not do what it is there for."""
        self.data()
        self.pretrain()
        self.export()
        before = self.evaluate("score before SFT", "hf", "before")
        self.fine_tune()
        self.chat()
        after = self.evaluate("score after SFT", "sft", "after")
        self.facts |= {"score_before": before, "score_after": after}
        if after["acc"] < before["acc"] + 0.3 or after["exact_match"] < 0.5:
            raise RunFailure(
                f"fine-tuning raised the score from {before['acc']:.0%} to {after['acc']:.0%} only: see {self.output}."
            )

    def path(self, *parts: str) -> Path:
        return self.output.joinpath(*parts)

    def command(self, text: str) -> list[str]:
        """The words of a command, OUT being the output folder."""
        return [f"{self.output}{word[3:]}" if word.startswith("OUT") else word for word in text.split()]

    def stage(self, title: str, made: str, text: str, said: Sequence[str] = ()) -> str:
        """Run one command and open its row of the table; the caller fills in the result."""
        self.console.print()
        self.console.rule(f"{len(self.rows) + 1}. {title}", align="left", style="cyan")
        began = time.monotonic()
        output = self.runner.run(title, self.command(text), said)
        self.rows.append(Row(title, time.monotonic() - began, str(self.path(made)) if made else "", ""))
        return output

    def result(self, text: str) -> None:
        self.rows[-1].result = text
        self.console.print(f"  {text}", markup=False, highlight=False)

    def data(self) -> None:
        """Text, tokenizer, .bin/.idx."""
        self.stage("text", "text", TEXT)
        corpus = self.path("text", "corpus.jsonl")
        documents = corpus.read_text(encoding="utf-8").count("\n")
        self.result(f"{documents} documents, {corpus.stat().st_size / 1e6:.1f} MB of text")
        self.stage("tokenizer", "tokenizer", TOKENIZER)
        trained = json.loads(self.path("tokenizer", "tokenizer.json").read_text(encoding="utf-8"))
        self.result(f"byte-level BPE, {len(trained['model']['vocab'])} ids")
        self.stage("dataset", "data/docs_*", DATASET)
        self.result(f"{_tokens(self.path('data', 'docs_text_document')):,} tokens")

    def pretrain(self) -> None:
        """Two tensor-parallel processes; stop in the middle, then give the same command again."""
        atomic_write(self.path("model.yaml"), MODEL)
        run = self.path("pretrain")
        self.stage("pretrain", "pretrain", f"{PRETRAIN} --exit-interval {STOP_AT}")
        metrics = _metrics(run)
        first, stopped = metrics[0]["lm_loss"], metrics[-1]
        self.result(f"iteration {stopped['iteration']}, loss {first:.2f} -> {stopped['lm_loss']:.2f}")
        self.stage("resume", "pretrain/loss.png", PRETRAIN)
        metrics = _metrics(run)
        last = _mean_loss(metrics[-10:])
        self.facts |= {"pretrain_loss_first": first, "pretrain_loss_last": last}
        if stopped["iteration"] != STOP_AT or [e["iteration"] for e in metrics] != list(range(1, len(metrics) + 1)):
            raise RunFailure(f"the run did not stop and go on at iteration {STOP_AT}: see {run}/metrics.jsonl.")
        self.result(f"iteration {len(metrics)}, loss {metrics[STOP_AT]['lm_loss']:.2f} -> {last:.2f}")
        if last > 0.7 * first:
            raise RunFailure(f"the loss fell from {first:.2f} to {last:.2f} only: see {run}/loss.png.")

    def export(self) -> None:
        """The newest checkpoint as a folder that `transformers` loads."""
        self.stage("export", "hf", EXPORT)
        size = sum(file.stat().st_size for file in self.path("hf").glob("*.safetensors"))
        self.result(f"Hugging Face folder, {size / 1e6:.1f} MB")

    def fine_tune(self) -> None:
        """Instruction data, then two data-parallel processes that start from the exported folder."""
        self.stage("SFT dataset", "data/questions_*", SFT_DATASET)
        tokens = _tokens(self.path("data", "questions_packed_input_ids_document"))
        self.result(f"{len(self.questions())} questions, {tokens:,} tokens")
        self.stage("SFT", "sft/loss.png", SFT)
        metrics = _metrics(self.path("sft"))
        self.result(f"loss {metrics[0]['lm_loss']:.2f} -> {_mean_loss(metrics[-10:]):.2f}")

    def questions(self) -> list[dict[str, str]]:
        found: list[dict[str, str]] = json.loads(self.path("text", "questions.json").read_text(encoding="utf-8"))
        return found

    def chat(self) -> None:
        """Ask what was taught; the answers must come word for word."""
        asked = [self.questions()[i] for i in ASKED]
        output = self.stage("chat", "", CHAT, said=[row["instruction"] for row in asked])
        right = 0
        for row, part in zip(asked, output.split("ModelLink:")[1:], strict=False):
            answer = part.split("You >>")[0].strip()
            right += answer == row["output"]
            for speaker, text, style in (("You", row["instruction"], "bold"), ("ModelLink", answer, "bold green")):
                self.console.print(f"  [{style}]{speaker} >>[/] {escape(text)}", highlight=False)
        self.facts |= {"chat_asked": len(asked), "chat_right": right}
        self.result(f"{right} of {len(asked)} answers word for word")
        if right < len(asked):
            raise RunFailure(f"the chat gave {right} of {len(asked)} answers as taught: see {self.runner.logs}.")

    def evaluate(self, title: str, model: str, when: str) -> dict[str, float]:
        """The metrics of task python_docs for the model in folder `model`."""
        self.stage(title, f"score-{when}", EVALUATE % (model, when))
        results = json.loads(self.path(f"score-{when}", "results.json").read_text(encoding="utf-8"))
        values = {name: figures["value"] for name, figures in results["tasks"]["python_docs"]["metrics"].items()}
        self.result(f"right choice {values['acc']:.0%}, exact {values['exact_match']:.0%}")
        return values


def _metrics(run: Path) -> list[dict[str, Any]]:
    return read_lines(run / METRICS_FILE)


def _mean_loss(entries: Sequence[dict[str, Any]]) -> float:
    return sum(entry["lm_loss"] for entry in entries) / len(entries)


def _tokens(prefix: Path) -> int:
    from modellink.data.indexed import IndexedDataset

    return len(IndexedDataset(prefix).tokens)


def prepare(output: Path) -> None:
    """An empty folder of ours: one that an earlier quickstart made is emptied, any other with content is refused."""
    if output.is_file() or (output.is_dir() and any(output.iterdir()) and not (output / MARKER).is_file()):
        raise ModelLinkError(
            f"--output {output} exists and was not made by a quickstart: give a folder that is new or empty."
        )
    if output.is_dir():
        shutil.rmtree(output)
    atomic_write(output / MARKER, "{}\n")


def closing_table(rows: Sequence[Row]) -> Table:
    """What was done, how long it took and what came out."""
    table = Table(title="quickstart", title_justify="left", header_style="bold")
    table.add_column("stage", no_wrap=True)
    table.add_column("seconds", justify="right")
    table.add_column("made", no_wrap=True)
    table.add_column("result", overflow="fold")
    for row in rows:
        table.add_row(row.stage, f"{row.seconds:.1f}", row.made, row.result)
    table.add_section()
    table.add_row("all", f"{sum(row.seconds for row in rows):.1f}", "", "")
    return table


def main(argv: Sequence[str] | None = None) -> int:
    """Run the quickstart and return the exit code of interface: 0, 2 bad usage, 1 failure, 130 interrupted."""
    parser = argparse.ArgumentParser(
        "python -m modellink.quickstart",
        description="The whole job on this machine, about two minutes on two cores: text, tokenizer, dataset, "
        "pre-training, resume, export, fine-tuning, chat, score. Every command is shown before it runs. Running it "
        "again starts over: the folder of an earlier quickstart is emptied, any other folder with content is refused.",
    )
    parser.add_argument("--output", type=Path, default=Path("quickstart"), help="folder that is written (quickstart)")
    options = parser.parse_args(argv)
    console = Console(highlight=False, width=None if sys.stdout.isatty() else WIDTH)
    job = Job(options.output, console)
    try:
        prepare(options.output)
        job.run()
    except ModelLinkError as error:
        print(f"modellink: error: {error}", file=sys.stderr)
        return error.exit_code
    except KeyboardInterrupt:
        print("modellink: error: interrupted.", file=sys.stderr)
        return INTERRUPTED
    stages = [vars(row) for row in job.rows]
    atomic_write(options.output / MARKER, json.dumps({"stages": stages, **job.facts}, indent=2) + "\n")
    console.print()
    console.print(closing_table(job.rows))
    told = {
        "loss curves": f"{job.path('pretrain', 'loss.png')} and {job.path('sft', 'loss.png')}",
        "go on talking": as_typed(job.command(CHAT)),
        "all options": "modellink --help, modellink train --help",
    }
    console.print()
    for what, text in told.items():
        console.print(f"{what + ':':<15}{text}", markup=False, soft_wrap=True)
    return 0


if __name__ == "__main__":
    sys.exit(main())
