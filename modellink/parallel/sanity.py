"""Do ranks that should hold the same weights hold the same bits? (`--sanity-checks`)

Three kinds of copies exist: parameters that the tensor group does not split, shards that hybrid or no sharding repeats
over `dp_replicate`, and the tied embedding of the first and the last pipeline stage. A copy that drifts, by a faulty
device or a missing reduction, spoils a run without a word, so each is compared by a checksum of its bits.
"""

from __future__ import annotations

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.tensor import DTensor

from modellink.errors import RunFailure
from modellink.optim.local import local_tensor
from modellink.parallel.apply import ParallelModel

_BITS = {1: torch.int8, 2: torch.int16, 4: torch.int32, 8: torch.int64}


def checksum(tensor: Tensor) -> Tensor:
    """int64 scalar: sum of the values' bit patterns, modulo 2**64; equal bits give equal sums."""
    local = local_tensor(tensor).contiguous()
    return local.view(_BITS[local.element_size()]).sum(dtype=torch.int64)


def _replicated_over_tensor(parameter: Tensor) -> bool:
    if not isinstance(parameter, DTensor) or "tp" not in (parameter.device_mesh.mesh_dim_names or ()):
        return True
    axis = parameter.device_mesh.mesh_dim_names.index("tp")
    return parameter.placements[axis].is_replicate()


def _deviating(named: list[tuple[str, Tensor]], group: dist.ProcessGroup | None) -> list[tuple[str, list[int]]]:
    """Collective over `group`: (name, global ranks that do not hold what most do) of every tensor that differs."""
    if group is None or not named:
        return []
    own_P = torch.stack([checksum(tensor) for _, tensor in named])
    all_RP = [torch.empty_like(own_P) for _ in range(dist.get_world_size(group))]
    dist.all_gather(all_RP, own_P, group=group)
    sums_RP = torch.stack(all_RP).cpu()
    usual_P = sums_RP.mode(dim=0).values
    ranks = dist.get_process_group_ranks(group)
    found = []
    for column, (name, _) in enumerate(named):
        odd = (sums_RP[:, column] != usual_P[column]).nonzero().flatten().tolist()
        if odd:
            found.append((name, [ranks[index] for index in odd]))
    return found


def check_replicas(model: ParallelModel) -> None:
    """Compare every replicated parameter over its copies; RunFailure names the first that differs and the odd ranks.

    Collective over the tensor, `dp_replicate` and (with tied embeddings) pipeline groups. Only members of a group that
    disagrees raise, so callers let the failure travel (`agree.together`).
    """
    topology, named = model.topology, model.named_parameters()
    found = _deviating([(n, p) for n, p in named if _replicated_over_tensor(p)], topology.group("tp"))
    # with expert parallelism experts lie on a mesh of their own
    shared: list[tuple[str, Tensor]] = [
        (n, p) for n, p in named if topology.experts is None or ".mlp.experts." not in n
    ]
    found += _deviating(shared, topology.group("dp_replicate"))
    if topology.experts is not None:
        experts: list[tuple[str, Tensor]] = [(n, p) for n, p in named if ".mlp.experts." in n]
        found += _deviating(experts, topology.group("expert_replicate"))
    pipeline = topology.group("pp")
    if pipeline is not None and model.chunks[0].config.tie_word_embeddings:
        found += _compare_ends(model, pipeline)
    if found:
        name, ranks = found[0]
        more = f" and {len(found) - 1} more" if len(found) > 1 else ""
        raise RunFailure(
            f"{name}{more} should be the same on all replicas, but rank {', '.join(map(str, ranks))} differs; resume "
            "from the last checkpoint, and test the devices of these ranks."
        )


def _compare_ends(model: ParallelModel, pipeline: dist.ProcessGroup) -> list[tuple[str, list[int]]]:
    """The tied embedding on the first and last stage; stages between only take part in the collective."""
    copy = model.tied_copy
    device = next(model.chunks[0].parameters()).device
    own = torch.zeros((), dtype=torch.int64, device=device) if copy is None else checksum(copy)
    sums = [torch.empty_like(own) for _ in range(dist.get_world_size(pipeline))]
    dist.all_gather(sums, own, group=pipeline)
    ranks = dist.get_process_group_ranks(pipeline)
    return [] if bool(sums[0] == sums[-1]) else [("embed_tokens.weight", [ranks[0], ranks[-1]])]
