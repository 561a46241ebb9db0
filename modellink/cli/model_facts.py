"""What `modellink models NAME` tells of one preset, as plain data: shape, parameters, memory, work, recipes.

Every figure comes from the formulas that the rest of the program uses: parameters from `models.count`, memory from
`parallel.memory`, operations from `train.metrics`; recipes are layouts that `parallel.memory.nearest_fit` found.
"""

from __future__ import annotations

import dataclasses
from typing import Any

from modellink.config.flags import spell
from modellink.config.load import load_config
from modellink.config.resolved import ResolvedConfig
from modellink.config.schema import ModelConfig
from modellink.models.count import attention_parameters, count_parameters, mlp_parameters, outer_parameters
from modellink.models.families import FAMILIES
from modellink.models.presets import NOTES, preset, preset_fields
from modellink.models.presets.published import throughput_of
from modellink.parallel.memory import estimate_memory, nearest_fit
from modellink.train.metrics import flops_of

# first field of each group, in the order of the fields of ModelConfig
GROUPS = {
    "family": "sizes",
    "normalization": "norms",
    "activation": "MLP",
    "qkv_bias": "biases and output",
    "position_embedding": "positions",
    "sliding_window": "attention",
    "output_logit_softcap": "scalings",
    "num_experts": "experts",
    "multi_head_latent_attention": "latent attention",
    "attention_dropout": "training",
}
SHOWN = "norm_epsilon activation qkv_bias tie_word_embeddings rope_theta router_topk router_scoring".split()
LAYOUT = ("tensor_parallel", "sequence_parallel", "pipeline_parallel", "zero_stage", "recompute_granularity")
NODE = 8  # devices of a machine
MOST_MACHINES = 128
USABLE = 0.9  # of a device's memory: the estimate knows no allocator slack and no communication buffers


def summary(name: str) -> dict[str, Any]:
    """One row of the table of presets."""
    model = preset(name)
    return {
        "name": name,
        "family": model.family,
        "parameters": count_parameters(model),
        "active_parameters": count_parameters(model, active=True),
        "note": NOTES.get(name, ""),
        "fields": preset_fields(name),
    }


def facts(name: str, memory: int) -> dict[str, Any]:
    """Everything about one preset; recipes are for devices of `memory` bytes."""
    model = preset(name)
    sequence = min(4096, model.max_position_embeddings or 4096)
    flops = flops_of(model, sequence)
    return summary(name) | {
        "groups": stated_fields(name),
        "parts": parts(model),
        "weights_bytes": 2 * count_parameters(model),
        "cache_bytes_per_token": cache_bytes(model),
        "full_cache_bytes_per_token": full_cache_bytes(model),
        "training_bytes": training_states(name, sequence),
        "sequence": sequence,
        "training_flops_per_token": {"full": flops.full, "causal": flops.causal},
        "published": [dataclasses.asdict(row) for row in throughput_of(name)],
        "recipes": recipes(name, sequence, memory),
    }


def stated_fields(name: str) -> dict[str, dict[str, Any]]:
    """What the preset says, by group: all that is not the default, and `SHOWN` where it means something."""
    stated, default = preset_fields(name), ModelConfig()
    grouped: dict[str, dict[str, Any]] = {}
    group = ""
    for field in dataclasses.fields(ModelConfig):
        group = GROUPS.get(field.name, group)
        shown = field.name in SHOWN and (field.name != "rope_theta" or stated["position_embedding"] == "rope")
        if field.name in stated and (shown or stated[field.name] != getattr(default, field.name)):
            grouped.setdefault(group, {})[field.name] = stated[field.name]
    return grouped


def parts(model: ModelConfig) -> dict[str, tuple[int, int]]:
    """Part of the model -> (parameters, those that one token meets); the sums are `count_parameters`."""
    layers = range(model.num_layers)
    embedding = outer_parameters(model, last=False)
    norm = model.hidden_size * (1 if model.normalization == "RMSNorm" else 2)
    found = {"embedding": (embedding, embedding)}
    attention = model.num_layers * attention_parameters(model)
    found["attention"] = (attention, attention)
    for part, wanted in (("MLP", False), ("experts", True)):
        here = [layer for layer in layers if model.layer_has_experts(layer) == wanted]
        if here:
            total, active = (
                sum(mlp_parameters(model, layer, experts=met) for layer in here) for met in (None, model.router_topk)
            )
            found[part] = (total, active)
    output = outer_parameters(model) - embedding - norm
    rest = count_parameters(model) - output - sum(total for total, _ in found.values())
    return found | {"norms": (rest, rest), "output": (output, output)}


def cache_bytes(model: ModelConfig) -> int:
    """Bytes of bf16 keys and values that decoding keeps for each token: the latents where there are such."""
    if model.multi_head_latent_attention:
        return 2 * model.num_layers * (model.kv_lora_rank + model.qk_rope_head_dim)
    return full_cache_bytes(model)


def full_cache_bytes(model: ModelConfig) -> int:
    """The same for every head's own key and value."""
    value = model.v_head_dim if model.multi_head_latent_attention else model.head_dim
    return 2 * model.num_layers * model.num_key_value_heads * (model.head_dim + value)


# --- memory of training -----------------------------------------------------------------------------------------------


def _resolved(name: str, sequence: int, *flags: str) -> ResolvedConfig:
    """The configuration of a training run on one device."""
    argv = f"--model {name} --bf16 --seq-length {sequence} --micro-batch-size 1 --train-iters 1 --lr 1 --mock-data"
    return dataclasses.replace(load_config([*argv.split(), *flags]), world_size=1)


def training_states(name: str, sequence: int) -> list[dict[str, Any]]:
    """Weights, gradients and optimizer states on each device, for some ways to spread them; no activations."""
    found = []
    for devices, flags in (
        (1, ()),
        (1, ("--reuse-fp32-param",)),
        (8, ("--zero-stage", "1")),
        (8, ("--zero-stage", "3")),
        (64, ("--zero-stage", "3")),
    ):
        resolved = dataclasses.replace(_resolved(name, sequence, *flags), world_size=devices)
        estimate = estimate_memory(resolved)
        states = {key: getattr(estimate, key) for key in ("weights", "gradients", "optimizer")}
        total = sum(states.values())
        found.append({"devices": devices, "flags": " ".join(flags), **states, "total": total})
    return found


# --- recipes ----------------------------------------------------------------------------------------------------------


def recipes(name: str, sequence: int, memory: int) -> list[dict[str, Any]]:
    """Command lines to paste: `title`, `command`, and `memory`, the estimate in bytes, where one trains.

    Without `command` the title says why there is none.
    """
    model = preset(name)
    found = [_pretrain(name, sequence, memory, devices) for devices in (1, NODE)]
    if "command" not in found[-1]:
        more = [_pretrain(name, sequence, memory, NODE * 2**power) for power in range(1, MOST_MACHINES.bit_length())]
        found[-1:] = [row for row in more if "command" in row][:1] or more[-1:]
    if not _has_hf_format(model):
        return [*found, {"title": "chat", "command": f"modellink chat --load runs/{name} --bf16"}]
    tensor = "" if model.num_key_value_heads % 2 or model.qk_norm_all_heads else " --target-tensor-parallel-size 2"
    written = f"--save-dir megatron/{name} --save-model-type mcore{tensor}"
    return [
        *found,
        {"title": "convert to Megatron-Core", "command": f"modellink convert --load-dir hf/{name} {written}"},
        {"title": "chat", "command": f"modellink chat --load hf/{name} --bf16 --hf-chat-template"},
    ]


def _has_hf_format(model: ModelConfig) -> bool:
    return model.family in FAMILIES and not FAMILIES.get(model.family).lost(model)


def _pretrain(name: str, sequence: int, memory: int, devices: int) -> dict[str, Any]:
    """Pre-training on `devices`, with the layout that changes least among those that fit."""
    batch = ("--global-batch-size", str(max(64, devices)))
    bases = [_resolved(name, sequence, *batch)]
    if devices == 1:
        bases.append(_resolved(name, sequence, *batch, "--reuse-fp32-param"))
    title = f"pre-train on {devices} device{'s' if devices > 1 else ''}"
    fits = (nearest_fit(base, int(memory * USABLE), devices) for base in bases)
    fit = next((found for found in fits if found is not None), None)
    if fit is None:
        return {"title": f"{title}: does not fit into {memory / 2**30:g} GiB"}
    layout = [spell(f"parallel.{field}", value) for field in LAYOUT if (value := fit.get(f"parallel.{field}"))]
    layout = [flag for flag in layout if not flag.endswith("-parallel-size 1")]
    if fit.config.optimizer.split_master:
        layout.append("--reuse-fp32-param")
    words = [
        _launcher(devices),
        f"--model {name} --bf16 --seq-length {sequence} --micro-batch-size 1 {' '.join(batch)}",
        *layout,
        "--train-iters 1000 --lr 3e-4 --lr-decay-style cosine --lr-warmup-iters 20",
        f"--tokenizer-name-or-path tokenizer --data-path data/docs_text_document --save runs/{name}",
    ]
    return {"title": title, "command": " ".join(words), "memory": estimate_memory(fit).total, "devices": devices}


def _launcher(devices: int) -> str:
    if devices == 1:
        return "modellink train"
    nodes = (
        "--standalone"
        if devices <= NODE
        else f"--nnodes {devices // NODE} --rdzv-backend c10d --rdzv-endpoint HOST:29500"
    )
    return f"torchrun {nodes} --nproc-per-node {min(devices, NODE)} -m modellink train"
