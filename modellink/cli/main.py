"""The command line: `modellink VERB [options]`, and the reference's six programs under their own names.

Each verb lives in its own module with one function `run(argv) -> int`, imported when it is called. Exit codes: 0 done,
2 bad usage or bad input, 1 failure while running, 130 interrupted. Errors are one line; `--debug` adds the traceback.
"""

from __future__ import annotations

import importlib
import os
import sys
import time
import traceback
from collections.abc import Callable, Sequence
from typing import NoReturn

from modellink.errors import ModelLinkError
from modellink.registry import suggest

VERBS: dict[str, str] = {
    "preprocess": "raw data -> .bin/.idx files; merge such files",
    "train": "pre-training and supervised fine-tuning",
    "generate": "answer prompts: demonstrations, command line, files",
    "chat": "chat with a model in the terminal",
    "evaluate": "score a model on benchmarks",
    "convert": "Hugging Face, native and Megatron folders, each into each",
    "models": "list families and presets",
    "env": "versions, devices, backends",
}
LATER: dict[str, str] = {
    "serve": "the HTTP server is not built yet: use `modellink chat` or `modellink generate --input FILE`",
    "plan": "the planner is not built yet: `modellink train ... --print-config` prints parameters and layout",
}
PROGRAMS = {
    "pretrain_gpt": "train",
    "trainer": "train",
    "preprocess_data": "preprocess",
    "convert_ckpt": "convert",
    "inference": "generate",
    "evaluation": "evaluate",
}

FIRST_SPEAKS_S = 10.0  # how long other ranks of a node keep silent about a configuration that all of them share
ORDER_S = 0.5  # and about anything else, so that the line of rank 0 comes first


def main(argv: Sequence[str] | None = None) -> int:
    """Run one verb and return the exit code; never raises for what a user can get wrong."""
    arguments = list(sys.argv[1:] if argv is None else argv)
    if not arguments or arguments[0] in ("-h", "--help", "help"):
        print(usage())
        return 0
    if arguments[0] in ("-V", "--version"):
        from modellink import __version__

        print(f"modellink {__version__}")
        return 0
    return guard(arguments[0], arguments[1:])


def program(name: str) -> NoReturn:
    """Run a program of the reference by name ("pretrain_gpt") with the process's own arguments, and exit."""
    sys.exit(guard(PROGRAMS[name], sys.argv[1:]))


def usage() -> str:
    """The table that `modellink --help` prints."""
    lines = ["usage: modellink VERB [options]", "", "verbs:"]
    lines += [f"  {verb:<12}{text}" for verb, text in VERBS.items()]
    lines += ["", "`modellink VERB --help` lists every option. Options also come from a YAML file: --config FILE."]
    return "\n".join(lines)


def guard(verb: str, argv: list[str]) -> int:
    """Run `verb`, turning exceptions into one line on stderr and an exit code."""
    debug = "--debug" in argv
    try:
        return _load(verb)(argv)
    except ModelLinkError as error:
        from modellink.config.load import ConfigurationError

        if isinstance(error, ConfigurationError) and os.environ.get("LOCAL_RANK", "0") != "0":
            # the ranks of a node read the same files: the first speaks, and its launcher ends the others meanwhile
            time.sleep(FIRST_SPEAKS_S)
        _report(str(error), debug)
        return error.exit_code
    except KeyboardInterrupt:
        _report("interrupted.", debug)
        return 130
    except BrokenPipeError:
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 1
    except Exception as error:
        text = str(error) or "no message"
        hint = "" if debug else " (--debug shows the traceback)"
        _report(f"{verb} failed: {type(error).__name__}: {text}{hint}", debug)
        return 1


def _load(verb: str) -> Callable[[Sequence[str]], int]:
    if verb in LATER:
        raise ModelLinkError(f"{verb}: {LATER[verb]}.")
    if verb not in VERBS:
        raise ModelLinkError(f"unknown verb {verb!r}.{suggest(verb, VERBS)} `modellink --help` lists the verbs.")
    run: Callable[[Sequence[str]], int] = importlib.import_module(f"modellink.cli.{verb}").run
    return run


def _report(message: str, debug: bool) -> None:
    """Print one error line. Another rank than 0 waits a moment and names itself, so that rank 0's line comes first."""
    rank, world = int(os.environ.get("RANK", "0")), int(os.environ.get("WORLD_SIZE", "1"))
    if rank and not debug:
        time.sleep(ORDER_S)
    prefix = f"[rank {rank}] " if rank and world > 1 else ""
    if debug:
        traceback.print_exc()
    print(f"{prefix}modellink: error: {' '.join(message.split())}", file=sys.stderr, flush=True)
