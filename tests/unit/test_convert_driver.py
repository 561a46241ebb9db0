"""The conversion driver: what is left of an interruption, what is refused, and what verification finds."""

from __future__ import annotations

import errno
import fcntl
import json
import os
import pickle
import re
import shutil
import signal
import subprocess
import sys
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

import modellink
from modellink.checkpoint import sinks
from modellink.checkpoint.digest import byte_pieces, digest, is_finite, map_tensor, write_at
from modellink.checkpoint.hf import expected_shapes, save_hf
from modellink.checkpoint.pump import merge_groups
from modellink.config.schema import ModelConfig
from modellink.errors import ModelLinkError, RunFailure
from modellink.files import replace_folder, restore_folder

RANK = "iter_0000001/mp_rank_01_001/model_optim_rng.pt"
SHARD_BYTES = 20_000
FORMATS: dict[str, dict[str, Any]] = {
    "hf": {},
    "native": {},
    "mcore": {"tensor_parallel": 2, "pipeline_parallel": 2},
    "legacy": {"tensor_parallel": 2, "pipeline_parallel": 2},
}


def small_model(**fields: Any) -> tuple[ModelConfig, dict[str, torch.Tensor]]:
    sizes = {"num_layers": 4, "hidden_size": 32, "num_attention_heads": 4, "num_key_value_heads": 2, "vocab_size": 61}
    common = {"ffn_hidden_size": 48, "max_position_embeddings": 64, "gated_mlp": True, "activation": "silu"}
    switches = {"qkv_bias": False, "attention_output_bias": False, "mlp_bias": False, "normalization": "RMSNorm"}
    rest = {"position_embedding": "rope", "tie_word_embeddings": False, "padded_vocab_size": 61}
    config = ModelConfig(**(sizes | common | switches | rest | fields)).resolve()
    generator = torch.Generator().manual_seed(3)
    shapes = expected_shapes(config)
    return config, {name: torch.randn(shape, generator=generator).bfloat16() for name, shape in shapes.items()}


@pytest.fixture
def source(tmp_path: Path) -> Path:
    config, state = small_model()
    save_hf(tmp_path / "source", state.items(), config, max_shard_bytes=SHARD_BYTES)
    assert len(list((tmp_path / "source").glob("*.safetensors"))) > 2
    return tmp_path / "source"


@pytest.fixture
def many_parts(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sinks, "_HF_PART", 10_000)
    monkeypatch.setattr(sinks, "_NATIVE_SHARD", 10_000)


def content(folder: Path) -> dict[str, bytes]:
    """Every file's bytes but those that tell time and place."""
    told = ("conversion_report.json", "manifest.json", "modellink.yaml", "native_config.json")
    files = [path for path in folder.rglob("*") if path.is_file() and path.name not in told]
    return {str(path.relative_to(folder)): path.read_bytes() for path in files}


def of_format(source: Path, to: str) -> Path:
    """`source`, a Hugging Face folder, in another format beside it."""
    if to == "hf":
        return source
    target = source.with_name(f"{source.name}_{to}")
    modellink.convert(source, target, to, **FORMATS[to], verify=False, progress=False)
    return target


DIRECTIONS = [(a, b) for a in FORMATS for b in FORMATS if a != b]


@pytest.mark.parametrize(("start", "end"), DIRECTIONS, ids=lambda name: name)
@pytest.mark.usefixtures("many_parts")
def test_workers_change_no_byte(start: str, end: str, source: Path, tmp_path: Path) -> None:
    before = of_format(source, start)
    for workers in (1, 4):
        target = tmp_path / f"out{workers}"
        modellink.convert(before, target, end, **FORMATS[end], workers=workers, progress=False)
    assert content(tmp_path / "out1") == content(tmp_path / "out4")
    report = json.loads((tmp_path / "out1" / "conversion_report.json").read_text())
    assert report["verification"] == {
        "tensors": "every tensor read back equals the one sent",
        "logits_max_difference": 0.0,
        "logits_skipped": None,
    }
    assert report["tensors"] == len(small_model()[1]) and report["bytes"] == sum(
        tensor.nbytes for tensor in small_model()[1].values()
    )
    assert (report["source"]["format"], report["target"]["format"], report["dtypes"]) == (start, end, ["bfloat16"])
    assert report["modellink"] == modellink.__version__ and report["peak_memory_bytes"] > 1e7
    assert sorted(path.name for path in tmp_path.iterdir() if path.name.startswith(".")) == []


def test_a_conversion_without_verification_says_so(source: Path, tmp_path: Path) -> None:
    modellink.convert(source, tmp_path / "out", "native", verify=False, progress=False)
    report = json.loads((tmp_path / "out" / "conversion_report.json").read_text())
    assert report["verification"]["tensors"] == "skipped"
    assert report["verification"]["logits_skipped"] == "verification was switched off"


class FailingWrite:
    """`write_at`, which fails after `after` calls as on a full disk."""

    def __init__(self, after: int) -> None:
        self.after, self.calls = after, 0

    def __call__(self, *arguments: Any, **options: Any) -> int:
        self.calls += 1
        if self.calls > self.after:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        return write_at(*arguments)


@pytest.mark.usefixtures("many_parts")
def test_a_full_disk_keeps_finished_parts_and_the_same_command_goes_on(
    source: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    before, out = of_format(source, "native"), tmp_path / "out"
    modellink.convert(before, tmp_path / "wanted", "hf", progress=False)
    modellink.convert(before, out, "hf", progress=False)
    (out / "mark").touch()
    earlier = content(out)
    with monkeypatch.context() as patch:
        patch.setattr("modellink.checkpoint.hf_shards.write_at", FailingWrite(20))
        with pytest.raises(RunFailure, match=r"writing .*out failed: No space left on device; what was there is unch"):
            modellink.convert(before, out, "hf", workers=1, progress=False)
    assert content(out) == earlier
    (work,) = tmp_path.glob(".out.tmp-*")
    parts = len((work / "journal.jsonl").read_text().splitlines()) - 1
    assert parts > 1 and f"{parts} finished parts are kept in {work}" in capsys.readouterr().err
    again = FailingWrite(10**6)
    with monkeypatch.context() as patch:
        patch.setattr("modellink.checkpoint.hf_shards.write_at", again)
        modellink.convert(before, out, "hf", workers=1, progress=False)
    assert 0 < again.calls <= len(small_model()[1]) - parts
    assert f"going on with an interrupted conversion: {parts} of " in capsys.readouterr().err
    assert content(out) == content(tmp_path / "wanted")
    assert json.loads((out / "conversion_report.json").read_text())["parts_resumed"] == parts
    assert list(tmp_path.glob(".*")) == []


def test_a_full_disk_with_nothing_finished_leaves_nothing(
    source: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    before = sorted(tmp_path.iterdir())
    monkeypatch.setattr("modellink.checkpoint.sinks.write_stages", FailingWrite(0))
    with pytest.raises(RunFailure, match="No space left"):
        modellink.convert(source, tmp_path / "new" / "out", "mcore", progress=False)
    assert sorted(tmp_path.iterdir()) == before


LIMITED = """
import resource, sys
from modellink.checkpoint.convert import convert
from modellink.errors import RunFailure
resource.setrlimit(resource.RLIMIT_FSIZE, (300_000, 300_000))
for source, to in (("hf", "native"), ("hf", "mcore"), ("native", "hf")):
    try:
        convert(f"{sys.argv[1]}/{source}", f"{sys.argv[1]}/out", to, progress=False)
    except RunFailure as failure:
        print(to, failure)
"""


def test_no_format_takes_a_write_that_fails_for_success(tmp_path: Path, root: Path) -> None:
    config, state = small_model(vocab_size=20_000, padded_vocab_size=20_000, num_layers=1)
    save_hf(tmp_path / "hf", state.items(), config)
    modellink.convert(tmp_path / "hf", tmp_path / "native", "native", progress=False)
    environment = os.environ | {"PYTHONPATH": str(root), "OMP_NUM_THREADS": "1"}
    program = [sys.executable, "-c", LIMITED, str(tmp_path)]
    done = subprocess.run(program, env=environment, capture_output=True, text=True)
    said = "writing .*/out failed: File too large; what was there is unchanged"
    lines = done.stdout.splitlines()
    assert [line.partition(" ")[0] for line in lines] == ["native", "mcore", "hf"], done.stderr
    assert all(re.search(said, line) for line in lines)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["hf", "native"]


KILLED = """
import os, signal, sys
from modellink.checkpoint import sinks, work
from modellink.checkpoint.convert import convert
sinks._NATIVE_SHARD = 10_000
record, count = work.WorkFolder.record, 0
def dying(self, part, report):
    global count
    count += 1
    if count > 3:
        os.kill(os.getpid(), signal.SIGKILL)
    record(self, part, report)
work.WorkFolder.record = dying
convert(sys.argv[1], sys.argv[2], "native", workers=1, progress=False)
"""


@pytest.mark.usefixtures("many_parts")
def test_a_killed_conversion_goes_on_unless_something_changed(
    source: Path, tmp_path: Path, root: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out, program = tmp_path / "out", [sys.executable, "-c", KILLED, str(source), str(tmp_path / "out")]
    environment = os.environ | {"PYTHONPATH": str(root), "OMP_NUM_THREADS": "1"}
    assert subprocess.run(program, env=environment).returncode == -signal.SIGKILL
    (work,) = tmp_path.glob(".out.tmp-*")
    assert not out.exists()
    with open(work / "journal.jsonl", "a") as journal:
        journal.write('["__0_3.distcp", {"dig')  # cut short while it was written
    shutil.copytree(work, tmp_path / "left")
    modellink.convert(source, out, "native", progress=False)
    assert "going on with an interrupted conversion: 3 of " in capsys.readouterr().err
    modellink.convert(source, tmp_path / "wanted", "native", progress=False)
    assert content(out) == content(tmp_path / "wanted")
    shutil.rmtree(out)
    os.rename(tmp_path / "left", work)
    shard = sorted(source.glob("*.safetensors"))[-1]
    changed = {name: tensor + 1 for name, tensor in load_file(shard).items()}
    save_file(changed, shard, metadata={"format": "pt"})
    modellink.convert(source, out, "native", progress=False)
    said = capsys.readouterr().err
    assert f"removed {work}" in said and "going on" not in said
    assert content(out) != content(tmp_path / "wanted")


def test_two_conversions_into_one_folder(source: Path, tmp_path: Path) -> None:
    work = tmp_path / ".out.tmp-000000000000"
    work.mkdir()
    descriptor = os.open(work, os.O_RDONLY)
    fcntl.flock(descriptor, fcntl.LOCK_EX)
    with pytest.raises(ModelLinkError, match="another conversion is at work in .*: wait for it"):
        modellink.convert(source, tmp_path / "out", "native", progress=False)
    os.close(descriptor)
    modellink.convert(source, tmp_path / "out", "native", progress=False)
    assert not work.exists()


def test_a_replacement_cut_short_is_undone(tmp_path: Path) -> None:
    for name in ("target", "finished"):
        (tmp_path / name).mkdir()
        (tmp_path / name / name).touch()
    (tmp_path / "target" / "notes").write_text("mine")
    os.rename(tmp_path / "target", tmp_path / ".target.old-1234")
    restore_folder(tmp_path / "target")
    assert (tmp_path / "target" / "target").exists()
    replace_folder(tmp_path / "finished", tmp_path / "target", ["notes"])
    names = sorted(path.name for path in (tmp_path / "target").iterdir())
    assert (names, (tmp_path / "target" / "notes").read_text()) == (["finished", "notes"], "mine")
    assert [path.name for path in tmp_path.iterdir()] == ["target"]


@pytest.mark.parametrize("to", ["hf", "native", "mcore"])
def test_damage_between_writing_and_reading_is_found(
    to: str, source: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    before = of_format(source, "legacy")
    kind = {"hf": sinks.HFSink, "native": sinks.NativeSink, "mcore": sinks.MegatronSink}[to]
    finish = kind.finish
    row = (
        small_model()[1]["layers.2.mlp.up_proj.weight"][5 if to != "mcore" else 30].view(torch.uint8).numpy().tobytes()
    )

    def damaging(self: Any, reports: Any) -> None:
        finish(self, reports)
        files = [path for path in self.folder.rglob("*") if path.is_file() and row in path.read_bytes()]
        assert len(files) == 1
        flipped = bytes([row[0] ^ 1]) + row[1:]
        files[0].write_bytes(files[0].read_bytes().replace(row, flipped))

    monkeypatch.setattr(kind, "finish", damaging)
    with pytest.raises(
        RunFailure, match=r"verification failed: the tensor 'layers.2.mlp.up_proj.weight' read back.*\(1"
    ):
        modellink.convert(before, tmp_path / "out", to, progress=False)
    assert not (tmp_path / "out").exists() and list(tmp_path.glob(".*")) == []


def test_a_configuration_that_computes_something_else_is_found(
    source: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    finish = sinks.HFSink.finish

    def misdescribing(self: Any, reports: Any) -> None:
        finish(self, reports)
        path = self.folder / "config.json"
        path.write_text(json.dumps(json.loads(path.read_text()) | {"rms_norm_eps": 0.5}))

    monkeypatch.setattr(sinks.HFSink, "finish", misdescribing)
    with pytest.raises(RunFailure, match=r"the logits of .* and of what was written differ by"):
        modellink.convert(of_format(source, "mcore"), tmp_path / "out", "hf", progress=False)
    assert not (tmp_path / "out").exists()


class Danger:
    def __init__(self, target: Path) -> None:
        self.target = target

    def __reduce__(self) -> Any:
        return os.mkdir, (str(self.target),)


def rewrite_hf(folder: Path, change: Callable[[dict[str, torch.Tensor]], None]) -> None:
    """Change the tensors of the shard that holds the final norm."""
    shard = next(path for path in folder.glob("*.safetensors") if "model.norm.weight" in load_file(path))
    tensors = load_file(shard)
    change(tensors)
    save_file(tensors, shard, metadata={"format": "pt"})


def as_torch_file(folder: Path, extra: Any = None) -> None:
    """Store the weights as pytorch_model.bin."""
    state: dict[str, Any] = {}
    for shard in folder.glob("*.safetensors"):
        state |= load_file(shard)
        shard.unlink()
    (folder / "model.safetensors.index.json").unlink()
    torch.save(state | ({"extra": extra} if extra is not None else {}), folder / "pytorch_model.bin")


def cut_short(path: Path) -> None:
    path.write_bytes(path.read_bytes()[:-100])


def bare_code(folder: Path) -> None:
    with zipfile.ZipFile(folder / RANK, "w") as archive:
        archive.writestr("a/data.pkl", pickle.dumps(Danger(folder / "executed")))


def spoil_native(folder: Path) -> None:
    cut_short(next((folder / "iter_0000001").glob("*.distcp")))


def nan_norm(tensors: dict[str, torch.Tensor]) -> None:
    tensors["model.norm.weight"][3] = float("nan")


def only_one_tensor_rank(folder: Path) -> None:
    for path in (folder / "iter_0000001").glob("mp_rank_01*"):
        shutil.rmtree(path)


def foreign_size(folder: Path) -> None:
    for path in (folder / "iter_0000001").glob("mp_rank_00*"):
        shutil.copytree(path, path.with_name(path.name.replace("rank_00", "rank_02")))
        shutil.copytree(path, path.with_name(path.name.replace("rank_00", "rank_03")))


REFUSALS: dict[str, tuple[str, Callable[[Path], Any], str]] = {
    "pickle with code, .bin": (
        "hf", lambda folder: as_torch_file(folder, Danger(folder / "executed")), "pytorch_model.bin wants to build",
    ),
    "pickle with code, .pt": ("mcore", bare_code, r"mp_rank_01_001/model_optim_rng.pt wants to build \w+.mkdir"),
    "truncated shard": (
        "hf", lambda folder: cut_short(next(folder.glob("model-00002*"))), "model-00002-of.* is damaged or cut short",
    ),
    "missing shard": ("hf", lambda folder: next(folder.glob("model-00002*")).unlink(), "model-00002-of.* is missing"),
    "truncated native shard": ("native", spoil_native, "holds no complete checkpoint .*__0_0.distcp has"),
    "truncated .pt": ("mcore", lambda folder: cut_short(folder / RANK), "model_optim_rng.pt is damaged or cut short"),
    "missing rank": (
        "mcore", lambda folder: shutil.rmtree((folder / RANK).parent), "mp_rank_01_001/model_optim_rng.pt is missing",
    ),
    "missing tensor rank": ("mcore", only_one_tensor_rank, "size 2, but there are folders for 1"),
    "wrong tensor-parallel size": ("legacy", foreign_size, "size 2, but there are folders for 4"),
    "NaN": ("hf", lambda folder: rewrite_hf(folder, nan_norm), "safetensors: tensor 'model.norm.weight' holds NaN"),
}  # fmt: skip


@pytest.mark.parametrize("kind", REFUSALS)
def test_bad_sources_are_refused_in_one_sentence(kind: str, source: Path, tmp_path: Path) -> None:
    start, damage, sentence = REFUSALS[kind]
    before = of_format(source, start)
    damage(before)
    for to in ("hf", "native", "mcore") if start != "hf" else ("native", "legacy"):
        if to == start:
            continue
        out = tmp_path / "out" / to
        if to != "native":
            good = source.with_name("good")
            config, state = small_model()
            save_hf(good, state.items(), config)
            modellink.convert(of_format(good, "legacy"), out, to, verify=False, progress=False)
        listed = content(out)
        with pytest.raises(ModelLinkError, match=sentence) as caught:
            modellink.convert(before, out, to, workers=3, progress=False)
        assert "\n" not in str(caught.value)
        assert content(out) == listed and out.exists() == (to != "native")
        assert list(out.parent.glob(".*")) == [] if out.parent.exists() else True
    assert not (before / "executed").exists()


def test_nan_in_native_weights_is_refused(source: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    rewrite_hf(source, nan_norm)
    with monkeypatch.context() as patch:
        patch.setattr("modellink.checkpoint.hf.is_finite", lambda tensor: True)
        modellink.convert(source, tmp_path / "native", "native", verify=False, progress=False)
    with pytest.raises(ModelLinkError, match=r"iter_0000001: tensor 'model.norm.weight' holds NaN or infinity"):
        modellink.convert(tmp_path / "native", tmp_path / "out", "mcore", progress=False)
    assert not (tmp_path / "out").exists()


def test_a_cast_out_of_range_is_refused(source: Path, tmp_path: Path) -> None:
    rewrite_hf(source, lambda tensors: tensors["model.norm.weight"].fill_(1e5))
    with pytest.raises(ModelLinkError, match="'norm.weight' holds values beyond the range of float16: convert to"):
        modellink.convert(source, tmp_path / "out", "native", dtype=torch.float16, progress=False)
    modellink.convert(source, tmp_path / "out", "native", dtype=torch.float32, progress=False)
    report = json.loads((tmp_path / "out" / "conversion_report.json").read_text())
    assert (report["dtypes"], report["verification"]["logits_max_difference"]) == (["float32"], 0.0)


def test_files_beside_a_megatron_step_stay(source: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    modellink.convert(source, out, "mcore", progress=False)
    (out / "notes").mkdir()
    (out / "notes" / "mine.txt").write_text("kept")
    modellink.convert(source, out, "mcore", 2, progress=False)
    assert (out / "notes" / "mine.txt").read_text() == "kept"
    assert sorted(path.name for path in (out / "iter_0000001").iterdir()) == ["mp_rank_00", "mp_rank_01"]


def test_digests_depend_on_every_bit_and_place_but_not_on_strides(tmp_path: Path) -> None:
    generator = torch.Generator().manual_seed(0)
    tensor = torch.randn(300, 5001, generator=generator).bfloat16()
    wanted = digest(tensor)
    assert wanted == digest(tensor.t().contiguous().t()) == digest(tensor.clone())
    assert digest(tensor.view(torch.int16)) != wanted and digest(tensor.view(5001, 300)) != wanted
    swapped = tensor.clone()
    swapped[[3, 250]] = swapped[[250, 3]]
    assert digest(swapped) != wanted
    for place in (0, 1_400_000, tensor.numel() - 1):
        for bit in (0, 15):
            changed = tensor.clone()
            changed.view(torch.int16).view(-1)[place] ^= -(1 << 15) if bit == 15 else 1 << bit
            assert digest(changed) != wanted
    with open(tmp_path / "file", "wb") as handle:
        handle.write(b"abc")
        assert write_at(handle.fileno(), tensor, 3) == 3 + tensor.nbytes
    mapped = map_tensor(tmp_path / "file", 3, tensor.shape, tensor.dtype)
    assert digest(mapped) == wanted and digest(torch.zeros(())) != digest(torch.zeros(1))
    assert sum(piece.numel() for piece in byte_pieces(tensor)) == tensor.nbytes


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32, torch.float64])
def test_finiteness(dtype: torch.dtype) -> None:
    tensor = torch.linspace(-3, 3, 1001, dtype=dtype)
    assert is_finite(tensor) and is_finite(tensor[:0])
    for value in ("nan", "inf", "-inf"):
        for place in (0, 500, 1000):
            changed = tensor.clone()
            changed[place] = float(value)
            assert not is_finite(changed)


def test_groups_are_merged_where_they_overlap() -> None:
    one, other = [["q", "k", "v"], ["o"], ["a"], ["b"]], [["q"], ["a", "b"], ["v", "o"]]
    assert merge_groups(one, other) == [["q", "k", "v", "o"], ["a", "b"]]
    assert merge_groups(one) == one
