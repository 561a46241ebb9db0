"""How a family spells its architecture in Hugging Face's config.json: the vocabulary in which family rows are written.

A row lists keys (one config.json key <-> one ModelConfig field) and groups (several keys that only make sense together,
such as the rotary ones). The same row reads and writes. Reading consumes keys, and a key that nobody consumed is an
error unless it is known to be cosmetic or says "off": a key ignored by mistake changes numbers silently. Both spellings
are read, the published one (`rope_theta`, `rope_scaling`, `torch_dtype`) and that of transformers 5 (`rope_parameters`,
`dtype`, `layer_types`); the published one is written, which transformers 4 and 5 both load. Nothing here imports torch.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

from modellink.config.schema import ModelConfig
from modellink.errors import ModelLinkError
from modellink.registry import suggest

REQUIRED = object()
_ABSENT = object()


def words(text: str) -> frozenset[str]:
    """The words of a text as a set."""
    return frozenset(text.split())


GENERATION_KEYS = words(
    """max_length min_length max_new_tokens do_sample temperature top_k top_p min_p typical_p repetition_penalty
    length_penalty no_repeat_ngram_size num_beams num_beam_groups diversity_penalty early_stopping num_return_sequences
    bad_words_ids encoder_no_repeat_ngram_size exponential_decay_length_penalty forced_bos_token_id forced_eos_token_id
    suppress_tokens begin_suppress_tokens remove_invalid_values output_scores return_dict_in_generate
    cache_implementation"""
)
TOKEN_KEYS = words("bos_token_id eos_token_id pad_token_id unk_token_id sep_token_id cls_token_id mask_token_id")
COSMETIC_KEYS = (
    GENERATION_KEYS
    | TOKEN_KEYS
    | words(
        """architectures model_type auto_map _name_or_path name_or_path _commit_hash transformers_version torch_dtype
        dtype use_cache initializer_range pretraining_tp return_dict output_attentions output_hidden_states
        chunk_size_feed_forward id2label label2id num_labels problem_type finetuning_task task_specific_params
        tokenizer_class prefix torchscript keys_to_ignore_at_inference attn_implementation _attn_implementation
        _flash_attn_2_enabled unsloth_fixed unsloth_version model_max_length max_sequence_length _from_model_config
        gradient_checkpointing use_flash_attn fp32 fp16 bf16 softmax_in_fp32 attention_softmax_in_fp32
        bias_dropout_fusion masked_softmax_fusion skip_bias_add skip_bias_add_qkv offset_alibi slow_but_exact
        apply_query_key_layer_scaling summary_type summary_use_proj summary_activation summary_proj_to_labels
        summary_first_dropout is_decoder use_cache_kernel use_cache_quantization prefix_projection pre_seq_len
        output_router_logits router_aux_loss_coef aux_loss_alpha seq_aux ep_size fuse_weight"""
    )
)
DROPOUT_KEYS = words("hidden_dropout resid_pdrop embd_pdrop attn_pdrop embedding_dropout residual_dropout")

ACTIVATION_NAMES = {
    "silu": "silu",
    "swish": "silu",
    "gelu": "gelu",
    "gelu_pytorch_tanh": "gelu_tanh",
    "gelu_new": "gelu_tanh",
    "relu": "relu",
    "relu2": "squared_relu",
}


class Keys:
    """The keys of one config.json, taken out one by one; `where` names the file in errors."""

    def __init__(self, content: Mapping[str, Any], where: str) -> None:
        self.content, self.where = content, where
        self._left = dict(content)
        self._known: set[str] = set()

    def take(self, name: str, default: Any = None) -> Any:
        """The value of `name`, which counts as understood from now on; `default` where it is absent."""
        self._known.add(name)
        return self._left.pop(name, default)

    def fail(self, name: str, value: Any, why: str) -> ModelLinkError:
        return ModelLinkError(f"{self.where}: {name} = {value!r} {why}")

    def finish(self) -> None:
        """Raise for the first key left that may matter."""
        for name, value in self._left.items():
            off = value is None or value is False or value in ({}, [], "") or (name in DROPOUT_KEYS and value == 0)
            if not off and name not in COSMETIC_KEYS:
                why = f"is not a key that this family knows.{suggest(name, self._known)}"
                raise self.fail(name, value, f"{why} Ignoring it could change results: remove it if it has no effect.")


class Group(NamedTuple):
    """Several keys that set several fields together."""

    read: Callable[[Keys], dict[str, Any]]
    write: Callable[[ModelConfig], dict[str, Any]]


@dataclasses.dataclass(frozen=True)
class Key:
    """One key <-> one field (or several that are always equal).

    `default` is what the family's original code assumes when the key is absent; None lets ModelConfig derive the size.
    `values` translates enumerations; the first spelling of a value is the one written. `also` are further names under
    which the key is read.
    """

    name: str
    field: str | tuple[str, ...]
    default: Any = REQUIRED
    values: Mapping[str, str] | None = None
    also: tuple[str, ...] = ()

    @property
    def fields(self) -> tuple[str, ...]:
        return (self.field,) if isinstance(self.field, str) else self.field

    def read(self, keys: Keys) -> dict[str, Any]:
        value = keys.take(self.name, _ABSENT)
        for name in self.also:
            value = agree(keys, name, [None if value is _ABSENT else value, keys.take(name)])
            value = _ABSENT if value is None else value
        value = self.default if value is _ABSENT else value
        if value is REQUIRED:
            raise ModelLinkError(
                f"{keys.where}: the key {self.name!r} is missing; the architecture is incomplete without it."
            )
        if self.values is not None:
            if value not in self.values:
                raise keys.fail(self.name, value, f"is not implemented; known: {', '.join(self.values)}.")
            value = self.values[value]
        return {field: _typed(keys, self.name, value, _FIELD_TYPES[field]) for field in self.fields}

    def write(self, config: ModelConfig) -> dict[str, Any]:
        value = getattr(config, self.fields[0])
        if self.values is not None:
            value = next((theirs for theirs, ours in self.values.items() if ours == value), None)
        if isinstance(value, float) and type(self.default) is int and value.is_integer():
            value = int(value)  # transformers 5 checks types
        return {self.name: value}


_FIELD_TYPES = {field.name: str(field.type) for field in dataclasses.fields(ModelConfig)}


def _typed(keys: Keys, name: str, value: Any, kind: str) -> Any:
    """`value` as the type `kind` of a ModelConfig field ("int | None", "float", ...), or an error naming it."""
    if value is None and "None" in kind:
        return None
    plain = kind.split(" ")[0]
    number = isinstance(value, int | float) and not isinstance(value, bool)
    if plain == "float" and number:
        return float(value)
    if plain == "int" and number and value == int(value):
        return int(value)
    if (plain == "bool" and isinstance(value, bool)) or (plain == "str" and isinstance(value, str)):
        return value
    raise keys.fail(name, value, f"should be of type {plain}.")


def renamed(keys: tuple[Key, ...], **names: str | tuple[str, ...] | None) -> tuple[Key, ...]:
    """`keys` with other names in config.json: the one written, or that and further ones read; None drops the key."""
    found = []
    for key in keys:
        name = names.get(key.name, key.name)
        if name is not None:
            first, *also = (name,) if isinstance(name, str) else name
            found.append(dataclasses.replace(key, name=first, also=tuple(also)))
    return tuple(found)


def ignored(*names: str) -> Group:
    """Keys that the family's own code computes or never reads."""

    def read(keys: Keys) -> dict[str, Any]:
        for name in names:
            keys.take(name)
        return {}

    return Group(read, lambda config: {})


def constant(name: str, value: Any, default: Any = REQUIRED) -> Group:
    """A key that must say `value`; `default` is what the family's code assumes without it, if something else."""

    def read(keys: Keys) -> dict[str, Any]:
        found = keys.take(name, value if default is REQUIRED else default)
        if found != value:
            raise keys.fail(name, found, f"is not implemented for this family; known: {value!r}.")
        return {}

    return Group(read, lambda config: {name: value})


# rope: rope_theta, rope_scaling, rope_parameters, partial_rotary_factor ---------------------------------------------

_ROPE_KEYS: dict[str, dict[str, tuple[str, Any]]] = {
    "linear": {"factor": ("rope_scaling_factor", REQUIRED)},
    "dynamic": {"factor": ("rope_scaling_factor", REQUIRED)},
    "llama3": {
        "factor": ("rope_scaling_factor", REQUIRED),
        "low_freq_factor": ("rope_low_freq_factor", REQUIRED),
        "high_freq_factor": ("rope_high_freq_factor", REQUIRED),
        "original_max_position_embeddings": ("rope_original_max_position", REQUIRED),
    },
    "yarn": {
        "factor": ("rope_scaling_factor", REQUIRED),
        "original_max_position_embeddings": ("rope_original_max_position", REQUIRED),
        "attention_factor": ("rope_attention_factor", None),
        "beta_fast": ("rope_beta_fast", 32.0),
        "beta_slow": ("rope_beta_slow", 1.0),
        "mscale": ("rope_mscale", 1.0),
        "mscale_all_dim": ("rope_mscale_all_dim", 0.0),
        "truncate": ("rope_truncate", True),
    },
}


def agree(keys: Keys, name: str, values: list[Any]) -> Any:
    """The one value that was given (None if none was); two different ones for the same thing are an error."""
    given = [value for value in values if value is not None]
    for value in given[1:]:
        if value != given[0]:
            raise keys.fail(name, value, f"contradicts {given[0]!r} given elsewhere in the file; keep one of them.")
    return given[0] if given else None


def _rope_dict(keys: Keys) -> dict[str, Any]:
    """rope_scaling and rope_parameters as one flat dict."""
    merged: dict[str, Any] = {}
    for name in ("rope_scaling", "rope_parameters"):
        value = keys.take(name) or {}
        if not isinstance(value, dict):
            raise keys.fail(name, value, "should be an object.")
        per_layer_type = [part for part in value.values() if isinstance(part, dict)]
        if per_layer_type:
            if any(part != per_layer_type[0] for part in per_layer_type):
                raise keys.fail(name, value, "differs between layer types, which no family here implements.")
            value = per_layer_type[0]
        for key, entry in value.items():
            merged[key] = agree(keys, f"{name}.{key}", [merged.get(key), entry])
    return {key: value for key, value in merged.items() if value is not None}


def read_rope(keys: Keys, default_theta: float = 10000.0, default_fraction: float = 1.0) -> dict[str, Any]:
    """The fields of the rotation; the defaults are what the family's code assumes where the file says nothing."""
    rope = _rope_dict(keys)
    theta = agree(keys, "rope_theta", [keys.take("rope_theta"), rope.pop("rope_theta", None)])
    fraction = agree(
        keys, "partial_rotary_factor", [keys.take("partial_rotary_factor"), rope.pop("partial_rotary_factor", None)]
    )
    kind = agree(keys, "rope_type", [rope.pop("rope_type", None), rope.pop("type", None)]) or "default"
    fields: dict[str, Any] = {
        "rope_theta": _typed(keys, "rope_theta", default_theta if theta is None else theta, "float"),
        "rope_fraction": _typed(
            keys, "partial_rotary_factor", default_fraction if fraction is None else fraction, "float"
        ),
    }
    if kind != "default" and kind not in _ROPE_KEYS:
        raise keys.fail("rope_type", kind, f"is not implemented; known: default, {', '.join(_ROPE_KEYS)}.")
    trained = "original_max_position_embeddings"
    given = agree(keys, trained, [keys.take(trained), rope.pop(trained, None)])
    longest = keys.content["max_position_embeddings"]
    if kind in ("llama3", "yarn"):
        rope[trained] = _typed(keys, trained, longest if given is None else given, "int")
    if kind == "yarn":
        rope.setdefault("factor", longest / rope[trained])
        if not (rope.get("mscale") and rope.get("mscale_all_dim")):
            # only together do they replace the usual temperature
            rope = {name: value for name, value in rope.items() if not name.startswith("mscale")}
    if kind == "dynamic":
        # the original code stretches from max_position_embeddings, pinned here against later changes of that
        fields["rope_original_max_position"] = agree(keys, trained, [longest, given])
    if kind != "default":
        fields["rope_scaling"] = kind
        for name, (field, default) in _ROPE_KEYS[kind].items():
            value = rope.pop(name, default)
            if value is REQUIRED:
                raise ModelLinkError(f"{keys.where}: rope scaling {kind!r} needs the key {name!r}.")
            fields[field] = _typed(keys, name, value, _FIELD_TYPES[field])
    if rope:
        name, value = next(iter(rope.items()))
        raise keys.fail(f"rope_scaling.{name}", value, f"is not a key of rope type {kind!r}.")
    return fields


def write_rope(config: ModelConfig, default_fraction: float = 1.0) -> dict[str, Any]:
    """The published spelling: rope_theta beside rope_scaling."""
    written: dict[str, Any] = {"rope_theta": config.rope_theta, "rope_scaling": None}
    if config.rope_fraction != default_fraction:
        written["partial_rotary_factor"] = config.rope_fraction
    if config.rope_scaling is not None:
        scaling: dict[str, Any] = {"rope_type": config.rope_scaling}
        for name, (field, default) in _ROPE_KEYS.get(config.rope_scaling, {}).items():
            value = getattr(config, field)
            if value != default:
                scaling[name] = value
        if scaling.get("mscale_all_dim"):
            scaling["mscale"] = config.rope_mscale
        written["rope_scaling"] = scaling
    return written


def write_rope_type(config: ModelConfig) -> dict[str, Any]:
    """The older key of the rule."""
    written = write_rope(config)
    if written["rope_scaling"]:
        written["rope_scaling"] = {"type": written["rope_scaling"].pop("rope_type"), **written["rope_scaling"]}
    return written


ROPE = Group(read_rope, write_rope)
ROPE_TYPE = Group(read_rope, write_rope_type)  # for families whose own code knows the older key alone


# window: sliding_window, use_sliding_window, max_window_layers, layer_types -----------------------------------------


def window_pattern(flags: list[bool]) -> str:
    """ModelConfig.window_layers for one flag per layer, in its shortest form."""
    if all(flags):
        return "all"
    if flags == [i % 2 == 0 for i in range(len(flags))]:
        return "even"
    return ",".join(str(int(flag)) for flag in flags)


def window_flags(config: ModelConfig) -> list[bool]:
    """One flag per layer: does it attend through the sliding window?"""
    return [config.layer_has_window(i) for i in range(config.num_layers or 0)]


def _layer_types(keys: Keys, layers: int) -> list[bool] | None:
    kinds = keys.take("layer_types")
    if kinds is None:
        return None
    if not isinstance(kinds, list):
        raise keys.fail("layer_types", kinds, "should be a list.")
    names = {"full_attention": False, "sliding_attention": True}
    for kind in kinds:
        if kind not in names:
            raise keys.fail("layer_types", kind, f"is not implemented; known: {', '.join(names)}.")
    if len(kinds) != layers:
        raise keys.fail("layer_types", kinds, f"has {len(kinds)} entries for {layers} layers.")
    return [names[kind] for kind in kinds]


def window_group(default_window: int | None, rule: str) -> Group:
    """Keys of the sliding window. `rule` says which layers have it unless `layer_types` does:

    "none" the family has no window, "all", "even" (Gemma2), "periodic" all but each `sliding_window_pattern`-th
    (Gemma-3), or "switched": off unless `use_sliding_window`, then on the layers from `max_window_layers` on (Qwen).
    """

    def read(keys: Keys) -> dict[str, Any]:
        layers = int(keys.content["num_hidden_layers"])
        listed = _layer_types(keys, layers)
        if rule == "none":
            if listed and any(listed):
                raise keys.fail("layer_types", "sliding_attention", "is not implemented for this family.")
            return {}
        window = _typed(keys, "sliding_window", keys.take("sliding_window", default_window), "int | None")
        flags = [rule == "all" or i % 2 == 0 for i in range(layers)]
        if rule == "periodic":
            names = ("sliding_window_pattern", "_sliding_window_pattern")
            period = _typed(keys, names[0], agree(keys, names[0], [keys.take(name) for name in names]) or 6, "int")
            flags = [(i + 1) % period != 0 for i in range(layers)]
        if rule == "switched":
            first = _typed(keys, "max_window_layers", keys.take("max_window_layers", 28), "int")
            used = _typed(keys, "use_sliding_window", keys.take("use_sliding_window", False), "bool")
            window = window if used else None
            flags = [i >= first for i in range(layers)]
        if listed is not None and rule == "all" and window is not None and listed != flags:
            raise keys.fail(
                "layer_types",
                keys.content["layer_types"],
                "is not implemented for this family: its window holds on all layers.",
            )
        flags = flags if listed is None else listed
        if listed is not None and any(listed) and window is None:
            raise keys.fail(
                "layer_types",
                "sliding_attention",
                "needs a sliding_window (and use_sliding_window, where the family has it).",
            )
        if window is None or not any(flags):
            return {}
        return {"sliding_window": window, "window_layers": window_pattern(flags)}

    def write(config: ModelConfig) -> dict[str, Any]:
        flags = window_flags(config)
        windowed = any(flags)
        if rule == "none":
            return {}
        written: dict[str, Any] = {"sliding_window": config.sliding_window if windowed else None}
        if rule == "periodic" and windowed and False in flags:
            period = flags.index(False) + 1
            if flags == [(i + 1) % period != 0 for i in range(len(flags))]:
                written["sliding_window_pattern"] = period
        if rule == "switched":
            written["use_sliding_window"] = windowed
            written["max_window_layers"] = flags.index(True) if windowed else config.num_layers
        if windowed and rule != "all":
            written["layer_types"] = ["sliding_attention" if flag else "full_attention" for flag in flags]
        return written

    return Group(read, write)


def _read_no_window(keys: Keys) -> dict[str, Any]:
    if keys.take("use_sliding_window"):
        why = "is not implemented for this family: versions of its code put the window on different layers."
        raise keys.fail("use_sliding_window", True, why)
    for name in ("sliding_window", "max_window_layers"):  # without effect
        keys.take(name)
    if any(_layer_types(keys, int(keys.content["num_hidden_layers"])) or []):
        raise keys.fail("layer_types", "sliding_attention", "contradicts use_sliding_window, which is false.")
    return {}


NO_WINDOW = Group(_read_no_window, lambda config: {"use_sliding_window": False})
