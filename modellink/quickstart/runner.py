"""Run one command of the quickstart as a user would type it: echoed, with a progress bar, its output kept in a file."""

from __future__ import annotations

import contextlib
import os
import re
import shlex
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path

from rich.console import Console
from rich.markup import escape
from rich.progress import BarColumn, Progress, TaskID, TextColumn, TimeElapsedColumn

from modellink.errors import RunFailure

INTERRUPTED = 130
WIDTH = 100
# what the first word of a command stands for: the same programs, of the interpreter that runs now
PROGRAMS = {
    "python": [sys.executable],
    "modellink": [sys.executable, "-m", "modellink"],
    "torchrun": [sys.executable, "-m", "torch.distributed.run"],
}
_ITERATION = re.compile(r"iteration\s+(\d+)/\s*(\d+) .*?lm loss: ([0-9.E+-]+)")
_NOISE = re.compile(r"^\s*$|^\*{5,}|OMP_NUM_THREADS|━")


def as_typed(command: Sequence[str], width: int = WIDTH) -> str:
    """The command as a line for a shell, broken before options where it is longer than `width`."""
    groups: list[str] = []
    for word in command:
        quoted = shlex.quote(word)
        if groups and not word.startswith("--"):
            groups[-1] += f" {quoted}"
        else:
            groups.append(quoted)
    lines = [groups[0]]
    for group in groups[1:]:
        if len(lines[-1]) + len(group) + 3 > width:
            lines[-1] += " \\"
            lines.append(f"    {group}")
        else:
            lines[-1] += f" {group}"
    return "\n".join(lines)


class Runner:
    """Runs commands one after another; `logs` receives one file per command."""

    def __init__(self, console: Console, logs: Path) -> None:
        self.console, self.logs = console, logs
        self.count = 0

    def run(self, title: str, command: Sequence[str], said: Sequence[str] = ()) -> str:
        """Run `command` and return its output; `said` are lines for its standard input.

        Raises RunFailure with the end of the output when it fails, and KeyboardInterrupt when it was interrupted.
        """
        self.count += 1
        log = self.logs / f"{self.count:02d}-{title.replace(' ', '-')}.log"
        typed = as_typed(command)
        if said:
            typed = f"printf '%s\\n' {shlex.join(said)} | \\\n    {typed}"
        self.console.print(f"$ {typed}", style="dim", markup=False, highlight=False, soft_wrap=True)
        environment = os.environ | {"PYTHONUNBUFFERED": "1", "COLUMNS": str(WIDTH)}
        environment.setdefault("OMP_NUM_THREADS", "1")  # two processes on two cores
        with subprocess.Popen(
            [*PROGRAMS[command[0]], *command[1:]],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            encoding="utf-8",
            errors="replace",
            env=environment,
        ) as child:
            try:
                assert child.stdin is not None
                with contextlib.suppress(BrokenPipeError):  # a child that dies at once says why in its output
                    child.stdin.write("".join(f"{line}\n" for line in said))
                    child.stdin.close()
                output = self._follow(title, child)
                code = child.wait()
            finally:
                _end(child)
        log.parent.mkdir(parents=True, exist_ok=True)
        log.write_text(f"$ {typed}\n{output}", encoding="utf-8")
        if code == INTERRUPTED:
            raise KeyboardInterrupt
        if code:
            told = [line for line in output.splitlines() if not _NOISE.search(line)]
            self.console.print("\n".join(told[-15:]), style="red", markup=False, highlight=False)
            raise RunFailure(f"{title!r} failed with exit code {code}: its whole output is in {log}.")
        return output

    def _follow(self, title: str, child: subprocess.Popen[str]) -> str:
        """Read the child's output to its end, turning its iterations into a progress bar."""
        assert child.stdout is not None
        lines: list[str] = []
        columns = (TextColumn("  {task.description:<22}"), BarColumn(28), TextColumn("{task.fields[state]}"))
        with Progress(*columns, TimeElapsedColumn(), console=self.console) as progress:
            bar = progress.add_task(escape(title), total=None, state="")
            for line in child.stdout:
                lines.append(line)
                _advance(progress, bar, line)
            if not progress.tasks[0].total:
                progress.update(bar, total=1, completed=1)
        return "".join(lines)


def _advance(progress: Progress, bar: TaskID, line: str) -> None:
    if found := _ITERATION.search(line):
        done, total, loss = int(found[1]), int(found[2]), float(found[3])
        progress.update(bar, completed=done, total=total, state=f"iteration {done}/{total}, loss {loss:.2f}")


def _end(child: subprocess.Popen[str], patience: float = 20.0) -> None:
    """Let an interrupted child save what it has, then make sure that it is gone."""
    if child.poll() is None:
        child.terminate()
        try:
            child.wait(patience)
        except subprocess.TimeoutExpired:
            child.kill()
