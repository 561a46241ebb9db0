"""Mixture of experts: against the blocks of transformers, plain loops and formulas in float64; the counts; where a
decoder has experts, and what they record.
"""

from __future__ import annotations

import dataclasses
import importlib
import math
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from modellink.config.experts import check_experts
from modellink.config.flags import convert, flags
from modellink.config.recompute_plan import recompute_plan
from modellink.config.schema import ModelConfig, ParallelConfig
from modellink.errors import ModelLinkError
from modellink.models import moe as sparse
from modellink.models.count import count_parameters, mlp_parameters
from modellink.models.decoder import Decoder
from modellink.models.layers import MLP
from modellink.models.moe import MoE, Router, auxiliary_loss_names, auxiliary_losses, expert_order, has_grouped_kernel
from modellink.parallel.recompute import apply_recompute
from modellink.train.metrics import flops_of

HIDDEN, WIDTH, EXPERTS = 20, 12, 8

WHOLE = {  # what a whole decoder needs beside
    "padded_vocab_size": 32,
    "normalization": "RMSNorm",
    "position_embedding": "rope",
    "attention_dropout": 0.0,
    "hidden_dropout": 0.0,
}


def model_config(**fields: Any) -> ModelConfig:
    base = {
        "num_layers": 1,
        "hidden_size": HIDDEN,
        "num_attention_heads": 2,
        "ffn_hidden_size": 24,
        "activation": "silu",
        "gated_mlp": True,
        "mlp_bias": False,
    }
    return ModelConfig(**(base | fields)).resolve()


def randomize(module: nn.Module, seed: int = 0) -> None:
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for tensor in (*module.parameters(), *module.buffers()):
            tensor.copy_(torch.randn(tensor.shape, generator=generator) * 0.5)


def close(mine: Tensor, theirs: Tensor, tolerance: float = 1e-5) -> None:
    assert mine.shape == theirs.shape
    assert (mine - theirs).abs().max() <= tolerance * theirs.abs().max()


def canonical(state: dict[str, Tensor]) -> dict[str, Tensor]:
    """Names of transformers' blocks (gate and up fused) -> ours."""
    out: dict[str, Tensor] = {}
    for name, tensor in state.items():
        name = name.replace("shared_expert.", "shared_experts.").replace("router.", "gate.")
        if name == "experts.gate_up_proj":
            out["experts.gate_proj"], out["experts.up_proj"] = tensor.chunk(2, 1)
        else:
            out[name] = tensor
    return out


DEEPSEEK = {
    "num_attention_heads": 2,
    "moe_intermediate_size": WIDTH,
    "n_routed_experts": EXPERTS,
    "num_experts_per_tok": 3,
    "n_shared_experts": 2,
}
QWEN = {"moe_intermediate_size": WIDTH, "num_experts": EXPERTS, "num_experts_per_tok": 3}
OURS = {"num_experts": EXPERTS, "moe_ffn_hidden_size": WIDTH, "router_topk": 3}
CASES: dict[str, tuple[str, str, dict[str, Any], dict[str, Any]]] = {
    "mixtral": (
        "mixtral",
        "MixtralSparseMoeBlock",
        {"intermediate_size": WIDTH, "num_local_experts": EXPERTS, "num_experts_per_tok": 2},
        OURS | {"router_topk": 2},
    ),
    "qwen2_moe": (
        "qwen2_moe",
        "Qwen2MoeSparseMoeBlock",
        QWEN | {"shared_expert_intermediate_size": 4 * WIDTH, "norm_topk_prob": False},
        OURS | {"router_scoring": "softmax", "n_shared_experts": 4, "shared_expert_gate": True},
    ),
    "qwen3_moe": (
        "qwen3_moe",
        "Qwen3MoeSparseMoeBlock",
        QWEN | {"norm_topk_prob": True},
        OURS | {"router_scoring": "softmax", "norm_topk_prob": True},
    ),
    "deepseek_v2": (
        "deepseek_v2",
        "DeepseekV2Moe",
        DEEPSEEK
        | {"topk_method": "group_limited_greedy", "n_group": 4, "topk_group": 2, "routed_scaling_factor": 16.0},
        OURS
        | {
            "router_scoring": "softmax",
            "router_groups": 4,
            "topk_group": 2,
            "routed_scaling_factor": 16.0,
            "n_shared_experts": 2,
        },
    ),
    "deepseek_v2_lite": (
        "deepseek_v2",
        "DeepseekV2Moe",
        DEEPSEEK | {"topk_method": "greedy", "routed_scaling_factor": 1.0},
        OURS | {"router_scoring": "softmax", "n_shared_experts": 2},
    ),
    "deepseek_v3": (
        "deepseek_v3",
        "DeepseekV3MoE",
        DEEPSEEK | {"n_group": 4, "topk_group": 2, "norm_topk_prob": True, "routed_scaling_factor": 2.5},
        OURS
        | {
            "router_scoring": "sigmoid",
            "router_correction_bias": True,
            "norm_topk_prob": True,
            "routed_scaling_factor": 2.5,
        }
        | {"router_groups": 4, "topk_group": 2, "n_shared_experts": 2},
    ),
    "glm4_moe": (
        "glm4_moe",
        "Glm4MoeMoE",
        DEEPSEEK
        | {"n_shared_experts": 1, "n_group": 1, "topk_group": 1, "norm_topk_prob": False, "routed_scaling_factor": 1.5},
        OURS
        | {
            "router_scoring": "sigmoid",
            "router_correction_bias": True,
            "routed_scaling_factor": 1.5,
            "n_shared_experts": 1,
        },
    ),
    "gpt_oss": (
        "gpt_oss",
        "GptOssMLP",
        {"intermediate_size": WIDTH, "num_local_experts": EXPERTS, "num_experts_per_tok": 3, "swiglu_limit": 1.5},
        OURS | {"router_bias": True, "swiglu_limit": 1.5},
    ),
}
CONFIGS = {
    "mixtral": "MixtralConfig",
    "qwen2_moe": "Qwen2MoeConfig",
    "qwen3_moe": "Qwen3MoeConfig",
    "deepseek_v2": "DeepseekV2Config",
    "deepseek_v3": "DeepseekV3Config",
    "glm4_moe": "Glm4MoeConfig",
    "gpt_oss": "GptOssConfig",
}


def unfuse_gpt_oss(state: dict[str, Tensor]) -> dict[str, Tensor]:
    """gpt-oss stores [E, in, out] with gate and up in alternating columns."""
    weight, bias = state["experts.gate_up_proj"].transpose(1, 2), state["experts.gate_up_proj_bias"]
    return {
        "gate.weight": state["router.weight"],
        "gate.bias": state["router.bias"],
        "experts.gate_proj": weight[:, 0::2],
        "experts.up_proj": weight[:, 1::2],
        "experts.gate_proj_bias": bias[:, 0::2],
        "experts.up_proj_bias": bias[:, 1::2],
        "experts.down_proj": state["experts.down_proj"].transpose(1, 2),
        "experts.down_proj_bias": state["experts.down_proj_bias"],
    }


@pytest.mark.parametrize("grouped", [False, True])
@pytest.mark.parametrize("case", CASES)
def test_equals_transformers(case: str, grouped: bool) -> None:
    package, block, their_fields, our_fields = CASES[case]
    theirs = importlib.import_module(f"transformers.models.{package}.modeling_{package}")
    hf_config = getattr(theirs, CONFIGS[package])(hidden_size=HIDDEN, experts_implementation="eager", **their_fields)
    reference = getattr(theirs, block)(hf_config)
    translate = unfuse_gpt_oss if case == "gpt_oss" else canonical
    config = model_config(mlp_bias=case == "gpt_oss", moe_grouped_gemm=grouped, **our_fields)
    mine = MoE(config)
    randomize(reference)
    mine.load_state_dict(translate(reference.state_dict()), strict=True)

    x = torch.randn(3, 13, HIDDEN, generator=torch.Generator().manual_seed(1))
    x_mine, x_theirs = x.clone().requires_grad_(), x.clone().requires_grad_()
    out_mine, out_theirs = mine(x_mine), reference(x_theirs)
    out_theirs = out_theirs[0] if isinstance(out_theirs, tuple) else out_theirs
    close(out_mine, out_theirs)
    weight = torch.randn(out_mine.shape, generator=torch.Generator().manual_seed(2))
    (out_mine * weight).sum().backward()
    (out_theirs * weight).sum().backward()
    close(x_mine.grad, x_theirs.grad)
    gradients = translate({name: p.grad for name, p in reference.named_parameters()})
    compared = [name for name, p in mine.named_parameters() if p.requires_grad]
    assert set(gradients) == set(compared)
    for name in compared:
        close(mine.get_parameter(name).grad, gradients[name])
    assert sum(p.numel() for p in mine.parameters()) == mlp_parameters(config, 0)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("gated", [False, True])
@pytest.mark.parametrize("topk", [1, 3])
def test_grouped_kernel_equals_loop(dtype: torch.dtype, gated: bool, topk: int) -> None:
    """Three tokens at most among eight experts: most of them get no row, and still a gradient of zeros."""
    fields = {"num_experts": EXPERTS, "moe_ffn_hidden_size": 24, "router_topk": topk}
    config = model_config(gated_mlp=gated, mlp_bias=True, hidden_size=16, **fields)
    x = torch.randn(1, 3, 16, generator=torch.Generator().manual_seed(1)).to(dtype)
    results = []
    for grouped in (False, True):
        block = MoE(dataclasses.replace(config, moe_grouped_gemm=grouped)).to(dtype)
        randomize(block)
        assert has_grouped_kernel(x, block.experts.up_proj)
        x_in = x.clone().requires_grad_()
        out = block(x_in)
        out.square().sum().backward()
        results.append((out.detach(), x_in.grad, *(p.grad for p in block.parameters())))
    tolerance = 1e-5 if dtype == torch.float32 else 2e-2
    for loop, kernel in zip(*results, strict=True):
        assert loop is not None and kernel is not None
        close(kernel.double(), loop.double(), tolerance)


def test_unaligned_rows_have_no_kernel() -> None:
    x = torch.zeros(2, 10)
    assert not has_grouped_kernel(x, torch.zeros(4, 12, 10))
    assert not has_grouped_kernel(torch.zeros(2, 8), torch.zeros(4, 8, 8, dtype=torch.bfloat16))
    assert has_grouped_kernel(torch.zeros(2, 8), torch.zeros(4, 8, 8))


def plain_capacity_loop(block: MoE, x_TD: Tensor, capacity: int | None) -> tuple[Tensor, int]:
    """Token by token, expert by expert; returns the output and how many choices were dropped."""
    config, experts = block.config, block.experts
    logits = x_TD @ block.gate.weight.T
    chosen: list[list[tuple[int, float]]] = []
    for row in logits.tolist():
        best = sorted(range(config.num_experts), key=lambda e: -row[e])[: config.router_topk]
        total = sum(math.exp(row[e]) for e in best)
        chosen.append([(e, math.exp(row[e]) / total) for e in best])
    out, dropped = torch.zeros_like(x_TD), 0
    for expert in range(config.num_experts):
        queue = [(token, w) for token, choices in enumerate(chosen) for e, w in choices if e == expert]
        if config.token_drop_policy == "probs":
            queue.sort(key=lambda pair: -pair[1])
        kept = queue if capacity is None else queue[:capacity]
        dropped += len(queue) - len(kept)
        for token, w in kept:
            gate = experts.gate_proj[expert] @ x_TD[token] + experts.gate_proj_bias[expert]
            up = experts.up_proj[expert] @ x_TD[token] + experts.up_proj_bias[expert]
            middle = gate * torch.sigmoid(gate) * up
            out[token] += w * (experts.down_proj[expert] @ middle + experts.down_proj_bias[expert])
    return out, dropped


@pytest.mark.parametrize("policy", ["probs", "position"])
@pytest.mark.parametrize("pad", [False, True])
@pytest.mark.parametrize("factor", [0.5, 1.1, None])
def test_capacity_against_plain_loop(policy: str, pad: bool, factor: float | None) -> None:
    config = model_config(
        mlp_bias=True,
        num_experts=4,
        moe_ffn_hidden_size=WIDTH,
        expert_capacity_factor=factor,
        token_drop_policy=policy,
        pad_experts_to_capacity=pad,
    )
    if pad and factor is None:
        with pytest.raises(ModelLinkError, match="needs a capacity"):
            check_experts(config)
        return
    check_experts(config)
    block = MoE(config).double()
    randomize(block)
    x = torch.randn(3, 11, HIDDEN, generator=torch.Generator().manual_seed(3), dtype=torch.float64)
    capacity = None if factor is None else math.ceil(33 * 2 / 4 * factor)
    with torch.no_grad():
        expected, dropped = plain_capacity_loop(block, x.flatten(0, 1), capacity)
        close(block(x).flatten(0, 1), expected, 1e-12)
        order = expert_order(block.gate(x.flatten(0, 1)), config)
    assert (dropped > 0) == (factor is not None)
    assert len(order.pairs_R) == 66 - dropped
    assert int(order.counts_E.sum()) == (4 * (capacity or 0) if pad else 66 - dropped)


def test_gradients_with_dropping_in_float64() -> None:
    """Dropped choices pass no gradient to their weights; padding passes none to anything."""
    for pad in (False, True):
        sizes = {"hidden_size": 4, "num_experts": 4, "moe_ffn_hidden_size": 3}
        config = model_config(**sizes, mlp_bias=True, expert_capacity_factor=0.7, pad_experts_to_capacity=pad)
        block = MoE(config).double()
        randomize(block)
        x = torch.randn(1, 5, 4, generator=torch.Generator().manual_seed(4), dtype=torch.float64, requires_grad=True)
        names = [name for name, _ in block.named_parameters()]

        def call(x: Tensor, *values: Tensor, block: MoE = block, names: list[str] = names) -> Tensor:
            return torch.func.functional_call(block, dict(zip(names, values, strict=True)), (x,))

        assert torch.autograd.gradcheck(call, (x, *block.parameters()))


LOSSES = {
    "aux_loss_coeff": 0.3,
    "device_aux_loss_coeff": 0.05,
    "comm_aux_loss_coeff": 0.02,
    "z_loss_coeff": 0.01,
}


def losses_by_formula(config: ModelConfig, logits_BSE: Tensor, routing_BSk: Tensor) -> dict[str, Tensor]:
    """The formulas of the paper with loops, one sequence (or the batch as one sequence) after the other."""
    batch, length, experts = logits_BSE.shape
    if not config.sequence_aux_loss:
        logits_BSE, routing_BSk = logits_BSE.reshape(1, -1, experts), routing_BSk.reshape(1, batch * length, -1)
        batch, length = 1, batch * length
    names = ("load_balancing_loss", "device_loss", "communication_loss", "z_loss")
    totals = {name: torch.zeros((), dtype=torch.float64) for name in names}
    size = experts // config.router_groups
    for b in range(batch):
        scores = logits_BSE[b].sigmoid() if config.router_scoring == "sigmoid" else logits_BSE[b].softmax(-1)
        scores = scores / scores.sum(-1, keepdim=True)
        share = scores.mean(0)
        count = [sum(e in row for row in routing_BSk[b].tolist()) for e in range(experts)]
        frequency = [c * experts / (config.router_topk * length) for c in count]
        totals["load_balancing_loss"] += sum(f * p for f, p in zip(frequency, share, strict=True)) * 0.3
        for g in range(config.router_groups):
            inside = range(g * size, (g + 1) * size)
            group_share = sum(share[e] for e in inside)
            totals["device_loss"] += sum(frequency[e] for e in inside) / size * group_share * 0.05
            touched = sum(any(e in inside for e in row) for row in routing_BSk[b].tolist()) / length
            totals["communication_loss"] += touched * config.router_groups / config.topk_group * group_share * 0.02
        totals["z_loss"] += logits_BSE[b].exp().sum(-1).log().square().mean() * 0.01
    return {name: total / batch for name, total in totals.items()}


@pytest.mark.parametrize("per_sequence", [False, True])
@pytest.mark.parametrize("scoring", ["softmax_selected", "softmax", "sigmoid"])
def test_auxiliary_losses_against_formulas(scoring: str, per_sequence: bool) -> None:
    groups = {} if scoring == "softmax_selected" else {"router_groups": 4, "topk_group": 2}
    config = model_config(**OURS, router_scoring=scoring, sequence_aux_loss=per_sequence, **groups, **LOSSES)
    router = Router(config).double()
    randomize(router)
    x = torch.randn(3, 7, HIDDEN, generator=torch.Generator().manual_seed(5), dtype=torch.float64)
    routing = router(x.flatten(0, 1))
    mine = auxiliary_losses(routing, config, batch=3)
    logits = (x @ router.weight.T).detach().requires_grad_()
    expected = losses_by_formula(config, logits, routing.experts_Tk.view(3, 7, -1))
    assert set(mine) == set(expected) == set(auxiliary_loss_names(config))
    for name, loss in mine.items():
        assert abs(float((loss - expected[name]).detach())) <= 1e-12
    (gradient,) = torch.autograd.grad(sum(mine.values()), router.weight)
    (by_logits,) = torch.autograd.grad(sum(expected.values()), logits)
    close(gradient, torch.einsum("bse,bsd->ed", by_logits, x), 1e-12)


def test_balanced_routing_costs_its_coefficient() -> None:
    """Uniform shares and equal loads: the load-balancing loss is the coefficient itself, and no less is possible."""
    config = model_config(num_experts=4, moe_ffn_hidden_size=WIDTH, router_topk=1, aux_loss_coeff=0.7)
    logits = torch.zeros(8, 4)
    routing = sparse.Routing(torch.arange(8)[:, None] % 4, torch.ones(8, 1), logits, logits.softmax(-1))
    assert float(auxiliary_losses(routing, config, 2)["load_balancing_loss"]) == pytest.approx(0.7)


@pytest.mark.parametrize("scale", [1.0, 1024.0])
def test_attached_gradient_is_the_gradient_of_loss_plus_auxiliary_losses(scale: float) -> None:
    """Micro-batches of sum losses times scale / tokens: gradients are those of the mean loss of both kinds, scaled."""
    fields = {"router_scoring": "softmax", "sequence_aux_loss": True, "router_groups": 4, "topk_group": 3}
    config = model_config(**OURS, **fields, **LOSSES)
    block = MoE(config).double()
    randomize(block)
    x = torch.randn(4, 6, HIDDEN, generator=torch.Generator().manual_seed(6), dtype=torch.float64)
    explicit = MoE(config).double().eval()  # attaches nothing
    explicit.load_state_dict(block.state_dict())
    routing = explicit.gate(x.flatten(0, 1))
    losses = auxiliary_losses(routing, config, batch=4)
    (explicit(x).square().sum() / 24 + sum(losses.values())).backward()
    load_E = torch.bincount(routing.experts_Tk.flatten(), minlength=EXPERTS)

    block.token_weight = torch.tensor(scale / 24, dtype=torch.float64)
    for part in x.split((1, 3)):
        (block(part).square().sum() * (scale / 24)).backward()
    for mine, theirs in zip(block.parameters(), explicit.parameters(), strict=True):
        close(mine.grad / scale, theirs.grad, 1e-10)
    assert_statistics(block, losses, load_E, positions=24)

    block.zero_grad()
    block.reset_statistics()
    assert block.losses == {} and block.load_E is None
    block.token_weight = None  # a forward by itself: its losses count fully
    (block(x).square().sum() / 24).backward()
    for mine, theirs in zip(block.parameters(), explicit.parameters(), strict=True):
        close(mine.grad, theirs.grad, 1e-10)
    assert_statistics(block, losses, load_E, positions=24)


def assert_statistics(block: MoE, losses: dict[str, Tensor], load_E: Tensor, positions: int) -> None:
    """`block` recorded means `losses` over that many positions, as sums, and this load."""
    expected = {name: float(loss.detach()) * positions for name, loss in losses.items()}
    assert {name: float(loss) for name, loss in block.losses.items()} == pytest.approx(expected, rel=1e-6)
    assert block.load_E is not None and torch.equal(block.load_E, load_E)


@pytest.mark.parametrize("reentrant", [False, True])
def test_attached_losses_survive_recomputation(reentrant: bool) -> None:
    """Same gradients, and losses and loads are recorded once a micro-batch, not once a forward."""
    config = model_config(**OURS, **LOSSES)
    block = MoE(config)
    randomize(block)
    x = torch.randn(2, 5, HIDDEN, generator=torch.Generator().manual_seed(7), requires_grad=True)
    routing = block.gate(x.detach().flatten(0, 1))
    losses = auxiliary_losses(routing, config, batch=2)
    load_E = torch.bincount(routing.experts_Tk.flatten(), minlength=EXPERTS)

    def run(x: Tensor) -> Tensor:
        return block(x).square()  # keeps the output, so that recomputation goes through to the end of the block

    run(x).sum().backward()
    assert_statistics(block, losses, load_E, positions=10)
    plain = [p.grad.clone() for p in block.parameters() if p.grad is not None]
    block.zero_grad()
    block.reset_statistics()
    checkpoint(run, x, use_reentrant=reentrant).sum().backward()
    again = [p.grad for p in block.parameters() if p.grad is not None]
    assert len(plain) == len(again) == 4
    assert all(torch.equal(a, b) for a, b in zip(plain, again, strict=True))
    assert_statistics(block, losses, load_E, positions=10)
    checkpoint(run, x, use_reentrant=reentrant).sum().backward()
    assert_statistics(block, losses, 2 * load_E, positions=20)


def test_evaluation_attaches_nothing() -> None:
    block = MoE(model_config(**OURS, **LOSSES, router_input_jitter=0.5)).eval()
    randomize(block)
    x = torch.randn(2, 5, HIDDEN, generator=torch.Generator().manual_seed(8))
    assert torch.equal(block(x), block(x))  # no jitter either
    block(x).sum().backward()
    assert block.losses == {} and block.load_E is None
    quiet = MoE(model_config(**OURS))
    quiet.load_state_dict(block.state_dict())
    assert torch.equal(quiet(x), block(x))
    block.train()
    out = block(x)
    assert not torch.equal(out, block(x))
    assert block.losses == {} and block.load_E is None  # a forward alone is none of the batch's
    out.sum().backward()
    assert set(block.losses) == {"load_balancing_loss", "device_loss", "communication_loss", "z_loss"}


def test_correction_bias_moves_choices_not_weights() -> None:
    router = Router(model_config(**OURS, router_scoring="sigmoid", router_correction_bias=True))
    randomize(router)
    x = torch.randn(9, HIDDEN, generator=torch.Generator().manual_seed(9))
    with torch.no_grad():
        router.e_score_correction_bias.copy_(torch.eye(EXPERTS)[5] * 10)
    routing = router(x)
    assert bool((routing.experts_Tk == 5).any(-1).all())
    close(routing.weights_Tk, routing.logits_TE.sigmoid().gather(-1, routing.experts_Tk))
    assert not router.e_score_correction_bias.requires_grad


def test_what_stands_between_router_and_shared_experts_can_be_replaced() -> None:
    block = MoE(model_config(**OURS, n_shared_experts=1))
    randomize(block)
    x = torch.randn(2, 5, HIDDEN, generator=torch.Generator().manual_seed(10))
    expected, seen = block(x), []
    block.shared_experts.register_forward_hook(lambda *_: seen.append("shared"))

    def begin(x_TD: Tensor, routing: Any) -> Any:
        seen.append("begin")
        return lambda: seen.append("finish") or block._routed(x_TD, routing)

    block.begin_routed = begin
    assert torch.equal(block(x), expected) and seen == ["begin", "shared", "finish"]


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"num_experts": 2, "router_topk": 3}, "cannot go to 3 of 2 experts"),
        ({"num_experts": 8, "router_groups": 3}, "do not fall into 3 equal groups"),
        ({"num_experts": 8, "router_groups": 4, "topk_group": 1, "router_topk": 3}, "hold fewer than the 3"),
        ({"num_experts": 8, "router_groups": 2, "topk_group": 3}, "of which 3 are chosen"),
        ({"num_experts": 8, "first_k_dense_replace": 1}, "leaves no layer of 1"),
        ({"num_experts": 8, "moe_layer_freq": 0}, "must be at least 1"),
        ({"num_experts": 8, "shared_expert_gate": True, "shared_expert_gate_dimension": 7}, "must be 1 or the hidden"),
    ],
)
def test_impossible_routers_are_refused(fields: dict[str, Any], message: str) -> None:
    with pytest.raises(ModelLinkError, match=message):
        check_experts(model_config(moe_ffn_hidden_size=WIDTH, **fields))


@pytest.mark.parametrize(("path", "value"), [("model.router_scoring", "tanh"), ("model.token_drop_policy", "last")])
def test_unknown_choices_are_refused(path: str, value: str) -> None:
    (flag,) = (flag for flag in flags("train") if flag.path == path and flag.status == "native")
    with pytest.raises(ModelLinkError, match=f"{value} is unknown.* Known: {', '.join(flag.choices or ())}"):
        convert(flag, value, flag.name)


def test_counts_by_hand() -> None:
    """Qwen2-57B-A14B and Mixtral 8x7B: one layer's MLP by arithmetic; active parameters count k experts."""
    qwen = model_config(
        hidden_size=3584,
        num_experts=64,
        moe_ffn_hidden_size=2560,
        router_topk=8,
        n_shared_experts=8,
        shared_expert_gate=True,
    )
    shared = 3 * 3584 * 20480 + 3584
    assert mlp_parameters(qwen, 0) == 64 * 3584 + 64 * 3 * 3584 * 2560 + shared
    assert mlp_parameters(qwen, 0, experts=8) == 64 * 3584 + 8 * 3 * 3584 * 2560 + shared
    mixtral = model_config(hidden_size=4096, num_experts=8, moe_ffn_hidden_size=14336)
    assert mlp_parameters(mixtral, 0) == 8 * (4096 + 3 * 4096 * 14336)


def test_flops_by_hand() -> None:
    """Three layers, the first dense; per token of training, three times two for each weight that the token meets."""
    config = model_config(
        num_layers=3,
        padded_vocab_size=32,
        first_k_dense_replace=1,
        num_experts=EXPERTS,
        moe_ffn_hidden_size=WIDTH,
        router_topk=3,
        n_shared_experts=2,
    )
    sparse_mlp = HIDDEN * EXPERTS + (3 + 2) * 3 * HIDDEN * WIDTH
    assert sparse_mlp == mlp_parameters(config, 1, experts=config.router_topk)
    dense_mlp, projections = 3 * HIDDEN * 24, 4 * HIDDEN * HIDDEN
    matrices = dense_mlp + 2 * sparse_mlp + 3 * projections + HIDDEN * 32
    assert flops_of(config, 7).full == 6 * (matrices + 3 * 2 * 7 * HIDDEN)
    assert flops_of(config, 7).causal == 6 * (matrices + 3 * 7 * HIDDEN)


@pytest.mark.parametrize(
    ("dense", "frequency", "places"),
    [(0, 1, [0, 1, 2, 3, 4, 5]), (1, 1, [1, 2, 3, 4, 5]), (1, 2, [2, 4]), (3, 2, [4]), (0, 3, [0, 3]), (4, 3, [])],
)
def test_stages_have_experts_where_the_whole_model_has_them(dense: int, frequency: int, places: list[int]) -> None:
    """`first_k_dense_replace` and `moe_layer_freq` count from the first layer of the model, not of the stage."""
    layout = {"num_layers": 6, "first_k_dense_replace": dense, "moe_layer_freq": frequency}
    config = model_config(**OURS, **layout, **WHOLE)
    model = Decoder(config).eval()
    randomize(model)
    assert [int(i) for i, layer in model.layers.items() if isinstance(layer.mlp, MoE)] == places
    assert all(isinstance(layer.mlp, MLP) for i, layer in model.layers.items() if int(i) not in places)
    assert sum(p.numel() for p in model.parameters()) == count_parameters(config)

    state, tokens = model.state_dict(), torch.arange(10).view(2, 5)
    x: Tensor = tokens
    for layers in (range(2), range(2, 5), range(5, 6)):
        stage = Decoder(config, layers, first=0 in layers, last=5 in layers).eval()
        stage.load_state_dict({name: state[name] for name in stage.state_dict()}, strict=True)
        x = stage(x)
    assert torch.equal(x, model(tokens))


@pytest.mark.parametrize(
    "recompute",
    [["0-2:layer"], ["1:layer", "2:core_attn"], ["0-2:mlp+moe+layernorm"], ["0-2:operators"], ["1-2:moe_act"]],
    ids=["layer", "core", "modules", "operators", "activation"],
)
def test_statistics_of_a_recomputed_decoder(recompute: list[str]) -> None:
    """Over two micro-batches, every layer records what it records without recomputation; gradients are the same."""
    layout = {"num_layers": 3, "first_k_dense_replace": 1, "sandwich_norm": True}  # the norm keeps the block's output
    config = model_config(**OURS, **LOSSES, **WHOLE, **layout)
    tokens = torch.arange(21).view(3, 7)
    results = []
    for parallel in (ParallelConfig(), ParallelConfig(recompute_layers=recompute)):
        model = Decoder(config)
        randomize(model)
        apply_recompute(model, *recompute_plan(parallel, [range(3)], 0, 3))
        for part in tokens.split((1, 2)):
            model(part).logsumexp(-1).sum().backward()
        blocks = [layer.mlp for layer in model.layers.values() if isinstance(layer.mlp, MoE)]
        assert [int(block.load_E.sum()) for block in blocks] == [21 * 3] * 2
        assert all(len(block.losses) == 4 and min(block.losses.values()) > 0 for block in blocks)
        results.append(
            [p.grad for p in model.parameters() if p.grad is not None]
            + [block.load_E for block in blocks]
            + [loss for block in blocks for loss in block.losses.values()]
        )
    assert all(torch.equal(plain, again) for plain, again in zip(*results, strict=True))
