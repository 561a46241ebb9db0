"""What one attention layer costs a rank of a context group: bytes sent, kept and held, by formula and by measurement.

With n ranks in a ring (or gathering), u ranks that exchange heads, s = S / (n u) positions on a rank, i bytes a number,
and G' = max(G, u) key/value heads (where there are fewer heads than ranks, each goes to several):

    keys    = 2 B s G' K i                  a rank's own keys and values
    all     = 2 B s H K i + keys            what an all-to-all takes: queries, outputs, keys, values

               forward                      backward
    ring       (n - 1) keys                 2 (n - 1) keys: keys and values again, and their gradients
    gather     (n - 1) keys                 2 (n - 1) keys: gathered again, gradients scattered
    exchange   (u - 1) / u all              (u - 1) / u all

    kept       q, k, v, out and 4 B s H bytes of log-sum-exp; with an exchange the output once more, as it came back
    peak       kept, the gradient of out (with an exchange twice), what one block's backward finds of q, k and v, and
               beyond a plain exchange: dq in float32 and
                   ring      3 keys: here, to be sent home, and this rank's own; 6 where sending overlaps, n > 2
                   gather    2 n keys: of all ranks, and their gradients

The peak is exact for an exchange and an upper bound, some percent above what is seen, for the others; attention alone
is counted. Hybrid is the sum of its exchange and its ring. Legend: B batch, S sequence, H query heads, G key/value
heads, K head size.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from modellink.config.schema import ModelConfig, ParallelConfig
from modellink.models.attention import AttentionCore, AttentionMask
from modellink.parallel.context import GATHER, ContextParallel, ulysses_degree
from modellink.parallel.meter import Meter
from modellink.parallel.topology import Topology


@dataclass(frozen=True)
class AttentionShape:
    """One layer's attention: rows, whole sequence, heads, size of a head, type of a number."""

    batch: int
    length: int
    heads: int
    groups: int
    size: int
    dtype: torch.dtype


@dataclass(frozen=True)
class ContextCost:
    """Bytes of one rank: sent in forward and in backward, kept from one to the other, the most held at once."""

    forward: int
    backward: int
    kept: int
    peak: int


def context_cost(parallel: ParallelConfig, shape: AttentionShape) -> ContextCost:
    """The formulas on top of this module, for `parallel`."""
    exchange = ulysses_degree(parallel)
    rings = parallel.context_parallel // exchange
    positions = shape.batch * shape.length // parallel.context_parallel
    both = 2 * shape.size * shape.dtype.itemsize
    keys = positions * max(shape.groups, exchange) * both
    queries_and_outputs = positions * shape.heads * both
    exchanged = (queries_and_outputs + keys) * (exchange - 1) // exchange
    ring = (rings - 1) * keys
    returned = queries_and_outputs // 2 if exchange > 1 else 0
    kept = queries_and_outputs + keys + returned + 4 * positions * shape.heads
    queries = queries_and_outputs // 2
    peak = kept + (2 if exchange > 1 else 1) * queries + queries + keys
    if rings > 1:
        gathers = parallel.context_parallel_algo == GATHER
        held = 2 * rings if gathers else 6 if parallel.use_cp_send_recv_overlap and rings > 2 else 3
        peak += positions * shape.heads * shape.size * 4 + held * keys
    return ContextCost(exchanged + ring, exchanged + 2 * ring, kept, peak)


def measure_context(parallel: ParallelConfig, shape: AttentionShape, documents: Tensor | None = None) -> ContextCost:
    """The same by running causal attention, forward and backward, on every rank of a context group (a collective call).

    Queries, keys and values are counted as far as attention keeps them, as in a model, where nobody else does.
    """
    context = None
    if parallel.context_parallel > 1:
        context = ContextParallel(parallel, Topology(parallel))
    config = ModelConfig(
        num_layers=1, hidden_size=shape.heads * shape.size, num_attention_heads=shape.heads, vocab_size=8,
        num_key_value_heads=shape.groups, padded_vocab_size=8, attention_dropout=0.0,
    )  # fmt: skip
    core = AttentionCore(config.resolve(), 0)
    core.context = context
    local = shape.length // parallel.context_parallel
    counts = (shape.heads, shape.groups, shape.groups)
    leaves = [torch.ones(shape.batch, local, n, shape.size, dtype=shape.dtype, requires_grad=True) for n in counts]
    mask = AttentionMask(local, local, torch.device("cpu"), documents=documents)
    with Meter() as meter:
        q, k, v = ((leaf * 1).transpose(1, 2) for leaf in leaves)  # as projections leave them
        out = core(q, k, v, mask)
        del q, k, v
        kept, forward = meter.live, meter.sent.total()
        out.backward(torch.ones_like(out))
    return ContextCost(forward, meter.sent.total() - forward, kept, meter.peak)
