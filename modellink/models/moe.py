"""Mixture-of-experts MLP: a router, stacked experts, shared experts, and the losses that keep the experts busy.

    x_TD ─▶ router ─▶ (expert, weight) x k ─▶ drop over capacity ─▶ rows sorted by expert ─▶ experts ─▶ weighted sum
      └──────────────────────────────▶ shared experts (x sigmoid gate) ─────────────────────────────────────▶ +

Routing is in fp32. Experts are stacked parameters (`experts.gate_proj` [E, F, D]), so that one grouped matrix product
runs all of them. Expert parallelism replaces what stands between router and shared experts, in two halves
(`begin_routed`: send rows off; then, after the shared experts: run the local ones, take rows back), and nothing else.

Auxiliary losses never reach the trainer: their gradient is attached to the output of the layer by an identity. What
they weigh against the token loss is `MoE.token_weight`, the factor with which one position counts in the scalar that is
differentiated. The trainer differentiates sum(token losses) * fp16 scale / labelled tokens, added up over micro-batches
and ranks, so it sets fp16 scale / positions of the global batch (masked ones count: they are routed as well). Each
forward then attaches loss * its positions * token_weight, and the sum over micro-batches and ranks is the mean
over the global batch, times the same scale as the rest of the gradient. Without it (None) the losses of one forward
count fully, which fits code that differentiates the mean loss of one batch. Legend: B batch, S sequence, T tokens
(B x S), D hidden, E experts, k experts of a token, F expert width, R routed rows, G groups.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable
from functools import partial
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from modellink.config.schema import ModelConfig
from modellink.models.layers import ACTIVATIONS, MLP, Runner, run_plainly


def capacity(config: ModelConfig, pairs: int) -> int:
    """Most rows an expert takes of `pairs` = T k: their even share times the capacity factor, rounded up."""
    if config.expert_capacity_factor is None:
        return pairs
    return math.ceil(pairs / config.num_experts * config.expert_capacity_factor)


def _wide(x: Tensor) -> Tensor:
    """fp32 at least."""
    return x.to(torch.promote_types(x.dtype, torch.float32))


class Routing(NamedTuple):
    """Where tokens go. All floats are fp32 (fp64 for fp64 input)."""

    experts_Tk: Tensor  # int64
    weights_Tk: Tensor
    logits_TE: Tensor
    shares_TE: Tensor  # scores over all experts, each row summing to 1


class Router(nn.Module):
    """Scores every expert for every token and chooses k. Sources: arXiv:2401.04088, 2405.04434, 2412.19437."""

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        self.config = config
        self.weight = nn.Parameter(torch.empty(config.num_experts, config.hidden_size).normal_(0.0, config.init_std))
        self.bias = nn.Parameter(torch.zeros(config.num_experts)) if config.router_bias else None
        # moves with the load of the experts, not with a gradient
        correction = nn.Parameter(torch.zeros(config.num_experts), requires_grad=False)
        self.e_score_correction_bias = correction if config.router_correction_bias else None

    def forward(self, x_TD: Tensor) -> Routing:
        """[T, D] -> `Routing`."""
        config = self.config
        if self.training and config.router_input_jitter:
            jitter = config.router_input_jitter
            x_TD = x_TD * torch.empty_like(x_TD).uniform_(1.0 - jitter, 1.0 + jitter)
        bias = _wide(self.bias) if self.bias is not None else None
        logits_TE = F.linear(_wide(x_TD), _wide(self.weight), bias)
        scores_TE = logits_TE.sigmoid() if config.router_scoring == "sigmoid" else logits_TE.softmax(-1)
        experts_Tk = self._eligible(scores_TE.detach()).topk(config.router_topk, -1).indices
        if config.router_scoring == "softmax_selected":
            return Routing(experts_Tk, logits_TE.gather(-1, experts_Tk).softmax(-1), logits_TE, scores_TE)
        weights_Tk = scores_TE.gather(-1, experts_Tk)
        if config.norm_topk_prob:
            weights_Tk = weights_Tk / (weights_Tk.sum(-1, keepdim=True) + 1e-20)
        if config.router_scoring == "sigmoid" or not config.norm_topk_prob:
            weights_Tk = weights_Tk * config.routed_scaling_factor
        shares_TE = scores_TE / scores_TE.sum(-1, keepdim=True) if config.router_scoring == "sigmoid" else scores_TE
        return Routing(experts_Tk, weights_Tk, logits_TE, shares_TE)

    def _eligible(self, scores_TE: Tensor) -> Tensor:
        """Scores to choose by: with the correction bias, -inf outside the chosen groups."""
        config = self.config
        if self.e_score_correction_bias is not None:
            scores_TE = scores_TE + self.e_score_correction_bias
        if config.topk_group == config.router_groups:
            return scores_TE
        scores_TGE = scores_TE.unflatten(-1, (config.router_groups, -1))
        best = min(2 if config.router_scoring == "sigmoid" else 1, scores_TGE.shape[-1])
        groups = scores_TGE.topk(best, -1).values.sum(-1).topk(config.topk_group, -1).indices
        closed_TG = torch.ones_like(scores_TGE[..., 0], dtype=torch.bool).scatter(-1, groups, False)
        return scores_TGE.masked_fill(closed_TG[..., None], float("-inf")).flatten(-2)


def auxiliary_loss_names(config: ModelConfig) -> list[str]:
    """The losses that `auxiliary_losses` gives for `config`."""
    weights = {
        "z_loss": config.z_loss_coeff,
        "load_balancing_loss": config.aux_loss_coeff,
        "device_loss": config.device_aux_loss_coeff,
        "communication_loss": config.comm_aux_loss_coeff,
    }
    return [name for name, weight in weights.items() if weight and config.num_experts]


def auxiliary_losses(
    routing: Routing, config: ModelConfig, batch: int, mean_over_sequence: Callable[[Tensor], Tensor] | None = None
) -> dict[str, Tensor]:
    """Each loss that weighs anything, times its coefficient, by name; scalars, means over the tokens of `routing`.

    The T tokens are `batch` sequences one after the other. f_e is the number of tokens sent to e, over its mean; P_e
    the mean share of e; both over a sequence (`sequence_aux_loss`, averaged over sequences after) or over all tokens.
    Choices before dropping count. `mean_over_sequence` averages frequencies over the ranks that share a sequence: with
    f over all its positions and P over those of one rank, the mean loss of the ranks is the loss of the whole. Source:
    arXiv:2405.04434, section 2.2.3; z-loss: arXiv:2202.08906.
    """
    losses: dict[str, Tensor] = {}
    if config.z_loss_coeff:
        losses["z_loss"] = routing.logits_TE.logsumexp(-1).square().mean() * config.z_loss_coeff
    rows = batch if config.sequence_aux_loss else 1
    shares_NSE = routing.shares_TE.unflatten(0, (rows, -1))
    chosen_NSE = torch.zeros_like(shares_NSE).scatter(-1, routing.experts_Tk.unflatten(0, (rows, -1)), 1.0)
    mean = mean_over_sequence or (lambda frequency: frequency)
    frequency_NE = mean(chosen_NSE.mean(1)) * (config.num_experts / config.router_topk)
    share_NE = shares_NSE.mean(1)
    if config.aux_loss_coeff:
        losses["load_balancing_loss"] = (frequency_NE * share_NE).sum(-1).mean() * config.aux_loss_coeff
    share_NG = share_NE.unflatten(-1, (config.router_groups, -1)).sum(-1)
    if config.device_aux_loss_coeff:
        frequency_NG = frequency_NE.unflatten(-1, (config.router_groups, -1)).mean(-1)
        losses["device_loss"] = (frequency_NG * share_NG).sum(-1).mean() * config.device_aux_loss_coeff
    if config.comm_aux_loss_coeff:
        touched_NSG = chosen_NSE.unflatten(-1, (config.router_groups, -1)).amax(-1)
        frequency_NG = mean(touched_NSG.mean(1)) * (config.router_groups / config.topk_group)
        losses["communication_loss"] = (frequency_NG * share_NG).sum(-1).mean() * config.comm_aux_loss_coeff
    return losses


class _AttachLoss(torch.autograd.Function):
    """Identity on `output` whose backward also differentiates the scalar `loss` and calls `record` once."""

    @staticmethod
    def forward(ctx, output: Tensor, loss: Tensor, record: Callable[[], None]) -> Tensor:  # type: ignore[no-untyped-def]
        ctx.like, ctx.record = loss.new_ones(()), record
        return output.view_as(output)

    @staticmethod
    def backward(ctx, grad: Tensor) -> tuple[Tensor, Tensor, None]:  # type: ignore[no-untyped-def]
        ctx.record()
        return grad, ctx.like, None


class Experts(nn.Module):
    """E MLPs of one shape as stacked parameters, run on rows that are sorted by expert."""

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        experts, ffn, hidden = config.num_experts, config.moe_ffn_hidden_size, config.hidden_size

        def weight(*shape: int) -> nn.Parameter:
            return nn.Parameter(torch.empty(shape).normal_(0.0, config.init_std))

        def bias(width: int, wanted: bool = True) -> nn.Parameter | None:
            return nn.Parameter(torch.zeros(experts, width)) if config.mlp_bias and wanted else None

        self.gate_proj = weight(experts, ffn, hidden) if config.gated_mlp else None
        self.up_proj = weight(experts, ffn, hidden)
        self.down_proj = weight(experts, hidden, ffn)
        self.gate_proj_bias = bias(ffn, config.gated_mlp)
        self.up_proj_bias, self.down_proj_bias = bias(ffn), bias(hidden)
        self.activation = ACTIVATIONS[config.activation]
        self.grouped, self.limit = config.moe_grouped_gemm, config.swiglu_limit
        # parallelism hands in what this rank sees of a parameter (name, parameter): fewer experts, or narrower ones
        self.local: Callable[[str, nn.Parameter], Tensor] | None = None
        self.output_runner: Runner = run_plainly
        # parallelism also hands in what to do with rows that are still travelling: (how to run rows, rows, facts about
        # them) -> results
        self.exchange: Callable[[Callable[..., Tensor], Any, Any], Any] | None = None

    def forward(self, rows: Any, facts: Any) -> Any:
        """Rows [R, D], the first facts[0] (int64 [E], sum R) of them for expert 0, and so on -> [R, D].

        With `exchange`, whatever that takes and gives: FSDP gathers and frees weights around this one call.
        """
        found: dict[str, Tensor] = dict(self.named_parameters())
        if self.local is not None:
            found = {name: self.local(name, parameter) for name, parameter in self.named_parameters()}
        run = partial(self._run, found)
        return run(rows, facts) if self.exchange is None else self.exchange(run, rows, facts)

    def _run(self, found: dict[str, Tensor], x_RD: Tensor, counts_E: Tensor, counts: list[int] | None = None) -> Tensor:
        """`counts` is counts_E where the host knows it already."""
        ends_E = None
        if self.grouped and has_grouped_kernel(x_RD, found["up_proj"]):
            ends_E = counts_E.cumsum(0, dtype=torch.int32)
        elif counts is None:
            counts = counts_E.tolist()

        def project(x_RD: Tensor, name: str) -> Tensor:
            weight_EFD, bias_EF = found[name], found.get(f"{name}_bias")
            if ends_E is not None:
                y_RF = _grouped_product(x_RD, weight_EFD, ends_E)
            else:
                assert counts is not None
                parts = zip(x_RD.split(counts), weight_EFD, strict=True)
                y_RF = torch.cat([F.linear(part, weight) for part, weight in parts])
            return y_RF if bias_EF is None else y_RF + bias_EF.repeat_interleave(counts_E, 0, output_size=len(y_RF))

        def output(gate_RF: Tensor, up_RF: Tensor | None = None) -> Tensor:
            return project(self._activate(gate_RF, up_RF), "down_proj")

        up_RF = project(x_RD, "up_proj")
        if self.gate_proj is None:
            return self.output_runner(output, up_RF)
        return self.output_runner(output, project(x_RD, "gate_proj"), up_RF)

    def _activate(self, gate_RF: Tensor, up_RF: Tensor | None) -> Tensor:
        if up_RF is None:
            return self.activation(gate_RF)
        if self.limit is None:
            return self.activation(gate_RF) * up_RF
        gate_RF = gate_RF.clamp(max=self.limit)  # gpt-oss: clamped, a steeper sigmoid, and one added to the linear part
        return gate_RF * torch.sigmoid(1.702 * gate_RF) * (up_RF.clamp(-self.limit, self.limit) + 1.0)


def has_grouped_kernel(x: Tensor, weight: Tensor) -> bool:
    """Whether F.grouped_mm takes these: bf16 anywhere, fp32 on the CPU; sizes in multiples of 16 bytes."""
    dtypes = (torch.bfloat16, torch.float32) if x.device.type == "cpu" else (torch.bfloat16,)
    aligned = all(size * weight.element_size() % 16 == 0 for size in weight.shape[1:])
    return x.dtype == weight.dtype and x.dtype in dtypes and aligned


def _grouped_product(x_RD: Tensor, weight_EFD: Tensor, ends_E: Tensor) -> Tensor:
    y_RF = F.grouped_mm(x_RD.contiguous(), weight_EFD.transpose(-2, -1), offs=ends_E)
    if y_RF.requires_grad:
        y_RF.register_hook(Tensor.contiguous)  # its backward takes nothing else
    return y_RF


class _TakeRows(torch.autograd.Function):
    """Rows of tokens for (token, choice) pairs. Gradients are put in place and summed over a token's choices: no two
    writers meet, unlike in the gradient of plain indexing."""

    @staticmethod
    def forward(ctx, x_TD: Tensor, pairs_R: Tensor, choices: int) -> Tensor:  # type: ignore[no-untyped-def]
        ctx.save_for_backward(pairs_R)
        ctx.tokens, ctx.choices = len(x_TD), choices
        return x_TD.index_select(0, pairs_R // choices)

    @staticmethod
    def backward(ctx, grad_RD: Tensor) -> tuple[Tensor, None, None]:  # type: ignore[no-untyped-def]
        (pairs_R,) = ctx.saved_tensors
        pairs = ctx.tokens * ctx.choices
        new = grad_RD.new_empty if len(pairs_R) == pairs else grad_RD.new_zeros  # dropped pairs have no gradient
        grad_PD = new(pairs, grad_RD.shape[-1]).index_copy_(0, pairs_R, grad_RD)
        return grad_PD.unflatten(0, (ctx.tokens, ctx.choices)).sum(1), None, None


def take_rows(x_TD: Tensor, pairs_R: Tensor, choices: int) -> Tensor:
    """Row of its token for each pair (place in the flattened [T, k], each at most once, k = `choices`): [R, D]."""
    return _TakeRows.apply(x_TD, pairs_R, choices)


def weighted_sum(y_RD: Tensor, pairs_R: Tensor, weights_Tk: Tensor) -> Tensor:
    """What experts made of the rows of these pairs, times the weights, summed over a token's choices: [T, D]."""
    y_PD = y_RD.new_zeros(weights_Tk.numel(), y_RD.shape[-1]).index_copy(0, pairs_R, y_RD)  # dropped: zero
    weights_Tk = weights_Tk.to(y_PD.dtype)
    return (y_PD.unflatten(0, weights_Tk.shape) * weights_Tk[..., None]).sum(1)


class _Order(NamedTuple):
    """Kept (token, choice) pairs, sorted by expert."""

    pairs_R: Tensor  # int64: place in the flattened [T, k]
    counts_E: Tensor  # int64: rows of each expert, padding included
    slots_R: Tensor | None  # int64: with padding, the row each pair takes


def sort_by_expert(experts_P: Tensor, experts: int) -> tuple[Tensor, Tensor, Tensor]:
    """(places of pairs sorted by expert, by token within one; the experts sorted; int64 [E] pairs of each expert).

    Pairs with the number `experts` are dropped ones: they come last.
    """
    sorted_P, pairs_P = experts_P.sort(stable=True)
    ends_E = torch.searchsorted(sorted_P, torch.arange(experts, device=experts_P.device), right=True)
    return pairs_P, sorted_P, ends_E.diff(prepend=ends_E.new_zeros(1))


def _places(sorted_P: Tensor, counts_E: Tensor) -> Tensor:
    """int64 [P]: how many pairs of the same expert stand before each."""
    starts_E = counts_E.cumsum(0) - counts_E
    last = len(counts_E) - 1  # any start will do for a dropped pair
    return torch.arange(len(sorted_P), device=sorted_P.device) - starts_E[sorted_P.clamp(max=last)]


def chosen_experts(routing: Routing, config: ModelConfig) -> Tensor:
    """int64 [T, k]: the expert of each choice; E, which is none, where that would exceed its capacity.

    "probs" keeps the largest weights, "position" the first tokens.
    """
    if config.expert_capacity_factor is None:
        return routing.experts_Tk
    experts_P = routing.experts_Tk.flatten()
    ranked_P = torch.arange(len(experts_P), device=experts_P.device)
    if config.token_drop_policy == "probs":
        ranked_P = routing.weights_Tk.detach().flatten().sort(descending=True, stable=True).indices
    pairs_P, sorted_P, counts_E = sort_by_expert(experts_P[ranked_P], config.num_experts)
    kept_P = _places(sorted_P, counts_E) < capacity(config, len(experts_P))
    kept_P = torch.where(kept_P, sorted_P, config.num_experts)
    return torch.empty_like(experts_P).scatter_(0, ranked_P[pairs_P], kept_P).view_as(routing.experts_Tk)


def expert_order(routing: Routing, config: ModelConfig) -> _Order:
    """Sort pairs by expert (by token within one) without those that exceed the capacity."""
    experts_P = chosen_experts(routing, config).flatten()
    pairs_P, sorted_P, counts_E = sort_by_expert(experts_P, config.num_experts)
    if config.expert_capacity_factor is None:
        return _Order(pairs_P, counts_E, None)
    kept = int(counts_E.sum())
    if not config.pad_experts_to_capacity:
        return _Order(pairs_P[:kept], counts_E, None)
    limit = capacity(config, len(experts_P))
    slots_P = sorted_P * limit + _places(sorted_P, counts_E)
    return _Order(pairs_P[:kept], torch.full_like(counts_E, limit), slots_P[:kept])


class MoE(nn.Module):
    """The mixture-of-experts MLP of one layer: drop-in for `layers.MLP`."""

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        self.config = config
        self.gate = Router(config)
        self.experts = Experts(config)
        shared = dataclasses.replace(config, ffn_hidden_size=config.n_shared_experts * config.moe_ffn_hidden_size)
        self.shared_experts = MLP(shared) if config.n_shared_experts else None
        gated = config.n_shared_experts and config.shared_expert_gate
        width = config.shared_expert_gate_dimension
        self.shared_expert_gate = nn.Linear(config.hidden_size, width, bias=False) if gated else None
        # expert parallelism hands in another way from tokens and their routing to weighted sums: it begins, and what it
        # returns is called for the result once the shared experts have been computed
        self.begin_routed: Callable[[Tensor, Routing], Callable[[], Tensor]] | None = None
        self.mean_over_sequence: Callable[[Tensor], Tensor] | None = None  # context parallelism hands it in
        self.token_weight: Tensor | float | None = None  # see the top of this module
        # sums over the backward passes since `reset_statistics`: auxiliary losses, times their coefficients and
        # positions; tokens per expert (int64), before dropping
        self.losses: dict[str, Tensor] = {}
        self.load_E: Tensor | None = None

    def forward(self, x_BSD: Tensor) -> Tensor:
        """[B, S, D] -> [B, S, D]."""
        x_TD = x_BSD.flatten(0, -2)
        routing = self.gate(x_TD)
        finish = (self.begin_routed or partial(partial, self._routed))(x_TD, routing)
        shared_TD = self._shared(x_TD)
        y_TD = finish() if shared_TD is None else finish() + shared_TD
        if self.training:
            y_TD = self._attach_losses(y_TD, routing, len(x_BSD))
        return y_TD.view_as(x_BSD)

    def _shared(self, x_TD: Tensor) -> Tensor | None:
        if self.shared_experts is None:
            return None
        shared_TD = self.shared_experts(x_TD)
        if self.shared_expert_gate is not None:
            shared_TD = shared_TD * torch.sigmoid(self.shared_expert_gate(x_TD))
        return shared_TD

    def _routed(self, x_TD: Tensor, routing: Routing) -> Tensor:
        pairs_R, counts_E, slots_R = expert_order(routing, self.config)
        x_RD = take_rows(x_TD, pairs_R, self.config.router_topk)
        if slots_R is not None:
            rows = self.config.num_experts * capacity(self.config, routing.experts_Tk.numel())
            x_RD = x_RD.new_zeros(rows, x_RD.shape[-1]).index_copy(0, slots_R, x_RD)
        y_RD = self.experts(x_RD, counts_E)
        if slots_R is not None:
            y_RD = y_RD[slots_R]
        return weighted_sum(y_RD, pairs_R, routing.weights_Tk)

    def _attach_losses(self, y_TD: Tensor, routing: Routing, batch: int) -> Tensor:
        losses = auxiliary_losses(routing, self.config, batch, self.mean_over_sequence)
        total = sum(losses.values(), start=routing.logits_TE.new_zeros(()))
        if self.token_weight is not None:
            total = total * (len(y_TD) * self.token_weight)
        values = {name: loss.detach() * len(y_TD) for name, loss in losses.items()}
        experts_Tk = routing.experts_Tk

        def record() -> None:
            # in backward, which happens once a batch; recomputation makes a second forward
            load_E = torch.bincount(experts_Tk.flatten(), minlength=self.config.num_experts)
            self.load_E = load_E if self.load_E is None else self.load_E + load_E
            for name, value in values.items():
                self.losses[name] = self.losses.get(name, 0.0) + value

        return _AttachLoss.apply(y_TD, total, record)

    def reset_statistics(self) -> None:
        """Forget losses and loads: a new step begins."""
        self.losses, self.load_E = {}, None
