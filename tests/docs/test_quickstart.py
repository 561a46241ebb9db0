"""`make quickstart`: its pieces, and the whole of it in the environment that runs the tests."""

from __future__ import annotations

import json
import re
import subprocess
import sys
from pathlib import Path

import pytest
from rich.console import Console

from modellink.data.train_tokenizer import train_tokenizer
from modellink.errors import ModelLinkError, RunFailure
from modellink.quickstart import __main__ as quickstart
from modellink.quickstart.runner import Runner, as_typed

COMMANDS = [getattr(quickstart, name) for name in "TEXT TOKENIZER DATASET PRETRAIN EXPORT SFT_DATASET SFT CHAT".split()]


def test_a_long_command_is_broken_so_that_a_shell_reads_it_as_one() -> None:
    words = ["echo", *(f"--option-{i}" for i in range(20)), "two words"]
    typed = as_typed(words, width=60)
    assert all(len(line) <= 62 for line in typed.splitlines()) and "\n" in typed
    said = subprocess.run(["bash", "-c", typed], capture_output=True, text=True, check=True).stdout
    assert said.split("\n") == [" ".join(words[1:]), ""]


def test_only_an_own_folder_is_emptied(tmp_path: Path) -> None:
    foreign = tmp_path / "thesis"
    foreign.mkdir()
    (foreign / "chapter.tex").write_text("")
    with pytest.raises(ModelLinkError, match="was not made by a quickstart"):
        quickstart.prepare(foreign)
    assert quickstart.main(["--output", str(foreign)]) == 2
    assert (foreign / "chapter.tex").is_file()

    own = tmp_path / "own"
    quickstart.prepare(own)
    (own / "data").mkdir()
    quickstart.prepare(own)
    assert [file.name for file in own.iterdir()] == [quickstart.MARKER]


def test_a_failing_command_ends_the_run_with_its_log(tmp_path: Path) -> None:
    runner = Runner(Console(quiet=True), tmp_path)
    assert "modellink 0" in runner.run("version", ["modellink", "--version"])
    with pytest.raises(RunFailure, match=r"'bad verb' failed with exit code 2"):
        runner.run("bad verb", ["modellink", "trian"])
    assert "Did you mean" in (tmp_path / "02-bad-verb.log").read_text()


@pytest.mark.parametrize("text", COMMANDS, ids=lambda text: text.split()[0])
def test_the_commands_read_and_write_in_the_output_folder_alone(text: str) -> None:
    job = quickstart.Job(Path("some where"), Console(quiet=True))
    words = job.command(text)
    assert words[0] in ("python", "modellink", "torchrun")
    assert not any(word.startswith("OUT") for word in words)
    assert {Path(word).parts[0] for word in words if "/" in word} == {"some where"}


def test_trained_tokenizer_is_whole_and_repeatable(tmp_path: Path) -> None:
    from modellink.data.tokenizer import HFTokenizer

    text = tmp_path / "text.jsonl"
    text.write_text("".join(json.dumps({"text": f"a b c {i} déjà vu"}) + "\n" for i in range(50)))
    sizes = [train_tokenizer(str(text), tmp_path / name, 300) for name in ("one", "two")]
    one, two = ((tmp_path / name / "tokenizer.json").read_bytes() for name in ("one", "two"))
    assert one == two and sizes[0] == sizes[1] <= 300
    tokenizer = HFTokenizer(str(tmp_path / "one"))
    for line in ("plain", "naïve 漢字 🙂", "  two  blanks\n\ttab"):
        assert tokenizer.decode(tokenizer.encode(line)) == line
    chat = tokenizer.hf.apply_chat_template(
        [{"role": "user", "content": "hi"}], tokenize=False, add_generation_prompt=True
    )
    assert chat == "<|im_start|>user\nhi<|im_end|>\n<|im_start|>assistant\n"
    assert tokenizer.eod == tokenizer.hf.convert_tokens_to_ids("<|im_end|>") != tokenizer.pad
    with pytest.raises(ModelLinkError, match="too small"):
        train_tokenizer(str(text), tmp_path / "three", 100)
    text.write_text('{"content": "a"}\n')
    with pytest.raises(ModelLinkError, match="has no column 'text'"):
        train_tokenizer(str(text), tmp_path / "three", 300)


@pytest.mark.slow
@pytest.mark.dist
@pytest.mark.timeout(1500)
def test_the_whole_job(tmp_path: Path) -> None:
    done = subprocess.run(
        [sys.executable, "-m", "modellink.quickstart", "--output", "out"], cwd=tmp_path, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-3000:]
    facts = json.loads((tmp_path / "out" / quickstart.MARKER).read_text())
    assert [row["stage"] for row in facts["stages"]] == [
        "text", "tokenizer", "dataset", "pretrain", "resume", "export", "score before SFT", "SFT dataset", "SFT",
        "chat", "score after SFT",
    ]  # fmt: skip
    assert 8.0 < facts["pretrain_loss_first"] < 8.6 and facts["pretrain_loss_last"] < 5.0
    assert facts["chat_right"] == facts["chat_asked"] == 2
    assert facts["score_after"]["acc"] >= 0.9 > 0.5 > facts["score_before"]["acc"]
    for picture in re.findall(r"out/\S+\.png", done.stdout.split("loss curves")[1]):
        assert (tmp_path / picture).read_bytes().startswith(b"\x89PNG")
