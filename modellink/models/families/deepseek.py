"""DeepSeek-V2 and V3: latent attention, many small experts beside shared ones, the first layers dense.

V2 scores experts by a softmax and may choose among the best groups of experts; V3 scores them by a sigmoid each, with a
bias that only decides who is chosen.
"""

from __future__ import annotations

from typing import Any

from modellink.config.schema import ModelConfig
from modellink.models.families.experts import chosen, expert_names, shared_names
from modellink.models.families.family import ACTIVATION, ATTENTION_BIAS, LLAMA_NAMES, Family, add, size_keys
from modellink.models.families.spelling import (
    Group,
    Key,
    Keys,
    constant,
    ignored,
    read_rope,
    renamed,
    window_group,
    write_rope_type,
)


def _read_heads(keys: Keys) -> dict[str, Any]:
    heads, given = keys.content["num_attention_heads"], keys.take("num_key_value_heads")
    if given not in (None, heads):
        raise keys.fail(
            "num_key_value_heads", given, f"must be num_attention_heads = {heads}: all heads share a latent."
        )
    return {}


def _read_rotation(keys: Keys) -> dict[str, Any]:
    scaling = keys.content.get("rope_scaling") or keys.content.get("rope_parameters")
    if isinstance(scaling, dict) and bool(scaling.get("mscale")) != bool(scaling.get("mscale_all_dim")):
        why = "gives one of mscale and mscale_all_dim, for which versions of its code disagree; give both or none."
        raise keys.fail("rope_scaling", scaling, why)
    return read_rope(keys)


def _write_rotation(config: ModelConfig) -> dict[str, Any]:
    """With the older key and the ends of the ramp, as the family's own code wants them."""
    written = write_rope_type(config)
    if config.rope_scaling == "yarn":
        written["rope_scaling"] |= {"beta_fast": config.rope_beta_fast, "beta_slow": config.rope_beta_slow}
    return written


_LATENT_KEYS = (
    *renamed(size_keys(), num_key_value_heads=None, head_dim=None),
    ACTIVATION,
    ATTENTION_BIAS,
    Key("q_lora_rank", "q_lora_rank", 1536),
    Key("kv_lora_rank", "kv_lora_rank", 512),
    Key("qk_nope_head_dim", "qk_nope_head_dim", 128),
    Key("qk_rope_head_dim", "qk_rope_head_dim", 64),
    Key("v_head_dim", "v_head_dim", 128),
)
_GROUPS = (
    Group(_read_rotation, _write_rotation),
    Group(_read_heads, lambda config: {"num_key_value_heads": config.num_attention_heads}),
    ignored("head_dim", "qk_head_dim"),
    window_group(None, "none"),
)
_FIXED = {"multi_head_latent_attention": True, "qk_norm": True}
_ATTENTION, _MLP = "self_attn", "model.layers.{}.mlp"
_NAMES = (
    {name: theirs for name, theirs in LLAMA_NAMES.items() if f".{_ATTENTION}." not in name}
    | {
        f"layers.{{}}.{_ATTENTION}.{part}": f"model.layers.{{}}.{_ATTENTION}.{part}"
        for part in ("q_proj", "q_a_proj", "q_a_layernorm", "q_b_proj", "kv_a_proj_with_mqa", "kv_a_layernorm")
    }
    | {f"layers.{{}}.{_ATTENTION}.{part}": f"model.layers.{{}}.{_ATTENTION}.{part}" for part in ("kv_b_proj", "o_proj")}
    | expert_names(_MLP)
    | shared_names(f"{_MLP}.shared_experts")
)


def _read_choice(keys: Keys) -> dict[str, Any]:
    method, groups, best = keys.take("topk_method", "greedy"), keys.take("n_group"), keys.take("topk_group")
    if method in ("greedy", "gready"):  # as the original code spells its default
        return {"router_groups": 1, "topk_group": 1}
    if method != "group_limited_greedy":
        raise keys.fail("topk_method", method, "is not implemented; known: greedy, group_limited_greedy.")
    for name, value in (("n_group", groups), ("topk_group", best)):
        if not isinstance(value, int):
            raise keys.fail(name, value, "should be a whole number.")
    return {"router_groups": groups, "topk_group": best}


def _write_choice(config: ModelConfig) -> dict[str, Any]:
    method = "greedy" if config.router_groups == config.topk_group else "group_limited_greedy"
    return {"topk_method": method, "n_group": config.router_groups, "topk_group": config.topk_group}


DEEPSEEK2 = add(
    Family(
        name="deepseek_v2",
        covers="DeepSeek-V2, V2-Lite, V2.5, Coder-V2",
        architecture="DeepseekV2ForCausalLM",
        model_type="deepseek_v2",
        keys=(
            *_LATENT_KEYS,
            *chosen(6, 64, "n_routed_experts"),
            Key("moe_intermediate_size", "moe_ffn_hidden_size", 1407),
            Key("n_shared_experts", "n_shared_experts", 2),
            Key("first_k_dense_replace", "first_k_dense_replace", 0),
            Key("moe_layer_freq", "moe_layer_freq", 1),
            Key("norm_topk_prob", "norm_topk_prob", False),
            Key("routed_scaling_factor", "routed_scaling_factor", 1.0),
        ),
        groups=(*_GROUPS, Group(_read_choice, _write_choice), constant("scoring_func", "softmax", "softmax")),
        fixed=_FIXED | {"router_scoring": "softmax"},
        names=_NAMES,
    )
)

DEEPSEEK3 = add(
    Family(
        name="deepseek_v3",
        covers="DeepSeek-V3, V3.1, R1, in bfloat16",
        architecture="DeepseekV3ForCausalLM",
        model_type="deepseek_v3",
        keys=(
            *_LATENT_KEYS,
            *chosen(8, 256, "n_routed_experts", "num_local_experts"),
            Key("moe_intermediate_size", "moe_ffn_hidden_size", 2048),
            Key("n_shared_experts", "n_shared_experts", 1),
            Key("first_k_dense_replace", "first_k_dense_replace", 3),
            Key("moe_layer_freq", "moe_layer_freq", 1),
            Key("n_group", "router_groups", 8),
            Key("topk_group", "topk_group", 4),
            Key("norm_topk_prob", "norm_topk_prob", True),
            Key("routed_scaling_factor", "routed_scaling_factor", 2.5),
            Key("rope_interleave", "latent_rope_interleaved", True),
        ),
        groups=(
            *_GROUPS,
            constant("topk_method", "noaux_tc", "noaux_tc"),
            constant("scoring_func", "sigmoid", "sigmoid"),
        ),
        fixed=_FIXED | {"router_scoring": "sigmoid", "router_correction_bias": True},
        names=_NAMES,
        extra_layers=True,
    ),
    *("deepseek-r1",),
)
