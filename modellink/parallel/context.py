"""Context parallelism: the ranks of one group share a sequence, and attention brings keys to queries or heads together.

    ring        keys and values travel round the ranks, one block a step; results merge by their log-sum-exp
    ulysses     an all-to-all gives every rank all positions of some heads, and another takes the result back
    hybrid      ulysses among neighbours, a ring over such neighbourhoods
    all-gather  every rank gets all keys and values

A ring is balanced: of 2 n chunks, rank r holds chunks r and 2 n - 1 - r, so that all have the same work under a causal
mask. Everything else of a decoder works on single positions and needs only their numbers. Sources: Liu et al.,
arXiv:2310.01889; Jacobs et al., arXiv:2309.14509; Fang and Zhao, arXiv:2405.07719. Legend: B batch, s local positions,
H query heads, G key/value heads, K head size, n ranks of a ring, u ranks of an all-to-all.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from modellink.config.schema import ParallelConfig
from modellink.models.attention import ALL_HEADS, AttentionCore, AttentionMask
from modellink.models.blockwise import ScoreRule, merge_
from modellink.models.decoder import Decoder
from modellink.models.moe import MoE
from modellink.models.tiles import Tile, backward_tiles, forward_tiles, make_tiles, sum_dtype
from modellink.parallel.collectives import all_gather_single, all_to_all, reduce_scatter_single
from modellink.parallel.topology import Topology

RING, ULYSSES, HYBRID, GATHER = "megatron_cp_algo", "ulysses_cp_algo", "hybrid_cp_algo", "allgather_cp_algo"


def ulysses_degree(parallel: ParallelConfig) -> int:
    """Ranks that exchange heads (u); the others of a context group form rings or gather."""
    size = parallel.context_parallel
    degrees = {ULYSSES: size, HYBRID: parallel.ulysses_degree_in_cp or 1}
    return degrees.get(parallel.context_parallel_algo, 1)


@dataclass(frozen=True)
class ContextLayout:
    """Which positions each rank of a context group holds: `rings` (n) parts of the sequence, each cut into `degree`."""

    rings: int
    degree: int

    def part(self, length: int, ring: int) -> Tensor:
        """int64 [length / n]: positions of part `ring`, two chunks of 2 n from both ends."""
        if self.rings == 1:
            return torch.arange(length)
        chunks = torch.arange(length).chunk(2 * self.rings)
        return torch.cat((chunks[ring], chunks[2 * self.rings - 1 - ring]))

    def positions(self, length: int, rank: int) -> Tensor:
        """int64 [length / (n u)]: positions of rank `rank` of the context group."""
        ring, place = divmod(rank, self.degree)
        return self.part(length, ring).chunk(self.degree)[place]


class ContextParallel:
    """A context group: cuts batches, and runs attention over the sequence that its ranks share."""

    def __init__(self, parallel: ParallelConfig, topology: Topology) -> None:
        self.algorithm, self.overlap = parallel.context_parallel_algo, parallel.use_cp_send_recv_overlap
        self.size, self.rank = topology.size("cp"), topology.coordinate("cp")
        degree = ulysses_degree(parallel)
        self.layout = ContextLayout(self.size // degree, degree)
        self.ring, self.place = divmod(self.rank, degree)
        group = topology.group("cp")
        assert group is not None
        self.group = group
        members = dist.get_process_group_ranks(group)
        self.ulysses, self.rings = self._subgroups(members, degree)
        self.neighbours = [members[(self.ring + step) % self.layout.rings * degree + self.place] for step in (1, -1)]

    def _subgroups(self, members: list[int], degree: int) -> tuple[dist.ProcessGroup, dist.ProcessGroup]:
        """The groups of this rank for the all-to-all and for the ring; every rank makes every group."""
        if degree in (1, self.size):
            return self.group, self.group
        every: list[Any] = [None] * dist.get_world_size()
        dist.all_gather_object(every, members)
        found: list[dist.ProcessGroup | None] = [None, None]
        for context in sorted({tuple(each) for each in every}):
            heads = [list(context[start : start + degree]) for start in range(0, self.size, degree)]
            rings = [list(context[place::degree]) for place in range(degree)]
            for kind, groups in enumerate((heads, rings)):
                for ranks in groups:
                    group = dist.new_group(ranks)
                    if dist.get_rank() in ranks:
                        found[kind] = group
        assert found[0] is not None and found[1] is not None
        return found[0], found[1]

    # --- batches ------------------------------------------------------------------------------------------------------

    def shard(self, batch: dict[str, Tensor]) -> dict[str, Tensor]:
        """This rank's positions of tokens, labels and position ids [rows, S]; document numbers stay whole."""
        tokens = batch["tokens"]
        mine = self.layout.positions(tokens.shape[1], self.rank).to(tokens.device)
        numbers = torch.arange(tokens.shape[1], device=tokens.device).expand_as(tokens)
        whole = {"position_ids": numbers, **batch}
        return {name: value if name == "documents" else value[:, mine] for name, value in whole.items()}

    # --- attention ----------------------------------------------------------------------------------------------------

    def __call__(self, core: AttentionCore, q: Tensor, k: Tensor, v: Tensor, mask: AttentionMask) -> Tensor:
        """q [B, H, s, K], k and v [B, G, s, ...] at this rank's positions -> [B, H, s, V]."""
        heads, degree = ALL_HEADS, self.layout.degree
        if degree > 1:
            share = q.shape[1] // degree
            heads = slice(self.place * share, (self.place + 1) * share)
            if k.shape[1] < degree:  # fewer key/value heads than ranks: each goes to several
                k, v = (x.repeat_interleave(degree // x.shape[1], 1) for x in (k, v))
            q, k, v = (self._to_heads(x) for x in (q, k, v))
        if self.layout.rings == 1:
            out = core.attend(q, k, v, self._whole(mask, q.shape[2]), heads)
        else:
            slopes = core.slopes(heads, q.shape[1]).to(q.device) if core.alibi else None
            sinks = core.sinks[heads] if core.sinks is not None else None
            kind = _GatheredAttention if self.algorithm == GATHER else _RingAttention
            rule = ScoreRule(core.scale, core.softcap, slopes)
            out = kind.apply(q, k, v, sinks, rule, self._tiles(core, mask, q.shape[2]), self)
        return self._to_positions(out) if degree > 1 else out

    def _to_heads(self, x_BHsK: Tensor) -> Tensor:
        """All heads of this rank's positions -> some heads of all positions."""
        rows = x_BHsK.unflatten(1, (self.layout.degree, -1)).movedim(1, 0)  # [u, B, H/u, s, K]
        return all_to_all(rows, self.ulysses).movedim(0, 2).flatten(2, 3)

    def _to_positions(self, x_BHSK: Tensor) -> Tensor:
        rows = x_BHSK.unflatten(2, (self.layout.degree, -1)).movedim(2, 0)  # [u, B, H/u, s, K]
        return all_to_all(rows, self.ulysses).movedim(0, 1).flatten(1, 2)

    def _whole(self, mask: AttentionMask, length: int) -> AttentionMask:
        """The mask of the whole sequence; like every other thing built here, once for all layers."""
        if "whole" not in mask.derived:
            mask.derived["whole"] = AttentionMask(
                length, length, mask.device, mask.first_key, mask.documents, mask.causal
            )
        return mask.derived["whole"]

    def _tiles(self, core: AttentionCore, mask: AttentionMask, local: int) -> list[list[Tile]]:
        """What this rank's queries see of the keys of each rank of the ring, this one first, then backwards."""
        key = "parts", core.window, core.alibi
        if key not in mask.derived:
            assert mask.first_key is None, "left padding is for generation, which shares no sequence"
            rings, documents = self.layout.rings, mask.host_documents()
            parts = [self.layout.part(local * rings, (self.ring - step) % rings).numpy() for step in range(rings)]
            mask.derived[key] = [
                make_tiles(parts[0], part, documents, mask.causal, core.window, core.alibi) for part in parts
            ]
        return mask.derived[key]

    def exchange(self, tensors: list[Tensor]) -> tuple[list[Tensor], list[Any]]:
        """Send to the next rank of the ring, receive from the one before; returns what arrives and what to wait for."""
        arriving = [torch.empty_like(tensor) for tensor in tensors]
        following, before = self.neighbours
        operations = [dist.P2POp(dist.isend, tensor, following, self.rings) for tensor in tensors]
        operations += [dist.P2POp(dist.irecv, tensor, before, self.rings) for tensor in arriving]
        return arriving, dist.batch_isend_irecv(operations)

    def gather(self, x_BGsK: Tensor) -> Tensor:
        """[n, B, G, s, K]: what the ranks of the ring hold."""
        mine = _by_position(x_BGsK)
        whole = mine.new_empty(self.layout.rings * len(mine), *mine.shape[1:])
        all_gather_single(whole, mine, group=self.rings)
        return whole.unflatten(0, (self.layout.rings, -1)).transpose(2, 3)

    def scatter_sum(self, parts_nBGsK: Tensor) -> Tensor:
        """Sum over the ranks of the ring of [n, B, G, s, K], of which each gets its own [B, G, s, K]."""
        whole = parts_nBGsK.transpose(2, 3).flatten(0, 1).contiguous()
        mine = torch.empty_like(whole[: parts_nBGsK.shape[1]])
        reduce_scatter_single(mine, whole, group=self.rings)
        return mine.transpose(1, 2)


def _finish(works: list[Any]) -> None:
    for work in works:
        work.wait()
    works.clear()  # a work holds its tensor


def _add_(sums: list[Tensor], parts_BsGK: list[Tensor]) -> None:
    for total, part in zip(sums, parts_BsGK, strict=True):
        total += part.transpose(1, 2)


def _by_position(x_BGsK: Tensor) -> Tensor:
    """[B, G, s, K] -> [B, s, G, K] without gaps, as projections leave it: mostly nothing is copied."""
    return x_BGsK.transpose(1, 2).contiguous()


def _empty_sums(q: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
    wide = torch.promote_types(q.dtype, torch.float32)
    out = q.new_zeros(*q.shape[:-1], v.shape[-1], dtype=wide)
    return out, q.new_full(q.shape[:-1], float("-inf"), dtype=wide)


def _keep(ctx: Any, inputs: Sequence[Tensor | None], out: Tensor, lse: Tensor, work: Sequence[Any]) -> Tensor:
    """The result in the dtype of q; backward finds it with q, k, v, sinks and (rule, steps, context) in `ctx`.

    A sink is one more key, whose value is zero.
    """
    q, _, _, sinks_H = inputs
    if sinks_H is not None:
        merge_(out, lse, torch.zeros_like(out), sinks_H.to(lse.dtype)[:, None].expand_as(lse))
    assert q is not None
    out = out.to(q.dtype)
    ctx.save_for_backward(*inputs, out, lse)
    ctx.rule, ctx.steps, ctx.context = work
    return out


def _sinks_gradient(grad: Tensor, out: Tensor, lse: Tensor, sinks_H: Tensor | None) -> Tensor | None:
    if sinks_H is None:
        return None
    delta = (grad.to(lse.dtype) * out.to(lse.dtype)).sum(-1)
    return -(torch.exp(sinks_H.to(lse.dtype)[:, None] - lse) * delta).sum((0, 2)).to(sinks_H.dtype)


class _RingAttention(torch.autograd.Function):
    """Keys and values go once round in forward; in backward they go round again, and their gradients behind them."""

    @staticmethod
    def forward(  # type: ignore[no-untyped-def]
        ctx,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        sinks_H: Tensor | None,
        rule: ScoreRule,
        steps: list[list[Tile]],
        context: ContextParallel,
    ) -> Tensor:
        out, lse = _empty_sums(q, v)
        here = [_by_position(k), _by_position(v)]
        for step, tiles in enumerate(steps):
            works: list[Any] = []
            last = step == len(steps) - 1
            if context.overlap and not last:
                coming, works = context.exchange(here)
            forward_tiles(q, here[0].transpose(1, 2), here[1].transpose(1, 2), rule, tiles, out, lse, step == 0)
            if not last:
                if not context.overlap:
                    coming, works = context.exchange(here)
                _finish(works)
                here = coming
        return _keep(ctx, (q, k, v, sinks_H), out, lse, (rule, steps, context))

    @staticmethod
    def backward(ctx, grad: Tensor) -> tuple[Any, ...]:  # type: ignore[no-untyped-def]
        q, k, v, sinks_H, out, lse = ctx.saved_tensors
        context, dq = ctx.context, torch.zeros_like(q, dtype=lse.dtype)
        here = [_by_position(k), _by_position(v)]
        behind: list[Tensor] = []
        returning: list[Any] = []
        for step, tiles in enumerate(ctx.steps):
            works: list[Any] = []
            last = step == len(ctx.steps) - 1
            if context.overlap and not last:
                coming, works = context.exchange(here)
            keys, values = (x.transpose(1, 2) for x in here)
            # of the keys that are here: this rank's own stay at home, those of others go on with what the ranks before
            # have found, which is added to where it is or, with overlap, arrives meanwhile
            dtype = sum_dtype(tiles, k.dtype)
            if behind and not context.overlap:
                _finish(returning)
                sums = [x.transpose(1, 2).to(dtype) for x in behind]
            else:
                sums = [torch.zeros_like(x, dtype=dtype) for x in (keys, values)]
            backward_tiles(grad, (q, out, lse), keys, values, ctx.rule, tiles, (dq, sums[0], sums[1]))
            if behind and context.overlap:
                _finish(returning)
                _add_(sums, behind)
            if step == 0:
                home = sums
            else:  # in the dtype of the keys, as their gradient is in the end
                behind, returning = context.exchange([_by_position(x.to(k.dtype)) for x in sums])
            if not last:
                if not context.overlap:
                    coming, works = context.exchange(here)
                _finish(works)
                here = coming
        _finish(returning)
        _add_(home, behind)
        dk, dv = (x.to(k.dtype) for x in home)
        return dq.to(q.dtype), dk, dv, _sinks_gradient(grad, out, lse, sinks_H), None, None, None


class _GatheredAttention(torch.autograd.Function):
    """Keys and values of all ranks at once; they are dropped after forward and gathered again in backward."""

    @staticmethod
    def forward(  # type: ignore[no-untyped-def]
        ctx,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        sinks_H: Tensor | None,
        rule: ScoreRule,
        steps: list[list[Tile]],
        context: ContextParallel,
    ) -> Tensor:
        out, lse = _empty_sums(q, v)
        keys, values = (context.gather(x) for x in (k, v))
        for step, tiles in enumerate(steps):
            source = (context.ring - step) % len(steps)
            forward_tiles(q, keys[source], values[source], rule, tiles, out, lse, step == 0)
        return _keep(ctx, (q, k, v, sinks_H), out, lse, (rule, steps, context))

    @staticmethod
    def backward(ctx, grad: Tensor) -> tuple[Any, ...]:  # type: ignore[no-untyped-def]
        q, k, v, sinks_H, out, lse = ctx.saved_tensors
        context, dq = ctx.context, torch.zeros_like(q, dtype=lse.dtype)
        keys, values = (context.gather(x) for x in (k, v))
        everything = [tile for tiles in ctx.steps for tile in tiles]
        sums = [torch.zeros_like(x, dtype=sum_dtype(everything, x.dtype)) for x in (keys, values)]
        for step, tiles in enumerate(ctx.steps):
            source = (context.ring - step) % len(ctx.steps)
            parts = dq, sums[0][source], sums[1][source]
            backward_tiles(grad, (q, out, lse), keys[source], values[source], ctx.rule, tiles, parts)
        del keys, values
        dk, dv = (context.scatter_sum(x.to(k.dtype)) for x in sums)
        return dq.to(q.dtype), dk, dv, _sinks_gradient(grad, out, lse, sinks_H), None, None, None


def apply_context_parallel(model: Decoder, context: ContextParallel) -> None:
    """Hand attention and the balance of experts what they need of the other ranks of the sequence."""

    def mean(frequency: Tensor) -> Tensor:
        dist.all_reduce(frequency, group=context.group)
        return frequency / context.size

    for module in model.modules():
        if isinstance(module, AttentionCore):
            module.context = context
        if isinstance(module, MoE):
            module.mean_over_sequence = mean
