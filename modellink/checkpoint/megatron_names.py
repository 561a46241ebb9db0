"""Megatron's names and cuts: which of our tensors make up one of its, and how tensor parallelism divides it.

One row per module, read in both directions. `cut` says what a tensor-parallel rank holds:

    whole     all of it (norms, routers, and biases added after the ranks are summed)
    stack     all of it, the rows of one part after those of the other (the projections into latents)
    rows      an equal share of the rows (vocabulary matrices, plain MLP input)
    columns   an equal share of the columns (attention and MLP outputs); a bias is whole
    qkv       an equal share of the KV groups; per group its query heads, then its key head, then its value head
    gated     its share of the gate's rows, then its share of the up projection's rows
    either    all of it or an equal share of the rows, as the build pleased: read and never written

Our stacked experts are one module each in Megatron's: their rows have a second "{}", the number of the expert.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from modellink.config.schema import ModelConfig
from modellink.errors import ModelLinkError

MCORE, LEGACY = "mcore", "legacy"
NUMBER = re.compile(r"(?<=\blayers\.)\d+(?=\.)")


class Row(NamedTuple):
    """`ours`: canonical module names; None where a dialect has no such module. `linear` ones carry an extra state."""

    ours: tuple[str, ...]
    cut: str
    mcore: str | None
    legacy: str | None
    linear: bool = False

    def name(self, dialect: str) -> str | None:
        return self.mcore if dialect == MCORE else self.legacy


class Place(NamedTuple):
    """Where parameters lie: those called `ours`, in the order of the row, share the tensor `name` of the whole model.

    With `experts` they share one tensor for each expert, and "{}" in `name` is its number.
    """

    row: Row
    ours: tuple[str, ...]
    name: str
    layer: int | None
    experts: int | None

    @property
    def names(self) -> list[str]:
        return [self.name] if self.experts is None else [self.name.format(expert) for expert in range(self.experts)]


_L, _D, _E = "layers.{}.", "decoder.layers.{}.", "language_model.encoder.layers.{}."
_A, _X = "self_attention.", "mlp.experts.local_experts.{}."
_EMBEDDING = "embedding.word_embeddings"
_ROWS = (
    Row(("embed_tokens",), "rows", _EMBEDDING, f"language_model.{_EMBEDDING}"),
    Row(
        ("embed_positions",),
        "whole",
        "embedding.position_embeddings",
        "language_model.embedding.position_embeddings",
    ),
    Row(("embed_norm",), "whole", f"{_EMBEDDING}.norm", f"language_model.{_EMBEDDING}.norm"),
    Row((f"{_L}input_layernorm",), "whole", f"{_D}input_layernorm", f"{_E}input_norm"),
    Row(
        (f"{_L}self_attn.q_proj", f"{_L}self_attn.k_proj", f"{_L}self_attn.v_proj"),
        "qkv",
        f"{_D}{_A}linear_qkv",
        f"{_E}{_A}query_key_value",
        True,
    ),
    Row((f"{_L}self_attn.o_proj",), "columns", f"{_D}{_A}linear_proj", f"{_E}{_A}dense", True),
    Row((f"{_L}self_attn.q_norm",), "whole", f"{_D}{_A}q_layernorm", None),
    Row((f"{_L}self_attn.k_norm",), "whole", f"{_D}{_A}k_layernorm", None),
    Row((f"{_L}self_attn.core",), "rows", f"{_D}{_A}core_attention", None),
    Row((f"{_L}attention_output_norm",), "whole", f"{_D}post_attn_norm", None),
    Row((f"{_L}post_attention_layernorm",), "whole", f"{_D}pre_mlp_layernorm", f"{_E}post_attention_norm"),
    Row((f"{_L}mlp_output_norm",), "whole", f"{_D}post_mlp_layernorm", None),
    Row((f"{_L}mlp.down_proj",), "columns", f"{_D}mlp.linear_fc2", f"{_E}mlp.dense_4h_to_h", True),
    Row((f"{_L}mlp.gate",), "whole", f"{_D}mlp.router", None),
    Row((f"{_L}mlp.shared_expert_gate",), "whole", f"{_D}mlp.shared_expert_gate", None),
    Row((f"{_L}mlp.shared_experts.down_proj",), "columns", f"{_D}mlp.shared_experts.linear_fc2", None, True),
    Row((f"{_L}mlp.experts.down_proj",), "columns", f"{_D}{_X}linear_fc2", None, True),
    Row(("norm",), "whole", "decoder.final_layernorm", "language_model.encoder.final_norm"),
    Row(("lm_head",), "rows", "output_layer", "language_model.output_layer", True),
)
# where the MLP of a layer, its shared experts and every expert take their input
_INPUTS: tuple[tuple[str, str, str | None], ...] = (
    ("mlp.", f"{_D}mlp.linear_fc1", f"{_E}mlp.dense_h_to_4h"),
    ("mlp.shared_experts.", f"{_D}mlp.shared_experts.linear_fc1", None),
    ("mlp.experts.", f"{_D}{_X}linear_fc1", None),
)
_GATED = tuple(
    Row((f"{_L}{ours}gate_proj", f"{_L}{ours}up_proj"), "gated", mcore, legacy, True) for ours, mcore, legacy in _INPUTS
)
_PLAIN = tuple(Row((f"{_L}{ours}up_proj",), "rows", mcore, legacy, True) for ours, mcore, legacy in _INPUTS)
_S = f"{_L}self_attn."
# latent attention: with a query latent, straight queries, and as Megatron itself calls its parts
_LATENT = (
    Row((f"{_S}q_a_proj", f"{_S}kv_a_proj_with_mqa"), "stack", f"{_D}{_A}linear_qkv", None, True),
    Row((f"{_S}q_a_layernorm",), "whole", f"{_D}{_A}q_layernorm", None),
    Row((f"{_S}q_b_proj",), "rows", f"{_D}{_A}linear_qb", None, True),
    Row((f"{_S}kv_a_layernorm",), "whole", f"{_D}{_A}k_layernorm", None),
    Row((f"{_S}kv_b_proj",), "rows", f"{_D}{_A}linear_kvb", None, True),
)
_STRAIGHT = Row((f"{_S}q_proj", f"{_S}kv_a_proj_with_mqa"), "stack", f"{_D}{_A}linear_qkv", None, True)
_UPSTREAM = (
    Row((f"{_S}q_proj",), "rows", f"{_D}{_A}linear_q_proj", None),
    Row((f"{_S}q_a_proj",), "either", f"{_D}{_A}linear_q_down_proj", None),
    Row((f"{_S}q_a_layernorm",), "whole", f"{_D}{_A}q_layernorm", None),
    Row((f"{_S}q_b_proj",), "rows", f"{_D}{_A}linear_q_up_proj", None),
    Row((f"{_S}kv_a_proj_with_mqa",), "either", f"{_D}{_A}linear_kv_down_proj", None),
    Row((f"{_S}kv_a_layernorm",), "whole", f"{_D}{_A}kv_layernorm", None),
    Row((f"{_S}kv_b_proj",), "rows", f"{_D}{_A}linear_kv_up_proj", None),
)
# parameters that Megatron calls otherwise
_PARAMETERS = {"e_score_correction_bias": "expert_bias", "sinks": "softmax_offset"}
_IN_EXPERTS = re.compile(r"(.*\.mlp\.experts\.\w+_proj)(?:_(bias))?")
# the copy of a tied embedding that the last stage multiplies by
TIED_HEAD = {MCORE: "output_layer", LEGACY: "word_embeddings_for_head"}
# spellings of other builds, read and never written: norms fused into the projection after them, and older names
_READABLE = {
    f"{_A}linear_qkv.layer_norm_": "input_layernorm.",
    "mlp.linear_fc1.layer_norm_": "pre_mlp_layernorm.",
    f"{_A}linear_q_up_proj.layer_norm_": f"{_A}q_layernorm.",
    f"{_A}linear_kv_up_proj.layer_norm_": f"{_A}kv_layernorm.",
    "mlp.shared_experts.gate_weight": "mlp.shared_expert_gate.weight",
    "language_model.transformer.": "language_model.encoder.",
    ".attention.": f".{_A}",
    "encoder.final_layernorm.": "encoder.final_norm.",
}
_NUMBERED = re.compile(r"(?<=\.)(experts\.)(linear_fc[12])\.(weight|bias)(\d+)$")
_READABLE_LEGACY = {".input_layernorm.": ".input_norm.", ".post_attention_layernorm.": ".post_attention_norm."}


def rows_of(config: ModelConfig, upstream: bool = False) -> dict[str, Row]:
    """Canonical module name, {} for the layer -> its row. `upstream`: latent attention as Megatron itself spells it."""
    table = (*_ROWS, *(_GATED if config.gated_mlp else _PLAIN))
    if config.multi_head_latent_attention and upstream:
        table += _UPSTREAM
    elif config.multi_head_latent_attention:
        table += _LATENT if config.q_lora_rank else (*_LATENT, _STRAIGHT)
    return {name: row for row in table for name in row.ours}


def find_place(config: ModelConfig, canonical: str, dialect: str, upstream: bool = False) -> Place:
    """Where a parameter lies in `dialect`; ModelLinkError where there is no place for it."""
    stacked = _IN_EXPERTS.fullmatch(canonical)
    module, parameter = (stacked[1], stacked[2] or "weight") if stacked else canonical.rsplit(".", 1)
    number = NUMBER.search(module)
    layer = number[0] if number else ""
    row = rows_of(config, upstream).get(NUMBER.sub("{}", module, count=1))
    name = row.name(dialect) if row else None
    if row is None or name is None:
        fix = "write Megatron-Core" if row or dialect == LEGACY else "use the native format"
        raise ModelLinkError(
            f"Megatron-{'Core' if dialect == MCORE else 'Legacy'} has no place for {canonical!r}: {fix}."
        )
    last = ("" if parameter == "weight" else f"_{parameter}") if stacked else f".{parameter}"
    return Place(
        row,
        tuple(ours.format(layer) + last for ours in row.ours),
        f"{name.replace('{}', layer, 1)}.{_PARAMETERS.get(parameter, parameter)}",
        int(layer) if layer else None,
        config.num_experts if stacked else None,
    )


def normalised(name: str) -> str:
    """The spelling written here of a name that any build may have written."""
    legacy = name.startswith("language_model.")
    for theirs, ours in (_READABLE | (_READABLE_LEGACY if legacy else {})).items():
        name = name.replace(theirs, ours)
    return _NUMBERED.sub(r"\1local_experts.\4.\2.\3", name)


def nested(flat: Mapping[str, object]) -> dict[str, object]:
    """Legacy's dictionaries: the embedding by module, the encoder flat, the head by its parameters."""
    model: dict[str, object] = {}
    for name, value in flat.items():
        *path, last = name.split(".")
        if path[:2] == ["language_model", "encoder"]:
            path, last = path[:2], ".".join((*path[2:], last))
        elif path[-1] == "norm":
            path, last = path[:-1], f"norm.{last}"
        place = model
        for key in path:
            place = place.setdefault(key, {})  # type: ignore[assignment]
        place[last] = value
    return model


def flattened(model: Mapping[str, object], prefix: str = "") -> dict[str, object]:
    """Every leaf of nested dictionaries under its dotted name."""
    flat: dict[str, object] = {}
    for name, value in model.items():
        if isinstance(value, Mapping):
            flat |= flattened(value, f"{prefix}{name}.")
        else:
            flat[f"{prefix}{name}"] = value
    return flat


def cut(row: Row, parts: Sequence[Tensor], rank: int, ranks: int, config: ModelConfig) -> Tensor:
    """What tensor-parallel rank `rank` of `ranks` holds of the full tensors `parts`, in the order of `row.ours`."""
    pieces = cut_pieces(row, parts, rank, ranks, config)
    return torch.cat(pieces) if len(pieces) > 1 else pieces[0]


def cut_pieces(row: Row, parts: Sequence[Tensor], rank: int, ranks: int, config: ModelConfig) -> list[Tensor]:
    """The same as views of `parts`, whose rows follow one another."""
    if row.cut == "whole" or (row.cut == "columns" and parts[0].dim() == 1):
        return [parts[0]]
    if row.cut == "columns":
        return [parts[0].chunk(ranks, dim=1)[rank]]
    if row.cut == "stack":
        return list(parts)
    shares = [part.chunk(ranks)[rank] for part in parts]
    if row.cut == "qkv":
        groups = (config.num_key_value_heads or 1) // ranks
        return [piece for group in zip(*(share.chunk(groups) for share in shares), strict=True) for piece in group]
    return shares


def join(row: Row, shares: Sequence[Tensor], config: ModelConfig) -> list[Tensor]:
    """The full tensors, in the order of `row.ours`, from what every rank holds; undoes `cut`."""
    if row.cut == "whole" or (row.cut == "columns" and shares[0].dim() == 1):
        return [shares[0]]
    if row.cut == "stack":
        latent = (config.kv_lora_rank or 0) + (config.qk_rope_head_dim or 0)
        return list(shares[0].split((len(shares[0]) - latent, latent)))
    if len(row.ours) == 1:
        return [torch.cat(list(shares), dim=1 if row.cut == "columns" else 0) if len(shares) > 1 else shares[0]]
    if row.cut == "gated":
        halves = zip(*(share.chunk(2) for share in shares), strict=True)
        return [torch.cat(half) if len(half) > 1 else half[0] for half in halves]
    heads, groups, size = config.num_attention_heads or 1, config.num_key_value_heads or 1, config.head_dim or 1
    rest = shares[0].shape[1:]
    widths = [heads // groups * size, size, size]
    grouped = [share.reshape(-1, sum(widths), *rest).split(widths, dim=1) for share in shares]
    return [torch.cat([part.reshape(-1, *rest) for part in parts]) for parts in zip(*grouped, strict=True)]
