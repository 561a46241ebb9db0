"""Optimizer, norms and state on sharded parameters against the same thing on one process."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from spawn import run_distributed
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor, Partial, Replicate, Shard, distribute_tensor
from torch.distributed.tensor.parallel import ColwiseParallel, RowwiseParallel, parallelize_module

from modellink.optim.adamw import MixedPrecisionAdamW
from modellink.optim.grad_norm import (
    clip_coefficient,
    count_zeros,
    finalize_partial_grads,
    global_grad_norm,
    global_params_norm,
    has_non_finite,
)

pytestmark = pytest.mark.dist

# one row over two ranks leaves an empty shard; 5 rows are uneven
SHAPES = {"even": (6, 4), "uneven": (5, 3), "empty": (1, 7), "columns": (3, 8), "replicated": (9,), "plain": (2, 5)}
PLACEMENTS = {"even": Shard(0), "uneven": Shard(0), "empty": Shard(0), "columns": Shard(1), "replicated": Replicate()}
OPTIONS = {"lr": 1e-2, "weight_decay": 0.1, "bucket_elements": 8}


def full_tensors(seed: int) -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)
    tensors = {name: torch.randn(shape, generator=generator) for name, shape in SHAPES.items()}
    tensors["even"][0] = 0.0
    tensors["replicated"][3] = 0.0
    return tensors


def place(name: str, tensor: torch.Tensor, mesh) -> torch.Tensor:
    return distribute_tensor(tensor, mesh, [PLACEMENTS[name]]) if name in PLACEMENTS else tensor.clone()


def make_params(mesh, dtype: torch.dtype = torch.float32) -> dict[str, nn.Parameter]:
    full = {name: tensor.to(dtype) for name, tensor in full_tensors(0).items()}
    return {n: nn.Parameter(t if mesh is None else place(n, t, mesh)) for n, t in full.items()}


def set_grads(params: dict[str, nn.Parameter], mesh, seed: int) -> None:
    for name, grad in full_tensors(seed).items():
        grad = grad.to(params[name].dtype)
        params[name].grad = grad if mesh is None else place(name, grad, mesh)


def full(tensor: torch.Tensor) -> torch.Tensor:
    return (tensor.full_tensor() if isinstance(tensor, DTensor) else tensor).detach()


def train(mesh, dtype: torch.dtype, master: str) -> tuple[dict[str, nn.Parameter], MixedPrecisionAdamW]:
    params = make_params(mesh, dtype)
    optimizer = MixedPrecisionAdamW(params.items(), master=master, **OPTIONS)
    for step in range(5):
        set_grads(params, mesh, 10 + step)
        optimizer.step(0.5)
    return params, optimizer


MODES = {
    "float32": (torch.float32, "none"),
    "separate": (torch.bfloat16, "separate"),
    "split": (torch.bfloat16, "split"),
}


def sums(mesh) -> dict[str, torch.Tensor]:
    params = make_params(mesh)
    set_grads(params, mesh, 1)
    named = list(params.items())
    results = {
        "norm": global_grad_norm(named),
        "params_norm": global_params_norm(named),
        "zeros": count_zeros(named),
        "skipped": global_grad_norm(named, skip_names={"even", "plain"}),
        "fine": has_non_finite(named),
    }
    # the last rank alone holds the last element
    last = params["uneven"].grad
    local = last.to_local() if isinstance(last, DTensor) else last
    if mesh is None or dist.get_rank() == 1:
        local.view(-1)[-1] = float("nan")
    results["broken"] = has_non_finite(named)
    return results


def two_dimensional_norm(world_size: int) -> torch.Tensor:
    """HSDP-like: replicated over an axis of 2, sharded over an axis of 1, and the other way round."""
    mesh = init_device_mesh("cpu", (world_size, 1), mesh_dim_names=("dp_replicate", "dp_shard"))
    named = []
    for name, placements in (("a", [Replicate(), Shard(0)]), ("b", [Shard(1), Replicate()])):
        param = nn.Parameter(distribute_tensor(torch.zeros(4, 6), mesh, placements))
        param.grad = distribute_tensor(full_tensors(3)["columns"].view(4, 6), mesh, placements)
        named.append((name, param))
    return global_grad_norm(named)


def pipeline_norm(rank: int) -> torch.Tensor:
    """Two stages with different parameters and a tied one, which the last stage does not count."""
    grads = full_tensors(4)
    own = {"tied": grads["even"], **({"first": grads["plain"]} if rank == 0 else {"second": grads["columns"]})}
    named = []
    for name, grad in own.items():
        named.append((name, nn.Parameter(torch.zeros_like(grad))))
        named[-1][1].grad = grad
    return global_grad_norm(named, pipeline_group=dist.group.WORLD, skip_names={"tied"} if rank == 1 else ())


def partial_sums(mesh, rank: int) -> dict[str, torch.Tensor]:
    params = make_params(mesh)
    parts = [full_tensors(20), full_tensors(21)]
    for name in PLACEMENTS:
        params[name].grad = DTensor.from_local(parts[rank][name], mesh, [Partial()], run_check=False)
    with pytest.raises(ValueError, match="finalize_partial_grads"):
        global_grad_norm(params.items())
    finalize_partial_grads(params.values())
    assert all(params[name].grad.placements == params[name].placements for name in PLACEMENTS)
    return {name: params[name].grad.full_tensor() for name in PLACEMENTS}


def two_ranks(rank: int, world_size: int, folder: str) -> dict:
    mesh = init_device_mesh("cpu", (world_size,), mesh_dim_names=("dp_shard",))
    results = {"sums": sums(mesh), "2d": two_dimensional_norm(world_size), "pipeline": pipeline_norm(rank)}
    results["partial"] = partial_sums(mesh, rank)
    for mode, (dtype, master) in MODES.items():
        params, optimizer = train(mesh, dtype, master)
        results[mode] = {
            "weights": {name: full(p) for name, p in params.items()},
            "masters": {name: full(p) for name, p in optimizer.master_state().items()},
        }
        state = {key: value for key, value in optimizer.state_dict().items() if key != "step"}
        masters = {f"master.{name}": value for name, value in optimizer.master_state().items()}
        dcp.save({**state, **masters}, checkpoint_id=f"{folder}/{mode}")
    return results


def fsdp_with_tensor_parallel(rank: int, world_size: int) -> dict:
    """Real FSDP2 over TP: shards carry torch's strided placements on the data-parallel axis."""
    mesh = init_device_mesh("cpu", (2, 2), mesh_dim_names=("dp_shard", "tp"))
    model = make_mlp().to(torch.bfloat16)
    parallelize_module(model, mesh["tp"], {"0": ColwiseParallel(), "2": RowwiseParallel()})
    fully_shard(model, mesh=mesh["dp_shard"])
    optimizer = MixedPrecisionAdamW(model.named_parameters(), master="split", **OPTIONS)
    model(mlp_input()).square().mean().backward()
    finalize_partial_grads(model.parameters())
    norm = global_grad_norm(model.named_parameters())
    optimizer.step(clip_coefficient(norm, 0.01))
    assert any("Strided" in str(p.placements) for p in model.parameters())
    return {
        "norm": norm,
        "grads": {name: full(p.grad) for name, p in model.named_parameters()},
        "exp_avg": {name: full(optimizer.state_dict()[f"exp_avg.{name}"]) for name, _ in model.named_parameters()},
        "masters": {name: full(p) for name, p in optimizer.master_state().items()},
    }


def make_mlp() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(6, 10), nn.GELU(), nn.Linear(10, 6))


def mlp_input() -> torch.Tensor:
    return torch.randn(4, 6, generator=torch.Generator().manual_seed(1)).to(torch.bfloat16)


@pytest.fixture(scope="module")
def pair(tmp_path_factory) -> tuple[list[dict], Path]:
    folder = tmp_path_factory.mktemp("optim")
    return run_distributed(two_ranks, 2, str(folder)), folder


def test_sums_count_every_parameter_once(pair):
    want = sums(None)
    assert want["zeros"] == 5
    for got in pair[0]:
        for key in ("norm", "params_norm", "skipped"):
            torch.testing.assert_close(got["sums"][key], want[key], rtol=1e-6, atol=0)
        assert [int(got["sums"][key]) for key in ("zeros", "fine", "broken")] == [5, 0, 1]


def test_norm_over_two_axes_and_over_stages(pair):
    columns, even, plain = (full_tensors(4)[name] for name in ("columns", "even", "plain"))
    stages = torch.cat([t.reshape(-1) for t in (columns, even, plain)]).norm()
    for got in pair[0]:
        torch.testing.assert_close(got["2d"], full_tensors(3)["columns"].norm() * 2**0.5, rtol=1e-6, atol=0)
        torch.testing.assert_close(got["pipeline"], stages, rtol=1e-6, atol=0)


def test_partial_gradients_are_summed_into_the_placement_of_the_parameter(pair):
    first, second = full_tensors(20), full_tensors(21)
    for got in pair[0]:
        for name, grad in got["partial"].items():
            torch.testing.assert_close(grad, first[name] + second[name], rtol=1e-6, atol=1e-7)


@pytest.mark.parametrize("mode", MODES)
def test_sharded_steps_equal_one_process(pair, mode: str):
    params, optimizer = train(None, *MODES[mode])
    for got in pair[0]:
        for name, master in optimizer.master_state().items():
            torch.testing.assert_close(got[mode]["masters"][name], master.detach(), rtol=1e-6, atol=1e-7)
            torch.testing.assert_close(got[mode]["weights"][name], params[name].detach(), rtol=2**-8, atol=1e-7)


def test_sharded_split_has_the_bits_of_sharded_separate(pair):
    for got in pair[0]:
        for kind in ("weights", "masters"):
            for name, value in got["separate"][kind].items():
                assert torch.equal(value, got["split"][kind][name]), (kind, name)


@pytest.mark.parametrize("mode", MODES)
def test_state_of_two_ranks_loads_into_one(pair, mode: str):
    (ranks, folder), (dtype, master) = pair, MODES[mode]
    params = make_params(None, dtype)
    optimizer = MixedPrecisionAdamW(params.items(), master=master, **OPTIONS)
    state = {key: torch.empty_like(v) for key, v in optimizer.state_dict().items() if key != "step"}
    masters = {f"master.{name}": torch.empty_like(v) for name, v in optimizer.master_state().items()}
    merged = {**state, **masters}
    dcp.load(merged, checkpoint_id=f"{folder}/{mode}", no_dist=True)
    optimizer.load_state_dict({"step": 5, **{key: merged[key] for key in state}})
    optimizer.load_master_state({name: merged[f"master.{name}"] for name in params})
    for name, param in params.items():
        assert torch.equal(param, ranks[0][mode]["weights"][name])
        assert torch.equal(optimizer.master_state()[name], ranks[0][mode]["masters"][name])
    # a sixth step continues as an unsharded run of six steps would
    straight_params, straight = train(None, dtype, master)
    for these, stepper in ((params, optimizer), (straight_params, straight)):
        set_grads(these, None, 15)
        stepper.step(0.5)
    for name, value in optimizer.master_state().items():
        torch.testing.assert_close(value, straight.master_state()[name], rtol=1e-6, atol=1e-7)


def test_fsdp_with_tensor_parallel():
    ranks = run_distributed(fsdp_with_tensor_parallel, 4)
    names = list(ranks[0]["grads"])
    params = {name: nn.Parameter(p.detach()) for name, p in make_mlp().to(torch.bfloat16).named_parameters()}
    # the gradients that FSDP computed, whole, are the input: what is tested starts after the backward pass
    for name in names:
        params[name].grad = ranks[0]["grads"][name]
    optimizer = MixedPrecisionAdamW(params.items(), master="separate", **OPTIONS)
    norm = global_grad_norm(params.items())
    assert norm > 0.01
    optimizer.step(clip_coefficient(norm, 0.01))
    for got in ranks:
        torch.testing.assert_close(got["norm"], norm, rtol=1e-6, atol=0)
        for name in names:
            state = optimizer.state_dict()[f"exp_avg.{name}"]
            torch.testing.assert_close(got["exp_avg"][name], state, rtol=1e-5, atol=1e-9)
            torch.testing.assert_close(got["masters"][name], optimizer.master_state()[name], rtol=1e-5, atol=1e-7)
