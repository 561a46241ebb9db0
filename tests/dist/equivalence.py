"""Train a tiny model a few steps at some layout and bring home losses, gradients and weights by canonical name."""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor
from torch.distributed.tensor import DTensor

from modellink.config.schema import Config, ModelConfig, OptimizerConfig, ParallelConfig
from modellink.optim.local import gradient_of
from modellink.parallel.apply import build_model
from modellink.parallel.topology import Topology
from modellink.train.engine import Engine
from modellink.train.losses import IGNORED

SEQUENCE, ROWS, STEPS = 16, 8, 3
VOCABULARY = 45  # padded to 64: the last of four tensor ranks holds padding alone

LLAMA: dict[str, Any] = {
    "num_layers": 4, "hidden_size": 32, "num_attention_heads": 8, "num_key_value_heads": 4, "ffn_hidden_size": 48,
    "vocab_size": VOCABULARY, "padded_vocab_size": 64, "max_position_embeddings": 32,
    "normalization": "RMSNorm", "activation": "silu",
    "gated_mlp": True, "qkv_bias": False, "attention_output_bias": False, "mlp_bias": False,
    "tie_word_embeddings": False, "position_embedding": "rope", "attention_dropout": 0.0, "hidden_dropout": 0.0,
    "init_std": 0.1,
}  # fmt: skip
MODELS: dict[str, dict[str, Any]] = {
    "llama": LLAMA,
    "tied": LLAMA | {"tie_word_embeddings": True, "qk_norm": True, "qkv_bias": True},
    "gpt": LLAMA
    | {
        "normalization": "LayerNorm", "activation": "gelu", "gated_mlp": False, "qkv_bias": True,
        "attention_output_bias": True, "mlp_bias": True, "position_embedding": "learned_absolute",
        "tie_word_embeddings": True,
    },
    "bloom": LLAMA
    | {
        "normalization": "LayerNorm", "activation": "gelu_tanh", "gated_mlp": False, "qkv_bias": True, "mlp_bias": True,
        "attention_output_bias": True, "position_embedding": "alibi", "embedding_norm": True,
    },
    "gemma2": LLAMA
    | {
        "norm_offset": True, "norm_weight_in_fp32": True, "sandwich_norm": True, "activation": "gelu_tanh",
        "tie_word_embeddings": True, "embedding_times_sqrt_hidden": True, "attention_logit_softcap": 20.0,
        "output_logit_softcap": 10.0, "sliding_window": 6, "window_layers": "even", "query_scale": 8.0,
    },
    # Mixtral with every auxiliary loss, over the micro-batch
    "moe": LLAMA
    | {
        "num_experts": 6, "moe_ffn_hidden_size": 24, "router_topk": 2, "router_groups": 3, "topk_group": 3,
        "aux_loss_coeff": 0.05, "device_aux_loss_coeff": 0.03, "comm_aux_loss_coeff": 0.02, "z_loss_coeff": 0.01,
    },
    # DeepSeek-V2: latent attention, a dense first layer, groups, shared experts, per-sequence balance
    "deepseek": LLAMA
    | {
        "num_key_value_heads": 8, "multi_head_latent_attention": True, "q_lora_rank": 20, "kv_lora_rank": 16,
        "qk_nope_head_dim": 6, "qk_rope_head_dim": 4, "v_head_dim": 8, "qk_norm": True,
        "num_experts": 8, "moe_ffn_hidden_size": 16, "router_topk": 3, "router_scoring": "softmax",
        "router_groups": 4, "topk_group": 2, "routed_scaling_factor": 2.0, "n_shared_experts": 2,
        "first_k_dense_replace": 1, "aux_loss_coeff": 0.05, "device_aux_loss_coeff": 0.02, "sequence_aux_loss": True,
    },
    # DeepSeek-V3's router, gpt-oss's biases, clamps and sinks, every second layer sparse, tokens dropped
    "sigmoid": LLAMA
    | {
        "num_experts": 4, "moe_ffn_hidden_size": 24, "router_topk": 2, "router_scoring": "sigmoid",
        "norm_topk_prob": True, "routed_scaling_factor": 1.5, "router_bias": True, "router_correction_bias": True,
        "mlp_bias": True, "attention_output_bias": True, "qkv_bias": True, "attention_sinks": True,
        "swiglu_limit": 1.5, "moe_layer_freq": 2, "n_shared_experts": 1, "shared_expert_gate": True,
        "expert_capacity_factor": 1.2, "sliding_window": 6, "window_layers": "even", "rope_theta_window": 100.0,
    },
    "padded": LLAMA
    | {
        "num_experts": 4, "moe_ffn_hidden_size": 24, "expert_capacity_factor": 1.0, "pad_experts_to_capacity": True,
        "token_drop_policy": "position", "aux_loss_coeff": 0.05,
    },
    # three experts a rank, which two data ranks cannot deal out evenly
    "odd": LLAMA | {"num_experts": 6, "moe_ffn_hidden_size": 24, "mlp_bias": True},
    # gpt-oss's attention: sinks, a window with a rotation of its own on every second layer
    "sinks": LLAMA
    | {"attention_sinks": True, "sliding_window": 6, "window_layers": "even", "rope_theta_window": 100.0},
    "multiquery": LLAMA | {"num_key_value_heads": 1},
    # latent attention without a query latent, with biases, all dense
    "latent": LLAMA
    | {
        "num_key_value_heads": 8, "multi_head_latent_attention": True, "kv_lora_rank": 16, "qk_nope_head_dim": 6,
        "qk_rope_head_dim": 4, "v_head_dim": 8, "qkv_bias": True, "attention_output_bias": True,
    },
}  # fmt: skip


def batches(seed: int = 0, packed: bool = False) -> list[dict[str, Tensor]]:
    """The same global batches for every layout; some labels are masked, unevenly over rows."""
    generator = torch.Generator().manual_seed(seed)
    out = []
    for _ in range(STEPS):
        text = torch.randint(0, VOCABULARY, (ROWS, SEQUENCE + 1), generator=generator)
        labels = text[:, 1:].clone()
        for row in range(ROWS):
            labels[row, : row % 5] = IGNORED
        out.append({"tokens": text[:, :-1].contiguous(), "labels": labels})
        if packed:  # documents of other lengths in every row
            begins = torch.rand(ROWS, SEQUENCE, generator=generator) < 0.2
            documents = begins.long().cumsum(1)
            place = torch.arange(SEQUENCE).expand(ROWS, -1)
            first = torch.where(begins, place, 0).cummax(1).values
            out[-1] |= {"documents": documents, "position_ids": place - first}
    return out


def rows_of(batch: dict[str, Tensor], micro_batch: int, dp: int, rank: int) -> dict[str, Tensor]:
    """Rows of data rank `rank`: its slice of each block of micro_batch x dp rows."""
    picked = [r for r in range(ROWS) if (r // micro_batch) % dp == rank]
    return {key: value[picked] for key, value in batch.items()}


def whole(tensor: Tensor) -> Tensor:
    return (tensor.full_tensor() if isinstance(tensor, DTensor) else tensor).detach().float().clone()


def train(model: str, parallel: dict[str, Any], micro_batch: int = 1, **optimizer: Any) -> dict[str, Any]:
    """Losses, gradient norms, gradients of each step and final weights (only the names this rank's stage holds)."""
    name, _, kind = model.partition(" ")
    config = Config(
        model=ModelConfig(**MODELS[name]).resolve(),
        parallel=ParallelConfig(**parallel),
        optimizer=OptimizerConfig(**{"lr": 1e-3, "weight_decay": 0.1, "clip_grad": 0.5, "adam_eps": 1e-5} | optimizer),
    )
    return train_config(config, micro_batch, packed=kind == "packed")


SIZES = (
    "tensor_parallel", "pipeline_parallel", "context_parallel", "expert_parallel", "data_parallel_replicas",
    "zero_stage", "distributed_optimizer",
)  # fmt: skip
TOPOLOGIES: dict[tuple[Any, ...], Topology] = {}


def topology_of(parallel: ParallelConfig) -> Topology:
    """One topology for all cases of the same sizes: its groups keep threads, which a hundred cases would pile up."""
    key = tuple(getattr(parallel, name) for name in SIZES)
    if key not in TOPOLOGIES:
        TOPOLOGIES[key] = Topology(parallel)
    return TOPOLOGIES[key]


def train_config(config: Config, micro_batch: int, packed: bool) -> dict[str, Any]:
    """The same of a whole configuration."""
    topology = topology_of(config.parallel)
    dtype = getattr(torch, config.optimizer.dtype)
    gradients = getattr(torch, config.optimizer.gradient_dtype)
    built = build_model(config.model, config.parallel, topology, torch.device("cpu"), dtype, 7, gradients)
    engine = Engine(built, config)
    result: dict[str, Any] = {"losses": [], "norms": [], "gradients": [], "auxiliary": {}}
    for batch in batches(packed=packed):
        mine = rows_of(batch, micro_batch, topology.dp, topology.dp_rank)
        result["losses"].append(engine.forward_backward(mine, micro_batch).item())
        engine.reduce_gradients()
        moved = [(name, p) for name, p in built.named_parameters() if p.requires_grad]
        result["gradients"].append({name: whole(gradient_of(p)) for name, p in moved})
        for name, value in engine.auxiliary_losses().items():
            result["auxiliary"].setdefault(name, []).append(value.item())
        norm, _, _ = engine.update()
        result["norms"].append(norm.item())
    loss, count = engine.evaluate(mine, micro_batch)
    result["evaluation"] = (loss / count).item()
    result["weights"] = {name: whole(p) for name, p in built.named_parameters()}
    return result


def relative_error(ours: Tensor, reference: Tensor, floor: float) -> float:
    """Largest difference relative to the largest value of the reference tensor, at least `floor`."""
    return ((ours - reference).abs().max() / reference.abs().max().clamp(min=floor)).item()


def run_cases(
    rank: int,
    world_size: int,
    cases: list[tuple[str, dict[str, Any], int]],
    half: list[tuple[str, dict[str, Any], int]],
) -> list[dict[str, Any]]:
    """Every case in turn on this world, then those in bf16; what each rank saw, as plain data and tensors."""
    results = [train(model, parallel, micro_batch) for model, parallel, micro_batch in cases]
    return results + [train(model, parallel, micro_batch, bf16=True) for model, parallel, micro_batch in half]


def compare(per_rank: list[dict[str, Any]], reference: dict[str, Any]) -> dict[str, float]:
    """Largest relative error of loss, gradient norm, any gradient of any step, any final weight, over all ranks."""

    def note(kind: str, error: float) -> None:
        # a NaN is the worst of all, and compares as no error
        errors[kind] = max(errors[kind], error if math.isfinite(error) else math.inf)

    errors = {"loss": 0.0, "norm": 0.0, "gradient": 0.0, "weight": 0.0, "evaluation": 0.0, "auxiliary": 0.0}
    seen = set()
    for result in per_rank:
        for ours, theirs in zip(result["losses"], reference["losses"], strict=True):
            note("loss", abs(ours - theirs) / abs(theirs))
        for ours, theirs in zip(result["norms"], reference["norms"], strict=True):
            note("norm", abs(ours - theirs) / abs(theirs))
        assert set(result["auxiliary"]) == set(reference["auxiliary"])
        for name, values in result["auxiliary"].items():
            for ours, theirs in zip(values, reference["auxiliary"][name], strict=True):
                note("auxiliary", abs(ours - theirs) / abs(theirs))
        for ours, theirs in zip(result["gradients"], reference["gradients"], strict=True):
            # a gradient that is zero but for rounding has no relative error of its own: rounding in fp32 leaves 1e-7
            # of the largest one behind
            floor = 1e-2 * max(value.abs().max().item() for value in theirs.values())
            for name, value in ours.items():
                note("gradient", relative_error(value, theirs[name], floor))
        for name, value in result["weights"].items():
            seen.add(name)
            # a bias that starts at zero has no scale of its own: it is measured against the weights'
            error = relative_error(value, reference["weights"][name], LLAMA["init_std"])
            note("weight", error)
        note("evaluation", abs(result["evaluation"] - reference["evaluation"]) / reference["evaluation"])
    assert seen == set(reference["weights"]), "a parameter is on no rank"
    return errors


def name_of(case: tuple[str, dict[str, Any], int]) -> str:
    model, parallel, _ = case
    return "-".join([model, *(f"{key}={value}" for key, value in parallel.items())])


def wrong_cases(
    cases: list[tuple[str, dict[str, Any], int]], per_rank: list[list[dict[str, Any]]], bound: float
) -> dict[str, dict[str, float]]:
    """Errors of the cases that are further than `bound` from one process, which is run once for all that share it."""
    wrong: dict[str, dict[str, float]] = {}
    references: dict[str, dict[str, Any]] = {}
    for place, case in enumerate(cases):
        model, parallel, micro_batch = case
        # what is computed rather than how it is laid out
        same = {key: value for key, value in parallel.items() if key == "cp_attention_mask_type"}
        key = f"{name_of((model, same, micro_batch))} {micro_batch}"
        if key not in references:
            references[key] = train(model, same, micro_batch)
        errors = compare([rank[place] for rank in per_rank], references[key])
        if max(errors.values()) > bound:
            wrong[name_of(case)] = errors
    return wrong
