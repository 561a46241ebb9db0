"""Options <-> command-line flags. A dataclass field is an option; this module gives it its flags, reads a command
line or a YAML mapping, and says how a value would be spelled.

What a flag does is data (`flags_table.py`). Each flag has exactly one status per program: *native* (it is a field),
*alias* (it sets fields), *accepted* (no effect: warns and says why) or *refused* (an error that says why and what to
use instead).
"""

from __future__ import annotations

import argparse
import dataclasses
import functools
import types
import typing
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from modellink.config import flags_table as rows
from modellink.config import schema
from modellink.errors import ModelLinkError
from modellink.registry import suggest

RUN_SECTIONS = ("model", "parallel", "optimizer", "train", "data", "tokenizer", "checkpoint")
PROGRAM_SECTIONS: dict[str, tuple[str, ...]] = {
    "train": RUN_SECTIONS,
    "generate": (*RUN_SECTIONS, "generate"),
    "chat": (*RUN_SECTIONS, "generate"),
    "evaluate": (*RUN_SECTIONS, "generate", "evaluate"),
    "preprocess": ("preprocess",),
    "convert": ("convert",),
}


@dataclass(frozen=True, eq=False)
class Flag:
    """One row: spellings (the preferred one first), what follows the flag on the command line, and what it does.

    `kind` is "switch" (nothing follows), "int", "float", "str" or a list of them ("ints", "strs"). `path` is the
    field a native row stores to; `sets` maps fields to a constant, `rows.VALUE` or a function of (value, look).
    """

    names: tuple[str, ...]
    status: str
    kind: str
    path: str | None = None
    sets: Mapping[str, Any] = dataclasses.field(default_factory=dict)
    negatives: tuple[str, ...] = ()
    harmless: tuple[str, ...] = ()
    late: bool = False
    needs: str | None = None
    help: str = ""
    choices: tuple[Any, ...] | None = None
    default: Any = None
    order: int = 0

    @property
    def name(self) -> str:
        return self.names[0] if self.names else self.negatives[0]

    @property
    def spellings(self) -> tuple[str, ...]:
        return self.names + self.negatives


@dataclass(frozen=True)
class Given:
    """A flag as the user gave it: `value` is already typed, `spelling` is what was written, `origin` where."""

    flag: Flag
    value: Any
    spelling: str
    origin: str


def section_types(program: str) -> dict[str, type]:
    """Section name -> dataclass, for the sections of `program`."""
    if program == "preprocess":
        from modellink.config.preprocess_schema import PreprocessConfig

        return {"preprocess": PreprocessConfig, "source": schema.SourceConfig}
    if program == "convert":
        from modellink.config.convert_schema import ConvertConfig

        return {"convert": ConvertConfig, "source": schema.SourceConfig}
    all_types = typing.get_type_hints(schema.Config)
    return {name: all_types[name] for name in PROGRAM_SECTIONS[program]} | {"source": schema.SourceConfig}


def field_kind(annotation: Any) -> str:
    """Kind of a field annotated int, float, str, bool or a list of int or str, each possibly `| None`."""
    if isinstance(annotation, types.UnionType) or typing.get_origin(annotation) is typing.Union:
        annotation = next(a for a in typing.get_args(annotation) if a is not type(None))
    if typing.get_origin(annotation) is list:
        return typing.get_args(annotation)[0].__name__ + "s"
    return {bool: "switch"}.get(annotation, annotation.__name__)


def _native(section: str, cls: type, program: str) -> list[Flag]:
    """The native rows of one section: one per field."""
    hints = typing.get_type_hints(cls)
    made = []
    for field in dataclasses.fields(cls):
        if program not in field.metadata.get("programs", (program,)):
            continue
        path, kind, dashed = f"{section}.{field.name}", field_kind(hints[field.name]), field.name.replace("_", "-")
        extra = rows.SPELLINGS.get(path, "").split()
        names = [n for n in extra if not n.startswith("!")] + [f"--{dashed}"]
        negatives = [n[1:] for n in extra if n.startswith("!")]
        if kind == "switch" and not field.name.startswith("no_"):
            negatives.append(f"--no-{dashed}")
        default = field.default if field.default is not dataclasses.MISSING else None
        if field.default_factory is not dataclasses.MISSING:
            default = field.default_factory()
        made.append(
            Flag(
                names=tuple(dict.fromkeys(names)),
                status="native",
                kind=kind,
                path=path,
                negatives=tuple(dict.fromkeys(negatives)),
                help=field.metadata.get("help", ""),
                choices=field.metadata.get("choices"),
                default=default,
            )
        )
    return made


def _split_kind(text: str) -> tuple[str, str]:
    """A row's first column is "--flag" or "--flag:kind"."""
    name, _, kind = text.partition(":")
    return name, kind or "switch"


@functools.cache
def flags(program: str) -> tuple[Flag, ...]:
    """All rows of `program`, native ones first. A spelling that two rows claim is a programming error."""
    group = program if program in ("preprocess", "convert") else "run"
    inert = [row[1] for row in rows.ACCEPTED[group]] + [row[1] for row in rows.REFUSED[group]]
    listed = {_split_kind(name)[0] for names in inert for name in names.split()}
    fields = [row for section, cls in section_types(program).items() for row in _native(section, cls, program)]
    made = [row for row in fields if row.name not in listed]  # a field kept for old callers has the table's status
    for order, (text, sets, help_text, *options) in enumerate(rows.ALIASES.get(group, ())):
        name, kind = _split_kind(text)
        extra: dict[str, Any] = options[0] if options else {}
        made.append(Flag((name,), "alias", kind, sets=sets, help=help_text, order=order, **extra))
    for why, names in rows.ACCEPTED[group]:
        made += [Flag((n,), "accepted", k, help=why) for n, k in map(_split_kind, names.split())]
    for why, names, harmless in rows.REFUSED[group]:
        made += [Flag((n,), "refused", k, help=why, harmless=harmless) for n, k in map(_split_kind, names.split())]
    if program == "evaluate":
        made += [Flag(("--greedy",), "accepted", "switch", help="decoding is greedy unless --do-sample is given")]
    _by_name(made)
    return tuple(made)


def _by_name(table: Iterable[Flag]) -> dict[str, Flag]:
    found: dict[str, Flag] = {}
    for flag in table:
        for spelling in flag.spellings:
            assert spelling not in found, f"{spelling} has two rows"
            found[spelling] = flag
    return found


@functools.cache
def by_name(program: str) -> Mapping[str, Flag]:
    """Spelling -> row."""
    return types.MappingProxyType(_by_name(flags(program)))


@functools.cache
def _by_path() -> dict[str, Flag]:
    tables = [flag for program in ("train", "generate", "evaluate") for flag in flags(program)]
    return {flag.path: flag for flag in reversed(tables) if flag.path}


def flag_of(path: str, value: Any = True) -> str:
    """The preferred spelling of a field ("parallel.tensor_parallel" -> "--tensor-model-parallel-size").

    For a switch, the spelling that gives it `value`.
    """
    flag = _by_path()[path]
    return flag.negatives[0] if flag.kind == "switch" and value is False else flag.name


def spell(path: str, value: Any) -> str:
    """What to type to give the field `value`: "--norm-epsilon 1e-06", "--disable-bias-linear"."""
    flag = _by_path()[path]
    if flag.kind == "switch":
        return flag_of(path, value)
    joint = "," if flag.kind == "ints" else " "
    return f"{flag.name} {joint.join(map(str, value)) if isinstance(value, list) else value}"


# -- values -----------------------------------------------------------------------------------------------------------


def _integer(text: Any) -> int:
    """Integers may be written 8192, 8192.0 or 1e6, as Megatron's float-typed flags are."""
    try:
        return int(text)
    except ValueError:
        number = float(text)
        if not number.is_integer():
            raise ValueError(f"{text!r} is no whole number") from None
        return int(number)


_SCALARS: dict[str, tuple[Callable[[Any], Any], str]] = {
    "int": (_integer, "a whole number"),
    "float": (float, "a number"),
    "str": (str, "text"),
}


def _scalar(kind: str, value: Any, spelling: str) -> Any:
    parse, word = _SCALARS[kind]
    if isinstance(value, bool | dict | list) or value is None:
        raise ModelLinkError(f"{spelling} needs {word}, not {value!r}.")
    try:
        return parse(value)
    except ValueError:
        raise ModelLinkError(f"{spelling} needs {word}, not {value!r}.") from None


def convert(flag: Flag, value: Any, spelling: str) -> Any:
    """Turn command-line text or a YAML value into the type of `flag`; errors name the flag as it was spelled."""
    if flag.kind == "switch":
        if not isinstance(value, bool):
            raise ModelLinkError(f"{spelling} is a switch: it is true or false, not {value!r}.")
        return value
    if flag.kind in ("ints", "strs", "floats"):
        items = value if isinstance(value, list) else [value]
        if flag.kind != "strs":
            items = [
                part for item in items for part in (item.split(",") if isinstance(item, str) else [item]) if part != ""
            ]
        return [_scalar(flag.kind[:-1], item, spelling) for item in items]
    typed = _scalar(flag.kind, value, spelling)
    typed = rows.VALUE_ALIASES.get(flag.path or "", {}).get(typed, typed)
    refused = rows.REFUSED_VALUES.get(flag.path or "", {})
    if typed in refused:
        raise ModelLinkError(f"{spelling} {typed} is refused: {refused[typed]}.")
    if flag.choices and typed not in flag.choices:
        names = ", ".join(map(str, flag.choices))
        raise ModelLinkError(
            f"{spelling} {value} is unknown.{suggest(str(value), map(str, flag.choices))} Known: {names}."
        )
    return typed


# -- the command line -------------------------------------------------------------------------------------------------


class _Record(argparse.Action):
    """Keep the text after a flag and the spelling used; a flag given twice keeps the last."""

    def __call__(self, parser: Any, namespace: Any, values: Any, option_string: str | None = None) -> None:
        setattr(namespace, self.dest, (values, option_string))


class _Parser(argparse.ArgumentParser):
    def error(self, message: str) -> typing.NoReturn:
        raise ModelLinkError(f"{message} (`{self.prog} --help` lists every option).")


class _Help(argparse.HelpFormatter):
    def __init__(self, prog: str) -> None:
        super().__init__(prog, max_help_position=34, width=118)


def _help_text(flag: Flag) -> str:
    parts = [flag.help]
    if flag.choices:
        parts.append("one of " + ", ".join(map(str, flag.choices)))
    if flag.default not in (None, "", False) and flag.kind != "switch":
        parts.append(f"default {flag.default}")
    if flag.kind == "switch" and flag.status == "native":
        parts.append("default on" if flag.default else "default off")
    return "; ".join(parts).replace("%", "%%")


@functools.cache
def build_parser(program: str) -> argparse.ArgumentParser:
    """argparse for `program`, generated from the table: options grouped by section; abbreviations in `preprocess`
    only.
    """
    note = "docs/flags.md lists every flag, also Megatron's that are accepted without effect or refused, and why."
    parser = _Parser(
        prog=f"modellink {program}",
        usage=f"modellink {program} [options]",
        description=rows.PROGRAMS[program],
        epilog=note,
        formatter_class=_Help,
        allow_abbrev=program == "preprocess",
    )
    groups = {
        section: parser.add_argument_group(section, (cls.__doc__ or "").strip().splitlines()[0])
        for section, cls in section_types(program).items()
    }
    if any(flag.status == "alias" for flag in flags(program)):
        text = "Flags that set several options at once or state one in other units."
        groups["alias"] = parser.add_argument_group("aliases", text)
    for index, flag in enumerate(flags(program)):
        hidden = flag.status in ("accepted", "refused")
        group: Any = parser if hidden else groups[flag.path.split(".")[0] if flag.path else "alias"]
        nargs: Any = {"switch": 0, "ints": "+", "strs": "*", "floats": "+", "any": "*"}.get(flag.kind)
        metavar = None if flag.kind == "switch" else flag.kind.rstrip("s").upper()
        common: dict[str, Any] = {
            "action": _Record,
            "nargs": nargs,
            "dest": f"flag{index}",
            "default": argparse.SUPPRESS,
        }
        help_text = argparse.SUPPRESS if hidden else _help_text(flag)
        if flag.kind == "switch" and not flag.default and flag.negatives:
            group.add_argument(*flag.names, help=help_text, **common)
            group.add_argument(*flag.negatives, help=argparse.SUPPRESS, **common)
        else:
            group.add_argument(*flag.spellings, help=help_text, metavar=metavar, **common)
    return parser


def parse(argv: Sequence[str], program: str) -> list[Given]:
    """Read a command line. Unknown flags (with suggestions) and values of the wrong type raise ModelLinkError."""
    namespace, unknown = build_parser(program).parse_known_args(list(argv))
    table = flags(program)
    for text in unknown:
        if not text.strip(" \t\\"):
            continue  # a blank behind the backslash that should end its line makes a word of nothing
        name = text.split("=")[0]
        if name.startswith("-"):
            raise ModelLinkError(f"unknown flag {name}.{_suggest_flag(name, program)}")
        raise ModelLinkError(f"unexpected argument {text!r}: every option starts with --.")
    given = []
    for key, (values, spelling) in vars(namespace).items():
        flag = table[int(key.removeprefix("flag"))]
        given.append(_given(flag, values, spelling, f"flag {spelling}"))
    return given


def _given(flag: Flag, value: Any, spelling: str, origin: str) -> Given:
    if flag.kind == "switch":
        value = spelling not in flag.negatives
    if flag.status in ("native", "alias"):
        value = convert(flag, value, spelling)
    return Given(flag, value, spelling, origin)


def _suggest_flag(name: str, program: str) -> str:
    known = [s for flag in flags(program) if flag.status in ("native", "alias") for s in flag.spellings]
    normal = "--" + name.lstrip("-").replace("_", "-")
    return f" Did you mean {normal}?" if normal in known else suggest(name, known)


# -- YAML -------------------------------------------------------------------------------------------------------------


def parse_mapping(content: Mapping[str, Any], program: str, source: str) -> list[Given]:
    """Read a YAML mapping: keys are flag names (dashes or underscores) or field names, optionally grouped by section.

    `source` is the file's name in messages. None leaves an option at its default.
    """
    sections = section_types(program)
    table = by_name(program)
    paths = {flag.path: flag for flag in flags(program) if flag.path}
    given: list[Given] = []
    flat: list[tuple[str, Any, str | None]] = []
    for key, value in content.items():
        if isinstance(value, Mapping):
            if key not in sections:
                raise ModelLinkError(f"{source}: unknown section {key!r}.{suggest(str(key), sections)}")
            flat += [(str(inner), v, str(key)) for inner, v in value.items()]
        else:
            flat.append((str(key), value, None))
    for key, value, section in flat:
        spelling = "--" + key.replace("_", "-")
        flag = paths.get(f"{section}.{key.replace('-', '_')}") or table.get(f"--{key}") or table.get(spelling)
        if flag is None:
            known = {s[2:].replace("-", "_") for s in table} | {p.split(".")[1] for p in paths}
            raise ModelLinkError(f"{source}: unknown key {key!r}.{suggest(key.replace('-', '_'), known)}")
        if value is None:
            continue
        origin = f"{source}: {key}"
        if flag.kind == "switch":
            value = convert(flag, value, origin)
            if not flag.path and not value:
                continue
            given.append(Given(flag, value != (spelling in flag.negatives), origin, origin))
        else:
            given.append(_given(flag, value, origin, origin))
    return given


# -- what was given -> fields -----------------------------------------------------------------------------------------


def check_statuses(given: Sequence[Given]) -> list[str]:
    """Raise for refused flags that ask for something; return one warning per reason for flags without effect."""
    for item in given:
        if item.flag.status == "refused" and not _is_harmless(item):
            raise ModelLinkError(f"{item.spelling} is refused: {item.flag.help}.")
    reasons: dict[str, list[str]] = {}
    for item in given:
        if item.flag.status == "accepted" and item.flag.help != rows.SILENT:
            reasons.setdefault(item.flag.help, []).append(item.spelling)
    return [f"{', '.join(names)}: no effect, {why}" for why, names in reasons.items()]


def _is_harmless(item: Given) -> bool:
    value = " ".join(map(str, item.value)) if isinstance(item.value, list) else str(item.value)
    return value in item.flag.harmless or item.value is False


def assignments(given: Sequence[Given], current: Callable[[str], Any]) -> tuple[dict[str, tuple[Any, str]], list[str]]:
    """Fields that `given` sets -> (value, origin), and warnings. Aliases come first, native flags win over them.

    `current(path)` answers functions in the table that need another field; fields set here are seen first.
    """
    found: dict[str, tuple[Any, str]] = {}
    warnings: list[str] = []
    names = {item.flag.name for item in given}
    native = {item.flag.path: (item.value, item.origin) for item in given if item.flag.path}

    def look(path: str) -> Any:
        if path.startswith("flag "):
            return path.removeprefix("flag ") in names
        known = native | found
        return known[path][0] if path in known else current(path)

    def apply_aliases(late: bool) -> None:
        chosen = [i for i in given if i.flag.status == "alias" and i.flag.late == late]
        for item in sorted(chosen, key=lambda i: (i.origin.startswith("flag"), i.flag.order)):
            if item.flag.needs and item.flag.needs not in names:
                warnings.append(f"{item.spelling}: no effect without {item.flag.needs}")
                continue
            for path, what in item.flag.sets.items():
                value = item.value if what is rows.VALUE else what(item.value, look) if callable(what) else what
                found[path] = (value, item.origin)

    apply_aliases(late=False)
    found |= native
    apply_aliases(late=True)
    return found, warnings
