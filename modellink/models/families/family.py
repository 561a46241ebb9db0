"""What a family is: one row that says how Hugging Face spells it. Rows stand in the files beside this one."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Mapping
from typing import Any

from modellink.config.experts import check_experts
from modellink.config.schema import ModelConfig
from modellink.errors import ModelLinkError
from modellink.models.families.spelling import (
    ACTIVATION_NAMES,
    ROPE,
    Group,
    Key,
    Keys,
    window_flags,
    window_group,
    words,
)
from modellink.registry import Registry

# canonical module name -> Hugging Face's, {} a layer number; our names are Llama's without "model."
LLAMA_NAMES: dict[str, str] = {
    "embed_tokens": "model.embed_tokens",
    "layers.{}.input_layernorm": "model.layers.{}.input_layernorm",
    "layers.{}.self_attn.q_proj": "model.layers.{}.self_attn.q_proj",
    "layers.{}.self_attn.k_proj": "model.layers.{}.self_attn.k_proj",
    "layers.{}.self_attn.v_proj": "model.layers.{}.self_attn.v_proj",
    "layers.{}.self_attn.o_proj": "model.layers.{}.self_attn.o_proj",
    "layers.{}.self_attn.q_norm": "model.layers.{}.self_attn.q_norm",
    "layers.{}.self_attn.k_norm": "model.layers.{}.self_attn.k_norm",
    "layers.{}.post_attention_layernorm": "model.layers.{}.post_attention_layernorm",
    "layers.{}.mlp.gate_proj": "model.layers.{}.mlp.gate_proj",
    "layers.{}.mlp.up_proj": "model.layers.{}.mlp.up_proj",
    "layers.{}.mlp.down_proj": "model.layers.{}.mlp.down_proj",
    "norm": "model.norm",
    "lm_head": "lm_head",
}
IGNORED_TENSORS = ("rotary_emb.inv_freq", "rotary_pos_emb.inv_freq", "rotary_emb.cos_cached", "rotary_emb.sin_cached")

# the block that all families here share (spec: pre-norm, RMSNorm, gated MLP, rotary positions, no dropout on branches)
COMMON: dict[str, Any] = {
    "normalization": "RMSNorm",
    "gated_mlp": True,
    "position_embedding": "rope",
    "qkv_bias": False,
    "attention_output_bias": False,
    "mlp_bias": False,
    "lm_head_bias": False,
    "hidden_dropout": 0.0,
}

# fields that describe a run rather than the function a model computes: no file can contradict them
_NOT_ARCHITECTURE = words(
    """family vocab_size padded_vocab_size vocab_multiple attention_dropout hidden_dropout fp32_residual init_std
    query_key_layer_scaling router_input_jitter aux_loss_coeff device_aux_loss_coeff comm_aux_loss_coeff z_loss_coeff
    sequence_aux_loss expert_capacity_factor pad_experts_to_capacity token_drop_policy moe_grouped_gemm"""
)
_EXPERT_FIELDS = words(
    """moe_ffn_hidden_size n_shared_experts shared_expert_gate shared_expert_gate_dimension router_topk router_scoring
    norm_topk_prob routed_scaling_factor router_groups topk_group router_bias router_correction_bias swiglu_limit"""
)
_LATENT_FIELDS = words(
    """q_lora_rank kv_lora_rank qk_nope_head_dim qk_rope_head_dim v_head_dim latent_rope_interleaved
    latent_norm_epsilon"""
)
_SCALING_FIELDS = [field.name for field in dataclasses.fields(ModelConfig) if field.name.startswith("rope_")]


def size_keys(
    *, kv_heads: int | None = None, head_dim: int | None = None, tied: bool = False, epsilon: float = 1e-6
) -> tuple[Key, ...]:
    """The keys of sizes that every family here has; arguments are what its code assumes where the file says nothing."""
    return (
        Key("num_hidden_layers", "num_layers"),
        Key("hidden_size", "hidden_size"),
        Key("num_attention_heads", "num_attention_heads"),
        Key("num_key_value_heads", "num_key_value_heads", kv_heads),
        Key("head_dim", "head_dim", head_dim),
        Key("intermediate_size", "ffn_hidden_size"),
        Key("vocab_size", "vocab_size"),
        Key("max_position_embeddings", "max_position_embeddings"),
        Key("rms_norm_eps", "norm_epsilon", epsilon),
        Key("tie_word_embeddings", "tie_word_embeddings", tied),
        Key("attention_dropout", "attention_dropout", 0.0),
    )


ACTIVATION = Key("hidden_act", "activation", "silu", ACTIVATION_NAMES)
ATTENTION_BIAS = Key("attention_bias", ("qkv_bias", "attention_output_bias"), False)


@dataclasses.dataclass(frozen=True, eq=False)
class Family:
    """One row: `covers` names the published models, `fixed` the fields that no key of the family can change.

    `names` maps our modules to theirs; modules of ours that share a name of theirs are one fused tensor in the files,
    rows in the order of the table. `grouped` ends the names whose rows alternate for every key/value head,
    `alternating` those whose rows alternate one by one, `transposed` those whose matrices are stored [in, out].
    Published files may lack `prefix` in all their names. With `extra_layers` they may hold layers after the last one
    that predict further tokens, which are left out. `assumed` are keys that the family's code takes for given.

    Models that also see images hold this family as their text part: `wrappers` names their architectures, `inner` how
    the names of the text part begin there and here. It is read alone and written as a model of its own.
    """

    name: str
    covers: str
    architecture: str
    model_type: str
    keys: tuple[Key, ...]
    groups: tuple[Group, ...] = (ROPE, window_group(None, "none"))
    fixed: Mapping[str, Any] = dataclasses.field(default_factory=dict)
    names: Mapping[str, str] = dataclasses.field(default_factory=lambda: LLAMA_NAMES)
    grouped: tuple[str, ...] = ()
    alternating: tuple[str, ...] = ()
    transposed: tuple[str, ...] = ()
    prefix: str = ""
    other_architectures: tuple[str, ...] = ()
    ignored_tensors: tuple[str, ...] = IGNORED_TENSORS
    extra_layers: bool = False
    assumed: Mapping[str, Any] = dataclasses.field(default_factory=dict)
    wrappers: tuple[str, ...] = ()
    inner: tuple[tuple[str, str], ...] = ()

    @property
    def architectures(self) -> tuple[str, ...]:
        """Names of the model's class in `architectures` of config.json; the first is written."""
        return (self.architecture, *self.other_architectures)

    @property
    def _parts(self) -> list[Key | Group]:
        return [*self.keys, *self.groups, *([_EXTRA_LAYERS] if self.extra_layers else [])]

    def read(self, content: Mapping[str, Any], where: str) -> ModelConfig:
        """ModelConfig of a parsed config.json, derived sizes filled in; `where` names the file in errors.

        The padded vocabulary is left open: it depends on the layout. Raises ModelLinkError for a key that is missing,
        has a value that is not implemented, or is not known and not cosmetic.
        """
        keys = Keys({**self.assumed, **content}, where)
        _refuse_quantised(keys)
        fields: dict[str, Any] = {"family": self.name, **COMMON, **self.fixed}
        for part in self._parts:
            fields.update(part.read(keys))
        keys.finish()
        config = ModelConfig(**fields).resolve()
        _check_sizes(config, where)
        try:
            check_experts(config)
        except ModelLinkError as error:
            raise ModelLinkError(f"{where}: {error}") from None
        return config

    def write(self, config: ModelConfig) -> dict[str, Any]:
        """config.json of `config` in the published spelling; ModelLinkError when the family cannot express it."""
        lost = self.lost(config)
        if lost:
            able = [row.name for row in all_families() if not row.lost(config)]
            fix = f"families that can: {', '.join(able)}" if able else "no family here can, so keep the native format"
            raise ModelLinkError(f"the Hugging Face format of family {self.name!r} cannot express {lost}; {fix}.")
        return self._spell(config)

    def lost(self, config: ModelConfig) -> str:
        """The first field whose value would not survive being written and read, as "name=value"; "" when all do."""
        try:
            back = _effective(self.read(self._spell(config), "config.json"))
        except ModelLinkError as error:
            return str(error).rstrip(".")
        for name, value in _effective(config).items():
            read = back[name]
            same = math.isclose(read, value) if isinstance(read, float) and isinstance(value, float) else read == value
            if not same:
                return f"{name}={getattr(config.resolve(), name)!r}"
        return ""

    def _spell(self, config: ModelConfig) -> dict[str, Any]:
        content: dict[str, Any] = {"architectures": [self.architecture], "model_type": self.model_type}
        for part in self._parts:
            content.update(part.write(config))
        return content


def _effective(config: ModelConfig) -> dict[str, Any]:
    """The fields that matter for the function computed; switches that are off are normalised away."""
    config = config.resolve()
    fields = {name: value for name, value in dataclasses.asdict(config).items() if name not in _NOT_ARCHITECTURE}
    if config.position_embedding != "rope":
        for name in _SCALING_FIELDS:
            fields.pop(name)
    elif config.rope_scaling is None:
        defaults = ModelConfig()
        for name in _SCALING_FIELDS:
            if name not in ("rope_theta", "rope_theta_window", "rope_fraction", "rope_interleaved"):
                fields[name] = getattr(defaults, name)
    fields["window_layers"] = window_flags(config)
    if not any(fields["window_layers"]):
        fields["sliding_window"] = fields["rope_theta_window"] = None
    fields["query_scale"] = config.query_scale or fields["head_dim"]
    first = _effective_experts(config) | _effective_latent(config)  # what is lost is named by the first difference
    return first | {name: value for name, value in fields.items() if name not in first}


def _effective_experts(config: ModelConfig) -> dict[str, Any]:
    """Fields of experts, one spelling for routers that compute the same."""
    experts = [config.layer_has_experts(i) for i in range(config.num_layers or 0)]
    fields: dict[str, Any] = {"num_experts": config.num_experts if any(experts) else None, "moe_layer_freq": experts}
    fields["first_k_dense_replace"] = None
    if not any(experts):
        return fields | dict.fromkeys(_EXPERT_FIELDS)
    if all(experts):
        fields["ffn_hidden_size"] = None
    if config.router_scoring == "softmax" and config.norm_topk_prob:
        fields["router_scoring"] = "softmax_selected"
    if fields.get("router_scoring", config.router_scoring) == "softmax_selected":
        fields |= {"norm_topk_prob": None, "routed_scaling_factor": None}
    if config.router_groups == config.topk_group:
        fields |= {"router_groups": None, "topk_group": None}
    if not (config.n_shared_experts and config.shared_expert_gate):
        fields |= {"shared_expert_gate": False, "shared_expert_gate_dimension": None}
    return fields


def _effective_latent(config: ModelConfig) -> dict[str, Any]:
    if not config.multi_head_latent_attention:
        return dict.fromkeys(_LATENT_FIELDS)
    return {"num_key_value_heads": None, "rope_interleaved": None, "rope_fraction": None}


_DEQUANTISE = {
    "mxfp4": "load it in transformers with Mxfp4Config(dequantize=True)",
    "fp8": "cast it with the family's own script (fp8_cast_bf16.py for DeepSeek-V3) or load it dequantised in "
    "transformers",
}


def _refuse_quantised(keys: Keys) -> None:
    settings = keys.take("quantization_config")
    if settings:
        method = settings.get("quant_method") if isinstance(settings, dict) else settings
        advice = _DEQUANTISE.get(str(method), "load it dequantised in transformers")
        raise ModelLinkError(
            f"{keys.where}: quantization_config says that the weights are quantised ({method}), which are not read:"
            f" {advice}, save it in bfloat16 and give that folder."
        )


def _read_extra_layers(keys: Keys) -> dict[str, Any]:
    keys.take("num_nextn_predict_layers")
    return {}


_EXTRA_LAYERS = Group(_read_extra_layers, lambda config: {"num_nextn_predict_layers": 0})


_SIZES = (
    *("num_layers", "hidden_size", "num_attention_heads", "num_key_value_heads", "head_dim", "ffn_hidden_size"),
    *("vocab_size", "num_experts", "router_groups"),
)
_MAY_BE_NONE = ("num_experts", "router_groups")


def _check_sizes(config: ModelConfig, where: str) -> None:
    for name in _SIZES:
        value = getattr(config, name)
        if (value is None and name not in _MAY_BE_NONE) or (value is not None and value < 1):
            raise ModelLinkError(f"{where}: {name} = {value} must be at least 1.")
    if (config.num_attention_heads or 0) % (config.num_key_value_heads or 1):
        raise ModelLinkError(
            f"{where}: {config.num_attention_heads} query heads are not a multiple of"
            f" {config.num_key_value_heads} key/value heads."
        )


FAMILIES: Registry[Family] = Registry("family")


def add(family: Family, *aliases: str) -> Family:
    """Register a row under its name and the names its models go by."""
    return FAMILIES.add(family.name, family, *aliases)


def all_families() -> list[Family]:
    """Every row once, in order of registration."""
    return list(dict.fromkeys(FAMILIES.get(name) for name in FAMILIES))
