"""Latent attention: against the DeepSeek modules of transformers, decoding from its cache, the counts."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path
from typing import Any

import pytest
import torch
from original_code import InferenceMoE, assert_as_original, stack_experts
from safetensors.torch import load_file
from torch import Tensor, nn

from modellink.config.schema import ModelConfig
from modellink.models import mla as latent
from modellink.models.attention import AttentionMask
from modellink.models.cache import KVCache, LayerCache
from modellink.models.decoder import Decoder
from modellink.models.mla import LatentAttention, MLAConfig, rope_config
from modellink.models.moe import MoEConfig
from modellink.models.rope import RopeTable, RotaryEmbedding

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


def randomize(module: nn.Module, seed: int = 0) -> None:
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in module.parameters():
            parameter.copy_(torch.randn(parameter.shape, generator=generator) * 0.3 + (parameter.dim() == 1))


def table(config: ModelConfig, mla: MLAConfig, positions: Tensor) -> RopeTable:
    return RotaryEmbedding(rope_config(config, mla))(positions, torch.float32)


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
    config = model_config(qkv_bias=bias, attention_output_bias=bias, **(YARN if yarn else {}))
    mla = MLAConfig(q_lora_rank=q_rank, **SIZES)
    mine = LatentAttention(config, mla, 0)
    randomize(reference)
    mine.load_state_dict(reference.state_dict(), strict=True)

    batch, length = 3, 17
    x = torch.randn(batch, length, 36, generator=torch.Generator().manual_seed(1))
    x_mine, x_theirs = x.clone().requires_grad_(), x.clone().requires_grad_()
    positions = torch.arange(length) * 3 + torch.tensor([[0], [5], [11]])
    out_mine = mine(x_mine, rope=table(config, mla, positions), mask=AttentionMask(length, length, x.device))
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
    assert sum(p.numel() for p in mine.parameters()) == latent.parameters(config, mla)


@pytest.mark.parametrize("q_rank", [None, 18])
@pytest.mark.parametrize("padded", [False, True])
def test_cached_decoding_equals_one_pass(q_rank: int | None, padded: bool) -> None:
    """A prompt in two pieces, then single tokens, in the compressed cache; with and without left padding."""
    config, mla = model_config(**YARN), MLAConfig(q_lora_rank=q_rank, **SIZES)
    attention = LatentAttention(config, mla, 0).eval()
    randomize(attention)
    batch, length = 2, 11
    x = torch.randn(batch, length, 36, generator=torch.Generator().manual_seed(1))
    first_key = torch.tensor([3, 0]) if padded else None
    positions = torch.arange(length).expand(batch, length)
    whole_mask = AttentionMask(length, length, x.device, first_key)
    with torch.no_grad():
        whole = attention(x, rope=table(config, mla, positions), mask=whole_mask)
        cache, pieces = LayerCache(capacity=4), []
        for start, end in ((0, 5), (5, 7), *((i, i + 1) for i in range(7, length))):
            mask = AttentionMask(end - start, end, x.device, first_key)
            rope = table(config, mla, positions[:, start:end])
            pieces.append(attention(x[:, start:end], rope=rope, mask=mask, cache=cache))
    real = (torch.arange(length) >= first_key[:, None]) if padded else torch.ones(batch, length, dtype=torch.bool)
    assert_close(torch.cat(pieces, 1)[real], whole[real])
    assert cache.length == length
    assert cache._keys is not None and cache._values is not None
    assert cache._keys.shape[-1] + cache._values.shape[-1] == mla.kv_lora_rank + mla.qk_rope_head_dim


def test_adapted_projection_is_expanded() -> None:
    """A module around kv_b_proj is called while decoding: its weight alone does not say what it computes."""

    class Doubled(nn.Linear):
        def forward(self, x: Tensor) -> Tensor:
            return 2.0 * super().forward(x)

    config, mla = model_config(), MLAConfig(**SIZES)
    attention = LatentAttention(config, mla, 0).eval()
    randomize(attention)
    adapted = Doubled(mla.kv_lora_rank, attention.kv_b_proj.out_features, bias=False)
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
    config = model_config()
    plain = MLAConfig(q_lora_rank=18, latent_norm=False, **SIZES)
    attention = LatentAttention(config, plain, 0)
    names = [name for name, _ in attention.named_parameters()]
    assert not [name for name in names if "norm" in name]
    assert sum(p.numel() for p in attention.parameters()) == latent.parameters(config, plain)
    normed = latent.parameters(config, dataclasses.replace(plain, latent_norm=True))
    assert normed - latent.parameters(config, plain) == 18 + SIZES["kv_lora_rank"]


def test_flops_by_hand() -> None:
    config, mla = model_config(), MLAConfig(q_lora_rank=18, **SIZES)
    by_hand = 36 * 18 + 18 * 3 * 16 + 36 * 26 + 20 * 3 * 24 + 3 * 14 * 36 + 7 * 3 * (16 + 14)
    assert latent.forward_flops(config, mla, 7) == 2 * by_hand
    direct = dataclasses.replace(mla, q_lora_rank=None)
    by_hand += 36 * 3 * 16 - 36 * 18 - 18 * 3 * 16
    assert latent.forward_flops(config, direct, 7) == 2 * by_hand


def test_deepseek_v2_from_its_original_code(shared: Path) -> None:
    """The whole model: latent attention with YaRN, a dense first layer, group-limited routing, shared experts."""
    folder = shared / "parity" / "deepseek_v2_original"
    settings = json.loads((folder / "config.json").read_text())
    yarn = settings["rope_scaling"]
    config = model_config(
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
    )
    sizes = ("q_lora_rank", "kv_lora_rank", "qk_nope_head_dim", "qk_rope_head_dim", "v_head_dim")
    mla = MLAConfig(**{name: settings[name] for name in sizes})
    moe = MoEConfig(
        num_experts=settings["n_routed_experts"],
        moe_ffn_hidden_size=settings["moe_intermediate_size"],
        router_topk=settings["num_experts_per_tok"],
        scoring="softmax",
        num_groups=settings["n_group"],
        topk_group=settings["topk_group"],
        routed_scaling_factor=settings["routed_scaling_factor"],
        n_shared_experts=settings["n_shared_experts"],
    )
    model = Decoder(config)
    model.rope = RotaryEmbedding(rope_config(config, mla))
    for index, layer in enumerate(model.layers.values()):
        layer.self_attn = LatentAttention(config, mla, index)
        if index >= settings["first_k_dense_replace"]:
            layer.mlp = InferenceMoE(config, moe)
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
