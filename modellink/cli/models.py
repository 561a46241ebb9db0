"""`modellink models`: the presets that `--model` takes, as a table; with a name, all that is known of one.

What is shown is gathered in `model_facts.py` as plain data; this module only lays it out.
"""

from __future__ import annotations

import argparse
import json
import shlex
from collections.abc import Sequence, Sized
from typing import TYPE_CHECKING, Any, NoReturn, TypeVar

from modellink.errors import ModelLinkError
from modellink.registry import suggest

if TYPE_CHECKING:
    from rich.console import Console
    from rich.table import Table

T = TypeVar("T", bound=Sized)
_INDENT = "  "
_WIDE = 100  # columns from which the table of presets has room for more


class _Parser(argparse.ArgumentParser):
    def error(self, message: str) -> NoReturn:
        raise ModelLinkError(f"{message} (`{self.prog} --help` lists every option).")


def _parser() -> argparse.ArgumentParser:
    parser = _Parser(
        "modellink models",
        description="List the presets of --model, or show the shape, parameters, memory and recipes of one.",
    )
    parser.add_argument("name", nargs="*", help="preset to show, for example llama2-7b")
    parser.add_argument("--family", help="list only this family, for example qwen2")
    parser.add_argument("--memory", type=float, default=80, metavar="GIB", help="device memory of recipes (default 80)")
    parser.add_argument("--json", action="store_true", help="print JSON")
    parser.add_argument("--debug", action="store_true", help="show tracebacks")
    return parser


def run(argv: Sequence[str]) -> int:
    """Print the table or one preset; ModelLinkError for names that are not known."""
    from rich.console import Console

    from modellink.cli.model_facts import facts, summary
    from modellink.models.presets import presets

    options = _parser().parse_args(list(argv))
    if len(options.name) > 1:
        raise ModelLinkError(f"models takes at most one preset name, not {' '.join(options.name)}.")
    name = options.name[0] if options.name else None
    if options.memory <= 0:
        raise ModelLinkError(f"--memory {options.memory:g} must be above 0: the GiB of one device.")
    if name and options.family:
        raise ModelLinkError(f"give either a preset ({name}) or --family {options.family}, not both.")
    console = Console(highlight=False)
    if name:
        presets.get(name)
        found = facts(name, int(options.memory * 2**30))
        print(json.dumps(found, indent=2)) if options.json else _print_one(console, found)
        return 0
    rows = _of_family([summary(name) for name in presets], options.family)
    print(json.dumps(rows, indent=2)) if options.json else _print_list(console, rows)
    return 0


def _of_family(rows: list[dict[str, Any]], wanted: str | None) -> list[dict[str, Any]]:
    """The rows of one family, which may be named as its models are ("llama3.1" is of family llama)."""
    if wanted is None:
        return rows
    from modellink.models.families import FAMILIES

    family = FAMILIES.get(wanted).name if wanted in FAMILIES else wanted
    found = [row for row in rows if row["family"] == family]
    if not found:
        known = sorted({row["family"] for row in rows})
        raise ModelLinkError(
            f"no preset is of family {wanted!r}.{suggest(wanted, known)} Families: {', '.join(known)}."
        )
    return found


def short(count: float) -> str:
    """ "6.74B", "127K"."""
    for unit, size in (("B", 1e9), ("M", 1e6), ("K", 1e3)):
        if count >= size:
            return f"{count / size:.{2 if count < 100 * size else 1}f}{unit}"
    return f"{count:.0f}"


def _tokens(number: int | None) -> str:
    return "" if number is None else f"{number // 1024}K" if number >= 1024 else str(number)


# --- the table of presets ---------------------------------------------------------------------------------------------


def _print_list(console: Console, rows: list[dict[str, Any]]) -> None:
    from rich.markup import escape
    from rich.padding import Padding

    from modellink.models.families import FAMILIES

    columns = {"preset": 17, "params": 7, "active": 7, "layers": 6, "hidden": 6, "heads": 7, "MLP": 6, "experts": 7}
    columns |= {"tokens": 6}
    if console.width >= _WIDE:
        columns |= {"vocabulary": 10}
    header = _grid(columns)
    header.add_row(*columns, style="bold")
    console.print(header)
    families: dict[str, list[dict[str, Any]]] = {}
    for row in rows:
        families.setdefault(row["family"], []).append(row)
    for family, members in families.items():
        covers = FAMILIES.get(family).covers if family in FAMILIES else ""
        console.print(
            f"\n[bold cyan]{family}[/]  [dim]{escape(covers)}[/]", no_wrap=True, overflow="ellipsis", crop=True
        )
        table = _grid(columns)
        for row in members:
            table.add_row(*_cells(row)[: len(columns)])
        console.print(table)
        for row in members:
            if row["note"]:
                console.print(Padding(f"[dim]{row['name']}: {row['note']}[/]", (0, 0, 0, 2)))
    experts = "experts/those a token goes to; " if any("num_experts" in row["fields"] for row in rows) else ""
    console.print(
        f"\n[dim]{len(rows)} presets. heads: query/key-value; {experts}tokens: longest sequence.\n"
        "`modellink models NAME` shows parameters, memory and recipes of one; --family NAME and --json also exist.[/]"
    )


def _grid(columns: dict[str, int]) -> Table:
    from rich.table import Table

    table = Table.grid(padding=(0, 1, 0, 0))
    for name, width in columns.items():
        table.add_column(name, width=width, justify="left" if name == "preset" else "right", no_wrap=True)
    return table


def _cells(row: dict[str, Any]) -> list[str]:
    fields = row["fields"]
    experts = f"{fields['num_experts']}/{fields['router_topk']}" if "num_experts" in fields else ""
    return [
        row["name"],
        short(row["parameters"]),
        short(row["active_parameters"]) if experts else "",
        str(fields["num_layers"]),
        str(fields["hidden_size"]),
        f"{fields['num_attention_heads']}/{fields['num_key_value_heads']}",
        str(fields["moe_ffn_hidden_size"] if experts else fields["ffn_hidden_size"]),
        experts,
        _tokens(fields.get("max_position_embeddings")),
        f"{fields['vocab_size']:,}",
    ]


# --- one preset -------------------------------------------------------------------------------------------------------


def _print_one(console: Console, found: dict[str, Any]) -> None:
    total, active = found["parameters"], found["active_parameters"]
    counted = f"{short(total)} parameters" + (f", {short(active)} active" if active != total else "")
    console.print(f"\n[bold cyan]{found['name']}[/]  {counted}  [dim]family {found['family']}[/]")
    if found["note"]:
        console.print(f"[dim]{found['note']}[/]")
    _print_shape(console, found["groups"])
    _print_parameters(console, found)
    _print_memory(console, found)
    if found["published"]:
        _print_published(console, found["published"])
    _print_recipes(console, found["recipes"])


def _heading(console: Console, title: str, remark: str = "") -> None:
    console.print(f"\n[bold]{title}[/]" + (f"  [dim]{remark}[/]" if remark else ""))


def _table(*columns: str) -> Table:
    """Columns of numbers to the right of a first one of words."""
    from rich import box
    from rich.table import Table

    table = Table(box=box.SIMPLE_HEAD, padding=(0, 1), pad_edge=True, show_edge=False, header_style="dim")
    for place, name in enumerate(columns):
        table.add_column(name, justify="right" if place else "left", no_wrap=bool(place))
    return table


def _print_shape(console: Console, groups: dict[str, dict[str, Any]]) -> None:
    from rich.table import Table
    from rich.text import Text

    _heading(console, "Shape", "what the preset states")
    table = Table.grid(padding=(0, 2, 0, 0))
    width = max(map(len, groups)) + len(_INDENT)
    table.add_column(style="dim", width=width)
    table.add_column(overflow="fold")
    for group, fields in groups.items():
        # not left to rich, which would part a name from its value
        stated = [Text.assemble(f"{name} ", (_value(value), "bold")) for name, value in fields.items()]
        lines = [Text(", ").join(line) for line in _flow(stated, console.width - width - 4, between=2)]
        table.add_row(_INDENT + group, Text(",\n").join(lines))
    console.print(table)


def _value(value: Any) -> str:
    return f"{value:.10g}" if isinstance(value, float) else str(value)


def _print_parameters(console: Console, found: dict[str, Any]) -> None:
    total, active = found["parameters"], found["active_parameters"]
    sparse = active != total
    _heading(console, "Parameters", "active: those that one token meets" if sparse else "")
    table = _table("part", "parameters", "share", *(["active"] if sparse else []))
    for part, (all_of_it, met) in found["parts"].items():
        known = f"{all_of_it:,}" if all_of_it else "tied"
        table.add_row(part, known, f"{all_of_it / total:.1%}" if all_of_it else "", *([f"{met:,}"] if sparse else []))
    table.add_section()
    table.add_row("all", f"{total:,}", "", *([f"{active:,}"] if sparse else []), style="bold")
    console.print(table)


def _print_memory(console: Console, found: dict[str, Any]) -> None:
    from modellink.parallel.memory import gib

    sequence, flops = found["sequence"], found["training_flops_per_token"]
    cache, full = found["cache_bytes_per_token"], found["full_cache_bytes_per_token"]
    instead = f" (latents; as keys and values: {1024 * full / 2**20:,.1f} MiB)" if cache != full else ""
    _heading(console, "Memory and work")
    console.print(f"{_INDENT}weights in bf16      {gib(found['weights_bytes'])}")
    console.print(f"{_INDENT}cache of 1024 tokens {1024 * cache / 2**20:,.1f} MiB{instead}")
    console.print(
        f"{_INDENT}training one token   {_flops(flops['causal'])} at sequence {sequence}"
        f" (all scores: {_flops(flops['full'])})\n"
    )
    rows = found["training_bytes"]
    unit, size = ("MiB", 2**20) if rows[0]["total"] < 2**30 else ("GiB", 2**30)
    table = _table(f"{unit} on each device", "devices", "weights", "gradients", "Adam fp32", "total")
    for row in rows:
        sizes = [f"{row[key] / size:,.1f}" for key in ("weights", "gradients", "optimizer", "total")]
        table.add_row(row["flags"] or "nothing sharded", str(row["devices"]), *sizes)
    console.print(table)


def _flops(count: float) -> str:
    prefix, size = next((p, s) for p, s in (("T", 1e12), ("G", 1e9), ("M", 1e6), ("K", 0.0)) if count >= s)
    return f"{count / (size or 1e3):.2f} {prefix}FLOP"


def _print_published(console: Console, rows: list[dict[str, Any]]) -> None:
    _heading(console, "Published by the reference", "training, tokens per second and device")
    table = _table("sequence", "nodes x devices", "device", "newer device", "GPU system")
    for row in rows:
        figures = [row[key] for key in ("device", "newer_device", "gpu_system")]
        table.add_row(row["sequence"], row["nodes_x_devices"], *("-" if n is None else f"{n:,}" for n in figures))
    console.print(table)


def _print_recipes(console: Console, rows: list[dict[str, Any]]) -> None:
    from modellink.parallel.memory import gib

    _heading(console, "Recipes", "hf/, megatron/, runs/, data/ and tokenizer are folders of yours")
    for row in rows:
        memory = f" [dim]({gib(row['memory'])} on each, at least)[/]" if "memory" in row else ""
        console.print(f"\n{_INDENT}[green]# {row['title']}[/]{memory}")
        if "command" in row:
            # not through rich: what is pasted must not be wrapped or coloured
            print("\n".join(_INDENT + line for line in break_lines(row["command"], min(console.width, 120) - 6)))


def break_lines(command: str, width: int) -> list[str]:
    """A command line as several, each but the last ending in a backslash; an option stays with its values."""
    pieces: list[str] = []
    for word in shlex.split(command):
        if pieces and not word.startswith("--") and pieces[-1].startswith("--"):
            pieces[-1] += f" {shlex.quote(word)}"
        else:
            pieces.append(shlex.quote(word))
    first, *more = (" ".join(line) for line in _flow(pieces, width - 6))
    return " \\\n    ".join([first, *more]).split("\n")


def _flow(pieces: list[T], width: int, between: int = 1) -> list[list[T]]:
    """`pieces` in lines of at most `width` characters, `between` characters between two of them."""
    lines: list[list[T]] = [[]]
    for piece in pieces:
        if lines[-1] and sum(len(known) + between for known in lines[-1]) + len(piece) > width:
            lines.append([])
        lines[-1].append(piece)
    return lines
