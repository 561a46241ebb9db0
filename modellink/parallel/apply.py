"""From a configuration to a model on devices: every transform, in the one order that works.

    stage of the pipeline  on the meta device: no memory yet
    tensor / sequence      parameters become DTensors over `tp`
    context                attention over the ranks that share a sequence
    recomputation          around layers or parts of them
    swapping               hooks on the modules whose saved tensors go to host memory
    compilation            per layer
    ZeRO-1, 2, 3           FSDP2 per layer, then the rest: parameters become shards over `dp`
    materialise            memory for the local shards only
    initial weights        each from its name, cut to the local shard

One process takes the model as it is: none of the wrappers exists. Whole weights on several data ranks (ZeRO-0) need
none either: the engine sums their gradients (replicate.py).
"""

from __future__ import annotations

import itertools
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.distributed.fsdp import FSDPModule, MixedPrecisionPolicy, fully_shard
from torch.distributed.tensor import Shard

from modellink.config.recompute_plan import recompute_plan
from modellink.config.schema import ModelConfig, ParallelConfig
from modellink.models.decoder import Decoder
from modellink.models.init import initial_value
from modellink.models.moe import Experts, MoE
from modellink.optim.local import local_tensor
from modellink.parallel.context import ContextParallel, apply_context_parallel
from modellink.parallel.expert import apply_expert_parallel
from modellink.parallel.offload import apply_swap
from modellink.parallel.pipeline import Pipeline, StageSpec, stage_specs
from modellink.parallel.recompute import SharedInputs, apply_recompute
from modellink.parallel.shard import copy_full_into
from modellink.parallel.tensor import apply_tensor_parallel
from modellink.parallel.topology import Topology


@dataclass
class ParallelModel:
    """This rank's chunks of the model (one, unless the pipeline is interleaved) and how to run them."""

    chunks: list[Decoder]
    specs: list[StageSpec]
    topology: Topology
    pipeline: Pipeline | None
    context: ContextParallel | None = None

    def named_parameters(self) -> list[tuple[str, nn.Parameter]]:
        """(canonical name, parameter) of everything this rank holds; a tied pair that lives here counts once."""
        follower = self.tied_pair[1] if self.tied_pair is not None else None
        return [
            (chunk.canonical_name(name), parameter)
            for chunk in self.chunks
            for name, parameter in chunk.named_parameters()
            if parameter is not follower
        ]

    def parameters(self) -> list[nn.Parameter]:
        """Everything that gets a gradient or none, both halves of a tied pair too."""
        return [parameter for chunk in self.chunks for parameter in chunk.parameters()]

    def fsdp_modules(self) -> list[FSDPModule]:
        """Every module that FSDP manages."""
        return [m for chunk in self.chunks for m in chunk.modules() if isinstance(m, FSDPModule)]

    def train(self, mode: bool = True) -> None:
        """Switch dropout on or off."""
        for chunk in self.chunks:
            chunk.train(mode)

    @property
    def tied_copy(self) -> Tensor | None:
        """The embedding matrix where first and last stage each hold a copy of it on ranks of their own, else None."""
        config = self.chunks[0].config
        if not config.tie_word_embeddings or self.topology.size("pp") == 1 or self.tied_pair is not None:
            return None
        if self.specs[0].first:
            return self.chunks[0].embed_tokens.weight
        if self.specs[-1].last:
            return self.chunks[-1].lm_head.weight
        return None

    @property
    def tied_pair(self) -> tuple[Tensor, Tensor] | None:
        """The embedding and its copy as output matrix, where a V-shaped pipeline has both on this rank, else None.

        Each belongs to the sharding of its own chunk. The optimizer knows the first; the second follows it.
        """
        apart = len(self.chunks) > 1 and self.specs[0].first and self.specs[-1].last
        if not apart or not self.chunks[0].config.tie_word_embeddings:
            return None
        return self.chunks[0].embed_tokens.weight, self.chunks[-1].lm_head.weight

    @torch.no_grad()
    def follow_ties(self) -> None:
        """Bring the copy of a tied pair up to date, whatever moved the original."""
        if self.tied_pair is not None:
            original, follower = self.tied_pair
            local_tensor(follower).copy_(local_tensor(original))


def apply_sharding(
    model: Decoder,
    topology: Topology,
    parallel: ParallelConfig,
    compute_dtype: torch.dtype,
    gradient_dtype: torch.dtype,
) -> None:
    """Wrap each layer and the rest with FSDP2 over the data axes; gradients are summed in `gradient_dtype`, not
    averaged.

    Parameters stay as they are, layers compute in `compute_dtype`. ZeRO-1 and 2 keep gathered weights until the last
    backward of a step is over; 3 drops them after forward.
    """
    policy = MixedPrecisionPolicy(param_dtype=compute_dtype, reduce_dtype=gradient_dtype, cast_forward_inputs=False)
    kept = {parameter for parameter in model.parameters() if not parameter.requires_grad}  # in fp32, on every rank
    mesh = topology.mesh["dp_replicate", "dp_shard"]
    if topology.size("dp_replicate") == 1:
        mesh = topology.mesh["dp_shard"]
    reshard = topology.zero_stage == 3 and topology.size("pp") == 1
    if topology.experts is not None:
        _shard_experts(model, topology, policy, reshard)
    for layer in model.layers.values():
        fully_shard(layer, mesh=mesh, mp_policy=policy, reshard_after_forward=reshard, ignored_params=kept)
    fully_shard(model, mesh=mesh, mp_policy=policy, reshard_after_forward=reshard, ignored_params=kept)
    for module in model.modules():
        if isinstance(module, FSDPModule):
            # the loss is already divided by the global token count; gloo knows no scaled sums
            module.set_gradient_divide_factor(1.0)
            module.set_force_sum_reduction_for_comms(True)
    if parallel.overlap_param_gather:
        _gather_ahead(model, mesh.device_type)


def _gather_ahead(model: Any, device_type: str) -> None:
    """While a layer computes, the weights of the next one travel (`--overlap-param-gather`).

    FSDP2 by itself starts a gather where the layer begins, on a stream of its own: an accelerator then overlaps it with
    kernels that are still queued. Asking one layer ahead overlaps also where the host is the slower one, and on a CPU.
    """
    order = [[model], *([m for m in layer.modules() if isinstance(m, FSDPModule)] for layer in model.layers.values())]
    for here, following in itertools.pairwise(order):
        here[0].set_modules_to_forward_prefetch(following)
        following[0].set_modules_to_backward_prefetch(here)
    # only asynchronous collectives run beside computation on a CPU; elsewhere streams do that
    model._set_unshard_async_op(device_type == "cpu")


def _shard_experts(model: Decoder, topology: Topology, policy: MixedPrecisionPolicy, reshard: bool) -> None:
    """The same for experts, over the data ranks that hold the same ones."""
    assert topology.experts is not None and model.config.num_experts
    mesh = topology.experts["expert_replicate", "expert_shard"]
    even = model.config.num_experts // topology.size("ep") % topology.size("expert_shard") == 0

    def place(parameter: nn.Parameter) -> Shard | None:
        if even:
            return None
        # too few experts on a rank to deal out: the hidden size is what no other axis splits
        hidden = [dim for dim, size in enumerate(parameter.shape) if dim and size == model.config.hidden_size]
        return Shard(hidden[-1]) if hidden else None

    for module in model.modules():
        if isinstance(module, Experts):
            fully_shard(module, mesh=mesh, mp_policy=policy, reshard_after_forward=reshard, shard_placement_fn=place)


def materialise(model: Decoder, device: torch.device, seed: int | None) -> None:
    """Allocate local shards on `device` and, unless `seed` is None (weights will be loaded), draw initial weights."""
    model.to_empty(device=device)
    model.tie_weights()
    if seed is None:
        return
    for name, parameter in model.named_parameters():
        canonical = model.canonical_name(name)
        copy_full_into(initial_value(canonical, parameter.shape, model.config, seed), parameter)


def saved_inputs(parallel: ParallelConfig, topology: Topology) -> SharedInputs | None:
    """How the inputs of recomputed layers are kept; None: whole (or as the shards that they are)."""
    group = topology.group("tp")
    shared = parallel.distribute_saved_activations and group is not None and not parallel.sequence_parallel
    return SharedInputs(group) if shared else None


def compile_layers(model: Decoder) -> None:
    """Compile each layer around its attention core and its experts.

    The core is kernels already, builds masks once for all layers, and talks to other ranks; experts take as many rows
    as are routed. What runs again in backward must meet the program that its forward met, which neither a mask that is
    there by then nor a shape that has become a variable may change.
    """
    layers: Any = model.layers.values()
    for layer in layers:
        layer.self_attn.core_runner = torch.compiler.disable(layer.self_attn.core_runner)
        if isinstance(layer.mlp, MoE):
            layer.mlp_runner = torch.compiler.disable(layer.mlp_runner)
        layer.compile(dynamic=False)


def build_model(
    model: ModelConfig,
    parallel: ParallelConfig,
    topology: Topology,
    device: torch.device,
    dtype: torch.dtype,
    seed: int | None,
    gradient_dtype: torch.dtype = torch.float32,
) -> ParallelModel:
    """Build this rank's part of `model`, laid out by `parallel`, computing in `dtype`, with initial weights from
    `seed`.

    Whole parameters are held in `dtype`. Shards (ZeRO-1, 2, 3) are held in `gradient_dtype`, the dtype in which their
    gradients are summed: in fp32 they are the masters, and are cast when gathered.
    """
    sharded = topology.copies > 1 and topology.zero_stage > 0
    context = ContextParallel(parallel, topology) if topology.size("cp") > 1 else None
    stage = topology.coordinate("pp")
    specs = stage_specs(model, parallel, stage)
    recomputed = recompute_plan(parallel, [spec.layers for spec in specs], stage, model.num_layers)
    chunks = []
    for spec, plan in zip(specs, recomputed, strict=True):
        with torch.device("meta"):
            chunk = Decoder(model, spec.layers, spec.first, spec.last)
        chunk.cast(gradient_dtype if sharded else dtype)
        if topology.size("tp") > 1:
            apply_tensor_parallel(chunk, topology.mesh["tp"], parallel)
        chunk.causal = parallel.cp_attention_mask_type == "causal"
        apply_expert_parallel(chunk, topology, parallel)
        if context is not None:
            apply_context_parallel(chunk, context)
        apply_recompute(chunk, plan, saved_inputs(parallel, topology))
        apply_swap(chunk, parallel)
        if parallel.compile:
            compile_layers(chunk)
        if sharded:
            apply_sharding(chunk, topology, parallel, dtype, gradient_dtype)
        materialise(chunk, device, seed)
        chunks.append(chunk)
    pipeline = Pipeline(chunks, specs, parallel, topology, device, dtype) if topology.size("pp") > 1 else None
    return ParallelModel(chunks, specs, topology, pipeline, context)
