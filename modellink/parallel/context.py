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

from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor

from modellink.config.schema import ParallelConfig
from modellink.models.attention import ALL_HEADS, AttentionCore, AttentionMask
from modellink.models.blockwise import BlockMask, ScoreRule, attend, attend_backward, merge
from modellink.models.decoder import Decoder
from modellink.models.moe import MoE
from modellink.parallel.collectives import all_to_all, gather_rows
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


class Block(NamedTuple):
    """One step of a ring: these queries look at these keys of the block that is here."""

    queries: slice
    keys: slice
    mask: BlockMask


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
        elif self.algorithm == GATHER:
            out = self._gathered(core, q, k, v, mask, heads)
        else:
            out = self._ring(core, q, k, v, mask, heads)
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

    def _gathered(
        self, core: AttentionCore, q: Tensor, k: Tensor, v: Tensor, mask: AttentionMask, heads: slice
    ) -> Tensor:
        length = k.shape[2] * self.layout.rings
        if "gathered" not in mask.derived:
            parts = torch.cat([self.layout.part(length, ring) for ring in range(self.layout.rings)])
            mine = self.layout.part(length, self.ring).to(mask.device)
            mask.derived["order"] = parts.argsort().to(mask.device)
            mask.derived["gathered"] = mask.at(mine, torch.arange(length, device=mask.device))
        order = mask.derived["order"]
        k, v = (gather_rows(x.movedim(2, 0), self.rings)[order].movedim(0, 2) for x in (k, v))
        return core.attend(q, k, v, mask.derived["gathered"], heads)

    def _ring(self, core: AttentionCore, q: Tensor, k: Tensor, v: Tensor, mask: AttentionMask, heads: slice) -> Tensor:
        key = ("ring", core.window, core.alibi)
        if key not in mask.derived:
            mask.derived[key] = self._blocks(core, mask, q.shape[2])
        slopes = core.slopes(heads, q.shape[1]).to(q.device) if core.alibi else None
        rule = ScoreRule(core.scale, core.softcap, slopes)
        sinks = core.sinks[heads] if core.sinks is not None else None
        return _RingAttention.apply(q, k, v, sinks, rule, mask.derived[key], self)

    def _blocks(self, core: AttentionCore, mask: AttentionMask, local: int) -> list[Block | None]:
        """What happens at each step of the ring, None where nothing is seen of the block that is here."""
        rings, half = self.layout.rings, local // 2
        length, everything = local * rings, slice(0, local)
        mine, blocks = self.layout.part(length, self.ring), []
        plain = mask.documents is None and mask.first_key is None and not core.alibi
        plain = plain and (core.window is None or core.window >= length)
        for step in range(rings):
            source = (self.ring - step) % rings
            queries, keys = everything, everything
            if mask.causal and source < self.ring:
                keys = slice(0, half)  # the later chunk of an earlier rank lies behind all queries
            elif mask.causal and source > self.ring:
                queries = slice(half, local)
            if plain:
                blocks.append(Block(queries, keys, BlockMask(causal=mask.causal and source == self.ring)))
                continue
            theirs = self.layout.part(length, source)
            distance = mine[queries, None] - theirs[None, keys]
            if core.window is not None and not ((distance >= 0) & (distance < core.window)).any():
                blocks.append(None)
                continue
            here = mask.at(mine[queries].to(mask.device), theirs[keys].to(mask.device))
            blocks.append(Block(queries, keys, BlockMask(here.dense(core.window), here.distances())))
        return blocks

    def exchange(self, tensors: list[Tensor]) -> tuple[list[Tensor], list[Any]]:
        """Send to the next rank of the ring, receive from the one before; returns what arrives and what to wait for."""
        arriving = [torch.empty_like(tensor) for tensor in tensors]
        following, before = self.neighbours
        operations = [dist.P2POp(dist.isend, tensor, following, self.rings) for tensor in tensors]
        operations += [dist.P2POp(dist.irecv, tensor, before, self.rings) for tensor in arriving]
        return arriving, dist.batch_isend_irecv(operations)


def _finish(works: list[Any]) -> None:
    for work in works:
        work.wait()


class _RingAttention(torch.autograd.Function):
    """Keys and values go once round in forward; in backward they go round again, and their gradients with them."""

    @staticmethod
    def forward(  # type: ignore[no-untyped-def]
        ctx,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        sinks_H: Tensor | None,
        rule: ScoreRule,
        blocks: list[Block | None],
        context: ContextParallel,
    ) -> Tensor:
        wide = torch.promote_types(q.dtype, torch.float32)
        out = q.new_zeros(*q.shape[:-1], v.shape[-1], dtype=wide)
        lse = q.new_full(q.shape[:-1], float("-inf"), dtype=wide)
        here = [k.contiguous(), v.contiguous()]
        for step, block in enumerate(blocks):
            works: list[Any] = []
            last = step == len(blocks) - 1
            if context.overlap and not last:
                coming, works = context.exchange(here)
            if block is not None:
                rows, keys = block.queries, block.keys
                more = attend(q[:, :, rows], here[0][:, :, keys], here[1][:, :, keys], rule, block.mask)
                out[:, :, rows], lse[:, :, rows] = merge(out[:, :, rows], lse[:, :, rows], *more)
            if not last:
                if not context.overlap:
                    coming, works = context.exchange(here)
                _finish(works)
                here = coming
        if sinks_H is not None:  # one more key, whose value is zero
            logit = sinks_H.to(wide)[:, None].expand_as(lse)
            out, lse = merge(out, lse, torch.zeros_like(out), logit)
        out = out.to(q.dtype)
        ctx.save_for_backward(q, k, v, sinks_H, out, lse)
        ctx.rule, ctx.blocks, ctx.context = rule, blocks, context
        return out

    @staticmethod
    def backward(ctx, grad: Tensor) -> tuple[Any, ...]:  # type: ignore[no-untyped-def]
        q, k, v, sinks_H, out, lse = ctx.saved_tensors
        context, blocks, wide = ctx.context, ctx.blocks, lse.dtype
        dq, dkv = torch.zeros_like(q, dtype=wide), [x.new_zeros(x.shape, dtype=wide) for x in (k, v)]
        here = [k.contiguous(), v.contiguous()]
        returning: list[Any] = []
        for step, block in enumerate(blocks):
            works: list[Any] = []
            last = step == len(blocks) - 1
            if context.overlap and not last:
                coming, works = context.exchange(here)
            found = None
            if block is not None:
                rows, keys = block.queries, block.keys
                parts = [x[:, :, rows] for x in (grad, q, out, lse)]
                found = attend_backward(
                    parts[0],
                    parts[1],
                    here[0][:, :, keys],
                    here[1][:, :, keys],
                    parts[2],
                    parts[3],
                    ctx.rule,
                    block.mask,
                )
                dq[:, :, rows] += found[0]
            _finish(returning)  # the gradients of the block that is here, by the ranks before
            if found is not None:
                for total, part in zip(dkv, found[1:], strict=True):
                    total[:, :, block.keys] += part
            if not last and not context.overlap:
                coming, works = context.exchange(here)
            _finish(works)
            here = here if last else coming
            dkv, returning = context.exchange(dkv)  # with their block; after the last step they are home
        _finish(returning)
        dsinks = None
        if sinks_H is not None:
            delta = (grad.to(wide) * out.to(wide)).sum(-1)
            dsinks = -(torch.exp(sinks_H.to(wide)[:, None] - lse) * delta).sum((0, 2)).to(sinks_H.dtype)
        return dq.to(q.dtype), dkv[0].to(k.dtype), dkv[1].to(v.dtype), dsinks, None, None, None


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
