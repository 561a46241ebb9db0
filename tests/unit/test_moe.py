"""Mixture of experts: against the blocks of transformers, plain loops and formulas in float64, and the counts."""

from __future__ import annotations

import dataclasses
import importlib
import json
import math
from pathlib import Path
from typing import Any

import pytest
import torch
from original_code import InferenceMoE, assert_as_original, stack_experts
from safetensors.torch import load_file
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from modellink.config.schema import ModelConfig
from modellink.errors import ModelLinkError
from modellink.models import moe as sparse
from modellink.models.decoder import Decoder
from modellink.models.moe import MoE, MoEConfig, Router, auxiliary_losses, expert_order, has_grouped_kernel

HIDDEN, WIDTH, EXPERTS = 20, 12, 8


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
        OURS | {"scoring": "softmax", "n_shared_experts": 4, "shared_expert_gate": True},
    ),
    "qwen3_moe": (
        "qwen3_moe",
        "Qwen3MoeSparseMoeBlock",
        QWEN | {"norm_topk_prob": True},
        OURS | {"scoring": "softmax", "norm_topk_prob": True},
    ),
    "deepseek_v2": (
        "deepseek_v2",
        "DeepseekV2Moe",
        DEEPSEEK
        | {"topk_method": "group_limited_greedy", "n_group": 4, "topk_group": 2, "routed_scaling_factor": 16.0},
        OURS
        | {
            "scoring": "softmax",
            "num_groups": 4,
            "topk_group": 2,
            "routed_scaling_factor": 16.0,
            "n_shared_experts": 2,
        },
    ),
    "deepseek_v2_lite": (
        "deepseek_v2",
        "DeepseekV2Moe",
        DEEPSEEK | {"topk_method": "greedy", "routed_scaling_factor": 1.0},
        OURS | {"scoring": "softmax", "n_shared_experts": 2},
    ),
    "deepseek_v3": (
        "deepseek_v3",
        "DeepseekV3MoE",
        DEEPSEEK | {"n_group": 4, "topk_group": 2, "norm_topk_prob": True, "routed_scaling_factor": 2.5},
        OURS
        | {"scoring": "sigmoid", "correction_bias": True, "norm_topk_prob": True, "routed_scaling_factor": 2.5}
        | {"num_groups": 4, "topk_group": 2, "n_shared_experts": 2},
    ),
    "glm4_moe": (
        "glm4_moe",
        "Glm4MoeMoE",
        DEEPSEEK
        | {"n_shared_experts": 1, "n_group": 1, "topk_group": 1, "norm_topk_prob": False, "routed_scaling_factor": 1.5},
        OURS | {"scoring": "sigmoid", "correction_bias": True, "routed_scaling_factor": 1.5, "n_shared_experts": 1},
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
    config = model_config(mlp_bias=case == "gpt_oss")
    moe = MoEConfig(grouped_gemm=grouped, **our_fields)
    mine = MoE(config, moe)
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
    assert sum(p.numel() for p in mine.parameters()) == sparse.parameters(config, moe)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("gated", [False, True])
@pytest.mark.parametrize("topk", [1, 3])
def test_grouped_kernel_equals_loop(dtype: torch.dtype, gated: bool, topk: int) -> None:
    """Three tokens at most among eight experts: most of them get no row, and still a gradient of zeros."""
    config = model_config(gated_mlp=gated, mlp_bias=True, hidden_size=16)
    moe = MoEConfig(num_experts=EXPERTS, moe_ffn_hidden_size=24, router_topk=topk)
    x = torch.randn(1, 3, 16, generator=torch.Generator().manual_seed(1)).to(dtype)
    results = []
    for grouped in (False, True):
        block = MoE(config, dataclasses.replace(moe, grouped_gemm=grouped)).to(dtype)
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
    moe, experts = block.moe, block.experts
    logits = x_TD @ block.gate.weight.T
    chosen: list[list[tuple[int, float]]] = []
    for row in logits.tolist():
        best = sorted(range(moe.num_experts), key=lambda e: -row[e])[: moe.router_topk]
        total = sum(math.exp(row[e]) for e in best)
        chosen.append([(e, math.exp(row[e]) / total) for e in best])
    out, dropped = torch.zeros_like(x_TD), 0
    for expert in range(moe.num_experts):
        queue = [(token, w) for token, choices in enumerate(chosen) for e, w in choices if e == expert]
        if moe.drop_policy == "probs":
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
    if pad and factor is None:
        with pytest.raises(ModelLinkError, match="needs a capacity"):
            MoEConfig(4, WIDTH, capacity_factor=None, pad_to_capacity=True)
        return
    moe = MoEConfig(4, WIDTH, router_topk=2, capacity_factor=factor, drop_policy=policy, pad_to_capacity=pad)
    block = MoE(model_config(mlp_bias=True), moe).double()
    randomize(block)
    x = torch.randn(3, 11, HIDDEN, generator=torch.Generator().manual_seed(3), dtype=torch.float64)
    capacity = None if factor is None else math.ceil(33 * 2 / 4 * factor)
    with torch.no_grad():
        expected, dropped = plain_capacity_loop(block, x.flatten(0, 1), capacity)
        close(block(x).flatten(0, 1), expected, 1e-12)
        order = expert_order(block.gate(x.flatten(0, 1)), moe)
    assert (dropped > 0) == (factor is not None)
    assert len(order.pairs_R) == 66 - dropped
    assert int(order.counts_E.sum()) == (4 * (capacity or 0) if pad else 66 - dropped)


def test_gradients_with_dropping_in_float64() -> None:
    """Dropped choices pass no gradient to their weights; padding passes none to anything."""
    for pad in (False, True):
        moe = MoEConfig(4, 3, router_topk=2, capacity_factor=0.7, pad_to_capacity=pad)
        block = MoE(model_config(hidden_size=4, mlp_bias=True), moe).double()
        randomize(block)
        x = torch.randn(1, 5, 4, generator=torch.Generator().manual_seed(4), dtype=torch.float64, requires_grad=True)
        names = [name for name, _ in block.named_parameters()]

        def call(x: Tensor, *values: Tensor, block: MoE = block, names: list[str] = names) -> Tensor:
            return torch.func.functional_call(block, dict(zip(names, values, strict=True)), (x,))

        assert torch.autograd.gradcheck(call, (x, *block.parameters()))


LOSSES = {
    "aux_loss_coeff": 0.3,
    "device_aux_loss_coeff": 0.05,
    "communication_aux_loss_coeff": 0.02,
    "z_loss_coeff": 0.01,
}


def losses_by_formula(moe: MoEConfig, logits_BSE: Tensor, routing_BSk: Tensor) -> dict[str, Tensor]:
    """The formulas of the paper with loops, one sequence (or the batch as one sequence) after the other."""
    batch, length, experts = logits_BSE.shape
    if not moe.sequence_aux_loss:
        logits_BSE, routing_BSk = logits_BSE.reshape(1, -1, experts), routing_BSk.reshape(1, batch * length, -1)
        batch, length = 1, batch * length
    names = ("load_balancing_loss", "device_loss", "communication_loss", "z_loss")
    totals = {name: torch.zeros((), dtype=torch.float64) for name in names}
    size = experts // moe.num_groups
    for b in range(batch):
        scores = logits_BSE[b].sigmoid() if moe.scoring == "sigmoid" else logits_BSE[b].softmax(-1)
        scores = scores / scores.sum(-1, keepdim=True)
        share = scores.mean(0)
        count = [sum(e in row for row in routing_BSk[b].tolist()) for e in range(experts)]
        frequency = [c * experts / (moe.router_topk * length) for c in count]
        totals["load_balancing_loss"] += sum(f * p for f, p in zip(frequency, share, strict=True)) * 0.3
        for g in range(moe.num_groups):
            inside = range(g * size, (g + 1) * size)
            group_share = sum(share[e] for e in inside)
            totals["device_loss"] += sum(frequency[e] for e in inside) / size * group_share * 0.05
            touched = sum(any(e in inside for e in row) for row in routing_BSk[b].tolist()) / length
            totals["communication_loss"] += touched * moe.num_groups / moe.topk_group * group_share * 0.02
        totals["z_loss"] += logits_BSE[b].exp().sum(-1).log().square().mean() * 0.01
    return {name: total / batch for name, total in totals.items()}


@pytest.mark.parametrize("per_sequence", [False, True])
@pytest.mark.parametrize("scoring", ["softmax_selected", "softmax", "sigmoid"])
def test_auxiliary_losses_against_formulas(scoring: str, per_sequence: bool) -> None:
    groups = {} if scoring == "softmax_selected" else {"num_groups": 4, "topk_group": 2}
    moe = MoEConfig(**OURS, scoring=scoring, sequence_aux_loss=per_sequence, **groups, **LOSSES)
    router = Router(model_config(), moe).double()
    randomize(router)
    x = torch.randn(3, 7, HIDDEN, generator=torch.Generator().manual_seed(5), dtype=torch.float64)
    routing = router(x.flatten(0, 1))
    mine = auxiliary_losses(routing, moe, batch=3)
    logits = (x @ router.weight.T).detach().requires_grad_()
    expected = losses_by_formula(moe, logits, routing.experts_Tk.view(3, 7, -1))
    assert set(mine) == set(expected)
    for name, loss in mine.items():
        assert abs(float((loss - expected[name]).detach())) <= 1e-12
    (gradient,) = torch.autograd.grad(sum(mine.values()), router.weight)
    (by_logits,) = torch.autograd.grad(sum(expected.values()), logits)
    close(gradient, torch.einsum("bse,bsd->ed", by_logits, x), 1e-12)


def test_balanced_routing_costs_its_coefficient() -> None:
    """Uniform shares and equal loads: the load-balancing loss is the coefficient itself, and no less is possible."""
    moe = MoEConfig(4, WIDTH, router_topk=1, aux_loss_coeff=0.7)
    logits = torch.zeros(8, 4)
    routing = sparse.Routing(torch.arange(8)[:, None] % 4, torch.ones(8, 1), logits, logits.softmax(-1))
    assert float(auxiliary_losses(routing, moe, 2)["load_balancing_loss"]) == pytest.approx(0.7)


@pytest.mark.parametrize("scale", [1.0, 1024.0])
def test_attached_gradient_is_the_gradient_of_loss_plus_auxiliary_losses(scale: float) -> None:
    """Micro-batches of sum losses times scale / tokens: gradients are those of the mean loss of both kinds, scaled."""
    moe = MoEConfig(**OURS, scoring="softmax", sequence_aux_loss=True, num_groups=4, topk_group=3, **LOSSES)
    block = MoE(model_config(), moe).double()
    randomize(block)
    x = torch.randn(4, 6, HIDDEN, generator=torch.Generator().manual_seed(6), dtype=torch.float64)
    explicit = MoE(model_config(), moe).double().eval()  # attaches nothing
    explicit.load_state_dict(block.state_dict())
    losses = auxiliary_losses(explicit.gate(x.flatten(0, 1)), moe, batch=4)
    (explicit(x).square().sum() / 24 + sum(losses.values())).backward()

    block.token_weight = torch.tensor(scale / 24, dtype=torch.float64)
    for part in x.split((1, 3)):
        (block(part).square().sum() * (scale / 24)).backward()
    for mine, theirs in zip(block.parameters(), explicit.parameters(), strict=True):
        close(mine.grad / scale, theirs.grad, 1e-10)

    block.zero_grad()
    block.token_weight = None  # a forward by itself: its losses count fully
    (block(x).square().sum() / 24).backward()
    for mine, theirs in zip(block.parameters(), explicit.parameters(), strict=True):
        close(mine.grad, theirs.grad, 1e-10)
    assert {name: float(loss) for name, loss in block.losses.items()} == pytest.approx(
        {name: float(loss.detach()) for name, loss in losses.items()}
    )
    assert block.load_E is not None and int(block.load_E.sum()) == 24 * moe.router_topk


def test_attached_losses_survive_recomputation() -> None:
    moe = MoEConfig(**OURS, **LOSSES)
    block = MoE(model_config(), moe)
    randomize(block)
    x = torch.randn(2, 5, HIDDEN, generator=torch.Generator().manual_seed(7), requires_grad=True)
    block(x).sum().backward()
    plain = [p.grad.clone() for p in block.parameters() if p.grad is not None]
    block.zero_grad()
    checkpoint(block, x, use_reentrant=False).sum().backward()
    again = [p.grad for p in block.parameters() if p.grad is not None]
    assert len(plain) == len(again) == 4
    assert all(torch.equal(a, b) for a, b in zip(plain, again, strict=True))


def test_evaluation_attaches_nothing() -> None:
    moe = MoEConfig(**OURS, **LOSSES, input_jitter=0.5)
    block = MoE(model_config(), moe).eval()
    randomize(block)
    x = torch.randn(2, 5, HIDDEN, generator=torch.Generator().manual_seed(8))
    assert torch.equal(block(x), block(x))  # no jitter either
    assert block.losses == {} and block.load_E is None
    quiet = MoE(model_config(), MoEConfig(**OURS))
    quiet.load_state_dict(block.state_dict())
    assert torch.equal(quiet(x), block(x))
    block.train()
    assert not torch.equal(block(x), block(x))
    assert block.losses


def test_correction_bias_moves_choices_not_weights() -> None:
    moe = MoEConfig(**OURS, scoring="sigmoid", correction_bias=True)
    router = Router(model_config(), moe)
    randomize(router)
    x = torch.randn(9, HIDDEN, generator=torch.Generator().manual_seed(9))
    with torch.no_grad():
        router.e_score_correction_bias.copy_(torch.eye(EXPERTS)[5] * 10)
    routing = router(x)
    assert bool((routing.experts_Tk == 5).any(-1).all())
    close(routing.weights_Tk, routing.logits_TE.sigmoid().gather(-1, routing.experts_Tk))
    assert not router.e_score_correction_bias.requires_grad


def test_run_experts_is_the_only_way_to_the_experts() -> None:
    block = MoE(model_config(), MoEConfig(**OURS))
    randomize(block)
    x = torch.randn(2, 5, HIDDEN, generator=torch.Generator().manual_seed(10))
    expected, seen = block(x), []

    def elsewhere(x_RD: Tensor, counts_E: Tensor) -> Tensor:
        seen.append((x_RD.shape, counts_E.tolist()))
        return block.experts(x_RD, counts_E)

    block.run_experts = elsewhere
    assert torch.equal(block(x), expected)
    assert seen[0][0] == (30, HIDDEN) and sum(seen[0][1]) == 30 and len(seen[0][1]) == EXPERTS


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"num_experts": 2, "router_topk": 3}, "cannot go to 3 of 2 experts"),
        ({"num_experts": 8, "num_groups": 3}, "do not fall into 3 equal groups"),
        ({"num_experts": 8, "num_groups": 4, "topk_group": 1, "router_topk": 3}, "hold fewer than the 3"),
        ({"num_experts": 8, "scoring": "tanh"}, "'tanh' must be one of"),
        ({"num_experts": 8, "drop_policy": "last"}, "'last' one of"),
    ],
)
def test_impossible_routers_are_refused(fields: dict[str, Any], message: str) -> None:
    with pytest.raises(ModelLinkError, match=message):
        MoEConfig(moe_ffn_hidden_size=WIDTH, **fields)


def test_counts_by_hand() -> None:
    """Qwen2-57B-A14B and Mixtral 8x7B: one layer's MLP by arithmetic; active parameters count k experts."""
    config = ModelConfig(hidden_size=3584, gated_mlp=True, mlp_bias=False)
    qwen = MoEConfig(64, 2560, router_topk=8, n_shared_experts=8, shared_expert_gate=True)
    shared = 3 * 3584 * 20480 + 3584
    assert sparse.parameters(config, qwen) == 64 * 3584 + 64 * 3 * 3584 * 2560 + shared
    assert sparse.parameters(config, qwen, active=True) == 64 * 3584 + 8 * 3 * 3584 * 2560 + shared
    assert sparse.forward_flops(config, qwen) == 2 * sparse.parameters(config, qwen, active=True)
    mixtral = MoEConfig(8, 14336)
    config = ModelConfig(hidden_size=4096, gated_mlp=True, mlp_bias=False)
    assert sparse.parameters(config, mixtral) == 8 * (4096 + 3 * 4096 * 14336)


GROK_NAMES = (
    ("transformer.in_out_embed.", "embed_tokens."),
    ("transformer.decoder_layer.", "layers."),
    ("multi_head_attention.query.", "self_attn.q_proj."),
    ("multi_head_attention.key.", "self_attn.k_proj."),
    ("multi_head_attention.value.", "self_attn.v_proj."),
    ("multi_head_attention.linear.", "self_attn.o_proj."),
    ("rms_norm_1.", "attention_output_norm."),
    ("rms_norm_2.", "post_attention_layernorm."),
    ("rms_norm_3.", "mlp_output_norm."),
    (".router.", ".mlp.gate."),
    (".moe.", ".mlp.experts."),
    ("linear_v.", "w3."),
    ("linear_1.", "w2."),
    (".linear.", ".w1."),
    ("transformer.rms_norm.", "norm."),
    ("rms_norm.", "input_layernorm."),
    ("model.", ""),
)


def parity_cases(name: str, settings: dict[str, Any]) -> tuple[dict[str, Any], dict[str, Any]]:
    if name == "minicpm_moe":
        return {
            "activation": "silu",
            "embedding_multiplier": settings["scale_emb"],
            "residual_multiplier": settings["scale_depth"] / settings["num_hidden_layers"] ** 0.5,
            "hidden_divisor": settings["hidden_size"] / settings["dim_model_base"],
        }, {"num_experts": settings["num_experts"]}
    return {
        "activation": "gelu_tanh",
        "sandwich_norm": True,
        "attention_logit_softcap": 30.0,
        "query_scale": settings["attn_output_multiplier"] ** -2,
        "embedding_multiplier": settings["embedding_multiplier_scale"],
        "logits_multiplier": settings["output_multiplier_scale"],
    }, {"num_experts": settings["num_local_experts"], "scoring": "softmax"}


@pytest.mark.parametrize("name", ["minicpm_moe", "grok1_port"])
def test_whole_models_from_their_original_code(shared: Path, name: str) -> None:
    folder = shared / "parity" / name
    settings = json.loads((folder / "config.json").read_text())
    switches, router = parity_cases(name, settings)
    config = model_config(
        num_layers=settings["num_hidden_layers"],
        hidden_size=settings["hidden_size"],
        num_attention_heads=settings["num_attention_heads"],
        num_key_value_heads=settings["num_key_value_heads"],
        vocab_size=settings["vocab_size"],
        padded_vocab_size=settings["vocab_size"],
        normalization="RMSNorm",
        norm_epsilon=settings["rms_norm_eps"],
        position_embedding="rope",
        tie_word_embeddings=True,
        qkv_bias=False,
        attention_output_bias=False,
        attention_dropout=0.0,
        hidden_dropout=0.0,
        **switches,
    )
    moe = MoEConfig(moe_ffn_hidden_size=settings["intermediate_size"], router_topk=2, **router)
    model = Decoder(config)
    for layer in model.layers.values():
        layer.mlp = (InferenceMoE if name == "minicpm_moe" else MoE)(config, moe)
    state = {}
    for name_there, tensor in load_file(folder / "model.safetensors").items():
        for theirs, ours in GROK_NAMES:
            name_there = name_there.replace(theirs, ours)
        state[name_there] = tensor
    state = stack_experts(state, {"w1": "gate_proj", "w3": "up_proj", "w2": "down_proj"})
    model.load_state_dict(state | {"lm_head.weight": state["embed_tokens.weight"]}, strict=True)
    assert_as_original(model, folder)
