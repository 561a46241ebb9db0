"""The plan: module-name pattern -> kind, and kind -> placement of its parameters. Data, and the only place it is said.

Training, inference, weight loading and the planner all read this one table, so none of them can disagree. A new family
needs a new row only if it brings a new module. Source of the scheme: Shoeybi et al. (arXiv:1909.08053), sequence
parallelism Korthikanti et al. (arXiv:2205.05198).

    column         rows of the matrix are split; the input is whole, the output is a shard of the features
    row            columns are split; the input is a shard of the features, partial sums are reduced
    vocabulary_in  rows of the embedding are split over the vocabulary
    vocabulary_out rows of the output matrix are split; logits stay split over the vocabulary
    block          entry of attention and MLP: the sequence shard is gathered here, once for all column splits inside
    norm           replicated, works on the sequence shard
    head_norm      replicated, works on the local heads
    experts        the width of every expert is split, as column and row split one MLP
    heads          one number a query head, split as the heads are
    positions      replicated embedding whose output is cut to the sequence shard
"""

from __future__ import annotations

from fnmatch import fnmatchcase

PLAN: tuple[tuple[str, str], ...] = (
    ("embed_tokens", "vocabulary_in"),
    ("embed_positions", "positions"),
    ("embed_norm", "norm"),
    ("layers.*.input_layernorm", "norm"),
    ("layers.*.self_attn", "block"),
    ("layers.*.self_attn.[qkv]_proj", "column"),
    ("layers.*.self_attn.[qk]_norm", "head_norm"),
    ("layers.*.self_attn.q_b_proj", "column"),
    ("layers.*.self_attn.kv_b_proj", "column"),
    ("layers.*.self_attn.core", "heads"),
    ("layers.*.self_attn.o_proj", "row"),
    ("layers.*.attention_output_norm", "norm"),
    ("layers.*.post_attention_layernorm", "norm"),
    ("layers.*.mlp", "block"),
    ("layers.*.mlp.gate_proj", "column"),
    ("layers.*.mlp.up_proj", "column"),
    ("layers.*.mlp.down_proj", "row"),
    ("layers.*.mlp.experts", "experts"),
    ("layers.*.mlp.shared_experts.gate_proj", "column"),
    ("layers.*.mlp.shared_experts.up_proj", "column"),
    ("layers.*.mlp.shared_experts.down_proj", "row"),
    ("layers.*.mlp_output_norm", "norm"),
    ("norm", "norm"),
    ("lm_head", "vocabulary_out"),
)

# kind -> parameter -> dimension that is split over the tensor group; a parameter that is not named is replicated
SPLIT_DIMENSION: dict[str, dict[str, int]] = {
    "column": {"weight": 0, "bias": 0},
    "row": {"weight": 1},
    "experts": {"gate_proj": 1, "up_proj": 1, "down_proj": 2, "gate_proj_bias": 1, "up_proj_bias": 1},
    "heads": {"sinks": 0},
    "vocabulary_in": {"weight": 0},
    "vocabulary_out": {"weight": 0, "bias": 0},
}

# added to what the ranks of the group sum up, so each of them adds its share of it
SUMMED = ("o_proj.bias", "down_proj.bias", "experts.down_proj_bias")


def kind_of(module_name: str) -> str | None:
    """Kind of the module called `module_name` (dotted path in the decoder), None for one that the plan does not
    touch."""
    for pattern, kind in PLAN:
        if module_name.count(".") == pattern.count(".") and fnmatchcase(module_name, pattern):
            return kind
    return None


def split_dimension(parameter_name: str) -> int | None:
    """Dimension along which tensor parallelism splits `parameter_name`, None when it is replicated."""
    module, _, leaf = parameter_name.rpartition(".")
    return SPLIT_DIMENSION.get(kind_of(module) or "", {}).get(leaf)
