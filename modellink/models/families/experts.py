"""What rows of sparse families share: names of routers and experts, keys of routers, which layers stay dense."""

from __future__ import annotations

from typing import Any

from modellink.config.schema import ModelConfig
from modellink.models.families.spelling import Group, Key, Keys

_PARTS = ("gate_proj", "up_proj", "down_proj")


def expert_names(block: str, parts: tuple[str, str, str] = _PARTS, router: str = "gate") -> dict[str, str]:
    """Names where every expert has tensors of its own; `block` is the module of the layer that holds them."""
    experts = {
        f"layers.{{}}.mlp.experts.{ours}": f"{block}.experts.{{}}.{theirs}.weight"
        for ours, theirs in zip(_PARTS, parts, strict=True)
    }
    return {"layers.{}.mlp.gate": f"{block}.{router}"} | experts


def shared_names(block: str) -> dict[str, str]:
    """Names of the experts that every token meets."""
    return {f"layers.{{}}.mlp.shared_experts.{part}": f"{block}.{part}" for part in _PARTS}


# a family whose layers are all sparse gives the width of an expert as the width of the MLP
EXPERT_WIDTH = Key("intermediate_size", ("moe_ffn_hidden_size", "ffn_hidden_size"))


def chosen(default: int, experts: int, *names: str) -> tuple[Key, ...]:
    """Keys of the number of experts, under `names`, and of those that a token goes to, with their defaults."""
    first, *also = names
    return (
        Key(first, "num_experts", experts, also=tuple(also)),
        Key("num_experts_per_tok", "router_topk", default),
    )


def _read_dense(keys: Keys) -> dict[str, Any]:
    step, dense = keys.take("decoder_sparse_step", 1), keys.take("mlp_only_layers") or []
    if step != 1:
        raise keys.fail("decoder_sparse_step", step, "is not implemented; known: 1, experts in every layer.")
    if not isinstance(dense, list) or dense != list(range(len(dense))):
        raise keys.fail("mlp_only_layers", dense, "is not implemented: dense layers must be the first ones.")
    return {"first_k_dense_replace": len(dense)}


def _write_dense(config: ModelConfig) -> dict[str, Any]:
    return {"decoder_sparse_step": 1, "mlp_only_layers": list(range(config.first_k_dense_replace))}


DENSE_LAYERS = Group(_read_dense, _write_dense)
