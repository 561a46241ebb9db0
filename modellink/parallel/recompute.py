"""Activation recomputation: a plan (`recompute_plan`) put to work on a model.

Everything stands on torch's non-reentrant checkpoint, which drops what autograd saves inside a part and runs the part
again when backward asks for the first of it, only until the last saved tensor is there again. So a part that ends in a
product never runs that product twice: "activation, then down projection" keeps gate and up, and rebuilds what the down
projection multiplies by elementwise work alone. Operator-level recomputation is torch's selective checkpoint.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import torch.distributed as dist
from torch import Tensor, nn
from torch.autograd.graph import saved_tensors_hooks
from torch.func import functional_call
from torch.utils.checkpoint import CheckpointPolicy, checkpoint, create_selective_checkpoint_contexts

from modellink.config.recompute_plan import LAYER, OPERATORS, ChunkPlan, Span
from modellink.models.decoder import Decoder, DecoderLayer, LayerCall, run_layers_plainly
from modellink.models.layers import Runner, run_plainly
from modellink.models.mla import LatentAttention
from modellink.models.moe import MoE
from modellink.parallel.collectives import all_gather_single

# batched products belong to attention that is written out: its scores are what nobody wants to keep
PRODUCTS = ("aten::mm", "aten::addmm", "aten::_grouped_mm")


def keep_attention(_context: Any, operator: Any, *_args: Any, **_kwargs: Any) -> CheckpointPolicy:
    """Policy: the results of attention kernels stay."""
    kept = "attention" in operator._schema.name
    return CheckpointPolicy.MUST_SAVE if kept else CheckpointPolicy.PREFER_RECOMPUTE


def keep_expensive(context: Any, operator: Any, *args: Any, **kwargs: Any) -> CheckpointPolicy:
    """Policy: the results of products, attention kernels and communication stay."""
    if operator._schema.name in PRODUCTS or operator.namespace == "_c10d_functional":
        return CheckpointPolicy.MUST_SAVE
    return keep_attention(context, operator, *args, **kwargs)


class _Part(nn.Module):
    """A function of a module, as a module: `functional_call` takes nothing else."""

    def __init__(self, owner: nn.Module, function: Callable[..., Tensor]) -> None:
        super().__init__()
        self.owner, self.function = owner, function

    def forward(self, *inputs: Any) -> Tensor:
        return self.function(*inputs)


def _with_parameters_of_now(owner: nn.Module, function: Callable[..., Tensor]) -> Callable[..., Tensor]:
    """`function`, which reads parameters of `owner`, bound to those that `owner` has now.

    A tensor-parallel region exchanges parameters for local tensors only while it runs forward; what runs again in
    backward must find the same ones.
    """
    now: dict[str, Tensor] = {f"owner.{name}": parameter for name, parameter in owner.named_parameters()}

    def run(*inputs: Any) -> Tensor:
        if all(now[f"owner.{name}"] is parameter for name, parameter in owner.named_parameters()):
            return function(*inputs)
        return functional_call(_Part(owner, function), now, inputs)

    return run


class Recomputed:
    """A `Runner` that keeps the inputs of a part, and of its inside what `policy` says (default: nothing).

    `owner` is the module whose parameters the part reads, where a tensor-parallel region may exchange them.
    """

    def __init__(self, owner: nn.Module | None = None, policy: Callable[..., CheckpointPolicy] | None = None) -> None:
        self.owner = owner
        self.options: dict[str, Any] = {"use_reentrant": False}
        if policy is not None:
            self.options["context_fn"] = partial(create_selective_checkpoint_contexts, policy)

    def __call__(self, function: Callable[..., Tensor], *inputs: Any) -> Tensor:
        if self.owner is not None:
            function = _with_parameters_of_now(self.owner, function)
        return checkpoint(function, *inputs, **self.options)


class SharedInputs:
    """Keeps 1/t of what autograd saves on each of the t ranks of `group`, all of which save the same."""

    def __init__(self, group: dist.ProcessGroup) -> None:
        self.group, self.size, self.rank = group, dist.get_world_size(group), dist.get_rank(group)

    def __call__(self) -> saved_tensors_hooks:
        return saved_tensors_hooks(self._share, self._gather)

    def _share(self, tensor: Tensor) -> Tensor | tuple[Tensor, Any]:
        if tensor.numel() % self.size:
            return tensor
        return tensor.reshape(self.size, -1)[self.rank].clone(), tensor.shape

    def _gather(self, kept: Tensor | tuple[Tensor, Any]) -> Tensor:
        if isinstance(kept, Tensor):
            return kept
        part, shape = kept
        whole = part.new_empty(shape)
        all_gather_single(whole.view(-1), part, group=self.group)
        return whole


class RunSpans:
    """How a chunk runs its layers: the groups of `layer` and `operators` under one checkpoint each."""

    def __init__(self, spans: ChunkPlan, shared: SharedInputs | None) -> None:
        self.spans, self.shared = spans, shared
        self.runners: dict[str, Runner] = {LAYER: Recomputed(), OPERATORS: Recomputed(policy=keep_expensive)}

    def __call__(self, layers: list[LayerCall], x_BSD: Tensor) -> Tensor:
        start = 0
        for span in self.spans:
            group = layers[start : start + span.layers]
            start += span.layers
            runner = next((run for part, run in self.runners.items() if part in span.drops), None)
            if runner is None:
                x_BSD = run_layers_plainly(group, x_BSD)
            elif self.shared is None:
                x_BSD = runner(run_layers_plainly, group, x_BSD)
            else:
                with self.shared():  # inside the group the checkpoint's own hooks take over
                    x_BSD = runner(run_layers_plainly, group, x_BSD)
        return x_BSD


def drop_inside(layer: DecoderLayer, drops: frozenset[str], make: Callable[..., Runner] = Recomputed) -> None:
    """Give the parts of `layer` the runners that `drops` asks for, each from `make`."""
    attention, mlp = layer.self_attn, layer.mlp

    def runner(wanted: bool, owner: nn.Module | None = None, **options: Any) -> Runner:
        return make(owner, **options) if wanted else run_plainly

    latent = isinstance(attention, LatentAttention) and "mla_up_proj" in drops
    attention.core_runner = runner("core_attn" in drops and not latent, attention.core)
    if isinstance(attention, LatentAttention):
        # what attention makes is kept unless it is to go as well
        policy = None if "core_attn" in drops else keep_attention
        attention.heads_runner = runner(latent, attention, policy=policy)
    layer.norm_runner = runner("layernorm" in drops)
    sparse = isinstance(mlp, MoE)
    whole = ("moe" if sparse else "mlp") in drops
    layer.mlp_runner = runner(whole)
    activation = ("moe_act" if sparse else "mlp_act") in drops and not whole
    for part in (mlp.experts, mlp.shared_experts) if isinstance(mlp, MoE) else (mlp,):
        if part is not None:
            part.output_runner = runner(activation, part)


def recomputes_products(model: Decoder) -> bool:
    """Whether `model` recomputes what multiplies by weights: computing weight gradients apart, matrix by matrix, would
    recompute it for each of them."""
    layers: Any = model.layers.values()
    runners = [layer.mlp_runner for layer in layers]
    runners += [layer.self_attn.heads_runner for layer in layers if isinstance(layer.self_attn, LatentAttention)]
    whole = model.run_layers is not run_layers_plainly or model.output_losses is not None
    return whole or any(runner is not run_plainly for runner in runners)


def apply_recompute(model: Decoder, plan: Sequence[Span], shared: SharedInputs | None = None) -> None:
    """Make `model` (one chunk) recompute what `plan` says, and nothing else: a second call replaces the first."""
    layers: Any = iter(model.layers.values())
    for span in plan:
        for _ in range(span.layers):
            drop_inside(next(layers), span.drops)
    plain = all(not span.drops & {LAYER, OPERATORS} for span in plan)
    model.run_layers = run_layers_plainly if plain else RunSpans(tuple(plan), shared)
