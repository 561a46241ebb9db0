"""The command line from outside: exit codes, one-line errors, help, the reference's programs."""

from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path

import pytest

from modellink.cli import main as cli
from modellink.config.flags import flags
from modellink.errors import RunFailure


def test_help_is_a_short_table_of_what_works(capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main([]) == 0
    text = capsys.readouterr().out
    assert all(f"  {verb} " in text for verb in cli.VERBS)
    assert not any(f"  {verb} " in text for verb in cli.LATER)
    assert len(text.splitlines()) < 20


@pytest.mark.parametrize("verb", ["train", "preprocess", "convert"])
def test_verb_help_lists_every_option(verb: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as caught:
        cli.main([verb, "--help"])
    text = capsys.readouterr().out
    assert caught.value.code == 0
    for flag in flags(verb):
        shown = re.search(rf"{re.escape(flag.name)}[ ,\n]", text) is not None
        assert shown == (flag.status in ("native", "alias")), flag.name
    assert "docs/flags.md" in text


@pytest.mark.parametrize(
    ("argv", "words"),
    [
        (["trian"], ["unknown verb 'trian'", "'train'"]),
        (["serve"], ["serve", "not built yet"]),
        (["plan", "--x"], ["plan", "not built yet"]),
        (["train", "--num-layres", "2"], ["--num-layres", "--num-layers"]),
        (["train", "--model", "llama2"], ["preset 'llama2'", "llama2-7b"]),
        (["models", "a", "b"], ["one preset name"]),
        (["convert", "--load-dir", "a"], ["--save-dir"]),
        (["convert", "--load-dir", "a", "--save-dir", "b", "--save-model-type", "mg"], ["no checkpoint at a"]),
        (["convert", "--load-dir", "a", "--save-dir", "b", "--save-model-type", "x"], ["x is unknown"]),
        (["convert", "--load-dir", "a", "--save-dir", "b"], ["--save-model-type is missing"]),
    ],
)
def test_usage_errors_are_one_line_and_exit_2(
    argv: list[str], words: list[str], capsys: pytest.CaptureFixture[str]
) -> None:
    assert cli.main(argv) == 2
    error = capsys.readouterr().err
    assert error.startswith("modellink: error: ") and error.count("\n") == 1
    assert all(word in error for word in words), error


def test_debug_shows_the_traceback(capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["train", "--num-layers", "x", "--debug"]) == 2
    assert "Traceback" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("raised", "code", "words"),
    [
        (RunFailure("the loss is NaN at iteration 3."), 1, ["the loss is NaN"]),
        (ValueError("two\nlines"), 1, ["train failed: ValueError: two lines", "--debug"]),
        (KeyboardInterrupt(), 130, ["interrupted"]),
    ],
)
def test_failures_while_running(
    raised: BaseException,
    code: int,
    words: list[str],
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    def run(argv: list[str]) -> int:
        raise raised

    monkeypatch.setattr(cli, "_load", lambda verb: run)
    assert cli.main(["train"]) == code
    error = capsys.readouterr().err
    assert error.count("\n") == 1 and all(word in error for word in words)


def test_another_rank_names_itself(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("RANK", "1")
    monkeypatch.setenv("WORLD_SIZE", "2")
    assert cli.main(["trian"]) == 2
    assert capsys.readouterr().err.startswith("[rank 1] modellink: error: ")


def test_one_process_of_a_node_reports_a_bad_configuration(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    silent: list[float] = []
    monkeypatch.setenv("RANK", "1")
    monkeypatch.setenv("LOCAL_RANK", "1")
    # the launcher ends this process while it waits
    monkeypatch.setattr(cli.time, "sleep", lambda s: silent.append(s) or capsys.readouterr().err == "" or pytest.fail())
    assert cli.main(["train", "--num-layers", "x"]) == 2
    assert silent[0] == cli.FIRST_SPEAKS_S >= 10
    # unless it found what the first rank did not
    assert "modellink: error: " in capsys.readouterr().err
    monkeypatch.setenv("LOCAL_RANK", "0")
    assert cli.main(["train", "--num-layers", "x"]) == 2
    assert cli.FIRST_SPEAKS_S not in silent[2:]


def test_models_table(capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["models"]) == 0
    assert re.search(r"llama2-7b\s.*6\.74B", capsys.readouterr().out)
    assert cli.main(["models", "qwen2.5-0.5b"]) == 0
    assert re.search(r"qkv_bias\s.*True", capsys.readouterr().out)


def test_reference_program_prints_its_configuration_without_torch(root: Path) -> None:
    code = (
        "import sys, runpy; sys.argv = ['pretrain_gpt.py', '--model', 'tiny-llama', '--print-config']\n"
        "try: runpy.run_path('pretrain_gpt.py', run_name='__main__')\n"
        "except SystemExit as end: print('code', end.code, 'torch' in sys.modules)"
    )
    done = subprocess.run(
        [sys.executable, "-c", code], cwd=root, capture_output=True, text=True, timeout=60, check=True
    )
    assert done.stdout.splitlines()[-1] == "code 0 False"
    assert "# data-parallel size: 1" in done.stdout
    script = [sys.executable, "trainer.py", "--stage", "dpo"]
    bad = subprocess.run(script, cwd=root, capture_output=True, text=True, timeout=60, check=False)
    assert bad.returncode == 2 and bad.stderr.startswith("modellink: error: --stage dpo is refused")
