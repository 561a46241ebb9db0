"""The rules that keep the code its shape, read from the source: each is a function from a file to its violations.

Every rule is tried on a snippet that breaks it (a rule that cannot fail protects nothing) and on one that does not.
"""

from __future__ import annotations

import ast
import re
import subprocess
import symtable
import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
PROGRAMS = ("preprocess_data", "convert_ckpt", "pretrain_gpt", "trainer", "inference", "evaluation")
ACCELERATORS = ("cuda", "npu")


@dataclass(frozen=True)
class Source:
    """One Python file: `path` relative to the repository, with forward slashes."""

    path: str
    text: str

    @cached_property
    def tree(self) -> ast.Module:
        return ast.parse(self.text, self.path)

    @cached_property
    def module(self) -> str:
        return self.path.removesuffix(".py").removesuffix("/__init__").replace("/", ".")


def walk(source: Source, *kinds: type[ast.AST]) -> Iterator[ast.AST]:
    return (node for node in ast.walk(source.tree) if isinstance(node, kinds))


def imports(source: Source, nodes: Iterator[ast.AST] | None = None) -> Iterator[tuple[int, str]]:
    """Every imported dotted name with its line; `from a import b` gives `a.b`, relative imports are made absolute."""
    for node in nodes or ast.walk(source.tree):
        if isinstance(node, ast.Import):
            yield from ((node.lineno, alias.name) for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            base = node.module or ""
            if node.level:
                package = source.module.split(".")
                keep = len(package) - node.level + source.path.endswith("/__init__.py")
                base = ".".join([*package[:keep], *([base] if base else [])])
            yield from ((node.lineno, f"{base}.{alias.name}") for alias in node.names)


def docstrings(source: Source) -> set[int]:
    """Identities of the constants that are only text (docstrings of modules, classes, functions and attributes)."""
    return {id(node.value) for node in walk(source, ast.Expr) if isinstance(node.value, ast.Constant)}  # type: ignore[attr-defined]


def words(source: Source) -> Iterator[tuple[int, str]]:
    """Every identifier and every string that is not a docstring, with its line."""
    text_only = docstrings(source)
    for node in ast.walk(source.tree):
        line = getattr(node, "lineno", 0)
        if isinstance(node, ast.Name):
            yield line, node.id
        elif isinstance(node, ast.Attribute):
            yield line, node.attr
        elif isinstance(node, ast.arg | ast.keyword):
            yield line, node.arg or ""
        elif isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef | ast.ClassDef):
            yield line, node.name
        elif isinstance(node, ast.Constant) and isinstance(node.value, str) and id(node) not in text_only:
            yield line, node.value


# ---------------------------------------------------------------------------------------------------------- the rules


def models_stay_single_device(source: Source) -> Iterator[str]:
    """Rule 1: `models/` imports neither torch.distributed, parallel/ nor config.flags, and names no accelerator."""
    if not source.path.startswith("modellink/models/"):
        return
    for line, name in imports(source):
        for banned in ("torch.distributed", "modellink.parallel", "modellink.config.flags", "torch.cuda", "torch_npu"):
            if name == banned or name.startswith((banned + ".", banned + "_")):
                yield f"{source.path}:{line} imports {name}"
    for node in walk(source, ast.Attribute):
        if ast.unparse(node) == "torch.distributed":
            yield f"{source.path}:{node.lineno} uses torch.distributed"  # type: ignore[attr-defined]


def no_global_args(source: Source) -> Iterator[str]:
    """Rule 2: no module keeps or reads a global `args`, and nothing calls a `get_args` of its own making."""
    if source.path.startswith(("modellink/compat", "tests/")):
        return  # the reference's `get_args` is what a user's own script calls, and its test
    names = {"args", "ARGS", "_ARGS", "GLOBAL_ARGS", "_GLOBAL_ARGS"}

    def visit(table: symtable.SymbolTable) -> Iterator[str]:
        for symbol in table.get_symbols():
            if symbol.get_name() not in names:
                continue
            if table.get_type() == "module" and symbol.is_assigned():
                yield f"{source.path} keeps a global {symbol.get_name()}"
            elif table.get_type() != "module" and symbol.is_global():
                yield f"{source.path}:{table.get_lineno()} {table.get_name()} reads a global {symbol.get_name()}"
        for child in table.get_children():
            yield from visit(child)

    yield from visit(symtable.symtable(source.text, source.path, "exec"))
    if "typing.get_args" not in {name for _, name in imports(source)}:
        for node in walk(source, ast.Call):
            called = ast.unparse(node.func)  # type: ignore[attr-defined]
            if called.split(".")[-1] == "get_args" and called != "typing.get_args":
                yield f"{source.path}:{node.lineno} calls {called}"  # type: ignore[attr-defined]


MEGATRON = re.compile(
    r"linear_(qkv|proj|fc1|fc2)\b|query_key_value|dense_(h_to_4h|4h_to_h)|(?<!tie_)word_embeddings|self_attention\.|mp_rank_"
    r"|\b(tensor|pipeline|expert|context)_model_parallel_size\b"
)


def megatron_stays_at_the_edges(source: Source) -> Iterator[str]:
    """Rule 3: Megatron's names live in config/flags*.py and checkpoint/megatron*.py only.

    The tables of models/families may hold the published spelling of a Hugging Face family that shares a word with it
    (BLOOM and GLM write query_key_value), and a user's own script meets them in compat.
    """
    edges = (
        "modellink/config/flags",
        "modellink/checkpoint/megatron",
        "modellink/models/families/",
        "modellink/compat",
    )
    if source.path.startswith("modellink/") and not source.path.startswith(edges):
        for line, word in words(source):
            if found := MEGATRON.search(word):
                yield f"{source.path}:{line} names {found[0]}"


class Patches(ast.NodeVisitor):
    """Collects assignments to attributes of imported things, unless a local name hides the import."""

    settings = ("torch.backends.", "torch._dynamo.config.", "torch._inductor.config.")  # made to be assigned

    def __init__(self, source: Source) -> None:
        self.path = source.path
        self.imported: set[str] = set()
        for node in walk(source, ast.Import, ast.ImportFrom):
            for alias in node.names:  # type: ignore[attr-defined]
                self.imported.add(alias.asname or alias.name.split(".")[0])
        self.hidden: list[set[str]] = []
        self.found: list[str] = []
        self.visit(source.tree)

    def visit_function(self, node: ast.FunctionDef | ast.AsyncFunctionDef | ast.Lambda) -> None:
        arguments = node.args
        local = {a.arg for a in (*arguments.posonlyargs, *arguments.args, *arguments.kwonlyargs)}
        local |= {a.arg for a in (arguments.vararg, arguments.kwarg) if a}
        local |= {n.id for n in ast.walk(node) if isinstance(n, ast.Name) and isinstance(n.ctx, ast.Store)}
        self.hidden.append(local)
        self.generic_visit(node)
        self.hidden.pop()

    visit_FunctionDef = visit_AsyncFunctionDef = visit_Lambda = visit_function

    def check(self, target: ast.expr) -> None:
        root: ast.expr = target
        while isinstance(root, ast.Attribute | ast.Subscript):
            root = root.value
        if isinstance(target, ast.Attribute) and isinstance(root, ast.Name) and self.is_imported(root.id):
            name = ast.unparse(target)
            if not name.startswith(self.settings):
                self.found.append(f"{self.path}:{target.lineno} patches {name}")

    def is_imported(self, name: str) -> bool:
        return name in self.imported and not any(name in local for local in self.hidden)

    def visit_Attribute(self, node: ast.Attribute) -> None:
        if isinstance(node.ctx, ast.Store | ast.Del):
            self.check(node)
        self.generic_visit(node)

    def visit_Call(self, node: ast.Call) -> None:
        first = node.args[0] if node.args else None
        if ast.unparse(node.func) in ("setattr", "delattr") and isinstance(first, ast.Name | ast.Attribute):
            root: ast.expr = first
            while isinstance(root, ast.Attribute):
                root = root.value
            if isinstance(root, ast.Name) and self.is_imported(root.id):
                self.found.append(f"{self.path}:{node.lineno} patches {ast.unparse(first)}")
        self.generic_visit(node)


def no_monkeypatching(source: Source) -> Iterator[str]:
    """Rule 4: nothing assigns to an attribute of something it imported, and the package uses no mocks."""
    if not source.path.startswith("modellink/"):
        return
    yield from Patches(source).found
    for line, name in imports(source):
        if name.startswith("unittest.mock"):
            yield f"{source.path}:{line} imports {name}"


def short_files_and_functions(source: Source) -> Iterator[str]:
    """Rule 5: no file over 600 lines, no function over 80."""
    lines = source.text.count("\n")
    if lines > 600:
        yield f"{source.path} has {lines} lines"
    for node in walk(source, ast.FunctionDef, ast.AsyncFunctionDef):
        length = (node.end_lineno or 0) - node.lineno + 1  # type: ignore[attr-defined]
        if length > 80:
            yield f"{source.path}:{node.lineno} {node.name} has {length} lines"  # type: ignore[attr-defined]


def accelerators_only_in_device(source: Source) -> Iterator[str]:
    """Rule 6: "cuda" and "npu", as a literal (also "cuda:0") or as an attribute (torch.cuda), live in device.py."""
    if not source.path.startswith("modellink/") or source.path == "modellink/device.py":
        return
    text_only = docstrings(source)
    pattern = re.compile(rf"({'|'.join(ACCELERATORS)})(:\d+)?")
    for node in walk(source, ast.Constant, ast.Attribute):
        if isinstance(node, ast.Attribute):
            name = f".{node.attr}" if node.attr in ACCELERATORS else ""
        else:
            value = node.value  # type: ignore[attr-defined]
            is_name = isinstance(value, str) and id(node) not in text_only and pattern.fullmatch(value.strip())
            name = repr(value) if is_name else ""
        if name:
            yield f"{source.path}:{node.lineno} names {name}"  # type: ignore[attr-defined]
    for line, name in imports(source):
        if set(name.split(".")) & {*ACCELERATORS, "torch_npu"}:
            yield f"{source.path}:{line} imports {name}"


def nothing_untrusted_is_run(source: Source) -> Iterator[str]:
    """No unpickling of what a user hands in, and no code from a model folder."""
    if not source.path.startswith(("modellink/", *PROGRAMS, "benchmarks/")):
        return
    for node in walk(source, ast.Call):
        name = ast.unparse(node.func)  # type: ignore[attr-defined]
        options = {k.arg: getattr(k.value, "value", None) for k in node.keywords}  # type: ignore[attr-defined]
        where = f"{source.path}:{node.lineno}"  # type: ignore[attr-defined]
        if name == "torch.load" and options.get("weights_only") is not True:
            yield f"{where} torch.load without weights_only=True"
        for option, safe in (("weights_only", True), ("trust_remote_code", False), ("allow_pickle", False)):
            if option in options and options[option] is not safe:
                yield f"{where} {name} sets {option} to something other than {safe}"
        if re.fullmatch(r"(pickle|cPickle|dill|cloudpickle|joblib)\.(load|loads)", name):
            yield f"{where} calls {name}"


def nothing_is_left_undone(source: Source) -> Iterator[str]:
    """No markers of work to come, and no exception caught without a name."""
    marker = re.compile(r"\b(TO" + r"DO|FIX" + r"ME|XX" + r"X)\b")
    for number, line in enumerate(source.text.splitlines(), 1):
        if found := marker.search(line):
            yield f"{source.path}:{number} says {found[0]}"
    for node in walk(source, ast.Name, ast.ExceptHandler):
        if isinstance(node, ast.Name) and node.id == "NotImplemented" + "Error":
            yield f"{source.path}:{node.lineno} uses {node.id}"
        elif isinstance(node, ast.ExceptHandler) and node.type is None:
            yield f"{source.path}:{node.lineno} has a bare except"


PRIVATE_PATH = re.compile(
    r"(?<![\w.])/(work|root|home/[a-z]\w*|Users/\w+|opt/(wheels|pypi)\S*|tmp/(venv|brief|bash)\S*)(?=[/\"'`\s:,)]|$)"
)


def no_machine_paths(path: str, text: str) -> Iterator[str]:
    """No file names a folder of the machine it was written on."""
    for number, line in enumerate(text.splitlines(), 1):
        if found := PRIVATE_PATH.search(line):
            yield f"{path}:{number} names {found[0]}"


def import_time(body: list[ast.stmt]) -> Iterator[ast.AST]:
    """The statements that run on import: everything outside functions and `if TYPE_CHECKING`."""
    for node in body:
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
            continue
        if isinstance(node, ast.If) and "TYPE_CHECKING" in ast.unparse(node.test):
            yield from import_time(node.orelse)
            continue
        yield node
        for field in ("body", "orelse", "finalbody"):
            yield from import_time(getattr(node, field, []))
        for handler in getattr(node, "handlers", []):
            yield from import_time(handler.body)


def import_cycles(sources: list[Source]) -> list[str]:
    """Rule 5: every cycle among the imports that run when a module is imported, written a -> b -> a."""
    modules = {source.module for source in sources}
    graph: dict[str, set[str]] = {}
    for source in sources:
        edges = graph.setdefault(source.module, set())
        for _, name in imports(source, import_time(source.tree.body)):
            target = name if name in modules else name.rpartition(".")[0]
            if target in modules and target != source.module:
                edges.add(target)
    cycles: list[str] = []
    done: set[str] = set()

    def visit(module: str, trail: list[str]) -> None:
        if module in trail:
            cycles.append(" -> ".join([*trail[trail.index(module) :], module]))
        elif module not in done:
            for target in sorted(graph[module]):
                visit(target, [*trail, module])
            done.add(module)

    for module in sorted(graph):
        visit(module, [])
    return cycles


def referenced(function: ast.AST) -> set[str]:
    """Names a function mentions, called or handed on (a worker is passed to its launcher by name)."""
    nodes = list(ast.walk(function))
    return {n.id for n in nodes if isinstance(n, ast.Name)} | {n.attr for n in nodes if isinstance(n, ast.Attribute)}


def toothless_tests(sources: list[Source]) -> list[str]:
    """Tests that can only pass: neither they nor a helper of the test tree that they mention asserts or expects."""
    Function = ast.FunctionDef | ast.AsyncFunctionDef
    functions = [(source, node) for source in sources for node in ast.walk(source.tree) if isinstance(node, Function)]
    expecting = {"raises", "warns", "fail", "assert_close", "assert_equal", "assert_allclose", "assert_array_equal"}
    asserting = {
        node.name for _, node in functions if any(isinstance(n, ast.Assert) for n in ast.walk(node))
    } | expecting
    while True:
        reached = {node.name for _, node in functions if referenced(node) & asserting} - asserting
        if not reached:
            break
        asserting |= reached
    found = []
    for source, node in functions:
        if not node.name.startswith("test") or not Path(source.path).name.startswith("test_"):
            continue
        if node.name not in asserting:
            found.append(f"{source.path}:{node.lineno} {node.name} asserts nothing")
        if any(isinstance(statement, ast.Return) for statement in node.body):
            found.append(f"{source.path}:{node.lineno} {node.name} returns before its end")
    return found


Rule = Callable[[Source], Iterator[str]]
RULES: list[Rule] = [
    models_stay_single_device,
    no_global_args,
    megatron_stays_at_the_edges,
    no_monkeypatching,
    short_files_and_functions,
    accelerators_only_in_device,
    nothing_untrusted_is_run,
    nothing_is_left_undone,
]


# ------------------------------------------------------------------------------------- a rule catches what it forbids

BROKEN: list[tuple[Rule, str, str, str]] = [
    (models_stay_single_device, "models/a.py", "import torch.distributed as dist", "torch.distributed"),
    (models_stay_single_device, "models/a.py", "from torch import distributed", "torch.distributed"),
    (models_stay_single_device, "models/a.py", "import torch\ntorch.distributed.barrier()", "uses torch.distributed"),
    (models_stay_single_device, "models/a.py", "from modellink.parallel.mesh import m", "modellink.parallel"),
    (models_stay_single_device, "models/a.py", "from ..parallel import mesh", "modellink.parallel"),
    (models_stay_single_device, "models/a.py", "def f():\n    from modellink import parallel", "modellink.parallel"),
    (models_stay_single_device, "models/families/a.py", "from modellink.config import flags_table", "config.flags"),
    (no_global_args, "train/a.py", "args = parse()", "keeps a global args"),
    (no_global_args, "train/a.py", "def f():\n    return args.lr", "reads a global args"),
    (no_global_args, "train/a.py", "def f():\n    global _GLOBAL_ARGS\n    _GLOBAL_ARGS = 1", "_GLOBAL_ARGS"),
    (no_global_args, "train/a.py", "import m\nlr = m.get_args().lr", "calls m.get_args"),
    (megatron_stays_at_the_edges, "models/a.py", "self.linear_qkv = 1", "linear_qkv"),
    (megatron_stays_at_the_edges, "checkpoint/hf.py", "x = f'layers.{i}.self_attention.dense'", "self_attention."),
    (megatron_stays_at_the_edges, "train/a.py", "f(tensor_model_parallel_size=2)", "tensor_model_parallel_size"),
    (megatron_stays_at_the_edges, "train/a.py", "p = folder / 'mp_rank_00'", "mp_rank_"),
    (megatron_stays_at_the_edges, "train/a.py", "def word_embeddings(): pass", "word_embeddings"),
    (no_monkeypatching, "train/a.py", "import torch\ntorch.nn.Linear.forward = f", "patches torch.nn.Linear.forward"),
    (no_monkeypatching, "train/a.py", "from torch import nn\ndef f(x):\n    nn.Linear.reset += x", "patches nn.Linear"),
    (no_monkeypatching, "train/a.py", "import torch\nsetattr(torch.nn, 'Linear', f)", "patches torch.nn"),
    (no_monkeypatching, "train/a.py", "import sys\nsys.stdout = f", "patches sys.stdout"),
    (no_monkeypatching, "train/a.py", "from unittest.mock import patch", "unittest.mock"),
    (short_files_and_functions, "train/a.py", "x = 1\n" * 601, "601 lines"),
    (short_files_and_functions, "train/a.py", "def f():\n" + "    x = 1\n" * 80, "f has 81 lines"),
    (accelerators_only_in_device, "train/a.py", "x.to('cuda:0')", "'cuda:0'"),
    (accelerators_only_in_device, "train/a.py", "import torch\ntorch.npu.synchronize()", ".npu"),
    (accelerators_only_in_device, "train/a.py", "from torch import cuda", "torch.cuda"),
    (accelerators_only_in_device, "train/a.py", "import torch_npu", "torch_npu"),
    (nothing_untrusted_is_run, "train/a.py", "torch.load(p, weights_only=False)", "weights_only"),
    (nothing_untrusted_is_run, "train/a.py", "torch.load(p)", "without weights_only=True"),
    (nothing_untrusted_is_run, "train/a.py", "from_pretrained(p, trust_remote_code=True)", "trust_remote_code"),
    (nothing_untrusted_is_run, "train/a.py", "np.load(p, allow_pickle=flag)", "allow_pickle"),
    (nothing_untrusted_is_run, "train/a.py", "pickle.load(handle)", "pickle.load"),
    (nothing_is_left_undone, "train/a.py", "x = 1  # TO" + "DO later", "TO" + "DO"),
    (nothing_is_left_undone, "train/a.py", "raise NotImplemented" + "Error('x')", "NotImplemented"),
    (nothing_is_left_undone, "train/a.py", "try:\n    f()\nexcept:\n    pass", "bare except"),
]
KEPT: list[tuple[Rule, str, str]] = [
    (models_stay_single_device, "parallel/a.py", "import torch.distributed as dist"),
    (models_stay_single_device, "models/a.py", "from modellink.config.schema import ModelConfig"),
    (no_global_args, "train/a.py", "def f(args):\n    return [args.lr for _ in args]"),
    (no_global_args, "train/a.py", "from typing import get_args\nkinds = get_args(Kind)"),
    (megatron_stays_at_the_edges, "config/flags_table.py", "FLAGS = ['tensor_model_parallel_size']"),
    (megatron_stays_at_the_edges, "checkpoint/megatron.py", "NAMES = ['linear_qkv']"),
    (megatron_stays_at_the_edges, "models/a.py", "'''Megatron's linear_qkv, split.'''\ntie_word_embeddings = True"),
    (no_monkeypatching, "train/a.py", "import torch\ntorch.backends.cudnn.benchmark = False"),
    (no_monkeypatching, "train/a.py", "from m import model\ndef f(model):\n    model.weight = 1\n    self.x = 2"),
    (short_files_and_functions, "train/a.py", "x = 1\n" * 600),
    (accelerators_only_in_device, "device.py", "kind = 'cuda'"),
    (accelerators_only_in_device, "train/a.py", "'''Runs on cuda.'''\nmessage = 'set MODELLINK_DEVICE=cuda'"),
    (nothing_untrusted_is_run, "train/a.py", "torch.load(p, weights_only=True)\nyaml.safe_load(p)"),
    (nothing_is_left_undone, "train/a.py", "try:\n    f()\nexcept ValueError:\n    pass"),
]


@pytest.mark.parametrize(("rule", "path", "text", "found"), BROKEN)
def test_rule_catches(rule: Rule, path: str, text: str, found: str) -> None:
    violations = list(rule(Source(f"modellink/{path}", text)))
    assert violations, "the rule lets this pass"
    assert found in violations[0]


@pytest.mark.parametrize(("rule", "path", "text"), KEPT)
def test_rule_allows(rule: Rule, path: str, text: str) -> None:
    assert list(rule(Source(f"modellink/{path}", text))) == []


def test_every_rule_is_tried() -> None:
    assert {entry[0] for entry in BROKEN} == {entry[0] for entry in KEPT} == set(RULES)


def test_import_cycles_are_found() -> None:
    a = Source("modellink/a.py", "from modellink import b")
    b = Source("modellink/b.py", "try:\n    from .c import f\nexcept ImportError:\n    raise")
    back = Source("modellink/c.py", "import modellink.a")
    lazy = Source("modellink/c.py", "def f():\n    import modellink.a\nif TYPE_CHECKING:\n    import modellink.a")
    assert import_cycles([a, b, back]) == ["modellink.a -> modellink.b -> modellink.c -> modellink.a"]
    assert import_cycles([a, b, lazy]) == []


def test_toothless_tests_are_found() -> None:
    helper = Source("tests/dist/helper.py", "def same(x, y):\n    assert x == y\ndef launch(f):\n    f()")
    text = "def test_good():\n    launch(worker)\ndef worker():\n    same(1, 1)\ndef test_bad():\n    launch(print)"
    early = "\ndef test_early():\n    return\n    assert False"
    assert toothless_tests([helper, Source("tests/unit/test_a.py", text + early)]) == [
        "tests/unit/test_a.py:5 test_bad asserts nothing",
        "tests/unit/test_a.py:7 test_early returns before its end",
    ]


@pytest.mark.parametrize("folder", ["home/alice", "work", "root", "Users/bob", "opt/wheels"])
def test_machine_paths_are_found(folder: str) -> None:
    slash = "/"
    assert list(no_machine_paths("a.md", f"load {slash}{folder}{slash}model"))
    assert not list(no_machine_paths("a.md", f"load ./{folder}{slash}model or {slash}path/to/model"))


# ------------------------------------------------------------------------------------------------- the rules are kept


def tracked() -> list[str]:
    """Files that belong to the repository: git's list, or all that is not hidden or built where there is no git."""
    listed = subprocess.run(
        ["git", "ls-files", "-co", "--exclude-standard"], cwd=ROOT, capture_output=True, text=True, check=False
    )
    if listed.returncode == 0 and listed.stdout:
        return [name for name in listed.stdout.splitlines() if (ROOT / name).is_file()]
    skip = re.compile(r"(^|/)(\.(?!ci)[^/]+/|build/|dist/|[^/]+\.egg-info/|__pycache__/)")
    names = (path.relative_to(ROOT).as_posix() for path in ROOT.rglob("*") if path.is_file())
    return [name for name in names if not skip.search(name)]


@pytest.fixture(scope="module")
def sources() -> list[Source]:
    return [Source(name, (ROOT / name).read_text()) for name in tracked() if name.endswith(".py")]


@pytest.mark.parametrize("rule", RULES, ids=lambda rule: rule.__name__)
def test_rule_is_kept(rule: Rule, sources: list[Source]) -> None:
    assert len(sources) > 20
    violations = [violation for source in sources for violation in rule(source)]
    assert not violations, "\n" + "\n".join(violations)


def test_no_import_cycle(sources: list[Source]) -> None:
    cycles = import_cycles([source for source in sources if source.path.startswith("modellink/")])
    assert not cycles, "\n" + "\n".join(cycles)


def test_every_test_can_fail(sources: list[Source]) -> None:
    toothless = toothless_tests([source for source in sources if source.path.startswith("tests/")])
    assert not toothless, "\n" + "\n".join(toothless)


def test_no_file_names_this_machine() -> None:
    found = []
    for name in tracked():
        try:
            text = (ROOT / name).read_text()
        except UnicodeDecodeError:
            continue  # pictures and data
        found += no_machine_paths(name, text)
    assert not found, "\n" + "\n".join(found)


def test_importing_modellink_imports_no_torch() -> None:
    program = (
        "import sys, modellink; dir(modellink); print(sorted({'torch', 'numpy', 'transformers'} & set(sys.modules)))"
    )
    done = subprocess.run([sys.executable, "-c", program], cwd=ROOT, capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"


def test_public_names_load_and_typos_raise() -> None:
    import modellink

    assert {"GPTModel", "convert", "data", "compat", "__version__"} <= set(dir(modellink))
    assert [name for name in modellink.__all__ if getattr(modellink, name, None) is None] == []
    with pytest.raises(AttributeError, match="has no attribute 'GTPModel'"):
        modellink.GTPModel  # noqa: B018


@pytest.mark.parametrize("name", PROGRAMS)
def test_root_programs_are_short_and_name_themselves(name: str) -> None:
    text = (ROOT / f"{name}.py").read_text()
    assert f'program("{name}")' in text
    assert len(text.splitlines()) <= 8
