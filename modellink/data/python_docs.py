"""Real text that is on every machine: Python's own documentation, as a corpus and as questions with answers.

`write_corpus` gives the language reference that `help()` shows and the docstrings of the standard library, one module
per document; `write_questions` gives "What does `len` do?" with the first sentence of its docstring. Sources are
parsed, not imported (some modules act when imported), so both are the same on every machine with the same Python
version.

    python -m modellink.data.python_docs FOLDER      # writes FOLDER/corpus.jsonl and FOLDER/questions.json
"""

from __future__ import annotations

import argparse
import ast
import importlib
import inspect
import json
import re
import sys
import sysconfig
from collections.abc import Iterator, Sequence
from importlib import resources
from pathlib import Path

from modellink.files import atomic_path, atomic_write

# written in C: no source to parse, but safe to import
C_MODULES = ("builtins", "math", "cmath", "itertools", "time", "operator", "zlib", "binascii", "array")
# tests, demonstrations and tools are not documentation
_LEFT_OUT = frozenset(
    {"test", "tests", "idlelib", "turtledemo", "lib2to3", "ensurepip", "site-packages", "__pycache__"}
)
_SENTENCE = re.compile(r"(.+?[.!?])(?:\s|$)", re.DOTALL)
_KINDS = (ast.FunctionDef, ast.AsyncFunctionDef, ast.ClassDef)
QUIZ = "python_docs.jsonl"


def _modules() -> Iterator[tuple[str, Path]]:
    """(name, file) of every public module of the standard library, in the order of names."""
    root = Path(sysconfig.get_path("stdlib"))
    found = {}
    for file in root.rglob("*.py"):
        parts = file.relative_to(root).with_suffix("").parts
        if _LEFT_OUT.isdisjoint(parts) and not any(p.startswith("_") and p != "__init__" for p in parts):
            found[".".join(p for p in parts if p != "__init__")] = file
    yield from sorted(found.items())


def _docstrings(name: str, file: Path) -> Iterator[tuple[str, str, str]]:
    """(qualified name, signature, docstring) of a module and everything public in it, in the order of the source."""
    try:
        tree = ast.parse(file.read_text(encoding="utf-8"))
    except (SyntaxError, UnicodeDecodeError):
        return
    if text := ast.get_docstring(tree):
        yield name, "", text

    def walk(node: ast.AST, prefix: str) -> Iterator[tuple[str, str, str]]:
        for child in ast.iter_child_nodes(node):
            if isinstance(child, _KINDS) and not child.name.startswith("_"):
                qualified = f"{prefix}.{child.name}"
                signature = "" if isinstance(child, ast.ClassDef) else f"({ast.unparse(child.args)})"
                if text := ast.get_docstring(child):
                    yield qualified, signature, text
                yield from walk(child, qualified)

    yield from walk(tree, name)


def _c_docstrings(name: str) -> Iterator[tuple[str, str, str]]:
    """The same for a module written in C; names of builtins stand without "builtins."."""
    module = importlib.import_module(name)
    prefix = "" if name == "builtins" else f"{name}."
    for key, value in sorted(vars(module).items()):
        if key.startswith("_") or (isinstance(value, type) and issubclass(value, BaseException)):
            continue
        if callable(value) and (text := inspect.getdoc(value)):
            yield prefix + key, "", text
        if isinstance(value, type):
            for inner, method in sorted(vars(value).items()):
                if not inner.startswith("_") and callable(method) and (text := inspect.getdoc(method)):
                    yield f"{prefix}{key}.{inner}", "", text


def _documents() -> Iterator[str]:
    from pydoc_data.topics import topics

    for _, text in sorted(topics.items()):
        yield text.strip()
    for name in C_MODULES:
        yield "\n\n".join(f"{item}\n{text}" for item, _, text in _c_docstrings(name))
    for name, file in _modules():
        parts = [f"{item}{signature}\n{text}" for item, signature, text in _docstrings(name, file)]
        if parts:
            yield "\n\n".join(parts)


def write_corpus(path: str | Path) -> int:
    """Write one JSON object {"text": ...} per document to `path`; returns the number of documents (several MB of
    text).
    """
    count = 0
    with atomic_path(path) as temporary, open(temporary, "w", encoding="utf-8") as handle:
        for text in _documents():
            handle.write(json.dumps({"text": text}, ensure_ascii=False) + "\n")
            count += 1
    return count


def first_sentence(docstring: str) -> str | None:
    """The first sentence of a docstring on one line, or None when it begins with a signature or has none of fair
    length.
    """
    paragraph = docstring.strip().split("\n\n")[0]
    found = _SENTENCE.match(paragraph)
    sentence = " ".join((found[1] if found else paragraph).split())
    plain = 15 <= len(sentence) <= 90 and sentence[0].isupper() and "->" not in sentence and ">>>" not in sentence
    return sentence.rstrip(".") + "." if plain and not re.match(r"\w+\(", sentence) else None


def quiz() -> list[dict[str, str]]:
    """The items of the embedded task `python_docs`: {"name", "answer", "choices"}."""
    text = resources.files("modellink.evaluate").joinpath("tasks", QUIZ).read_text(encoding="utf-8")
    return [json.loads(line) for line in text.splitlines()]


def questions() -> Iterator[tuple[str, str]]:
    """(name, what it does): first those that the embedded task asks, then the builtins, then the library."""
    seen = set()
    for item in quiz():
        seen.add(item["name"])
        yield item["name"], item["answer"]
    sources = [_c_docstrings(name) for name in C_MODULES] + [_docstrings(name, file) for name, file in _modules()]
    for source in sources:
        for name, _, text in source:
            sentence = first_sentence(text)
            if sentence and name not in seen:
                seen.add(name)
                yield name, sentence


def write_questions(path: str | Path, limit: int | None = None) -> int:
    """Write at most `limit` questions as one JSON list of {"instruction", "input", "output"}; returns how many."""
    rows = [
        {"instruction": f"What does `{name}` do?", "input": "", "output": answer}
        for (name, answer), _ in zip(questions(), range(limit if limit is not None else 1 << 30), strict=False)
    ]
    atomic_write(path, json.dumps(rows, ensure_ascii=False, indent=0))
    return len(rows)


def main(argv: Sequence[str] | None = None) -> int:
    """Write both files and say what they hold."""
    parser = argparse.ArgumentParser("python -m modellink.data.python_docs", description="Python's docs as data.")
    parser.add_argument("folder", type=Path, help="folder that is written")
    parser.add_argument("--questions", type=int, help="questions to write at most (default: all, several thousand)")
    options = parser.parse_args(argv)
    corpus, asked = options.folder / "corpus.jsonl", options.folder / "questions.json"
    print(f"{corpus}: {write_corpus(corpus)} documents, {corpus.stat().st_size / 1e6:.1f} MB", flush=True)
    print(f"{asked}: {write_questions(asked, options.questions)} questions with answers")
    return 0


if __name__ == "__main__":
    sys.exit(main())
