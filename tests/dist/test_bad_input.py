"""What a user gets wrong, end to end on one and on two processes: one sentence, exit code 2 on every rank, no hang."""

from __future__ import annotations

import contextlib
import math
import os
import re
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
import torch.distributed as dist
from bad_input import (
    ARCHITECTURE,
    RUN,
    VOCABULARY,
    Case,
    as_tuples,
    copy,
    copy_pair,
    flip,
    make_hf,
    make_tokenizer,
    make_tokens,
    run_case,
    run_cases,
    truncate,
)
from spawn import DistributedFailure, run_distributed

from modellink.errors import RunFailure
from modellink.train.resilience import PeerWatch

pytestmark = pytest.mark.dist


def data_cases(folder: Path, tokenizer: Path, tokens: Path) -> list[Case]:
    """Token files that are missing, cut, foreign, or of another tokenizer."""
    empty = folder / "empty"
    empty.mkdir()
    cut_bin, cut_idx = copy_pair(tokens, folder / "cut_bin"), copy_pair(tokens, folder / "cut_idx")
    truncate(Path(f"{cut_bin}.bin"))
    truncate(Path(f"{cut_idx}.idx"))
    foreign = copy_pair(tokens, folder / "foreign")
    Path(f"{foreign}.idx").write_bytes(b"not an index" * 20)
    shifted = copy_pair(tokens, folder / "shifted")
    flip(Path(f"{shifted}.idx"), at=34 + 4 * 10)  # the length of sequence 10
    large = make_tokens(folder / "large", largest=VOCABULARY + 13)
    padded = make_tokens(folder / "padded", largest=VOCABULARY)
    base = ["train", *ARCHITECTURE, *RUN, "--tokenizer-name-or-path", str(tokenizer), "--split", "100,0,0"]

    def case(name: str, prefix: Path, *says: str) -> Case:
        return Case(name, [*base, "--data-path", str(prefix)], list(says))

    return [
        case("missing data", folder / "none", f"{folder}/none.idx does not exist", "`modellink preprocess`"),
        case("truncated bin", cut_bin, f"{cut_bin}.bin is truncated: it has 2,003 bytes", "4,006", "preprocess again"),
        case("truncated idx", cut_idx, f"{cut_idx}.idx is truncated", "copy it again"),
        case("foreign idx", foreign, f"{foreign}.idx is not a Megatron .idx file", "`modellink preprocess`"),
        case("flipped idx", shifted, f"{shifted}.idx is damaged: sequence 11 is not where", "copy it again"),
        case("ids beyond", large, f"{large}.bin holds token id 77, the vocabulary has 64", "preprocess again"),
        # the row exists, but only as padding: trained on, it would go unnoticed
        case("id in the padding", padded, f"{padded}.bin holds token id 64, the vocabulary has 64", "again"),
        Case(
            "missing tokenizer",
            [*base[:-4], "--tokenizer-name-or-path", f"{folder}/nowhere", "--data-path", str(tokens)],
            [f"tokenizer folder {folder}/nowhere does not exist", "--tokenizer-name-or-path"],
        ),
        Case(
            "empty tokenizer",
            ["train", *ARCHITECTURE, *RUN, "--mock-data", "--tokenizer-name-or-path", str(empty)],
            [f"folder {empty} holds no tokenizer", "tokenizer.json"],
        ),
    ]


def weight_cases(folder: Path, tokenizer: Path, tokens: Path) -> list[Case]:
    """Hugging Face folders that are incomplete, damaged, or of another shape than the flags say."""
    whole = make_hf(folder / "hf", tokenizer, shard_bytes=9000)
    shards = sorted(whole.glob("model-*.safetensors"))
    assert len(shards) > 1
    lacks, cut, garbage = (copy(whole, folder / name) for name in ("lacks", "cut", "garbage"))
    (lacks / shards[-1].name).unlink()
    truncate(cut / shards[0].name)
    for at in range(12, 60):
        flip(garbage / shards[0].name, at)
    base = ["train", *RUN, "--data-path", str(tokens), "--split", "100,0,0", "--finetune"]

    def case(name: str, source: Path, says: list[str], *flags: str) -> Case:
        return Case(name, [*base, "--load", str(source), *flags], says)

    return [
        case("missing shard", lacks, [f"{lacks}/{shards[-1].name} is missing", "Fetch the file"]),
        case("cut safetensors", cut, [f"{cut}/{shards[0].name} is damaged or cut short", "fetch the file again"]),
        case("garbage safetensors", garbage, [f"{garbage}/{shards[0].name} is damaged", "fetch the file again"]),
        case(
            "vocabulary against flags",
            whole,
            ["vocab_size is 100 by flag --vocab-size but 64 in HF folder", "--vocab-size 64"],
            *[*ARCHITECTURE, "--vocab-size", "100"],
        ),
        case(
            "vocabulary too small",
            whole,
            [f"--padded-vocab-size 32 is smaller than --vocab-size {VOCABULARY}", "raise the first"],
            *["--padded-vocab-size", "32"],
        ),
        Case(
            "tokenizer larger than the weights",
            [*base, "--load", str(whole), "--tokenizer-name-or-path", str(make_tokenizer(folder / "big", 300))],
            ["the tokenizer has 300 ids but the embedding only", f"HF folder {whole}", "--padded-vocab-size 300"],
        ),
        Case(
            "tokenizer larger than the padding",
            ["train", *ARCHITECTURE, *RUN, "--mock-data", "--padded-vocab-size", "32"]
            + ["--tokenizer-name-or-path", str(tokenizer)],
            [f"the tokenizer has {VOCABULARY} ids but the embedding only 32 rows", f"--padded-vocab-size {VOCABULARY}"],
        ),
        Case(
            "a file to load",
            [*base, "--load", str(whole / "config.json")],
            [f"--load {whole}/config.json is a file", "give a checkpoint folder"],
        ),
        Case(
            "nothing to load",
            ["train", *ARCHITECTURE, *RUN, "--mock-data", "--vocab-size", "64", "--exit-on-missing-checkpoint"]
            + ["--load", f"{folder}/no_run"],
            [f"no checkpoint in {folder}/no_run", "Hugging Face folder"],
        ),
    ]


def layout_cases(folder: Path) -> list[Case]:
    """Layouts that do not divide, options that do not exist."""
    base = ["train", *ARCHITECTURE, *RUN, "--mock-data", "--vocab-size", "64"]
    three = ["train", *RUN, "--mock-data", "--vocab-size", "64", "--num-layers", "3", "--hidden-size", "18"]
    three += ["--num-attention-heads", "3", "--max-position-embeddings", "64", "--ffn-hidden-size", "32"]
    (folder / "bad.yaml").write_text("num_layres: 2\n")
    (folder / "open.yaml").write_text("split: [1, 2\n")
    return [
        Case(
            "heads",
            [*three, "--tensor-model-parallel-size", "2"],
            ["3 query heads do not split over --tensor-model-parallel-size 2", "divides 3"],
        ),
        Case(
            "layers",
            [*three, "--pipeline-model-parallel-size", "2"],
            ["3 layers do not split over the 2 stages of --pipeline-model-parallel-size 2", "--num-layer-list"],
        ),
        Case("unknown flag", [*base, "--num-layrs", "3"], ["--num-layrs", "--num-layers"]),
        Case("unknown template", [*base, "--prompt-type", "lama3"], ["unknown prompt type 'lama3'", "'llama3'"]),
        Case("unknown stage", [*base, "--stage", "sfd"], ["--stage sfd is unknown", "'sft'"]),
        Case("unknown preset", ["train", "--model", "llama2-7"], ["unknown preset 'llama2-7'", "'llama2-7b'"]),
        Case("missing config", [*base, "--config", f"{folder}/none.yaml"], [f"--config {folder}/none.yaml cannot be"]),
        Case("config key", [*base, "--config", f"{folder}/bad.yaml"], ["num_layres", "num_layers", "bad.yaml"]),
        Case("broken config", [*base, "--config", f"{folder}/open.yaml"], ["open.yaml is not valid YAML", "line 1"]),
        Case(
            "no folder to save in",
            [*base, "--save", f"{folder}/bad.yaml/run"],
            [f"--save {folder}/bad.yaml/run cannot be used, {folder}/bad.yaml is a file", "another folder"],
        ),
        Case("unknown verb", ["trian"], ["unknown verb 'trian'", "'train'"]),
    ]


def other_verb_cases(folder: Path, tokenizer: Path) -> list[Case]:
    """preprocess, convert, evaluate, generate, chat."""
    broken = folder / "broken.parquet"
    broken.write_bytes(b"PAR1" + bytes(100) + b"PAR1")
    (folder / "text.jsonl").write_text('{"text": "w1 w2"}\n')
    (folder / "line.jsonl").write_text('{"text": "w1 w2"}\n{"text": \n')
    (folder / "full").mkdir()
    (folder / "full" / "thesis.txt").write_text("mine")
    pre = ["preprocess", "--tokenizer-name-or-path", str(tokenizer)]
    pre += ["--output-prefix", f"{folder}/out{{rank}}", "--input"]
    hf, text = str(folder / "hf"), f"{folder}/text.jsonl"
    return [
        Case("input", [*pre, f"{folder}/no.jsonl"], [f"--input {folder}/no.jsonl does not exist", "local file"]),
        Case("parquet", [*pre, str(broken)], [f"{broken} is not a readable parquet file", "write it again"]),
        Case("line", [*pre, f"{folder}/line.jsonl"], ["line.jsonl, line 2 is not JSON", "fix or drop the line"]),
        Case("column", [*pre, text, "--json-keys", "txt"], ["has no column 'txt'", "'text'", "--json-keys"]),
        Case(
            "handler",
            [*pre, text, "--handler-name", "AlpacaPretrainHandlr"],
            ["unknown handler 'AlpacaPretrainHandlr'", "'AlpacaPretrainHandler'"],
        ),
        Case(
            "template of preprocess",
            [*pre, text, "--handler-name", "AlpacaStyleInstructionHandler", "--prompt-type", "qwin"],
            ["'qwin'", "'qwen'"],
        ),
        Case(
            "convert from nothing",
            ["convert", "--load-dir", f"{folder}/gone", "--save-dir", f"{folder}/new", "--save-model-type", "native"],
            [f"{folder}/gone", "give a Hugging Face"],
        ),
        Case(
            "convert into a full folder",
            ["convert", "--load-dir", f"{folder}/run", "--save-dir", f"{folder}/full", "--save-model-type", "hf"],
            [f"{folder}/full exists and was not written by ModelLink", "another folder"],
        ),
        Case(
            "convert over a run",
            ["convert", "--load-dir", hf, "--save-dir", f"{folder}/run", "--save-model-type", "native"],
            [f"{folder}/run exists and is not an empty folder", "give another"],
        ),
        Case(
            "task",
            ["evaluate", "--load", hf, "--task", "arithmetik", "--save-dir", f"{folder}/results"],
            ["unknown task 'arithmetik'", "Known: "],
        ),
        Case("demo", ["generate", "--load", hf, "--task", "gredy"], ["unknown task 'gredy'", "'greedy'"], worlds=(1,)),
        Case("generate", ["generate", "--load", f"{folder}/gone"], [f"{folder}/gone", "--load"]),
        Case("chat", ["chat", "--load", f"{folder}/gone"], [f"{folder}/gone", "--load"]),
        Case("generate with a cut file", ["generate", "--load", f"{folder}/cut"], ["cut short", "again"], worlds=(1,)),
    ]


def lonely_cases(folder: Path, tokenizer: Path, tokens: Path) -> list[Case]:
    """What only the second of two ranks finds: the first must not wait for it."""
    base = ["train", *ARCHITECTURE, *RUN, "--split", "100,0,0"]
    copy_pair(tokens, folder / "on_rank0")
    copy(tokenizer, folder / "tokenizer0")
    for rank in (0, 1):
        copy(folder / "hf", folder / f"hf{rank}")
    truncate(sorted((folder / "hf1").glob("model-*"))[0])
    known = ["--tokenizer-name-or-path", str(tokenizer)]
    return [
        Case(
            "data on one rank",
            [*base, *known, "--data-path", f"{folder}/on_rank{{rank}}"],
            [f"{folder}/on_rank1.idx does not exist"],
            worlds=(2,),
        ),
        Case(
            "tokenizer on one rank",
            [*base, "--mock-data", "--tokenizer-name-or-path", f"{folder}/tokenizer{{rank}}"],
            [f"tokenizer folder {folder}/tokenizer1 does not exist"],
            worlds=(2,),
        ),
        Case(
            "weights cut on one rank",
            ["train", *RUN, "--mock-data", "--load", f"{folder}/hf{{rank}}", "--tensor-model-parallel-size", "2"],
            [f"{folder}/hf1/", "is damaged or cut short"],
            worlds=(2,),
        ),
    ]


def checkpoint_cases(folder: Path) -> list[Case]:
    """A run with damaged steps: the newest is refused by name and the one before is used, unless a step was asked."""
    base = ["train", *ARCHITECTURE, *RUN, "--mock-data", "--vocab-size", "64"]
    run = folder / "run"
    code, errors, _ = run_case([*base, "--save", str(run), "--save-interval", "1"])
    assert code == 0, errors
    flipped, cut, ruined = (copy(run, folder / name) for name in ("flipped", "cut_step", "ruined"))
    last, first = "iter_0000002", "iter_0000001"
    shard = max((flipped / last).glob("*.distcp"), key=lambda path: path.stat().st_size).name
    flip(flipped / last / shard, 1000)
    truncate(cut / last / shard)
    for step in (first, last):
        (ruined / step / shard).unlink()

    def case(name: str, source: Path, code: int, says: list[str], *flags: str) -> Case:
        return Case(name, [*base, "--load", str(source), *flags], says, code)

    refused = f"{cut}/{last} is refused: {shard} has"
    return [
        case("flipped bit", flipped, 0, [f"{flipped}/{last} is refused: {shard} does not have the SHA-256", "step 1"]),
        case("cut step", cut, 0, [refused, "using step 1 instead"]),
        case("asked for", flipped, 2, [f"2 in {flipped} is damaged: {shard}", "sound steps: 1"], "--ckpt-step", "2"),
        case("no such step", run, 2, ["checkpoint step 7 does not exist", "steps there: 1, 2"], "--ckpt-step", "7"),
        case("nothing sound", ruined, 2, [f"{ruined} holds no complete checkpoint", "iter_0000001: __0_0.distcp is"]),
    ]


def memory_cases() -> list[Case]:
    """A model that no device holds, and one that two processes of this machine hold only when they share it."""
    from modellink import device
    from modellink.config.load import load_config
    from modellink.parallel.memory import estimate_memory

    base = [*RUN, "--mock-data", "--vocab-size", "1024", "--hidden-size", "4096", "--num-attention-heads", "32"]
    base += ["--max-position-embeddings", "64"]
    one = estimate_memory(load_config([*base, "--num-layers", "2"], "train")).total
    each = estimate_memory(load_config([*base, "--num-layers", "4"], "train")).total - one
    share = device.total_memory() / (1 if device.is_accelerated() else 2)
    layers = 2 * math.ceil(share * 1.25 / each / 2)
    wide = ["train", *base, "--hidden-size", "65536", "--num-attention-heads", "512", "--num-layers", "2000"]
    deep = ["train", *base, "--num-layers", "400000"]
    sentence = ["a device is too small for this layout: the run needs at least", "choose a smaller"]
    shared = ["train", *base, "--num-layers", str(layers)]
    return [
        Case("too wide", wide, sentence),
        Case("too deep", deep, sentence),
        Case("too small a device", shared, ["the nearest layout that fits is --", "GiB for each"], worlds=(2,)),
    ]


@pytest.fixture(scope="module")
def cases(tmp_path_factory: pytest.TempPathFactory) -> list[Case]:
    folder = tmp_path_factory.mktemp("bad")
    tokenizer = make_tokenizer(folder / "tokenizer")
    tokens = make_tokens(folder / "tokens")
    found = checkpoint_cases(folder)
    found += data_cases(folder, tokenizer, tokens) + weight_cases(folder, tokenizer, tokens)
    found += lonely_cases(folder, tokenizer, tokens)
    found += layout_cases(folder) + other_verb_cases(folder, tokenizer) + memory_cases()
    assert len({case.name for case in found}) == len(found)
    return found


@pytest.mark.parametrize("world", [1, 2])
def test_one_sentence_and_the_exit_code_on_every_rank(cases: list[Case], world: int) -> None:
    chosen = [case for case in cases if world in case.worlds]
    # what one case leaves in the store would mislead the rendezvous of the next
    stores = [dist.TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False) for _ in chosen]
    ports = [store.port for store in stores]
    ranks = run_distributed(run_cases, world, as_tuples(chosen), ports, 16 << 30, init_group=False, timeout=100)
    wrong = [text for case in chosen if (text := what_is_wrong(case, [rank[case.name] for rank in ranks]))]
    assert not wrong, "\n".join(wrong)


def what_is_wrong(case: Case, ranks: list[Any]) -> str:
    """Empty when `case` said what it must, on every rank."""
    text = "".join(errors for _, errors, _ in ranks)
    problems = [f"rank {rank} exits with {code}" for rank, (code, _, _) in enumerate(ranks) if code != case.code]
    problems += [f"rank {rank} took {s:.0f} s" for rank, (_, _, s) in enumerate(ranks) if s > 30]
    problems += [f"{part!r} is not said" for part in case.says if part not in text]
    problems += ["a traceback"] if "Traceback" in text else []
    if case.code:
        first = re.findall(r"^modellink: error: (.*)$", ranks[0][1], re.MULTILINE)
        problems += [f"{len(first)} sentences by rank 0"] if len(first) != 1 else []
        problems += ["more than the sentence"] if first and not ranks[0][1].endswith(f"{first[-1]}\n") else []
        for rank, (_, errors, _) in enumerate(ranks[1:], 1):
            said = re.findall(rf"^\[rank {rank}\] modellink: error: (.*)$", errors, re.MULTILINE)
            problems += [f"rank {rank} says {said}"] if said != first else []
    return f"--- {case.name}: {'; '.join(problems)}\n{text}" if problems else ""


# --- launched by torchrun ---------------------------------------------------------------------------------------------

TORCHRUN = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]


def launch(root: Path, log: Path, *flags: str) -> subprocess.Popen[bytes]:
    command = [*TORCHRUN, str(root / "pretrain_gpt.py"), *ARCHITECTURE, *RUN, "--mock-data", "--vocab-size", "64"]
    with open(log, "wb") as out:
        return subprocess.Popen(
            [*command, *flags],
            env=os.environ | {"OMP_NUM_THREADS": "1"},
            stdout=out,
            stderr=subprocess.STDOUT,
        )


def process_of(rank: int, parent: int) -> int:
    """The process id of one rank that the torchrun process `parent` has started."""
    for folder in Path("/proc").glob("[0-9]*"):
        with contextlib.suppress(OSError):
            launched_by = int((folder / "stat").read_text().rpartition(")")[2].split()[1])
            if launched_by == parent and f"RANK={rank}" in (folder / "environ").read_text().split("\0"):
                return int(folder.name)
    raise AssertionError(f"rank {rank} is not there")


def test_an_unknown_flag_ends_both_ranks(root: Path, tmp_path: Path) -> None:
    began = time.monotonic()
    run = launch(root, tmp_path / "log", "--num-layrs", "3")
    assert run.wait(timeout=60) != 0
    text = (tmp_path / "log").read_text()
    # a launcher starts many processes: one of them speaks
    assert text.count("modellink: error: ") == 1 and "--num-layers" in text and time.monotonic() - began < 60
    assert not re.search(r'File ".*modellink/', text), "a traceback"
    assert text.count("exitcode  : 2") >= 1, text


@pytest.mark.parametrize("victim", [0, 1])
def test_the_survivor_of_a_killed_peer_names_it(root: Path, tmp_path: Path, victim: int) -> None:
    metrics, log = tmp_path / "run" / "metrics.jsonl", tmp_path / "log"
    run = launch(root, log, "--train-iters", "1000000", "--log-interval", "1", "--save", str(tmp_path / "run"))
    try:
        deadline = time.monotonic() + 120
        while time.monotonic() < deadline and not (metrics.exists() and metrics.read_text().count("\n") > 3):
            assert run.poll() is None, log.read_text()[-3000:]
            time.sleep(0.05)
        os.kill(process_of(victim, run.pid), signal.SIGKILL)
        done, killed = metrics.read_text().count("\n"), time.monotonic()
        assert run.wait(timeout=60) != 0
        assert time.monotonic() - killed < 60
    finally:
        run.kill()
    text = log.read_text()
    survivor = "[rank 1] " if victim == 0 else ""
    said = re.findall(rf"^{re.escape(survivor)}modellink: error: (.*)$", text, re.MULTILINE)
    assert len(said) == 1, text[-3000:]
    found = re.match(rf"rank {victim} \(process \d+ on .*\) died in iteration (\d+); see the log of that", said[0])
    assert found and done <= int(found[1]) <= done + 50, said
    assert re.search(r"exitcode  : 1 ", text), "the survivor did not leave by itself"
    assert "resume from the last checkpoint" in said[0] and not re.search(r'File ".*modellink/', text)


# --- a collective that never notices ----------------------------------------------------------------------------------


def wait_for_a_dead_peer(rank: int, world_size: int) -> None:
    store = dist.TCPStore("127.0.0.1", int(os.environ["MASTER_PORT"]), is_master=False)
    watch = PeerWatch(store, rank, world_size, patience_s=0.5, look_every_s=0.2)
    for iteration in range(1, 9):
        with watch.iteration(iteration):
            if iteration == 4 and rank == 1:
                os.kill(os.getpid(), signal.SIGKILL)
            if iteration == 4:
                time.sleep(60)  # as in a kernel that waits for the peer


def test_a_survivor_that_hangs_is_ended(capfd: pytest.CaptureFixture[str]) -> None:
    began = time.monotonic()
    with pytest.raises(DistributedFailure, match="rank 1 exited with -9"):
        run_distributed(wait_for_a_dead_peer, 2, init_group=False)
    assert time.monotonic() - began < 40
    said = capfd.readouterr().err
    assert re.search(r"\[rank 0\] modellink: error: rank 1 \(process \d+ on .*\) died in iteration 4;", said)


@pytest.mark.parametrize("peer", ["died", "lives", "was stopped"])
def test_sigterm_is_answered_only_where_a_peer_died(monkeypatch: pytest.MonkeyPatch, peer: str) -> None:
    """torchrun ends survivors so soon that their collective may not have failed yet."""
    monkeypatch.setenv("LOCAL_RANK", "0")
    monkeypatch.setenv("LOCAL_WORLD_SIZE", "2")
    store = dist.HashStore()
    watch = PeerWatch(store, 0, 2, patience_s=0.1)
    gone = subprocess.Popen([sys.executable, "-c", ""])
    gone.wait()
    peers = dist.PrefixStore("modellink/watch", store)
    peers.set("place/1", f"{os.getpid() if peer == 'lives' else gone.pid} {socket.gethostname()}")
    if peer == "was stopped":
        peers.set("stopped/1", "3")  # torchrun was asked to end the run: that is no fault of rank 1
    asked: list[int] = []
    before = signal.getsignal(signal.SIGTERM)
    try:
        if peer == "died":
            with pytest.raises(RunFailure, match=r"rank 1 .* died in iteration 0"), watch.iteration(3):
                signal.raise_signal(signal.SIGTERM)
            assert signal.getsignal(signal.SIGTERM) == signal.SIG_IGN, "the sentence would be cut short"
        else:
            monkeypatch.setattr(os, "kill", lambda pid, number: asked.append(number) if number else None)
            with watch.iteration(3):
                signal.raise_signal(signal.SIGTERM)
            assert asked == [signal.SIGTERM] and peers.check(["stopped/0"])
    finally:
        signal.signal(signal.SIGTERM, before)
