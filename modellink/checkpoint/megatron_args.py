"""The architecture in the `args` of Megatron's files: ModelConfig to and from the run's options.

An option's attribute is its flag with underscores, so the flag table says most names; flags that set several fields are
read by the table's own rules. What is left are the few places where one of our fields is several options, and where
Megatron itself, after the reference, found another name for experts and latent attention: both are read. Fields that
Megatron has no option for are stored under our name, which its own reader passes over; its own files lack them, and
then they keep their defaults.
"""

from __future__ import annotations

import argparse
import dataclasses
from collections.abc import Mapping
from typing import Any

from modellink.config.architecture import ONLY_WITH
from modellink.config.flags import Given, assignments, by_name
from modellink.config.flags_table import SPELLINGS
from modellink.config.schema import ModelConfig
from modellink.errors import ModelLinkError
from modellink.models.families import FAMILIES
from modellink.models.families.family import all_families

_EXTRAS = "hf_extras"
_SIZES = ("num_layers", "hidden_size", "num_attention_heads")
_DERIVED = ("num_key_value_heads", "tie_word_embeddings")
_LAYOUT = ("moe_grouped_gemm",)  # how the files are cut, not what the model is
# flags that set fields, and what a run's options hold when they were given
_FLAGS = (
    *("use_rotary_position_embeddings", "rotary_seq_len_interpolation_factor", "use_glm_rope", "apply_layernorm_1p"),
    *("gelu_tanh", "openai_gelu", "squared_relu", "swiglu", "geglu"),
    *("dim_model_base", "scale_depth", "interleave_sliding_window"),
)
# Megatron's own names -> ours
_UPSTREAM_EXPERTS = {
    "moe_shared_expert_gate": "shared_expert_gate",
    "moe_router_num_groups": "router_groups",
    "moe_router_group_topk": "topk_group",
    "moe_router_topk_scaling_factor": "routed_scaling_factor",
    "moe_router_enable_expert_bias": "router_correction_bias",
}
_UPSTREAM_LATENTS = {"qk_head_dim": "qk_nope_head_dim", "qk_pos_emb_head_dim": "qk_rope_head_dim"}
_UPSTREAM_YARN = {
    "rotary_scaling_factor": "rope_scaling_factor",
    "original_max_position_embeddings": "rope_original_max_position",
    "beta_fast": "rope_beta_fast",
    "beta_slow": "rope_beta_slow",
    "mscale": "rope_mscale",
    "mscale_all_dim": "rope_mscale_all_dim",
}
# no option of Megatron says these
_OURS_ALONE = (
    *("norm_weight_in_fp32", "pre_norm", "qk_norm_all_heads", "lm_head_bias", "normalize_lm_head"),
    *("rope_theta_window", "rope_attention_factor", "rope_truncate", "query_log_window", "attention_sinks"),
    *("router_bias", "swiglu_limit", "latent_rope_interleaved"),
)


def _attributes(field: str) -> list[str]:
    """The attributes that may hold a field, the one that is written first."""
    flags = [flag for flag in SPELLINGS.get(f"model.{field}", "").split() if not flag.startswith("!")]
    names = [flag.removeprefix("--").replace("-", "_") for flag in flags]
    return [*names, field] if field not in names else names


def read_arguments(arguments: dict[str, Any], where: str, family: str | None = None) -> ModelConfig:
    """The ModelConfig that `arguments` describe; `family` (default: the first that can) is the Hugging Face spelling.

    Raises ModelLinkError when sizes are missing or the options describe a model that has no place here.
    """
    lacking = [name for name in _SIZES if not arguments.get(name)]
    if lacking:
        raise ModelLinkError(
            f"{where} does not say {', '.join(lacking)}: give --save-dir a folder that holds the model's config.json."
        )
    found: dict[str, Any] = {}
    for option in dataclasses.fields(ModelConfig):
        if option.name in _DERIVED + _LAYOUT:
            continue
        values = [arguments[name] for name in _attributes(option.name) if arguments.get(name) is not None]
        if values and not isinstance(values[0], list):  # Megatron's newest options take a list of losses or layers
            found[option.name] = float(values[0]) if _is_float(option, values[0]) else values[0]
    if _EXTRAS not in arguments:  # not written here: what has no field of its own says something
        found |= _set_by_flags(arguments, found)
        if arguments.get("num_experts"):
            found |= _experts(arguments, where)
        if arguments.get("multi_head_latent_attention") or arguments.get("multi_latent_attention"):
            found |= _latents(arguments)
    found |= _special(arguments, found)
    found = {name: value for name, value in found.items() if not _is_idle(name, found)}
    config = ModelConfig(**found).resolve()
    config.vocab_size = config.vocab_size or config.padded_vocab_size
    config.family = _family(config, found.get("family"), family)
    return config


def _special(arguments: dict[str, Any], found: dict[str, Any]) -> dict[str, Any]:
    """Fields that several options decide together."""
    given = arguments.get
    bias = bool(given("add_bias_linear", True))
    special: dict[str, Any] = {
        "qkv_bias": bias or found.get("qkv_bias", False),
        "attention_output_bias": bias or found.get("attention_output_bias", False),
        "mlp_bias": found.get("mlp_bias", bias),
        "tie_word_embeddings": not given("untie_embeddings_and_output_weights", False),
    }
    if given("group_query_attention") and given("num_query_groups"):
        special["num_key_value_heads"] = given("num_query_groups")
    if "norm_epsilon" not in found and given("layernorm_epsilon") is not None:
        special["norm_epsilon"] = given("layernorm_epsilon")
    if given("use_rope_scaling", False):
        special |= {"rope_scaling": "llama3", "rope_original_max_position": 8192}
    return special


def _set_by_flags(arguments: dict[str, Any], found: dict[str, Any]) -> dict[str, Any]:
    """What flags without a field of their own say."""
    table = by_name("train")
    flags = {name: table[f"--{name.replace('_', '-')}"] for name in _FLAGS if arguments.get(name)}
    given = [Given(flag, arguments[name], flag.name, name) for name, flag in flags.items()]
    chosen, _ = assignments(given, lambda path: found.get(path.removeprefix("model.")))
    gelu = "gelu_tanh" if arguments.get("bias_gelu_fusion", True) else "gelu"
    plain = {"gated_mlp": False, "activation": gelu}
    return plain | {path.removeprefix("model."): value for path, (value, _) in chosen.items()}


def _is_idle(name: str, fields: Mapping[str, Any]) -> bool:
    """Whether a field of experts or latent attention says nothing, as the model has none."""
    other, _ = ONLY_WITH.get(name, ("", None))
    return other in ("num_experts", "n_shared_experts", "multi_head_latent_attention") and not fields.get(other)


def _is_float(option: dataclasses.Field[Any], value: Any) -> bool:
    return type(value) is int and "float" in str(option.type)


def _experts(arguments: dict[str, Any], where: str) -> dict[str, Any]:
    """The fields of experts that options of the reference or of Megatron itself say in another way."""
    given = arguments.get
    kinds = given("moe_router_load_balancing_type") or "none"
    kind = kinds[0] if isinstance(kinds, list) else kinds
    if kind == "sinkhorn":
        raise ModelLinkError(f"{where} routes with sinkhorn, which only balances training: no model here does.")
    early = kind in ("softmax_topk", "group_limited_greedy") or given("moe_router_pre_softmax")
    found: dict[str, Any] = {"router_scoring": "softmax" if early else "softmax_selected"}
    if given("moe_router_score_function") == "sigmoid":
        found |= {"router_scoring": "sigmoid", "norm_topk_prob": (given("moe_router_topk") or 2) > 1}
    if kind == "group_limited_greedy" and (given("expert_model_parallel_size") or 1) > 1:
        found["router_groups"] = given("expert_model_parallel_size")
    found |= {ours: given(theirs) for theirs, ours in _UPSTREAM_EXPERTS.items() if given(theirs) is not None}
    width = given("moe_intermediate_size") or given("moe_ffn_hidden_size") or given("ffn_hidden_size")
    if given("moe_shared_expert_intermediate_size") and width:
        shared, rest = divmod(given("moe_shared_expert_intermediate_size"), width)
        if rest:
            raise ModelLinkError(f"{where}: the shared experts' width is no multiple of the experts' width {width}.")
        found["n_shared_experts"] = shared
    pattern = given("moe_layer_freq")
    if isinstance(pattern, list):
        dense = pattern.index(1) if 1 in pattern else 0
        every = next((step for step in range(1, len(pattern)) if _follows(pattern, dense, step)), None)
        if every is None:
            raise ModelLinkError(f"{where}: the layers with experts, moe_layer_freq {pattern}, follow no rule.")
        found |= {"first_k_dense_replace": dense, "moe_layer_freq": every}
    return found


def _follows(pattern: list[int], dense: int, step: int) -> bool:
    return pattern == [int(layer >= dense and layer % step == 0) for layer in range(len(pattern))]


def _latents(arguments: dict[str, Any]) -> dict[str, Any]:
    """Latent attention as files say it that were not written here; in Megatron's own, rotation is mostly yarn."""
    given = arguments.get
    epsilon = given("norm_epsilon") or given("layernorm_epsilon")
    found: dict[str, Any] = {"latent_norm_epsilon": epsilon} if epsilon else {}
    if not given("multi_latent_attention"):
        return found
    found |= {"multi_head_latent_attention": True, "position_embedding": "rope"}
    found |= {ours: given(theirs) for theirs, ours in _UPSTREAM_LATENTS.items() if given(theirs) is not None}
    if given("rope_type", "yarn") == "yarn" and (given("rotary_scaling_factor") or 1.0) != 1.0:
        found["rope_scaling"] = "yarn"
        found |= {ours: given(theirs) for theirs, ours in _UPSTREAM_YARN.items() if given(theirs) is not None}
    return found


def _family(config: ModelConfig, stored: str | None, asked: str | None) -> str:
    if stored in FAMILIES:
        return str(stored)
    # the plainest spelling first: many families share an architecture
    wanted = [FAMILIES.get(name) for name in (asked, "llama", "qwen2") if name is not None and name in FAMILIES]
    able = (row.name for row in (*wanted, *all_families()) if not row.lost(config))
    return next(able, "llama")


def read_extras(arguments: dict[str, Any]) -> dict[str, Any]:
    """The keys of config.json that no field holds, when the files were written here."""
    extras = arguments.get(_EXTRAS)
    return dict(extras) if isinstance(extras, dict) else {}


def unsaid(config: ModelConfig, expert_parallel: int = 1) -> list[str]:
    """The fields of `config` that no option of Megatron says: its own programs would compute something else."""
    config, plain = config.resolve(), ModelConfig()
    names = [name for name in _OURS_ALONE if getattr(config, name) != getattr(plain, name)]
    if config.rope_scaling in ("dynamic", "dynamic_doubling"):
        names.append("rope_scaling")
    if config.sliding_window and config.window_layers not in ("all", "even"):
        names.append("window_layers")
    if config.multi_head_latent_attention and config.qk_norm and config.latent_norm_epsilon != config.norm_epsilon:
        names.append("latent_norm_epsilon")
    if config.num_experts and _limited(config) and config.router_groups != expert_parallel:
        names.append("router_groups")
    if config.num_experts and config.router_scoring == "softmax_selected" and config.routed_scaling_factor != 1.0:
        names.append("routed_scaling_factor")
    return names


def _limited(config: ModelConfig) -> bool:
    """Whether a token chooses among the experts of some groups only."""
    return config.topk_group != config.router_groups


def _router_options(config: ModelConfig) -> dict[str, Any]:
    """Options of the router: the reference's, and after them Megatron's own of the same meaning."""
    early = config.router_scoring != "softmax_selected"
    greedy = _limited(config) or config.norm_topk_prob or config.routed_scaling_factor != 1.0
    late = "aux_loss" if config.aux_loss_coeff else "none"
    return {
        "moe_router_load_balancing_type": ("group_limited_greedy" if greedy else "softmax_topk") if early else late,
        "moe_router_score_function": "sigmoid" if config.router_scoring == "sigmoid" else "softmax",
        "moe_router_pre_softmax": config.router_scoring == "softmax",
        "moe_router_num_groups": config.router_groups if _limited(config) else None,
        "moe_router_group_topk": config.topk_group if _limited(config) else None,
        "moe_router_topk_scaling_factor": config.routed_scaling_factor if config.routed_scaling_factor != 1 else None,
        "moe_router_enable_expert_bias": config.router_correction_bias,
        "moe_ffn_hidden_size": config.moe_ffn_hidden_size,
        "moe_shared_expert_intermediate_size": config.n_shared_experts * (config.moe_ffn_hidden_size or 0) or None,
        "moe_shared_expert_gate": config.shared_expert_gate,
    }


def write_arguments(
    config: ModelConfig, extras: dict[str, Any] | None, layout: dict[str, Any], dtype: object
) -> argparse.Namespace:
    """The options of a run of Megatron that has this architecture and `layout` (further attributes)."""
    config = config.resolve()
    values: dict[str, Any] = {}
    for option in dataclasses.fields(ModelConfig):
        if option.name not in _DERIVED + _LAYOUT:
            idle = _is_idle(option.name, vars(config))
            values[_attributes(option.name)[0]] = None if idle else getattr(config, option.name)
    values |= _router_options(config) if config.num_experts else {}
    if config.multi_head_latent_attention and config.num_attention_heads:
        values["kv_channels"] = (config.hidden_size or 0) // config.num_attention_heads
    biases = config.qkv_bias and config.attention_output_bias and config.mlp_bias
    rope, length = config.position_embedding, config.max_position_embeddings or 0
    grouped = config.num_key_value_heads != config.num_attention_heads
    return argparse.Namespace(
        **values
        | layout
        | {
            "add_bias_linear": biases,
            "add_position_embedding": rope == "learned_absolute",
            "apply_layernorm_1p": config.norm_offset,
            "consumed_train_samples": 0,
            "consumed_valid_samples": 0,
            "encoder_num_layers": config.num_layers,
            "group_query_attention": grouped,
            "layernorm_epsilon": config.norm_epsilon,  # the newer name
            "max_position_embeddings": length,
            "num_query_groups": config.num_key_value_heads if grouped else 1,
            "params_dtype": dtype,
            "seq_length": length,
            "squared_relu": config.activation == "squared_relu",
            "swiglu": config.gated_mlp and config.activation == "silu",
            "tokenizer_type": "PretrainedFromHF",
            "untie_embeddings_and_output_weights": not config.tie_word_embeddings,
            "use_rotary_position_embeddings": rope == "rope",
            _EXTRAS: extras or {},
        }
    )
