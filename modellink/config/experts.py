"""What the options of experts and of latent attention must satisfy, wherever they come from."""

from __future__ import annotations

from modellink.config.schema import ModelConfig
from modellink.errors import ModelLinkError

_LATENT_SIZES = ("kv_lora_rank", "qk_nope_head_dim", "qk_rope_head_dim", "v_head_dim")


def check_experts(model: ModelConfig) -> None:
    """Raise ModelLinkError for a router that cannot choose or a latent attention without sizes; `model` is resolved."""
    if model.multi_head_latent_attention:
        missing = [name for name in _LATENT_SIZES if not getattr(model, name)]
        if missing:
            flags = " ".join("--" + name.replace("_", "-") for name in missing)
            raise ModelLinkError(f"--multi-head-latent-attention needs the sizes of its heads: give {flags}.")
        if model.qk_rope_head_dim is not None and model.qk_rope_head_dim % 2:
            raise ModelLinkError(f"--qk-rope-head-dim {model.qk_rope_head_dim} must be even: channels turn in pairs.")
    if not model.num_experts:
        return
    assert model.num_layers and model.router_groups
    experts, groups = model.num_experts, model.router_groups
    if not 1 <= model.router_topk <= experts:
        raise ModelLinkError(
            f"a token cannot go to {model.router_topk} of {experts} experts: "
            "lower --moe-router-topk or raise --num-experts."
        )
    if experts % groups or not 1 <= model.topk_group <= groups:
        raise ModelLinkError(
            f"{experts} experts do not fall into {groups} equal groups of which {model.topk_group} are chosen: "
            "change --router-groups or --topk-group."
        )
    if model.topk_group * (experts // groups) < model.router_topk:
        raise ModelLinkError(
            f"{model.topk_group} groups of {experts // groups} experts hold fewer than the {model.router_topk} that a "
            "token goes to: raise --topk-group."
        )
    if model.pad_experts_to_capacity and model.expert_capacity_factor is None:
        raise ModelLinkError("padding experts to their capacity needs a capacity: set --moe-expert-capacity-factor.")
    if model.moe_layer_freq < 1:
        raise ModelLinkError(f"--moe-layer-freq {model.moe_layer_freq} must be at least 1.")
    if not any(model.layer_has_experts(layer) for layer in range(model.num_layers)):
        raise ModelLinkError(
            f"--first-k-dense-replace {model.first_k_dense_replace} with --moe-layer-freq {model.moe_layer_freq} "
            f"leaves no layer of {model.num_layers} for experts: lower one."
        )
    if model.swiglu_limit is not None and not model.gated_mlp:
        raise ModelLinkError("--swiglu-limit clamps the two halves of a gated MLP: give --swiglu, or leave it out.")
    if model.shared_expert_gate and model.shared_expert_gate_dimension not in (1, model.hidden_size):
        raise ModelLinkError(
            f"--shared-expert-gate-output-dimension {model.shared_expert_gate_dimension} must be 1 or the hidden size "
            f"{model.hidden_size}."
        )
