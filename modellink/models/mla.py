"""Multi-head latent attention (DeepSeek-V2, arXiv:2405.04434, section 2.1): keys and values grow out of a small latent.

    x ─▶ (q_a ─▶ norm ─▶) q ─▶ per head [nope; rope]                    rope parts are rotated, the key's is one
    x ─▶ kv_a ─▶ [latent; rope key] ─▶ norm(latent) ─▶ kv_b ─▶ per head [nope key; value]     for all heads

The cache keeps latent and rotated rope key only, R + r numbers a token. While decoding one token, the expansion of the
latent is moved from the keys to the query and from the values to the output, so the past is never expanded: attention
then is multi-query with one key [latent; rope key] and the value latent. Softmax and masks are `AttentionCore`'s; note
that values may be narrower than keys. Legend: B batch, S query length, T key length, D hidden, H heads, K key size
(nope N + rope r), V value size, R latent rank.
"""

from __future__ import annotations

import dataclasses

import torch
from torch import Tensor, nn

from modellink.config.schema import ModelConfig
from modellink.models.attention import AttentionCore, AttentionMask
from modellink.models.cache import LayerCache
from modellink.models.layers import RMSNorm, Runner, run_plainly
from modellink.models.rope import RopeTable, rotate, yarn_mscale


def rope_config(config: ModelConfig) -> ModelConfig:
    """What the decoder's `RotaryEmbedding` is built from: a head is its rotated part."""
    return dataclasses.replace(
        config, head_dim=config.qk_rope_head_dim, rope_fraction=1.0, rope_interleaved=config.latent_rope_interleaved
    )


def core_config(config: ModelConfig) -> ModelConfig:
    """What the `AttentionCore` is built from. Its scale takes over YaRN's temperature: K^-1/2 * mscale^2."""
    size = float(config.query_scale or config.head_dim)
    if config.rope_scaling == "yarn" and config.rope_mscale_all_dim:
        size /= yarn_mscale(config.rope_scaling_factor, config.rope_mscale_all_dim) ** 4
    heads = config.num_attention_heads
    return dataclasses.replace(config, num_key_value_heads=heads, query_scale=size)


class LatentAttention(nn.Module):
    """Multi-head latent attention of one layer: drop-in for `attention.Attention`."""

    def __init__(self, config: ModelConfig, layer: int) -> None:
        super().__init__()
        self.config = config
        hidden, heads, bias = config.hidden_size, config.num_attention_heads, config.qkv_bias
        query = heads * config.head_dim

        def norm(size: int) -> RMSNorm | None:
            return RMSNorm(size, config.latent_norm_epsilon) if config.qk_norm else None

        compressed = config.q_lora_rank is not None
        self.q_proj = None if compressed else nn.Linear(hidden, query, bias=False)
        self.q_a_proj = nn.Linear(hidden, config.q_lora_rank, bias=bias) if compressed else None
        self.q_a_layernorm = norm(config.q_lora_rank) if compressed else None
        self.q_b_proj = nn.Linear(config.q_lora_rank, query, bias=False) if compressed else None
        self.kv_a_proj_with_mqa = nn.Linear(hidden, config.kv_lora_rank + config.qk_rope_head_dim, bias=bias)
        self.kv_a_layernorm = norm(config.kv_lora_rank)
        self.kv_b_proj = nn.Linear(
            config.kv_lora_rank, heads * (config.qk_nope_head_dim + config.v_head_dim), bias=False
        )
        self.o_proj = nn.Linear(heads * config.v_head_dim, hidden, bias=config.attention_output_bias)
        self.core = AttentionCore(core_config(config), layer)
        self.core_runner: Runner = run_plainly
        self.heads_runner: Runner = run_plainly

    def forward(
        self, x_BSD: Tensor, *, rope: RopeTable | None, mask: AttentionMask, cache: LayerCache | None = None
    ) -> Tensor:
        """[B, S, D] -> [B, S, D]; with `cache`, latents and rope keys of earlier tokens come first.

        `rope` is a table over qk_rope_head_dim channels (`rope_config`).
        """
        config = self.config
        query_latent = self._query_latent(x_BSD)
        latent, k_rope = self.kv_a_proj_with_mqa(x_BSD).split((config.kv_lora_rank, config.qk_rope_head_dim), -1)
        if self.kv_a_layernorm is not None:
            latent = self.kv_a_layernorm(latent)
        if rope is not None:
            k_rope = rotate(k_rope[:, :, None], rope, config.latent_rope_interleaved)[:, :, 0]
        if cache is not None:  # stored as one key without a value
            joint_B1TX = torch.cat((latent, k_rope), -1)[:, None]
            joint_B1TX, _ = cache.append(joint_B1TX, joint_B1TX[..., :0])
            if x_BSD.shape[1] == 1 and self._is_plain(self.kv_b_proj):
                return self._decode(*self._queries(query_latent, rope), joint_B1TX, mask)
            latent, k_rope = joint_B1TX[:, 0].split((config.kv_lora_rank, config.qk_rope_head_dim), -1)
        out_BHSV = self.heads_runner(self._heads, query_latent, latent, k_rope, rope, mask)
        return self.o_proj(out_BHSV.transpose(1, 2).flatten(-2))

    def _heads(
        self, query_latent: Tensor, latent: Tensor, k_rope: Tensor, rope: RopeTable | None, mask: AttentionMask
    ) -> Tensor:
        """From latents to the weighted sum of values, [B, H, S, V]."""
        config = self.config
        kv_BTHX = self.kv_b_proj(latent).unflatten(-1, (-1, config.qk_nope_head_dim + config.v_head_dim))
        k_BHTN, v_BHTV = kv_BTHX.transpose(1, 2).split((config.qk_nope_head_dim, config.v_head_dim), -1)
        k_BHTK = torch.cat((k_BHTN, k_rope[:, None].expand(-1, k_BHTN.shape[1], -1, -1)), -1)
        q_BHSK = torch.cat(self._queries(query_latent, rope), -1)
        return self.core_runner(self.core, q_BHSK, k_BHTK, v_BHTV, mask)

    def _query_latent(self, x_BSD: Tensor) -> Tensor:
        if self.q_a_proj is None:
            return x_BSD
        compressed = self.q_a_proj(x_BSD)
        return compressed if self.q_a_layernorm is None else self.q_a_layernorm(compressed)

    def _queries(self, query_latent: Tensor, rope: RopeTable | None) -> tuple[Tensor, Tensor]:
        """The plain and the rotated part of the queries, [B, H, S, N] and [B, H, S, r]."""
        config = self.config
        q_BSX = self.q_proj(query_latent) if self.q_a_proj is None else self.q_b_proj(query_latent)
        q_BSHK = q_BSX.unflatten(-1, (-1, config.head_dim))
        nope_BSHN, rope_BSHr = q_BSHK.split((config.qk_nope_head_dim, config.qk_rope_head_dim), -1)
        if rope is not None:
            rope_BSHr = rotate(rope_BSHr, rope, config.latent_rope_interleaved)
        return nope_BSHN.transpose(1, 2), rope_BSHr.transpose(1, 2)

    @staticmethod
    def _is_plain(linear: nn.Linear) -> bool:
        """Whether the weight says all: no adapter around it, no shard of it."""
        return type(linear) is nn.Linear and type(linear.weight) is nn.Parameter

    def _decode(self, nope_BHSN: Tensor, q_rope_BHSr: Tensor, joint_B1TX: Tensor, mask: AttentionMask) -> Tensor:
        """One query against the latents themselves: q (W c) = (q W) c, and the weighted sum of W c is W of the sum."""
        config = self.config
        weight_HXR = self.kv_b_proj.weight.unflatten(0, (-1, config.qk_nope_head_dim + config.v_head_dim))
        key_HNR, value_HVR = weight_HXR.split((config.qk_nope_head_dim, config.v_head_dim), 1)
        q_BHSX = torch.cat((nope_BHSN @ key_HNR, q_rope_BHSr), -1)
        out_BHSR = self.core(q_BHSX, joint_B1TX, joint_B1TX[..., : config.kv_lora_rank], mask)
        out_BHSV = out_BHSR @ value_HVR.transpose(1, 2)
        return self.o_proj(out_BHSV.transpose(1, 2).flatten(-2))
