"""Device memory of a layout in closed form, and the nearest layout that fits.

The estimate follows what the layout code of this package allocates, tensor by tensor, and nothing else: no allocator
slack, no communication buffers, no library context. It is a lower bound that a real run exceeds by some percent, so a
layout it refuses would not have run. Nothing is built and torch is not imported: a layout of any size costs
microseconds. Legend: B micro-batch, S sequence, D hidden, H query heads, G KV heads, K head size, F FFN, V vocabulary.

    weights      whole: in the compute dtype; ZeRO-1, 2, 3: shards in the dtype of gradients, and what is gathered
    gradients    fp32, or the compute dtype with --release-fp32-grad (a micro-batch's own live too shortly to count)
    optimizer    masters of half-precision weights, moments
    activations  what autograd keeps of every micro-batch under way, and the logits with their gradient
"""

from __future__ import annotations

import dataclasses
import itertools
import math
import os
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import cache, partial
from typing import Any

import numpy as np
import numpy.typing as npt

from modellink.config.flags import spell
from modellink.config.pipeline import LOOPED, live_micro_batches, micro_batch_sizes, stage_layers, stages_of
from modellink.config.recompute_plan import LAYER, OPERATORS, recompute_plan
from modellink.config.resolved import ResolvedConfig
from modellink.config.swap import swapped_modules
from modellink.config.validate import layout_problem
from modellink.errors import ModelLinkError
from modellink.models.count import layer_parameters, outer_parameters

# bytes of states a parameter, at least (scales, and what Muon leaves to AdamW, come on top)
MOMENTS = {"adam": 8, "adamw8bit": 2, "cadam": 2, "muon": 4, "sgd": 4}
_FIELDS = ("zero_stage", "recompute_granularity", "tensor_parallel", "pipeline_parallel")


@dataclass(frozen=True)
class MemoryEstimate:
    """Bytes on the fullest device of a layout, at the peak of a step."""

    weights: int
    gradients: int
    optimizer: int
    activations: int

    @property
    def total(self) -> int:
        return self.weights + self.gradients + self.optimizer + self.activations

    def __str__(self) -> str:
        parts = ", ".join(f"{name} {gib(value)}" for name, value in vars(self).items())
        return f"{gib(self.total)} ({parts})"


def gib(size: float) -> str:
    """ "12.3 GiB"."""
    return f"{size / 2**30:,.1f} GiB" if size >= 2**30 / 10 else f"{size / 2**20:,.1f} MiB"


class _Layout:
    """The sizes of one resolved configuration that the formulas read."""

    def __init__(self, resolved: ResolvedConfig) -> None:
        config = resolved.config
        self.model, self.parallel, self.optimizer = config.model.resolve(), config.parallel, config.optimizer
        self.tensor, self.stages, self.data = (
            self.parallel.tensor_parallel,
            self.parallel.pipeline_parallel,
            resolved.data_parallel,
        )
        self.zero = self.parallel.zero_stage or int(self.parallel.distributed_optimizer)
        self.copies = self.data * self.parallel.context_parallel  # ranks of one context hold the same weights
        self.shards = self.copies // self.parallel.data_parallel_replicas if self.zero else 1
        self.experts = (self.model.num_experts or 0) // self.parallel.expert_parallel  # on one rank
        self.item = 4 if self.optimizer.dtype == "float32" else 2
        self.rows = config.train.micro_batch_size or 1
        self.length = (config.data.seq_length or 1) // self.parallel.context_parallel
        batch = config.train.global_batch_size or self.rows * self.data
        self.micro_batches = max(1, batch // (self.rows * self.data))
        assert self.model.num_layers
        self.layers = stage_layers(self.model.num_layers, self.parallel)
        self.sizes = micro_batch_sizes(self.parallel)

        modules = ["input_layernorm", "self_attn", "post_attention_layernorm", "mlp"]
        modules += ["attention_output_norm", "mlp_output_norm"] * self.model.sandwich_norm
        swapped = swapped_modules(self.parallel.swap_modules) if self.parallel.swap_attention else []
        self.held_modules = [name for name in modules if name not in swapped]  # those whose activations stay

    def held(self, stage: int) -> list[int]:
        """The chunks that pipeline rank `stage` holds: one, those of an interleaved pipeline, or both arms of a V."""
        assert self.model.num_layers
        return stages_of(stage, self.model.num_layers, self.parallel)

    def ends(self, stage: int) -> tuple[bool, bool]:
        """Whether the embedding and the output matrix lie on `stage`."""
        return 0 in self.held(stage), len(self.layers) - 1 in self.held(stage)

    def layers_at(self, stage: int) -> npt.NDArray[np.int64]:
        """Indices of the layers of `stage`."""
        return np.concatenate([np.arange(self.layers[s].start, self.layers[s].stop) for s in self.held(stage)])

    def each(self, stage: int, of: Callable[[int], int]) -> npt.NDArray[np.int64]:
        """`of` every layer of `stage`. Layers are of two kinds, so a model of any depth costs two calls."""
        layers = self.layers_at(stage)
        sparse = np.zeros(len(layers), np.bool_)
        if self.model.num_experts:
            sparse[:] = [self.model.layer_has_experts(layer) for layer in layers.tolist()]
        found = np.zeros(len(layers), np.int64)
        for kind in (sparse, ~sparse):
            if kind.any():
                found[kind] = of(int(layers[kind][0]))
        return found

    # --- states -------------------------------------------------------------------------------------------------------

    def states(self, stage: int) -> tuple[int, int, int]:
        """(weights, gradients, optimizer) in bytes."""
        first, last = self.ends(stage)
        outer = outer_parameters(self.model, self.tensor, first, last)
        # a V has both ends of a tied pair on one rank: a copy that the optimizer does not know
        follower = self.model.tie_word_embeddings and first and last and self.stages > 1
        copy = (self.model.padded_vocab_size or 0) * self.model.hidden_size // self.tensor if follower else 0
        layers = self.each(stage, lambda layer: layer_parameters(self.model, layer, self.tensor, self.experts))
        held = outer + int(layers.sum())
        # experts that lie apart are sharded over fewer ranks: their share is that of all experts over all ranks
        every = self.each(stage, lambda layer: layer_parameters(self.model, layer, self.tensor))
        all_experts = outer + int(every.sum())
        moments, split = MOMENTS[self.optimizer.optimizer], 2 if self.optimizer.split_master else 4
        if self.optimizer.cpu_optimizer:
            moments = split = 0
        gradient = self.item if self.optimizer.release_fp32_grad else 4
        if self.copies == 1 or not self.zero:
            master = 0 if self.item == 4 else split
            return self.item * (held + copy), gradient * (held + copy), (master + moments) * held
        # shards are held in the dtype of gradients: fp32 ones are their own masters
        shard, master = all_experts // self.shards, 0 if gradient == 4 else split
        gathered, copied = held, copy // self.shards
        if self.zero == 3 and self.stages == 1:
            gathered = outer + 2 * int(layers.max())  # the layer at work and the one that is fetched ahead
        # stage 2 and 3, and all in fp32, reduce after each micro-batch; a pipeline and the others once a step
        waits = self.micro_batches > 1 and ((self.zero < 2 and self.item == 2) or self.stages > 1)
        weights = gradient * (shard + copied) + self.item * (gathered + copy)
        return weights, gradient * (held + copy if waits else shard + copied), (master + moments) * shard

    # --- activations --------------------------------------------------------------------------------------------------

    def layer_input(self) -> int:
        """Bytes of a layer's input for one micro-batch: all that full recomputation keeps of it."""
        width = (4 if self.model.fp32_residual else self.item) * self.model.hidden_size
        return self.rows * self.length * width // (self.tensor if self.parallel.sequence_parallel else 1)

    def layer_activations(self, layer: int, drops: frozenset[str] = frozenset()) -> int:
        """Bytes that `layer` keeps on the device for one micro-batch, at least, when it recomputes `drops`."""
        model, item = self.model, self.item
        tokens, tensor = self.rows * self.length, self.tensor
        between = tensor if self.parallel.sequence_parallel else 1
        query, key_value = model.num_attention_heads * model.head_dim, model.num_key_value_heads * model.head_dim
        inside = self._norm_keeps() * model.hidden_size
        stays = [name for name in self.held_modules if name in ("self_attn", "mlp")]
        operators = OPERATORS in drops  # of norms nothing stays, of the rest about the results of products
        if "layernorm" in drops:
            inside = min(inside, item * model.hidden_size)
        norms = (len(self.held_modules) - len(stays)) * inside // between + len(stays) * item * model.hidden_size
        if model.multi_head_latent_attention:  # query and key, value and output; the latents are small
            value = item * model.num_attention_heads * model.v_head_dim
            heads = value if "mla_up_proj" in drops else 2 * (item * query + value)
        else:
            heads = item * 2 * (query + key_value) + self._norm_keeps() * (query + key_value) * model.qk_norm
        width, routed = model.ffn_hidden_size, 0
        if model.layer_has_experts(layer):
            width = (model.router_topk + model.n_shared_experts) * model.moe_ffn_hidden_size
            routed = 2 * item * model.router_topk * model.hidden_size  # a copy for every choice, in and out
        mlp = item * width * (4 if model.gated_mlp else 2)
        sparse = model.layer_has_experts(layer)
        if operators or ("moe_act" if sparse else "mlp_act") in drops:
            mlp //= 2  # what the activation and the product make
        if ("moe" if sparse else "mlp") in drops:
            mlp = routed = 0
        if operators:
            norms, routed, heads = item * model.hidden_size // between, routed // 2, heads - heads // 4
        dropout = 2 * model.hidden_size // between if model.hidden_dropout else 0
        if "self_attn" not in stays:
            heads = 0
        if "mlp" not in stays:
            mlp = routed = 0
        per_token = norms + (heads + mlp) // tensor + routed + dropout
        return tokens * per_token + (0 if operators or "core_attn" in drops else self._scores())

    def _norm_keeps(self) -> int:
        """Bytes per channel that a norm keeps besides its output: fp32 input and normalised values (RMSNorm)."""
        if self.model.normalization != "RMSNorm":
            return self.item
        return 4 + (4 if self.model.norm_weight_in_fp32 else self.item)

    def _scores(self) -> int:
        """Bytes of attention scores where a soft cap or sinks keep them (capped, softmax, cast); kernels keep none."""
        fused = self.model.attention_logit_softcap is None and not self.model.attention_sinks
        if fused or "self_attn" not in self.held_modules:
            return 0
        context = self.parallel.context_parallel
        if context > 1 and self.parallel.context_parallel_algo in ("megatron_cp_algo", "hybrid_cp_algo"):
            return 0  # a ring computes them again
        heads = self.model.num_attention_heads // self.tensor
        return self.rows * heads * self.length * self.length * context * (8 + self.item % 4)

    def activations(self, stage: int) -> int:
        """Bytes that autograd keeps on `stage` when most micro-batches are under way, and the logits there."""
        parallel, least = self.parallel, self.layer_input()
        if parallel.distribute_saved_activations and not parallel.sequence_parallel:
            least //= self.tensor
        chunks = [self.layers[chunk] for chunk in self.held(stage)]
        plan = recompute_plan(parallel, chunks, stage, self.model.num_layers or 0)
        kept = cache(lambda drops: self.each(stage, partial(self.layer_activations, drops=drops)))
        each = at_work = start = 0
        for span, alike in itertools.groupby(itertools.chain.from_iterable(plan)):
            count = len(list(alike))
            rows = slice(start, start + count * span.layers)
            if LAYER in span.drops:
                each += least * count
                whole = kept(frozenset())[rows].reshape(count, span.layers)
                at_work = max(at_work, int(whole.sum(1).max()))
            else:
                each += int(kept(span.drops)[rows].sum())
            start = rows.stop
        logits = 0
        if self.ends(stage)[1]:
            tokens = self.rows * math.ceil(self.length / parallel.output_layer_slice_num)
            logits = tokens * (self.model.padded_vocab_size or 0) // self.tensor
            # whole: log-softmax, its gradient and that of the loss in fp32; shards: themselves and one fp32 copy
            logits *= 12 if self.tensor == 1 else self.item + 4
        # logits are gone when the first layer is rebuilt
        return int(each * self._under_way(stage)) + max(at_work, logits)

    def _under_way(self, stage: int) -> float:
        """Micro-batches whose activations `stage` holds at once, in whole-stage units."""
        assert self.model.num_layers
        live = live_micro_batches(stage, self.micro_batches, self.model.num_layers, self.parallel)
        if self.sizes is None:
            return live
        count = int(live)  # neighbours of other sizes, in units of the usual one
        return max(sum(self.sizes[at : at + count]) for at in range(len(self.sizes))) / self.rows


def estimate_memory(resolved: ResolvedConfig) -> MemoryEstimate:
    """Bytes that the fullest device needs to train `resolved` (vocabulary, batch and sequence must be known)."""
    layout = _Layout(resolved)
    found = []
    even = not layout.parallel.layers_per_stage
    for stage in {0, 1 % layout.stages, layout.stages - 1} if even else range(layout.stages):
        weights, gradients, optimizer = layout.states(stage)
        activations = layout.activations(stage)
        if layout.micro_batches == 1 and (layout.copies > 1 or layout.item == 4):
            # backward frees activations as it makes gradients: only the larger of the two counts
            activations = max(0, activations - gradients)
        found.append(MemoryEstimate(weights, gradients, optimizer, activations))
    return max(found, key=lambda estimate: estimate.total)


# --- the nearest layout that fits -------------------------------------------------------------------------------------


def _with(resolved: ResolvedConfig, world_size: int, micro_batch: int, values: dict[str, Any]) -> ResolvedConfig:
    """A copy with another layout."""
    config, now = resolved.config, resolved.config.parallel
    parallel = dataclasses.replace(now, **values)
    if parallel.tensor_parallel != now.tensor_parallel:
        parallel.sequence_parallel = True
    if parallel.recompute_granularity == "full":
        parallel.recompute_modules = parallel.recompute_layers = None
        parallel.recompute_activation_function &= now.recompute_granularity == "full"
        parallel.auto_recompute_device_size = -1
        parallel.recompute_method = parallel.recompute_method or "uniform"
        parallel.recompute_num_layers = parallel.recompute_num_layers or 1
    if parallel.pipeline_parallel != now.pipeline_parallel:
        parallel.layers_per_stage = parallel.layers_per_virtual_stage = parallel.manual_mbs = None
        parallel.optimized_pipeline = False
        parallel.pipeline_schedule = None if parallel.schedule in LOOPED else parallel.pipeline_schedule
    train = dataclasses.replace(config.train, micro_batch_size=micro_batch)
    new = dataclasses.replace(
        resolved, config=dataclasses.replace(config, parallel=parallel, train=train), world_size=world_size, warnings=[]
    )
    if world_size != resolved.world_size and resolved.origins["train.global_batch_size"].startswith("derived"):
        train.global_batch_size = micro_batch * max(1, new.data_parallel)
    return new


def _divisors(number: int) -> list[int]:
    return [n for n in range(1, number + 1) if number % n == 0]


def _neighbours(resolved: ResolvedConfig, world_size: int) -> Iterator[tuple[float, ResolvedConfig]]:
    """Every layout of `world_size` processes with at least this sharding, and how far it is from the one given.

    Sharding states over data ranks changes least, then a smaller micro-batch, recomputation, tensor, pipeline.
    """
    now, train = resolved.config.parallel, resolved.config.train
    zero = now.zero_stage or int(now.distributed_optimizer)
    rows = train.micro_batch_size or 1
    sizes = [rows] + [rows // n for n in _divisors(rows) if n > 1]
    kinds = [now.recompute_granularity] + ["full"] * (now.recompute_granularity != "full")
    for tensor in _divisors(world_size):
        for stages in _divisors(world_size // tensor):
            if tensor < now.tensor_parallel or stages < now.pipeline_parallel:
                continue
            shape = 8 * math.log2(tensor / now.tensor_parallel) + 12 * math.log2(stages / now.pipeline_parallel)
            data = world_size // (tensor * stages)
            for stage in range(zero, 4 if data > 1 else zero + 1):
                for kind in kinds:
                    for micro_batch in sizes:
                        values = dict(zip(_FIELDS, (stage, kind, tensor, stages), strict=True))
                        cost = shape + stage - zero + 2 * math.log2(rows / micro_batch) + 5 * (kind != kinds[0])
                        yield cost, _with(resolved, world_size, micro_batch, values)


def nearest_fit(resolved: ResolvedConfig, memory: int, world_size: int | None = None) -> ResolvedConfig | None:
    """The layout of `world_size` processes (default: as many as now) nearest to `resolved` that fits, or None."""
    fitting = (
        (cost, -estimate_memory(layout).total, layout)
        for cost, layout in _neighbours(resolved, world_size or resolved.world_size)
        if layout_problem(layout) is None and estimate_memory(layout).total <= memory
    )
    best = min(fitting, key=lambda item: item[:2], default=None)
    return None if best is None else best[2]


def _changes(before: ResolvedConfig, after: ResolvedConfig) -> str:
    """The flags that lead from one layout to the other."""
    paths = ["parallel.tensor_parallel", "parallel.sequence_parallel", "parallel.pipeline_parallel"]
    paths += ["parallel.zero_stage", "parallel.recompute_granularity", "train.micro_batch_size"]
    changed = [path for path in paths if before.get(path) != after.get(path) and after.get(path)]
    return " ".join(spell(path, after.get(path)) for path in changed)


def check_device(resolved: ResolvedConfig) -> None:
    """`check_memory` against this rank's device; on CPU the processes of a machine share its memory evenly."""
    from modellink import device

    sharing = 1 if device.is_accelerated() else int(os.environ.get("LOCAL_WORLD_SIZE", "1"))
    check_memory(resolved, device.total_memory() // sharing, device.device_name())


def check_memory(resolved: ResolvedConfig, memory: int, device_name: str) -> None:
    """Raise ModelLinkError when `resolved` cannot fit into `memory` bytes per process; names the nearest fit.

    Every rank computes the same sentence from the same numbers, so none waits for another.
    """
    estimate = estimate_memory(resolved)
    if estimate.total <= memory:
        return
    world = resolved.world_size
    advice = "no layout of up to 1024 times as many processes fits: choose a smaller model or a shorter sequence"
    for factor in (2**n for n in range(11)):
        fit = nearest_fit(resolved, memory, world * factor)
        if fit is not None:
            where = "is" if factor == 1 else f"needs {world * factor} processes:"
            flags = _changes(resolved, fit) or "the same flags"
            advice = f"the nearest layout that fits {where} {flags} ({gib(estimate_memory(fit).total)})"
            break
    raise ModelLinkError(
        f"a device is too small for this layout: the run needs at least {estimate} on each of {world} process(es), "
        f"{device_name} has {gib(memory)} for each; {advice}."
    )
