"""One optimizer step, at any layout: forward and backward over micro-batches, reduction, clipping, update.

The engine promises that loss, gradients and weights after a step are those of one process on the whole batch: losses
are sums over tokens divided by the token count of the *global* batch before backward, and every reduction is a sum.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

from modellink.config.schema import Config, OptimizerConfig
from modellink.data.loader import EXTRA
from modellink.models.moe import MoE, auxiliary_loss_names
from modellink.optim.adamw import MixedPrecisionAdamW
from modellink.optim.cadam import MixedPrecisionCAdam
from modellink.optim.grad_norm import (
    clip_coefficient,
    count_zeros,
    finalize_partial_grads,
    global_grad_norm,
    global_params_norm,
)
from modellink.optim.local import drop_gradient, gradient_of, like_parameter, local_tensor
from modellink.optim.mixed_precision import MixedPrecisionOptimizer
from modellink.optim.muon import MixedPrecisionMuon
from modellink.optim.scaler import LossScaler
from modellink.optim.sgd import MixedPrecisionSGD
from modellink.parallel.apply import ParallelModel
from modellink.parallel.auto_recompute import AutoRecompute
from modellink.parallel.recompute_choice import OUTSIDE
from modellink.parallel.replicate import ReplicatedGradients
from modellink.train.losses import IGNORED, cross_entropy_sum, token_cross_entropy
from modellink.train.sliced_losses import SlicedLosses

Batch = dict[str, Tensor]
Loss = Callable[[Tensor, Tensor], Tensor]


@dataclass
class StepResult:
    """What one step did. Tensors stay on the device until somebody prints them."""

    loss: Tensor  # fp32 scalar: mean over the global batch's tokens, equal on all ranks
    grad_norm: Tensor  # fp32 scalar, before clipping
    skipped: bool  # True when fp16 gradients overflowed and nothing was updated
    zeros: Tensor | None = None
    auxiliary: dict[str, Tensor] = field(default_factory=dict)  # losses of routers, mean over layers and tokens


def _micro_batches(batch: Batch, size: int) -> Iterator[Batch]:
    """The rows of `batch`, `size` at a time."""
    for start in range(0, len(batch["tokens"]), size):
        yield {key: value[start : start + size] for key, value in batch.items()}


class Float32Accumulation:
    """Adds each micro-batch's half-precision gradient to `param.main_grad` in fp32 as soon as autograd has it."""

    def __init__(self, parameters: list[nn.Parameter]) -> None:
        self.parameters = parameters
        for parameter in parameters:
            parameter.register_post_accumulate_grad_hook(self._add)

    def collect(self) -> None:
        """Add what came without a hook: a pipeline that computes weight gradients apart adds them by hand."""
        for parameter in self.parameters:
            if parameter.grad is not None:
                self._add(parameter)

    @staticmethod
    def _add(parameter: nn.Parameter) -> None:
        gradient, parameter.grad = parameter.grad, None
        main = getattr(parameter, "main_grad", None)
        if main is not None:
            local_tensor(main).add_(local_tensor(gradient))
            return
        # a partial sum stays partial: only the local values change dtype
        parameter.main_grad = like_parameter(gradient, local_tensor(gradient).float())  # type: ignore[attr-defined]


def build_optimizer(model: ParallelModel, config: OptimizerConfig) -> MixedPrecisionOptimizer:
    """The optimizer over everything this rank holds, with masters as `config` asks for them."""
    decoupled = None
    if config.decoupled_lr is not None:
        decoupled = lambda name: name.startswith(("embed_tokens.", "lm_head."))  # noqa: E731
    common: dict[str, Any] = {
        "lr": config.lr or 0.0,
        "weight_decay": config.weight_decay,
        "master": "split" if config.split_master else "separate",
        "decoupled": decoupled,
        "on_host": config.cpu_optimizer,
    }
    named = model.named_parameters()
    if config.optimizer == "sgd":
        return MixedPrecisionSGD(named, momentum=config.sgd_momentum, **common)
    if config.optimizer == "cadam":
        return MixedPrecisionCAdam(named, beta=config.adam_beta1, **common)
    common |= {"betas": (config.adam_beta1, config.adam_beta2), "eps": config.adam_eps}
    if config.optimizer == "muon":
        return MixedPrecisionMuon(
            named,
            momentum=config.muon_momentum,
            newton_schulz_steps=config.muon_num_ns_steps,
            scale=config.muon_extra_scale_factor,
            dtype=torch.float32 if config.dtype == "float32" else torch.bfloat16,
            **common,
        )
    return MixedPrecisionAdamW(named, eight_bits=config.optimizer == "adamw8bit", **common)


def build_scaler(config: OptimizerConfig) -> LossScaler | None:
    """The fp16 loss scaler; None in other precisions."""
    if not config.fp16:
        return None
    return LossScaler(
        constant=config.loss_scale,
        initial=config.initial_loss_scale,
        minimum=config.min_loss_scale,
        window=config.loss_scale_window,
        hysteresis=config.hysteresis,
    )


class Engine:
    """Holds a laid-out model, its optimizer and the loss scaler; runs steps and evaluations."""

    def __init__(self, model: ParallelModel, config: Config, loss: Loss | None = None) -> None:
        self.model, self.config, self.topology = model, config, model.topology
        self.device = next(model.chunks[0].parameters()).device
        self.optimizer = build_optimizer(model, config.optimizer)
        self.scaler = build_scaler(config.optimizer)
        self.auto: AutoRecompute | None = None
        if config.parallel.auto_recompute_device_size > 0:
            self.auto = AutoRecompute(model.chunks, config.parallel, self.topology.coordinate("pp"), self.held)
        vocabulary_group = self.topology.group("tp")
        vocab_size: Any = config.model.vocab_size or config.model.padded_vocab_size
        self.loss = loss or (lambda logits, labels: cross_entropy_sum(logits, labels, vocab_size, vocabulary_group))
        self._inputs: tuple[str, ...] = EXTRA  # what the model takes besides tokens
        if config.parallel.output_layer_slice_num > 1:
            self._slice_losses(
                lambda logits, labels: token_cross_entropy(logits, labels, vocab_size, vocabulary_group),
                config.parallel.output_layer_slice_num,
            )
        self._fsdp = model.fsdp_modules()
        self._experts = [module for chunk in model.chunks for module in chunk.modules() if isinstance(module, MoE)]
        # FSDP accumulates in its reduce dtype by itself; fp32 parameters need nothing
        if not self._fsdp and config.optimizer.dtype != "float32" and not config.optimizer.release_fp32_grad:
            accumulation = Float32Accumulation([p for p in model.parameters() if p.requires_grad])
            if model.pipeline is not None:
                model.pipeline.after_weights = accumulation.collect
        self._replicas: ReplicatedGradients | None = None
        if self.topology.copies > 1 and not self._fsdp:
            overlap = config.parallel.overlap_grad_reduce
            self._replicas = ReplicatedGradients(model.chunks, self.topology, overlap)
        tied_elsewhere = model.tied_copy is not None and not model.specs[0].first
        self._counted_elsewhere = ("embed_tokens.weight",) if tied_elsewhere else ()

    def _slice_losses(self, token_losses: Loss, slices: int) -> None:
        """Let the model end in the losses of its tokens, so that its output matrix can be used slice by slice."""
        for chunk in self.model.chunks:
            chunk.output_losses = SlicedLosses(token_losses, slices) if chunk.lm_head is not None else None
        self._inputs = (*EXTRA, "labels")
        self.loss = lambda losses_BS, labels_BS: losses_BS.sum()

    def _extra(self, batch: Batch) -> Batch:
        return {name: batch[name] for name in self._inputs if name in batch}

    def held(self) -> Iterator[Tensor]:
        """Local tensors that live from step to step."""
        return (local_tensor(tensor) for tensors in self.optimizer.held_tensors().values() for tensor in tensors)

    def _token_count(self, labels_BS: Tensor) -> Tensor:
        """fp32 scalar: tokens with a label in the global batch, at least 1."""
        count = (labels_BS != IGNORED).sum().float()
        return self.topology.sum_over_data(count).clamp_(min=1.0)

    def forward_backward(self, batch: Batch, micro_batch_size: int) -> Tensor:
        """Accumulate gradients of this rank's rows of the global batch; returns the global mean loss (equal on all
        ranks).

        batch: tokens, labels (and position_ids, documents) int [rows, S] on the device, rows a multiple of
        `micro_batch_size`.
        """
        self.model.follow_ties()
        if self.model.context is not None:
            batch = self.model.context.shard(batch)
        tokens, labels = batch["tokens"], batch["labels"]
        divisor = self._token_count(labels)
        scale = self.scaler.scale if self.scaler is not None else 1.0

        self._weigh_experts(labels, scale)
        if self._replicas is not None:
            self._replicas.begin(len(tokens) // micro_batch_size)

        def loss_fn(logits: Tensor, target: Tensor) -> Tensor:
            return self.loss(logits, target) * (scale / divisor)

        if self.model.pipeline is not None:
            total = self.model.pipeline.run(
                tokens, labels, loss_fn, micro_batch_size, training=True, extra=self._extra(batch)
            )
        else:
            total = self._accumulate(batch, micro_batch_size, loss_fn)
        if self._replicas is not None:
            self._replicas.finish()
        return self._global_loss(total) / scale

    def _positions(self, labels_BS: Tensor) -> Tensor:
        """fp32 scalar: positions of the global batch, with or without a label (routers see them all)."""
        return self.topology.sum_over_data(torch.tensor(float(labels_BS.numel()), device=self.device))

    def _weigh_experts(self, labels_BS: Tensor, scale: Tensor | float) -> None:
        """Give auxiliary losses their weight in this step; every tensor rank adds its share of them."""
        if self.config.model.num_experts:
            self._routed = self._positions(labels_BS)
            weight = scale / (self._routed * self.topology.size("tp"))
            for experts in self._experts:
                experts.reset_statistics()
                experts.token_weight = weight

    def auxiliary_losses(self) -> dict[str, Tensor]:
        """Losses of routers in the last step: means over the global batch and the layers."""
        names, model = auxiliary_loss_names(self.config.model), self.config.model
        if not names:
            return {}
        zero = torch.zeros((), device=self.device)
        sums = [sum((experts.losses.get(name, zero) for experts in self._experts), zero) for name in names]
        total = self.topology.reduce(self.topology.sum_over_data(torch.stack(sums).float()), "pp")
        layers = sum(model.layer_has_experts(layer) for layer in range(model.num_layers or 0))
        return dict(zip(names, total / (self._routed * layers), strict=True))

    def _accumulate(self, batch: Batch, micro_batch_size: int, loss_fn: Loss) -> Tensor:
        model = self.model.chunks[0]
        count = len(batch["tokens"]) // micro_batch_size
        stage = self.topology.zero_stage
        # fp32 weights lie beside fp32 shards of them; whole gradients too would be more than ZeRO-1 may take
        reduce_each = stage >= 2 or self.config.optimizer.dtype == "float32"
        total = torch.zeros((), dtype=torch.float32, device=self.device)
        for number, part in enumerate(_micro_batches(batch, micro_batch_size), start=1):
            last = number == count
            if self._fsdp:
                model.set_is_last_backward(last)  # type: ignore[operator]
                model.set_requires_gradient_sync(last or reduce_each)  # type: ignore[operator]
                model.set_reshard_after_backward(last or stage == 3)  # type: ignore[operator]
            loss = loss_fn(model(part["tokens"], **self._extra(part)), part["labels"])
            loss.backward()
            total += loss.detach()
        return total

    def _global_loss(self, total: Tensor) -> Tensor:
        """Sum the last stage's share of every data rank; other stages contribute zero."""
        return self.topology.reduce(self.topology.sum_over_data(total.float()), "pp")

    def reduce_gradients(self) -> None:
        """Finish what the layouts left open: sums over the tensor group, and the tied embedding of first and last
        stage."""
        finalize_partial_grads(self.model.parameters())
        if self.topology.size("pp") > 1 and self.model.chunks[0].config.tie_word_embeddings:
            self._reduce_tied()

    def _reduce_tied(self) -> None:
        """First and last stage exchange their gradients of the one matrix; a + b and b + a are the same bits."""
        if self.model.tied_pair is not None:
            original, follower = self.model.tied_pair
            local_tensor(gradient_of(original)).add_(local_tensor(gradient_of(follower)))
            drop_gradient(follower)
        copy = self.model.tied_copy
        if copy is None:
            return
        group = self.topology.group("pp")
        gradient = local_tensor(gradient_of(copy))
        peer = dist.get_global_rank(group, self.topology.size("pp") - 1 - self.topology.coordinate("pp"))
        received = torch.empty_like(gradient)
        sends = dist.batch_isend_irecv(
            [dist.P2POp(dist.isend, gradient.contiguous(), peer, group), dist.P2POp(dist.irecv, received, peer, group)]
        )
        for work in sends:
            work.wait()
        gradient.add_(received)

    @torch.no_grad()
    def update(self) -> tuple[Tensor, bool, Tensor | None]:
        """Clip and apply the accumulated gradients; returns (gradient norm, skipped, zeros)."""
        named = self.model.named_parameters()
        pipeline = self.topology.group("pp")
        inverse = self.scaler.inverse if self.scaler is not None else 1.0
        norm = global_grad_norm(named, pipeline_group=pipeline, skip_names=self._counted_elsewhere) * inverse
        zeros = None
        if self.config.train.log_num_zeros_in_grad:
            zeros = count_zeros(named, pipeline_group=pipeline, skip_names=self._counted_elsewhere)
        skipped = False
        if self.scaler is not None:
            skipped = not bool(norm.isfinite())  # inf or NaN anywhere makes the norm so
            self.scaler.update(skipped)
        if not skipped:
            clip = self.config.optimizer.clip_grad
            self.optimizer.step(clip_coefficient(norm, clip) * inverse if clip > 0 else inverse)
            self._move_router_biases()
        self.optimizer.zero_grad()
        return norm, skipped, zeros

    def _move_router_biases(self) -> None:
        """Make experts that got more than their share of the step's tokens less eligible, the others more.

        Source: auxiliary-loss-free balancing, Wang et al., arXiv:2408.15664.
        """
        rate = self.config.optimizer.router_bias_update_rate
        biased = [moe for moe in self._experts if moe.gate.e_score_correction_bias is not None]
        if not biased or not rate:
            return
        loads = [moe.load_E for moe in biased if moe.load_E is not None]
        load_LE = self.topology.sum_over_data(torch.stack(loads).float())
        steps_LE = (load_LE.mean(-1, keepdim=True) - load_LE).sign() * rate
        for moe, step_E in zip(biased, steps_LE, strict=True):
            local_tensor(moe.gate.e_score_correction_bias).add_(step_E)

    def step(self, batch: Batch, micro_batch_size: int) -> StepResult:
        """One whole optimizer step on this rank's rows of the global batch."""
        with self.auto.watch() if self.auto is not None else contextlib.nullcontext():
            loss = self.forward_backward(batch, micro_batch_size)
            self.reduce_gradients()
            if self.auto is not None:
                self.auto.segment(OUTSIDE)
            norm, skipped, zeros = self.update()
        return StepResult(loss, norm, skipped, zeros, self.auxiliary_losses())

    @torch.no_grad()
    def evaluate(self, batch: Batch, micro_batch_size: int) -> tuple[Tensor, Tensor]:
        """(summed loss, token count) of one global batch, fp32 scalars equal on all ranks."""
        self.model.follow_ties()
        if self.model.context is not None:
            batch = self.model.context.shard(batch)
        tokens, labels = batch["tokens"], batch["labels"]
        if self.model.pipeline is not None:
            total = self.model.pipeline.run(
                tokens, labels, self.loss, micro_batch_size, training=False, extra=self._extra(batch)
            )
        else:
            total = torch.zeros((), dtype=torch.float32, device=self.device)
            for part in _micro_batches(batch, micro_batch_size):
                total += self.loss(self.model.chunks[0](part["tokens"], **self._extra(part)), part["labels"])
        return self._global_loss(total), self._token_count(labels)

    def params_norm(self) -> Tensor:
        """L2 norm of all parameters, fp32 scalar equal on all ranks."""
        return global_params_norm(
            self.model.named_parameters(),
            pipeline_group=self.topology.group("pp"),
            skip_names=self._counted_elsewhere,
        )
