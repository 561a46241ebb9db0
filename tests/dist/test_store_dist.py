"""The native checkpoint store over several ranks: other layouts, agreement, failures of one rank, background saves."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from spawn import run_distributed
from torch import nn
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor, Replicate, Shard, distribute_tensor
from torch.distributed.tensor.parallel import ColwiseParallel, RowwiseParallel, parallelize_module

from modellink.checkpoint.store import TRACKER, CheckpointStore, load_full
from modellink.errors import ModelLinkError

pytestmark = pytest.mark.dist


def whole_tensors() -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(7)
    return {
        "plain": torch.randn(5, generator=generator),
        "rows": torch.randn(8, 6, generator=generator),
        "uneven": torch.randn(7, 5, generator=generator),  # 7 rows over 4 ranks: 2, 2, 2, 1
        "both": torch.randint(-9, 9, (6, 8), generator=generator).bfloat16(),
        "stage0.weight": torch.randn(4, 4, generator=generator),
        "stage1.weight": torch.randn(4, 4, generator=generator),
    }


class Block(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.up = nn.Linear(8, 16, bias=False)
        self.down = nn.Linear(16, 8, bias=False)

    def forward(self, x_BD: torch.Tensor) -> torch.Tensor:
        return self.down(self.up(x_BD).relu())


def seeded_block() -> Block:
    torch.manual_seed(3)
    return Block()


def sharded_block(mesh: DeviceMesh) -> Block:
    """Tensor parallel over "tp", then FSDP over "dp": rows of `up` are sharded twice, in strided order."""
    block = seeded_block()
    parallelize_module(block, mesh["tp"], {"up": ColwiseParallel(), "down": RowwiseParallel()})
    fully_shard(block, mesh=mesh["dp"])
    return block


def save_in_four(rank: int, world_size: int, folder: str) -> Any:
    mesh = init_device_mesh("cpu", (2, 2), mesh_dim_names=("dp", "tp"))
    flat = init_device_mesh("cpu", (4,))
    stages = [DeviceMesh("cpu", [0, 1]), DeviceMesh("cpu", [2, 3])]
    whole, stage = whole_tensors(), rank // 2
    tensors = {
        "plain": whole["plain"],
        "rows": distribute_tensor(whole["rows"], mesh, [Shard(0), Replicate()]),
        "uneven": distribute_tensor(whole["uneven"], flat, [Shard(0)]),
        "both": distribute_tensor(whole["both"], mesh, [Shard(0), Shard(1)]),
        # a pipeline rank holds, and names, only what its stage has
        f"stage{stage}.weight": distribute_tensor(whole[f"stage{stage}.weight"], stages[stage], [Shard(1)]),
    }
    block = sharded_block(mesh)
    tensors |= {f"block.{name}": tensor for name, tensor in block.state_dict().items()}
    store = CheckpointStore(folder)
    store.save(
        1, tensors, extra={"consumed_samples": 8}, per_rank={"rng": torch.tensor([rank])}, config_text="layers: 1\n"
    )

    background = CheckpointStore(folder, async_save=True)
    for step in (2, 3):
        for tensor in tensors.values():
            (tensor.to_local() if isinstance(tensor, DTensor) else tensor).data.add_(1)
        background.save(
            step, tensors, extra={"consumed_samples": 8 * step}, per_rank={"rng": torch.tensor([rank])}, config_text=""
        )
        # training goes on, with traffic of its own, while the thread writes
        for tensor in tensors.values():
            (tensor.to_local() if isinstance(tensor, DTensor) else tensor).data.add_(100)
            dist.all_reduce(torch.ones(10))
        for tensor in tensors.values():
            (tensor.to_local() if isinstance(tensor, DTensor) else tensor).data.sub_(100)
    background.wait()
    return background.iterations(), background.latest()


class OneRankFails(CheckpointStore):
    def _write_own(self, temporary: Path, content: Any) -> None:
        if dist.get_rank() == 1:
            raise OSError(28, "No space left on device")
        super()._write_own(temporary, content)


def message_of(action: Any) -> str:
    try:
        action()
    except ModelLinkError as error:
        return str(error)
    return "nothing was raised"


def load_in_two(rank: int, world_size: int, folder: str) -> Any:
    mesh = init_device_mesh("cpu", (2,), mesh_dim_names=("tp",))
    whole = whole_tensors()
    layouts: dict[str, Any] = {
        "rows": Shard(1), "uneven": Shard(1), "both": Shard(0), "stage0.weight": Shard(0), "stage1.weight": Replicate()
    }  # fmt: skip
    tensors: dict[str, torch.Tensor] = {
        name: distribute_tensor(torch.zeros_like(whole[name]), mesh, [layout]) for name, layout in layouts.items()
    }
    tensors["plain"] = torch.zeros(5)
    block = Block()
    fully_shard(block, mesh=mesh)
    tensors |= {f"block.{name}": tensor for name, tensor in block.state_dict().items()}
    store = CheckpointStore(folder)
    result: dict[str, Any] = {"extra": store.load(tensors, step=1)}
    gathered = {name: t.full_tensor() if isinstance(t, DTensor) else t for name, t in tensors.items()}
    expected = whole | {f"block.{name}": tensor for name, tensor in seeded_block().state_dict().items()}
    result["wrong"] = [name for name in expected if not torch.equal(gathered[name], expected[name])]
    result["rng"] = [store.load_per_rank(source, step=1)["rng"].item() for source in range(4)]

    # what one rank alone finds wrong, every rank raises
    ill = dict(tensors) if rank == 0 else {**tensors, "plain": torch.zeros(6)}
    result["shape"] = message_of(lambda: store.load(ill, step=1))
    result["missing step"] = message_of(lambda: store.load(tensors, step=9))
    stage_only = {name: tensor for name, tensor in tensors.items() if name != f"stage{1 - rank}.weight"}
    result["union of names"] = message_of(lambda: store.load(stage_only, step=1))
    no_plain = {name: tensor for name, tensor in tensors.items() if name != "plain"}
    result["unexpected"] = message_of(lambda: store.load(no_plain, step=1))

    for async_save in (False, True):
        failing = OneRankFails(folder, async_save=async_save)

        def save_and_wait(store: CheckpointStore = failing) -> None:
            store.save(4, tensors, extra={}, per_rank={}, config_text="")
            store.wait()

        result[f"one rank fails {async_save}"] = message_of(save_and_wait)
    dist.barrier()

    # a shard of the newest step changes on disk: both ranks refuse that step and agree on the one before
    if rank == 0:
        path = max(Path(folder, "iter_0000003").glob("*.distcp"), key=lambda path: path.stat().st_size)
        content = bytearray(path.read_bytes())
        content[len(content) // 2] ^= 1
        path.write_bytes(content)
    dist.barrier()
    fresh = CheckpointStore(folder)
    result["damaged"] = message_of(lambda: fresh.resolve(3))
    result["fallback"] = fresh.resolve().name
    return result


def test_save_in_four_load_in_two_and_in_one(tmp_path: Path) -> None:
    folder = tmp_path / "run"
    assert run_distributed(save_in_four, 4, str(folder)) == [([1, 2, 3], 3)] * 4
    assert sorted(path.name for path in folder.iterdir()) == [
        "iter_0000001", "iter_0000002", "iter_0000003", TRACKER
    ]  # fmt: skip

    expected = whole_tensors() | {f"block.{name}": t.detach() for name, t in seeded_block().state_dict().items()}
    for step in (1, 2, 3):  # each step was saved with 1 added to all; the later changes must not show
        loaded = dict(load_full(folder / f"iter_000000{step}"))
        assert loaded.keys() == expected.keys()
        for name, tensor in expected.items():
            torch.testing.assert_close(loaded[name], tensor + (step - 1), rtol=0, atol=1e-4)

    copy = tmp_path / "copy"
    shutil.copytree(folder, copy)
    first, second = run_distributed(load_in_two, 2, str(copy))
    assert first == second, "the ranks do not agree"
    assert first["extra"] == {"consumed_samples": 8}
    assert first["wrong"] == []
    assert first["rng"] == [0, 1, 2, 3]
    assert "plain is [5] instead of [6]" in first["shape"]
    assert "step 9 does not exist" in first["missing step"] and "1, 2, 3" in first["missing step"]
    assert first["union of names"] == "nothing was raised"
    assert "has plain, which the run does not" in first["unexpected"]
    for async_save in (False, True):
        assert "rank 1 failed: OSError" in first[f"one rank fails {async_save}"]
    assert "step 3" in first["damaged"] and "SHA-256" in first["damaged"]
    assert first["fallback"] == "iter_0000002"
    assert not [path.name for path in copy.iterdir() if path.name.startswith(".")]
