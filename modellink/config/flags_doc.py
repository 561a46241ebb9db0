"""The flag table as a page: `python -m modellink.config.flags_doc > docs/flags.md`; a test keeps it up to date."""

from __future__ import annotations

from modellink.config.flags import Flag, flags

TITLES = {
    "train": "train (`pretrain_gpt.py`, `trainer.py`); also read by generate, chat and evaluate",
    "generate": "generate (`inference.py`) and chat, besides those of train",
    "evaluate": "evaluate (`evaluation.py`), besides those of train and generate",
    "preprocess": "preprocess (`preprocess_data.py`)",
    "convert": "convert (`convert_ckpt.py`)",
}
STATUSES = ("native", "alias", "accepted", "refused")
INTRO = """# Flags

Every flag and what becomes of it, made from the table in `modellink/config` by `python -m modellink.config.flags_doc`.
*native*: an option of this program. *alias*: sets the options named. *accepted*: no effect; warns and says why.
*refused*: an error that says why and what to use. A flag that is in none of these tables is an error with a suggestion.
A switch `--x` that is off has a `--no-x` that takes it back from a YAML file.
Every option is also a YAML key of `--config FILE`, with dashes or underscores.
"""


def _meaning(flag: Flag) -> str:
    if flag.status == "native":
        known = {True: "on", False: "off"}.get(flag.default, flag.default) if flag.kind == "switch" else flag.default
        default = "" if known in (None, "") else f" (default {known})"
        choices = f"; one of {', '.join(map(str, flag.choices))}" if flag.choices else ""
        return flag.help + choices + default
    return flag.help


def page() -> str:
    """The whole page as Markdown."""
    parts = [INTRO]
    shown: set[str] = set()
    for program, title in TITLES.items():
        table = [f for f in flags(program) if program in ("preprocess", "convert") or f.name not in shown]
        if program not in ("preprocess", "convert"):
            shown |= {flag.name for flag in table}
        parts.append(f"\n## {title}\n\n| flag | value | status | meaning |\n|---|---|---|---|")
        for flag in sorted(table, key=lambda f: (STATUSES.index(f.status), f.path or "", f.order)):
            names = flag.names if flag.kind == "switch" and not flag.default else flag.spellings
            spellings = ", ".join(f"`{s}`" for s in names)
            value = {"switch": "", "any": "..."}.get(flag.kind, flag.kind)
            parts.append(f"| {spellings} | {value} | {flag.status} | {_meaning(flag).replace('|', chr(92) + '|')} |")
    return "\n".join(parts) + "\n"


if __name__ == "__main__":
    print(page(), end="")
