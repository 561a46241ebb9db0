"""No line of the README is untested: its commands and programs run in order, its links and names exist, and the Chinese
one says the same.
"""

from __future__ import annotations

import os
import re
import subprocess
import sys
import tomllib
from pathlib import Path
from typing import NamedTuple

import pytest

from modellink.cli.main import VERBS

ROOT = Path(__file__).resolve().parents[2]
README, CHINESE = (ROOT / name for name in ("README.md", "README.zh.md"))
PAGES = [README, CHINESE, ROOT / "CONTRIBUTING.md", *sorted((ROOT / "docs").glob("*.md"))]
PROGRAMS = [p for p in ROOT.glob("*.py") if p.stem != "setup"]


class Block(NamedTuple):
    """A fenced block: its language, its text, the line it begins at."""

    language: str
    text: str
    line: int


def blocks(page: Path) -> list[Block]:
    text = page.read_text(encoding="utf-8")
    found = re.finditer(r"^```(\w*)\n(.*?)^```$", text, re.MULTILINE | re.DOTALL)
    return [Block(m[1], m[2], text.count("\n", 0, m.start()) + 1) for m in found]


def prose(page: Path) -> str:
    """The page without its fenced blocks."""
    return re.sub(r"^```.*?^```$", "", page.read_text(encoding="utf-8"), flags=re.MULTILINE | re.DOTALL)


def make_targets() -> set[str]:
    return set(re.findall(r"^([.a-z-]+):", (ROOT / "Makefile").read_text(), re.MULTILINE))


def split_make(script: str) -> tuple[list[str], str]:
    """(targets of the `make` lines, the script without them)."""
    lines = script.splitlines()
    targets = [line.split()[1] for line in lines if line.startswith("make ")]
    return targets, "\n".join(line for line in lines if not line.startswith("make "))


RUNNABLE = [block for block in blocks(README) if block.language in ("bash", "python")]


def run(block: Block, folder: Path) -> None:
    """Run one block as a user would, in `folder`; `make` lines are only looked up in the Makefile."""
    targets, script = split_make(block.text) if block.language == "bash" else ([], block.text)
    assert set(targets) <= make_targets()
    path = f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"
    shell = [sys.executable, "-c"] if block.language == "python" else ["bash", "-euo", "pipefail", "-c"]
    environment = os.environ | {"PATH": path, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    done = subprocess.run([*shell, script], cwd=folder, env=environment, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, f"README.md line {block.line}\n{done.stdout[-2000:]}\n{done.stderr[-3000:]}"
    assert targets or done.stdout, f"README.md line {block.line} printed nothing"


@pytest.mark.dist
@pytest.mark.timeout(1200)
def test_the_blocks_run_in_order(tmp_path: Path) -> None:
    """One test, because each block stands on the ones before; the folder is like the top of a checkout."""
    for program in PROGRAMS:
        (tmp_path / program.name).symlink_to(program)
    for block in RUNNABLE:
        run(block, tmp_path)
    # what the README says lies there
    assert (tmp_path / "runs/docs/loss.png").is_file() and (tmp_path / "results/results.json").is_file()
    assert (tmp_path / "runs/docs/metrics.jsonl").read_text().count("\n") == 40


def test_every_block_is_run_or_is_output() -> None:
    assert {block.language for block in blocks(README)} == {"bash", "python", "text"}
    assert len(RUNNABLE) >= 12
    shown = [block for block in blocks(README) if block.language == "text"]
    assert all("$" in block.text or "┃" in block.text for block in shown)


def test_the_chinese_readme_has_the_same_shape() -> None:
    assert [block[:2] for block in blocks(CHINESE)] == [block[:2] for block in blocks(README)]
    shapes = []
    for page in (README, CHINESE):
        text = prose(page)
        headings = [len(level) for level in re.findall(r"^(#+) ", text, re.MULTILINE)]
        rows = len(re.findall(r"^\|", text, re.MULTILINE))
        code = sorted(set(re.findall(r"`([^`\n]+)`", text)))
        links = sorted(set(re.findall(r"\]\(([^)]+)\)", text)) - {"README.md", "README.zh.md"})
        shapes.append((headings, rows, code, links))
    assert shapes[0] == shapes[1]
    assert len(re.findall(r"[\u4e00-\u9fff]", prose(CHINESE))) > 800


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_links_lead_somewhere(page: Path) -> None:
    links = re.findall(r"\]\(([^)#\s]+)[^)]*\)", prose(page))
    missing = [link for link in links if not link.startswith("https://") and not (page.parent / link).exists()]
    assert not missing


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_named_files_verbs_targets_and_extras_exist(page: Path) -> None:
    text = page.read_text(encoding="utf-8")
    files = set(re.findall(r"\b(?:tests|benchmarks|modellink)/[\w./-]+\.(?:py|md|yaml)\b", text))
    assert {name for name in files if not (ROOT / name).exists()} == set()
    verbs = {verb for verb in re.findall(r"`modellink (\w+)", text) if verb != "VERB"}
    assert verbs <= set(VERBS)
    assert set(re.findall(r"`make ([.a-z-]+)", text)) <= make_targets()
    extras = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["optional-dependencies"]
    assert set(re.findall(r"'\.\[([a-z-]+)\]'", text)) <= set(extras)


def test_every_verb_is_shown() -> None:
    text = README.read_text(encoding="utf-8")
    assert {verb for verb in VERBS if f"modellink {verb}" not in text} == set()
