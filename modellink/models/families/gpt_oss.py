"""gpt-oss: a learned sink in every softmax, windows on every other layer, experts with biases and a clamped gate.

In the files all experts of a layer lie in one tensor [E, in, out], whose columns are gate and up by turns.
"""

from __future__ import annotations

from typing import Any

from modellink.config.schema import ModelConfig
from modellink.models.families.experts import EXPERT_WIDTH, chosen
from modellink.models.families.family import LLAMA_NAMES, Family, add, size_keys
from modellink.models.families.spelling import (
    Group,
    Key,
    Keys,
    constant,
    ignored,
    read_rope,
    renamed,
    window_group,
    write_rope,
)


def _read_rotation(keys: Keys) -> dict[str, Any]:
    """The family's code stretches by 32 where a file does not speak of scaling, so files must."""
    if not (keys.content.get("rope_scaling") or keys.content.get("rope_parameters")):
        raise keys.fail("rope_scaling", None, 'should be an object; {"rope_type": "default"} rotates without scaling.')
    return read_rope(keys, 150000.0)


def _write_rotation(config: ModelConfig) -> dict[str, Any]:
    written = write_rope(config)
    return written | {"rope_scaling": written["rope_scaling"] or {"rope_type": "default"}}


_MLP = "model.layers.{}.mlp"
GPT_OSS = add(
    Family(
        name="gpt_oss",
        covers="gpt-oss 20B and 120B, in bfloat16",
        architecture="GptOssForCausalLM",
        model_type="gpt_oss",
        keys=(
            *renamed(size_keys(kv_heads=8, head_dim=64, epsilon=1e-5), intermediate_size=None),
            EXPERT_WIDTH,
            Key("attention_bias", ("qkv_bias", "attention_output_bias"), True),
            *chosen(4, 128, "num_local_experts", "num_experts"),
            Key("swiglu_limit", "swiglu_limit", 7.0),
        ),
        groups=(
            Group(_read_rotation, _write_rotation),
            window_group(128, "even"),
            constant("hidden_act", "silu", "silu"),
            constant("swiglu_alpha", 1.702, 1.702),
            ignored("initial_context_length", "experts_per_token"),
        ),
        fixed={
            "activation": "silu",
            "mlp_bias": True,
            "router_bias": True,
            "attention_sinks": True,
            "norm_weight_in_fp32": True,
        },
        names=LLAMA_NAMES
        | {
            "layers.{}.self_attn.core.sinks": "model.layers.{}.self_attn.sinks",
            "layers.{}.mlp.gate": f"{_MLP}.router",
            "layers.{}.mlp.experts.gate_proj": f"{_MLP}.experts.gate_up_proj",
            "layers.{}.mlp.experts.up_proj": f"{_MLP}.experts.gate_up_proj",
            "layers.{}.mlp.experts.down_proj": f"{_MLP}.experts.down_proj",
            "layers.{}.mlp.experts.gate_proj_bias": f"{_MLP}.experts.gate_up_proj_bias",
            "layers.{}.mlp.experts.up_proj_bias": f"{_MLP}.experts.gate_up_proj_bias",
            "layers.{}.mlp.experts.down_proj_bias": f"{_MLP}.experts.down_proj_bias",
        },
        alternating=(".gate_up_proj", ".gate_up_proj_bias"),
        transposed=(".experts.gate_up_proj", ".experts.down_proj"),
    ),
    "gpt-oss",
)
