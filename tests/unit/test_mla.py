"""Latent attention against the DeepSeek modules of transformers, sinks against a plain loop, counts, decoding from the
cache, and whole models of experts and latents against what their original code computed.
"""

from __future__ import annotations

import dataclasses
import itertools
import json
from pathlib import Path
from typing import Any

import pytest
import torch
from original_code import assert_as_original, cut_expert_gradients, stack_experts
from safetensors.torch import load_file
from torch import Tensor, nn

from modellink.config.experts import check_experts
from modellink.config.schema import ModelConfig
from modellink.errors import ModelLinkError
from modellink.models.attention import Attention, AttentionCore, AttentionMask
from modellink.models.cache import KVCache, LayerCache
from modellink.models.count import attention_parameters, count_parameters
from modellink.models.decoder import Decoder
from modellink.models.mla import LatentAttention, rope_config
from modellink.models.rope import RopeTable, RotaryEmbedding
from modellink.train.metrics import flops_of

YARN = {
    "rope_scaling": "yarn",
    "rope_scaling_factor": 4.0,
    "rope_original_max_position": 32,
    "rope_mscale": 0.707,
    "rope_mscale_all_dim": 1.3,
}
HF_YARN = {
    "rope_type": "yarn",
    "rope_theta": 10000.0,
    "factor": 4.0,
    "original_max_position_embeddings": 32,
    "beta_fast": 32,
    "beta_slow": 1,
    "mscale": 0.707,
    "mscale_all_dim": 1.3,
}
WHOLE = {  # what a whole decoder needs beside
    "num_layers": 3,
    "ffn_hidden_size": 24,
    "activation": "silu",
    "gated_mlp": True,
    "mlp_bias": False,
    "padded_vocab_size": 32,
    "hidden_dropout": 0.0,
}
SIZES = {"kv_lora_rank": 20, "qk_nope_head_dim": 10, "qk_rope_head_dim": 6, "v_head_dim": 14}


def model_config(**fields: Any) -> ModelConfig:
    base = {
        "num_layers": 1,
        "hidden_size": 36,
        "num_attention_heads": 3,
        "normalization": "RMSNorm",
        "position_embedding": "rope",
        "qkv_bias": False,
        "attention_output_bias": False,
        "attention_dropout": 0.0,
        "max_position_embeddings": 128,
    }
    return ModelConfig(**(base | fields)).resolve()


def latent_config(**fields: Any) -> ModelConfig:
    return model_config(**({"multi_head_latent_attention": True, "qk_norm": True} | SIZES | fields))


def randomize(module: nn.Module, seed: int = 0) -> None:
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in module.parameters():
            parameter.copy_(torch.randn(parameter.shape, generator=generator) * 0.3 + (parameter.dim() == 1))


def table(config: ModelConfig, positions: Tensor) -> RopeTable:
    return RotaryEmbedding(rope_config(config))(positions, torch.float32)


def assert_close(mine: Tensor, theirs: Tensor, tolerance: float = 1e-5) -> None:
    assert mine.shape == theirs.shape
    assert (mine - theirs).abs().max() <= tolerance * theirs.abs().max()


def causal(length: int) -> Tensor:
    return torch.full((length, length), float("-inf")).triu(1)[None, None]


@pytest.mark.parametrize("version", [2, 3])
@pytest.mark.parametrize("q_rank", [None, 18])
@pytest.mark.parametrize("yarn", [False, True])
@pytest.mark.parametrize("bias", [False, True])
def test_equals_transformers(version: int, q_rank: int | None, yarn: bool, bias: bool) -> None:
    if version == 2:
        from transformers.models.deepseek_v2 import modeling_deepseek_v2 as theirs

        config_class, prefix = theirs.DeepseekV2Config, "DeepseekV2"
    else:
        from transformers.models.deepseek_v3 import modeling_deepseek_v3 as theirs

        config_class, prefix = theirs.DeepseekV3Config, "DeepseekV3"
    hf_config = config_class(
        hidden_size=36,
        num_attention_heads=3,
        num_key_value_heads=3,
        q_lora_rank=q_rank,
        attention_bias=bias,
        max_position_embeddings=128,
        rope_parameters=HF_YARN if yarn else {"rope_type": "default", "rope_theta": 10000.0},
        attn_implementation="eager",
        **SIZES,
    )
    reference = getattr(theirs, f"{prefix}Attention")(hf_config, 0)
    rotary = getattr(theirs, f"{prefix}RotaryEmbedding")(hf_config)
    scaling = YARN if yarn else {}
    config = latent_config(q_lora_rank=q_rank, qkv_bias=bias, attention_output_bias=bias, **scaling)
    mine = LatentAttention(config, 0)
    randomize(reference)
    mine.load_state_dict(reference.state_dict(), strict=True)

    batch, length = 3, 17
    x = torch.randn(batch, length, 36, generator=torch.Generator().manual_seed(1))
    x_mine, x_theirs = x.clone().requires_grad_(), x.clone().requires_grad_()
    positions = torch.arange(length) * 3 + torch.tensor([[0], [5], [11]])
    out_mine = mine(x_mine, rope=table(config, positions), mask=AttentionMask(length, length, x.device))
    out_theirs, _ = reference(
        x_theirs, position_embeddings=rotary(x_theirs, positions), attention_mask=causal(length), past_key_values=None
    )
    assert_close(out_mine, out_theirs)
    weight = torch.randn(out_mine.shape, generator=torch.Generator().manual_seed(2))
    (out_mine * weight).sum().backward()
    (out_theirs * weight).sum().backward()
    assert_close(x_mine.grad, x_theirs.grad)
    gradients = {name: parameter.grad for name, parameter in reference.named_parameters()}
    for name, parameter in mine.named_parameters():
        assert_close(parameter.grad, gradients[name])
    assert sum(p.numel() for p in mine.parameters()) == attention_parameters(config)


@pytest.mark.parametrize("q_rank", [None, 18])
@pytest.mark.parametrize("padded", [False, True])
def test_cached_decoding_equals_one_pass(q_rank: int | None, padded: bool) -> None:
    """A prompt in two pieces, then single tokens, in the compressed cache; with and without left padding."""
    config = latent_config(q_lora_rank=q_rank, **YARN)
    attention = LatentAttention(config, 0).eval()
    randomize(attention)
    batch, length = 2, 11
    x = torch.randn(batch, length, 36, generator=torch.Generator().manual_seed(1))
    first_key = torch.tensor([3, 0]) if padded else None
    positions = torch.arange(length).expand(batch, length)
    whole_mask = AttentionMask(length, length, x.device, first_key)
    with torch.no_grad():
        whole = attention(x, rope=table(config, positions), mask=whole_mask)
        cache, pieces = LayerCache(capacity=4), []
        for start, end in ((0, 5), (5, 7), *((i, i + 1) for i in range(7, length))):
            mask = AttentionMask(end - start, end, x.device, first_key)
            rope = table(config, positions[:, start:end])
            pieces.append(attention(x[:, start:end], rope=rope, mask=mask, cache=cache))
    real = (torch.arange(length) >= first_key[:, None]) if padded else torch.ones(batch, length, dtype=torch.bool)
    assert_close(torch.cat(pieces, 1)[real], whole[real])
    assert cache.length == length
    assert cache._keys is not None and cache._values is not None
    assert cache._keys.shape[-1] + cache._values.shape[-1] == SIZES["kv_lora_rank"] + SIZES["qk_rope_head_dim"]


def test_adapted_projection_is_expanded() -> None:
    """A module around kv_b_proj is called while decoding: its weight alone does not say what it computes."""

    class Doubled(nn.Linear):
        def forward(self, x: Tensor) -> Tensor:
            return 2.0 * super().forward(x)

    attention = LatentAttention(latent_config(), 0).eval()
    randomize(attention)
    adapted = Doubled(SIZES["kv_lora_rank"], attention.kv_b_proj.out_features, bias=False)
    adapted.weight = attention.kv_b_proj.weight
    attention.kv_b_proj = adapted
    x = torch.randn(1, 4, 36, generator=torch.Generator().manual_seed(1))
    cache = LayerCache()
    with torch.no_grad():
        whole = attention(x, rope=None, mask=AttentionMask(4, 4, x.device))
        steps = [
            attention(x[:, i : i + 1], rope=None, mask=AttentionMask(1, i + 1, x.device), cache=cache) for i in range(4)
        ]
    assert_close(torch.cat(steps, 1), whole)


def test_latent_norm_can_be_left_out() -> None:
    plain = latent_config(q_lora_rank=18, qk_norm=False)
    attention = LatentAttention(plain, 0)
    assert not [name for name, _ in attention.named_parameters() if "norm" in name]
    assert sum(p.numel() for p in attention.parameters()) == attention_parameters(plain)
    normed = attention_parameters(latent_config(q_lora_rank=18))
    assert normed - attention_parameters(plain) == 18 + SIZES["kv_lora_rank"]


def test_flops_by_hand() -> None:
    config = latent_config(
        q_lora_rank=18, ffn_hidden_size=24, gated_mlp=True, padded_vocab_size=32, qkv_bias=True, num_layers=2
    )
    projections = 36 * 18 + 18 * 3 * 16 + 36 * 26 + 20 * 3 * 24 + 3 * 14 * 36
    scores, outside = 7 * 3 * (16 + 14), 2 * 3 * 36 * 24 + 36 * 32
    flops = flops_of(config, 7)
    assert flops.full == 6 * (2 * (projections + scores) + outside)
    assert flops.causal == 6 * (2 * projections + scores + outside)
    projections += 36 * 3 * 16 - 36 * 18 - 18 * 3 * 16
    direct = flops_of(dataclasses.replace(config, q_lora_rank=None), 7)
    assert direct.full == 6 * (2 * (projections + scores) + outside)


@pytest.mark.parametrize("size", SIZES)
def test_missing_sizes_are_refused(size: str) -> None:
    check_experts(latent_config())
    with pytest.raises(ModelLinkError, match=f"give --{size.replace('_', '-')}\\."):
        check_experts(latent_config(**{size: None}))


def test_odd_rotation_is_refused() -> None:
    with pytest.raises(ModelLinkError, match="--qk-rope-head-dim 5 must be even"):
        check_experts(latent_config(qk_rope_head_dim=5))


def softmax_loop(tensors: list[Tensor], scale: float, window: int | None, first_key: list[int] | None) -> Tensor:
    """Attention with sinks, query by query: exp(score) / (exp(sink) + sum of exp(score)) in float64."""
    q_BHSK, k_BGTK, v_BGTK, sinks_H = tensors
    batch, heads, queries, _ = q_BHSK.shape
    keys, group = k_BGTK.shape[2], heads // k_BGTK.shape[1]
    out = torch.zeros(*q_BHSK.shape[:3], v_BGTK.shape[-1], dtype=torch.float64)
    for b, h, s in itertools.product(range(batch), range(heads), range(queries)):
        here = keys - queries + s
        start = 0 if first_key is None else first_key[b]
        seen = [t for t in range(start, here + 1) if window is None or here - t < window] or [here]
        powers = [(q_BHSK[b, h, s] @ k_BGTK[b, h // group, t] * scale).exp() for t in seen]
        total = sinks_H[h].exp() + sum(powers)
        out[b, h, s] = sum(p / total * v_BGTK[b, h // group, t] for p, t in zip(powers, seen, strict=True))
    return out


@pytest.mark.parametrize("window", [None, 3])
@pytest.mark.parametrize("first_key", [None, [2, 0]])
@pytest.mark.parametrize("queries", [1, 2, 7])
def test_sinks_against_plain_loop(window: int | None, first_key: list[int] | None, queries: int) -> None:
    """Two heads on each key head; all of a sequence, its end, or one token after a cache."""
    config = model_config(
        attention_sinks=True, sliding_window=window, num_attention_heads=4, num_key_value_heads=2, head_dim=6
    )
    core = AttentionCore(config, 0)
    generator = torch.Generator().manual_seed(1)
    shapes = ((2, 4, queries, 6), (2, 2, 7, 6), (2, 2, 7, 6), (4,))
    exact = [torch.randn(shape, generator=generator, dtype=torch.float64).requires_grad_() for shape in shapes]
    q, k, v, sinks = (tensor.detach().float().requires_grad_() for tensor in exact)
    assert core.sinks is not None and core.sinks.shape == sinks.shape
    core.sinks.data = sinks.data
    mask = AttentionMask(queries, 7, q.device, None if first_key is None else torch.tensor(first_key))
    mine, loop = core(q, k, v, mask), softmax_loop(exact, 6**-0.5, window, first_key)
    assert_close(mine.double(), loop)
    weight = torch.randn(loop.shape, generator=generator, dtype=torch.float64)
    (mine * weight).sum().backward()
    (loop * weight).sum().backward()
    for ours, theirs in zip((q, k, v, core.sinks), exact, strict=True):
        assert_close(ours.grad.double(), theirs.grad)


def test_sinks_are_counted_and_a_low_one_takes_nothing() -> None:
    config = model_config(attention_sinks=True)
    with_sinks, without = Attention(config, 0), Attention(model_config(), 0)
    randomize(with_sinks)
    assert sum(p.numel() for p in with_sinks.parameters()) == attention_parameters(config)
    with_sinks.core.sinks.data.fill_(float("-inf"))
    state = with_sinks.state_dict()
    assert state.pop("core.sinks").shape == (3,)
    without.load_state_dict(state, strict=True)
    x = torch.randn(2, 5, 36, generator=torch.Generator().manual_seed(1))
    mask = AttentionMask(5, 5, x.device)
    assert_close(with_sinks(x, rope=None, mask=mask), without(x, rope=None, mask=mask))


def test_layers_with_a_window_rotate_by_their_own_base() -> None:
    """Unscaled and by `rope_theta_window` on the windowed layers, counted over the whole model; else as without it."""
    scaled = {"rope_theta": 1e6, "rope_scaling": "linear", "rope_scaling_factor": 8.0}
    fields = WHOLE | {"sliding_window": 4, "num_layers": 3}
    tokens = torch.arange(18).view(2, 9)

    def logits(**more: Any) -> Tensor:
        model = Decoder(model_config(**(fields | more))).eval()
        randomize(model)
        return model(tokens).detach()

    local = logits(rope_theta=100.0)
    assert torch.equal(logits(**scaled, rope_theta_window=100.0), local)
    assert torch.equal(
        logits(**scaled, rope_theta_window=100.0, window_layers="0,0,0"), logits(**scaled, window_layers="0,0,0")
    )
    config = model_config(**(fields | scaled | {"rope_theta_window": 100.0, "window_layers": "1,0,1"}))
    model = Decoder(config).eval()
    randomize(model)
    mask, positions = AttentionMask(9, 9, tokens.device), torch.arange(9)
    near = RotaryEmbedding(model_config(rope_theta=100.0))(positions, torch.float32)
    far = RotaryEmbedding(model_config(**scaled))(positions, torch.float32)
    x = model.embed(tokens, positions)
    for layer, rope in zip(model.layers.values(), (near, far, near), strict=True):
        x = layer(x, rope=rope, mask=mask)
    assert torch.equal(model.logits(x), model(tokens))
    state, x = model.state_dict(), tokens
    for layers in (range(1), range(1, 3)):
        stage = Decoder(config, layers, first=0 in layers, last=2 in layers).eval()
        stage.load_state_dict({name: state[name] for name in stage.state_dict()}, strict=True)
        x = stage(x)
    assert torch.equal(x, model(tokens))


LATENT = {"multi_head_latent_attention": True, "qk_norm": True, **SIZES}
SPARSE = {"num_experts": 8, "moe_ffn_hidden_size": 12, "router_topk": 3}
DECODERS = {
    "experts": SPARSE | {"num_key_value_heads": 1},
    "experts, sinks, windows": SPARSE
    | {"attention_sinks": True, "sliding_window": 4, "window_layers": "even", "rope_theta_window": 100.0}
    | {"mlp_bias": True, "router_bias": True, "swiglu_limit": 7.0},
    "latents": LATENT | YARN,
    "latents and experts": LATENT
    | SPARSE
    | {"q_lora_rank": 18, "first_k_dense_replace": 1, "n_shared_experts": 2, "router_scoring": "sigmoid"}
    | {"norm_topk_prob": True, "router_correction_bias": True, "router_groups": 4, "topk_group": 2},
}


@pytest.mark.parametrize("padded", [False, True])
@pytest.mark.parametrize("name", DECODERS)
def test_decoding_with_the_cache_equals_without(name: str, padded: bool) -> None:
    """A prompt in two pieces, then token by token, with and without left padding."""
    config = model_config(**(WHOLE | DECODERS[name]))
    check_experts(config)
    model = Decoder(config).eval()
    randomize(model)
    assert sum(p.numel() for p in model.parameters()) == count_parameters(config)
    tokens = torch.randint(32, (2, 12), generator=torch.Generator().manual_seed(1))
    first_key = torch.tensor([3, 0]) if padded else None
    with torch.no_grad():
        whole = model(tokens, first_key=first_key)
        cache = KVCache(config.num_layers, capacity=4)
        pieces = [model(part, cache=cache, first_key=first_key) for part in tokens.split((5, 2, 1, 1, 1, 1, 1), 1)]
    real = torch.arange(12) >= (torch.zeros(2) if first_key is None else first_key)[:, None]
    assert cache.length == 12
    assert_close(torch.cat(pieces, 1)[real], whole[real])


def test_deepseek_v2_from_its_original_code(shared: Path) -> None:
    """The whole model: latent attention with YaRN, a dense first layer, group-limited routing, shared experts."""
    folder = shared / "parity" / "deepseek_v2_original"
    settings = json.loads((folder / "config.json").read_text())
    yarn = settings["rope_scaling"]
    sizes = ("q_lora_rank", "kv_lora_rank", "qk_nope_head_dim", "qk_rope_head_dim", "v_head_dim")
    config = latent_config(
        num_layers=3,
        hidden_size=64,
        num_attention_heads=4,
        ffn_hidden_size=settings["intermediate_size"],
        vocab_size=320,
        padded_vocab_size=320,
        norm_epsilon=settings["rms_norm_eps"],
        activation="silu",
        gated_mlp=True,
        mlp_bias=False,
        tie_word_embeddings=False,
        hidden_dropout=0.0,
        rope_scaling="yarn",
        rope_scaling_factor=yarn["factor"],
        rope_original_max_position=yarn["original_max_position_embeddings"],
        rope_mscale=yarn["mscale"],
        rope_mscale_all_dim=yarn["mscale_all_dim"],
        **{name: settings[name] for name in sizes},
        num_experts=settings["n_routed_experts"],
        moe_ffn_hidden_size=settings["moe_intermediate_size"],
        router_topk=settings["num_experts_per_tok"],
        router_scoring="softmax",
        router_groups=settings["n_group"],
        topk_group=settings["topk_group"],
        routed_scaling_factor=settings["routed_scaling_factor"],
        n_shared_experts=settings["n_shared_experts"],
        first_k_dense_replace=settings["first_k_dense_replace"],
    )
    model = Decoder(config)
    cut_expert_gradients(model)
    state = {name.removeprefix("model."): tensor for name, tensor in load_file(folder / "model.safetensors").items()}
    names = ("gate_proj", "up_proj", "down_proj")
    model.load_state_dict(stack_experts(state, dict(zip(names, names, strict=True))), strict=True)
    reference = assert_as_original(model, folder)
    with torch.no_grad():
        cache, fed, greedy = KVCache(config.num_layers), torch.tensor(reference["input_ids"]), []
        for _ in range(reference["greedy"].shape[1]):
            fed = model(fed, cache=cache, last_only=True).argmax(-1)
            greedy.append(fed)
    assert torch.equal(torch.cat(greedy, 1), torch.tensor(reference["greedy"]))


GROK_NAMES = (
    ("transformer.in_out_embed.", "embed_tokens."),
    ("transformer.decoder_layer.", "layers."),
    ("multi_head_attention.query.", "self_attn.q_proj."),
    ("multi_head_attention.key.", "self_attn.k_proj."),
    ("multi_head_attention.value.", "self_attn.v_proj."),
    ("multi_head_attention.linear.", "self_attn.o_proj."),
    ("rms_norm_1.", "attention_output_norm."),
    ("rms_norm_2.", "post_attention_layernorm."),
    ("rms_norm_3.", "mlp_output_norm."),
    (".router.", ".mlp.gate."),
    (".moe.", ".mlp.experts."),
    ("linear_v.", "w3."),
    ("linear_1.", "w2."),
    (".linear.", ".w1."),
    ("transformer.rms_norm.", "norm."),
    ("rms_norm.", "input_layernorm."),
    ("model.", ""),
)


def parity_cases(name: str, settings: dict[str, Any]) -> tuple[dict[str, Any], dict[str, Any]]:
    if name == "minicpm_moe":
        return {
            "activation": "silu",
            "embedding_multiplier": settings["scale_emb"],
            "residual_multiplier": settings["scale_depth"] / settings["num_hidden_layers"] ** 0.5,
            "hidden_divisor": settings["hidden_size"] / settings["dim_model_base"],
        }, {"num_experts": settings["num_experts"]}
    return {
        "activation": "gelu_tanh",
        "sandwich_norm": True,
        "attention_logit_softcap": 30.0,
        "query_scale": settings["attn_output_multiplier"] ** -2,
        "embedding_multiplier": settings["embedding_multiplier_scale"],
        "logits_multiplier": settings["output_multiplier_scale"],
    }, {"num_experts": settings["num_local_experts"], "router_scoring": "softmax"}


@pytest.mark.parametrize("name", ["minicpm_moe", "grok1_port"])
def test_whole_models_from_their_original_code(shared: Path, name: str) -> None:
    folder = shared / "parity" / name
    settings = json.loads((folder / "config.json").read_text())
    switches, router = parity_cases(name, settings)
    config = model_config(
        num_layers=settings["num_hidden_layers"],
        hidden_size=settings["hidden_size"],
        num_attention_heads=settings["num_attention_heads"],
        num_key_value_heads=settings["num_key_value_heads"],
        vocab_size=settings["vocab_size"],
        padded_vocab_size=settings["vocab_size"],
        normalization="RMSNorm",
        norm_epsilon=settings["rms_norm_eps"],
        position_embedding="rope",
        tie_word_embeddings=True,
        qkv_bias=False,
        attention_output_bias=False,
        attention_dropout=0.0,
        hidden_dropout=0.0,
        moe_ffn_hidden_size=settings["intermediate_size"],
        router_topk=2,
        gated_mlp=True,
        mlp_bias=False,
        **switches,
        **router,
    )
    model = Decoder(config)
    if name == "minicpm_moe":
        cut_expert_gradients(model)
    state = {}
    for name_there, tensor in load_file(folder / "model.safetensors").items():
        for theirs, ours in GROK_NAMES:
            name_there = name_there.replace(theirs, ours)
        state[name_there] = tensor
    state = stack_experts(state, {"w1": "gate_proj", "w3": "up_proj", "w2": "down_proj"})
    model.load_state_dict(state | {"lm_head.weight": state["embed_tokens.weight"]}, strict=True)
    assert_as_original(model, folder)
