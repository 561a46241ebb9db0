"""The native checkpoint store in one process: round trips, damage, crashes, retention, and files made to run code."""

from __future__ import annotations

import enum
import io
import json
import multiprocessing
import os
import pickle
import random
import shutil
import signal
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from modellink.checkpoint.manifest import MANIFEST, FileRecord, hash_file, read_manifest
from modellink.checkpoint.shards import INDEX, _IndexUnpickler
from modellink.checkpoint.store import CONFIG, EXTRA, TRACKER, CheckpointStore, load_full, read_tensor_names
from modellink.errors import ModelLinkError
from modellink.files import atomic_write


def tensors_of(step: int) -> dict[str, torch.Tensor]:
    """Every kind that a training state holds; the content tells the step."""
    return {
        "model.weight": torch.full((5, 3), float(step)),
        "model.half": torch.full((7,), float(step)).bfloat16(),
        "optim.step": torch.tensor(float(step)),
        "optim.remainder": torch.arange(6, dtype=torch.int16) + step,
        "optim.none": torch.empty(0, 3),
    }


def save(store: CheckpointStore, step: int) -> None:
    store.save(
        step,
        tensors_of(step),
        extra={"consumed_samples": step * 8, "scale": 0.5},
        per_rank={"rng": torch.full((16,), step, dtype=torch.int16)},
        config_text=f"iteration: {step}\n",
    )


def blank() -> dict[str, torch.Tensor]:
    return {name: torch.zeros_like(tensor) for name, tensor in tensors_of(0).items()}


def assert_loads(folder: Path, step: int) -> None:
    """The newest complete step of `folder` is `step` and holds, bit for bit, what was saved as `step`."""
    store, tensors = CheckpointStore(folder), blank()
    assert store.latest() == step
    assert store.load(tensors) == {"consumed_samples": step * 8, "scale": 0.5}
    for name, expected in tensors_of(step).items():
        assert torch.equal(tensors[name], expected), name
    assert store.load_per_rank(0)["rng"].tolist() == [step] * 16


def test_round_trip_and_layout(tmp_path: Path) -> None:
    store = CheckpointStore(tmp_path / "run")
    save(store, 3)
    assert_loads(tmp_path / "run", 3)
    step = store.resolve()
    assert step.name == "iter_0000003"
    assert (step / CONFIG).read_text() == "iteration: 3\n"
    assert (tmp_path / "run" / TRACKER).read_text().strip() == "3"
    manifest = read_manifest(step)
    assert set(manifest.files) == {path.name for path in step.iterdir()} - {MANIFEST}
    assert all(hash_file(step / name) == record for name, record in manifest.files.items())
    assert not [path for path in (tmp_path / "run").iterdir() if path.name.startswith(".")]
    assert store.load_per_rank(5) == {}


def test_names_and_streaming(tmp_path: Path) -> None:
    save(CheckpointStore(tmp_path), 3)
    infos = read_tensor_names(tmp_path / "iter_0000003")
    assert {name: (info.shape, info.dtype) for name, info in infos.items()} == {
        name: (tuple(tensor.shape), tensor.dtype) for name, tensor in tensors_of(3).items()
    }
    for path in (tmp_path, tmp_path / "iter_0000003"):
        loaded = dict(load_full(path))
        assert loaded.keys() == tensors_of(3).keys()
        assert all(torch.equal(loaded[name], tensor) for name, tensor in tensors_of(3).items())
    assert [name for name, _ in load_full(tmp_path, ["optim.step", "model.half"])] == ["optim.step", "model.half"]
    with pytest.raises(ModelLinkError, match="no tensor 'model.nose'"):
        list(load_full(tmp_path, ["model.nose"]))


def test_names_and_shapes_that_do_not_fit(tmp_path: Path) -> None:
    store = CheckpointStore(tmp_path)
    save(store, 1)
    tensors = blank()
    tensors["model.bias"] = torch.zeros(3)
    del tensors["model.half"]
    tensors["model.weight"] = torch.zeros(5, 4)
    tensors["optim.remainder"] = torch.zeros(6)
    with pytest.raises(ModelLinkError) as raised:
        store.load(tensors)
    for part in (
        "lacks model.bias",
        "has model.half, which the run does not",
        "model.weight is [5, 3] instead of [5, 4]",
        "optim.remainder is torch.int16 instead of torch.float32",
    ):
        assert part in str(raised.value)
    assert all(not tensor.any() for tensor in tensors.values()), "something was loaded before the refusal"


def test_loose_and_prefix_and_conversion(tmp_path: Path) -> None:
    store = CheckpointStore(tmp_path)
    save(store, 2)
    tensors = {"model.weight": torch.zeros(5, 3, dtype=torch.bfloat16), "model.half": torch.zeros(7)}
    store.load({**tensors, "optim.step": torch.tensor(9.0)}, prefix="model.")
    assert tensors["model.weight"].eq(2).all() and tensors["model.half"].eq(2).all()
    loose = {"optim.step": torch.tensor(9.0), "adapter": torch.ones(2)}
    store.load(loose, strict=False)
    assert loose["optim.step"] == 2 and loose["adapter"].eq(1).all()


def cut(path: Path) -> None:
    os.truncate(path, path.stat().st_size // 2)


def flip(path: Path) -> None:
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 1
    path.write_bytes(content)


FILES = [INDEX, CONFIG, EXTRA, "__0_0.distcp", "rank_00000.safetensors"]


@pytest.mark.parametrize(
    ("name", "damage"),
    [(name, damage) for name in FILES for damage in (Path.unlink, cut, flip)]
    + [(MANIFEST, Path.unlink), (MANIFEST, cut)],
)
def test_damaged_step_is_refused_by_name(
    tmp_path: Path, caplog: pytest.LogCaptureFixture, name: str, damage: Callable[[Path], None]
) -> None:
    for step in (1, 2):
        save(CheckpointStore(tmp_path), step)
    damage(tmp_path / "iter_0000002" / name)
    assert CheckpointStore(tmp_path).resolve().name == "iter_0000001"
    assert "iter_0000002 is refused" in caplog.text and name in caplog.text
    with pytest.raises(ModelLinkError, match=r"step 2 .* is damaged: .*; sound steps: 1\."):
        CheckpointStore(tmp_path).resolve(2)
    with pytest.raises(ModelLinkError, match="damaged"):
        list(load_full(tmp_path / "iter_0000002"))
    shutil.rmtree(tmp_path / "iter_0000001")
    with pytest.raises(ModelLinkError, match="holds no complete checkpoint .*iter_0000002"):
        CheckpointStore(tmp_path).resolve()


def test_missing_step_and_empty_folder(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    assert CheckpointStore(tmp_path / "nowhere").latest() is None
    with pytest.raises(ModelLinkError, match="holds no complete checkpoint"):
        CheckpointStore(tmp_path / "nowhere").resolve()
    for step in (1, 2):
        save(CheckpointStore(tmp_path), step)
    with pytest.raises(ModelLinkError, match="step 7 does not exist .* steps there: 1, 2"):
        CheckpointStore(tmp_path).resolve(7)
    shutil.rmtree(tmp_path / "iter_0000002")
    assert_loads(tmp_path, 1)
    assert "says step 2, which is not there; using step 1" in caplog.text
    (tmp_path / "iter_0000009" / "mp_rank_00").mkdir(parents=True)  # another format under the same kind of name
    assert CheckpointStore(tmp_path).iterations() == [1]


def test_newest_is_the_last_saved(tmp_path: Path) -> None:
    store = CheckpointStore(tmp_path)
    for step in (300, 500, 350):  # went back to 300 and on from there
        save(store, step)
    assert store.iterations() == [300, 350, 500]
    assert_loads(tmp_path, 350)


def test_retention_and_leftovers(tmp_path: Path) -> None:
    store = CheckpointStore(tmp_path, keep=2)
    (tmp_path / ".iter_0000001.tmp-dead").mkdir()
    for step in (1, 2, 3, 4):
        save(store, step)
        assert store.latest() == step
    assert sorted(path.name for path in tmp_path.iterdir()) == ["iter_0000003", "iter_0000004", TRACKER]
    with pytest.raises(ModelLinkError, match="at least 1"):
        CheckpointStore(tmp_path, keep=0)


def test_background_save_keeps_the_values_of_its_moment(tmp_path: Path) -> None:
    store = CheckpointStore(tmp_path, async_save=True)
    for step in (1, 2, 3):
        tensors = tensors_of(step)
        store.save(
            step,
            tensors,
            extra={"consumed_samples": step * 8, "scale": 0.5},
            per_rank={"rng": torch.full((16,), step, dtype=torch.int16)},
            config_text="",
        )
        for tensor in tensors.values():
            tensor.zero_()
    store.wait()
    assert_loads(tmp_path, 3)
    assert CheckpointStore(tmp_path).iterations() == [1, 2, 3]


class FailingStore(CheckpointStore):
    def _write_own(self, temporary: Path, content: object) -> None:
        raise OSError(28, "No space left on device")


@pytest.mark.parametrize("async_save", [False, True])
def test_failed_save_is_reported_once_and_leaves_nothing(tmp_path: Path, async_save: bool) -> None:
    save(CheckpointStore(tmp_path), 1)
    store = FailingStore(tmp_path, async_save=async_save)
    with pytest.raises(ModelLinkError, match="No space left on device"):
        save(store, 2)
        store.wait()
    store.wait()
    assert sorted(path.name for path in tmp_path.iterdir()) == ["iter_0000001", TRACKER]
    assert_loads(tmp_path, 1)


# --- crashes ------------------------------------------------------------------------------------------------------

PHASES = ["_open", "_write", "_write_own", "_seal", "_write_manifest", "_publish", "_track", "_prune", "_discard"]


def dying_store(method: str, after: bool) -> type[CheckpointStore]:
    """A store whose process dies, without any clean-up, before or after one of its phases."""

    def die(self: CheckpointStore, *args: object) -> object:
        if after:
            getattr(CheckpointStore, method)(self, *args)
        os._exit(9)

    return type("DyingStore", (CheckpointStore,), {method: die})


def in_a_fork(work: Callable[[], None], seconds: float | None = None) -> None:
    """Run `work` in a forked child; kill the child after `seconds`, or expect `work` to die as `dying_store` does."""
    torch.set_num_threads(1)
    child = multiprocessing.get_context("fork").Process(target=work)
    child.start()
    child.join(20 if seconds is None else seconds)
    if seconds is None:
        assert child.exitcode == 9
    else:
        assert child.exitcode is None, "the child was meant to be killed at work"
        os.kill(child.pid, signal.SIGKILL)
    child.join()


@pytest.mark.parametrize("after", [False, True])
@pytest.mark.parametrize("method", PHASES)
def test_death_between_phases(tmp_path: Path, method: str, after: bool) -> None:
    store = CheckpointStore(tmp_path)
    for step in (1, 2):
        save(store, step)
    in_a_fork(lambda: save(dying_store(method, after)(tmp_path, keep=1), 3))
    published = PHASES.index(method) + after > PHASES.index("_publish")
    assert_loads(tmp_path, 3 if published else 2)
    if method not in ("_prune", "_discard"):
        assert CheckpointStore(tmp_path).iterations() == ([1, 2, 3] if published else [1, 2])
    save(CheckpointStore(tmp_path), 4)
    assert_loads(tmp_path, 4)
    assert not [path.name for path in tmp_path.iterdir() if path.name.startswith(".")]


def test_death_while_a_step_is_replaced(tmp_path: Path) -> None:
    save(CheckpointStore(tmp_path), 1)
    # the one moment at which the old folder has been moved aside and the new one is not in place
    os.rename(tmp_path / "iter_0000001", tmp_path / ".iter_0000001.replaced-0a0a0a0a")
    assert_loads(tmp_path, 1)
    save(CheckpointStore(tmp_path), 1)
    assert_loads(tmp_path, 1)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["iter_0000001", TRACKER]


def test_killed_at_random_moments(tmp_path: Path) -> None:
    def save_for_ever() -> None:
        store = CheckpointStore(tmp_path, keep=2)
        step = store.latest() or 0
        while True:
            step += 1
            save(store, step)
            atomic_write(tmp_path / "finished", str(step))

    save(CheckpointStore(tmp_path), 1)
    moments, seen = random.Random(0), 1
    for _ in range(10):
        in_a_fork(save_for_ever, seconds=moments.uniform(0.05, 0.4))
        finished = int((tmp_path / "finished").read_text()) if (tmp_path / "finished").exists() else 1
        newest = CheckpointStore(tmp_path).latest()
        # at most the step that was under way is newer than what was known to be saved
        known = max(finished, seen)
        assert newest is not None and known <= newest <= known + 1
        assert_loads(tmp_path, newest)
        seen = newest
    assert seen > 10, "the saver hardly ran"


# --- files that were made to run code -----------------------------------------------------------------------------


class Exploit:
    def __init__(self, target: Path) -> None:
        self.target = target

    def __reduce__(self) -> tuple[object, ...]:
        return (os.mkdir, (str(self.target),))


def reseal(step: Path) -> None:
    """Give a tampered step sums that agree, as an attacker would."""
    content = json.loads((step / MANIFEST).read_text())
    for name in content["files"]:
        record: FileRecord = hash_file(step / name)
        content["files"][name] = {"size": record.size, "sha256": record.sha256}
    (step / MANIFEST).write_text(json.dumps(content))


def assert_refused(folder: Path, word: str) -> None:
    for use in (
        lambda: CheckpointStore(folder).load(blank()),
        lambda: list(load_full(folder)),
        lambda: read_tensor_names(folder / "iter_0000001"),
    ):
        with pytest.raises(ModelLinkError, match=word):
            use()


def test_index_that_would_run_code_is_refused(tmp_path: Path) -> None:
    folder, target = tmp_path / "run", tmp_path / "owned"
    save(CheckpointStore(folder), 1)
    index = folder / "iter_0000001" / INDEX
    index.write_bytes(pickle.dumps(Exploit(target)))
    reseal(folder / "iter_0000001")
    assert_refused(folder, "refused: it refers to posix.mkdir")
    assert not target.exists()
    pickle.loads(index.read_bytes())  # the file does what it claims, when one lets it
    assert target.exists()


def test_index_with_objects_or_foreign_paths_is_refused(tmp_path: Path) -> None:
    from torch.distributed.checkpoint.metadata import BytesStorageMetadata

    save(CheckpointStore(tmp_path), 1)
    index = tmp_path / "iter_0000001" / INDEX
    original = index.read_bytes()

    content = pickle.loads(original)
    content.state_dict_metadata["model.weight"] = BytesStorageMetadata()  # the stock loader unpickles such an entry
    index.write_bytes(pickle.dumps(content))
    reseal(tmp_path / "iter_0000001")
    assert_refused(tmp_path, "'model.weight' is not a tensor")

    content = pickle.loads(original)
    next(iter(content.storage_data.values())).relative_path = "../elsewhere"
    index.write_bytes(pickle.dumps(content))
    reseal(tmp_path / "iter_0000001")
    assert_refused(tmp_path, "points to '../elsewhere'")

    index.write_bytes(pickle.dumps({"no": "index"}))
    reseal(tmp_path / "iter_0000001")
    assert_refused(tmp_path, "it is a dict, not an index")

    index.write_bytes(pickle.dumps(Attribute(torch.Size, "__init__")))
    reseal(tmp_path / "iter_0000001")
    assert_refused(tmp_path, "it asks for attribute '__init__'")


class Attribute:
    """Pickles as `getattr(owner, name)`."""

    def __init__(self, owner: Any, name: str) -> None:
        self.owner, self.name = owner, name

    def __reduce__(self) -> Any:
        return getattr, (self.owner, self.name)


def test_index_written_by_python_3_11_0_to_3_11_3(tmp_path: Path) -> None:
    """Their enumerations pickle as `getattr(kind, name)`."""
    save(CheckpointStore(tmp_path), 1)
    index = tmp_path / "iter_0000001" / INDEX
    content = pickle.loads(index.read_bytes())
    for entry in content.state_dict_metadata.values():
        state = list(entry.properties.__getstate__())
        places = [i for i, value in enumerate(state) if isinstance(value, enum.Enum)]
        assert places
    member = type(state[places[0]])
    written = pickle.dumps(Attribute(member, state[places[0]].name))
    assert _IndexUnpickler(io.BytesIO(written)).load() is state[places[0]]


def test_shard_that_would_run_code_is_refused(tmp_path: Path) -> None:
    folder, target = tmp_path / "run", tmp_path / "owned"
    save(CheckpointStore(folder), 1)
    step = folder / "iter_0000001"
    torch.save(Exploit(target), step / "__0_0.distcp")
    index = pickle.loads((step / INDEX).read_bytes())
    for place in index.storage_data.values():
        place.offset, place.length = 0, (step / "__0_0.distcp").stat().st_size
    (step / INDEX).write_bytes(pickle.dumps(index))
    reseal(step)
    with pytest.raises(ModelLinkError, match="UnpicklingError"):
        CheckpointStore(folder).load(blank())
    with pytest.raises(ModelLinkError, match="__0_0.distcp .* is refused"):
        list(load_full(folder))
    assert not target.exists()


def test_manifest_cannot_point_outside(tmp_path: Path) -> None:
    save(CheckpointStore(tmp_path), 1)
    path = tmp_path / "iter_0000001" / MANIFEST
    content = json.loads(path.read_text())
    content["files"]["../latest_checkpointed_iteration.txt"] = {"size": 2, "sha256": "0"}
    path.write_text(json.dumps(content))
    with pytest.raises(ModelLinkError, match="not a file of the step's own folder"):
        CheckpointStore(tmp_path).resolve(1)
