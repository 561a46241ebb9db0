"""Which modules of a layer `--swap-modules` means, in the reference's spelling and ours; what swapping excludes."""

from __future__ import annotations

from modellink.config.flags import flag_of, spell
from modellink.config.resolved import ResolvedConfig
from modellink.errors import ModelLinkError
from modellink.registry import suggest

# spelling -> attribute of a layer
SWAP_MODULES = {
    "input_layernorm": "input_layernorm",
    "input_norm": "input_layernorm",
    "self_attention": "self_attn",
    "self_attn": "self_attn",
    "attention_output_norm": "attention_output_norm",
    "post_attention_layernorm": "post_attention_layernorm",
    "post_attention_norm": "post_attention_layernorm",
    "pre_cross_attn_layernorm": "post_attention_layernorm",
    "pre_mlp_layernorm": "post_attention_layernorm",
    "mlp": "mlp",
    "mlp_output_norm": "mlp_output_norm",
}


def swapped_modules(names: str) -> list[str]:
    """Attributes of a layer that the comma-separated `names` stand for; an unknown name is an error."""
    found = []
    for name in (part.strip() for part in names.split(",")):
        if name not in SWAP_MODULES:
            raise ModelLinkError(
                f"--swap-modules {names}: no module of a layer is called {name!r}.{suggest(name, SWAP_MODULES)} Choose "
                f"from {', '.join(SWAP_MODULES)}."
            )
        found.append(SWAP_MODULES[name])
    return list(dict.fromkeys(found))


def check_swap(resolved: ResolvedConfig) -> None:
    """Raise ModelLinkError for modules that do not exist, or save nothing."""
    parallel = resolved.config.parallel
    if not parallel.swap_attention:
        return
    swapped_modules(parallel.swap_modules)
    kind, some = parallel.recompute_granularity, parallel.recompute_method == "block"
    if kind == "operators" or (kind == "full" and not some and not parallel.recompute_layers_per_stage):
        raise ModelLinkError(
            f"--swap-attention has nothing to swap where {spell('parallel.recompute_granularity', kind)} recomputes "
            "every layer: leave one out, or recompute some with --recompute-method block --recompute-num-layers N."
        )
    if parallel.auto_recompute_device_size > 0:
        raise ModelLinkError(
            f"--swap-attention and {flag_of('parallel.auto_recompute_device_size')} exclude each other: the second "
            "weighs what layers keep on the device; choose layers with --recompute-layers."
        )
    if parallel.compile:
        raise ModelLinkError("--swap-attention and --compile exclude each other: compiled layers save by themselves.")
