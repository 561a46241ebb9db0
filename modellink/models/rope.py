"""Rotary position embedding (Su et al., arXiv:2104.09864) and the rules that stretch it to longer contexts.

A rotation table is computed once per forward pass from the position ids and handed to every layer, so that pipeline
stages, sequence shards and packed documents need only the right positions. Frequencies and angles are fp32; cos and sin
are cast to the activation dtype before they multiply, as the Hugging Face models do.
"""

from __future__ import annotations

import math
from typing import NamedTuple

import torch
from torch import Tensor, nn

from modellink.config.schema import ModelConfig

_DYNAMIC = ("dynamic", "dynamic_doubling")


class RopeTable(NamedTuple):
    """cos and sin of the angles, each [B or 1, S, 1, R] with R the rotated channels of a head.

    `query_scale` [B or 1, S, 1, 1] multiplies queries after the rotation, None where they keep their length.
    """

    cos: Tensor
    sin: Tensor
    query_scale: Tensor | None = None


def yarn_mscale(factor: float, mscale: float = 1.0) -> float:
    """Attention temperature of YaRN (Peng et al., arXiv:2309.00071, section 3.4)."""
    return 1.0 if factor <= 1.0 else 0.1 * mscale * math.log(factor) + 1.0


def _llama3_frequencies(inv_freq: Tensor, config: ModelConfig) -> Tensor:
    """Llama 3.1: long wavelengths are divided by the factor, short ones kept, those between blended linearly."""
    window = config.rope_original_max_position
    low, high, factor = config.rope_low_freq_factor, config.rope_high_freq_factor, config.rope_scaling_factor
    wavelength = 2 * math.pi / inv_freq
    blend = (window / wavelength - low) / (high - low)
    blended = (1 - blend) * inv_freq / factor + blend * inv_freq
    scaled = torch.where(wavelength > window / low, inv_freq / factor, inv_freq)
    between = (wavelength <= window / low) & (wavelength >= window / high)
    return torch.where(between, blended, scaled)


def _yarn_frequencies(inv_freq: Tensor, rotated: int, config: ModelConfig) -> Tensor:
    """YaRN: interpolate slow dimensions, keep fast ones, ramp between those of beta_fast and beta_slow rotations."""
    window = config.rope_original_max_position

    def dimension_of(rotations: float) -> float:
        return rotated * math.log(window / (rotations * 2 * math.pi)) / (2 * math.log(config.rope_theta))

    low, high = dimension_of(config.rope_beta_fast), dimension_of(config.rope_beta_slow)
    if config.rope_truncate:
        low, high = math.floor(low), math.ceil(high)
    low, high = max(low, 0), min(high, rotated - 1)
    if low == high:
        high += 0.001  # an empty ramp would divide by zero
    ramp = ((torch.arange(rotated // 2, dtype=torch.float32) - low) / (high - low)).clamp(0, 1)
    return inv_freq / config.rope_scaling_factor * ramp + inv_freq * (1 - ramp)


class RotaryEmbedding(nn.Module):
    """Turns position ids [B, S] or [S] into a `RopeTable`; holds no parameters and no buffers."""

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        self.config = config
        self.rotated = int(config.head_dim * config.rope_fraction)
        self.attention_factor = 1.0
        if config.rope_scaling == "yarn":
            factor = config.rope_scaling_factor
            if config.rope_attention_factor is not None:
                self.attention_factor = config.rope_attention_factor
            elif config.rope_mscale_all_dim:
                self.attention_factor = yarn_mscale(factor, config.rope_mscale) / yarn_mscale(
                    factor, config.rope_mscale_all_dim
                )
            else:
                self.attention_factor = yarn_mscale(factor)
        self._fixed: dict[torch.device, Tensor] = {}

    def inverse_frequencies(self, longest: int | None = None) -> Tensor:
        """fp32 [R/2] on the CPU; `longest` (tokens) matters only for the dynamic rules."""
        config, rotated = self.config, self.rotated
        theta = config.rope_theta
        if config.rope_scaling in _DYNAMIC:
            window = config.rope_original_max_position or config.max_position_embeddings
            longest = max(longest or window, window)
            if config.rope_scaling == "dynamic":
                stretch = config.rope_scaling_factor * longest / window - (config.rope_scaling_factor - 1)
            else:
                stretch = 2 ** math.ceil(math.log2(longest / window) + 1) - 1
            theta = theta * stretch ** (rotated / (rotated - 2))
        inv_freq = 1.0 / (theta ** (torch.arange(0, rotated, 2, dtype=torch.float32) / rotated))
        if config.rope_scaling == "linear":
            inv_freq = inv_freq / config.rope_scaling_factor
        elif config.rope_scaling == "llama3":
            inv_freq = _llama3_frequencies(inv_freq, config)
        elif config.rope_scaling == "yarn":
            inv_freq = _yarn_frequencies(inv_freq, rotated, config)
        return inv_freq

    def forward(self, position_ids: Tensor, dtype: torch.dtype) -> RopeTable:
        """position_ids int [B, S] or [S] -> cos, sin in `dtype`, [B or 1, S, 1, R]."""
        device, window = position_ids.device, self.config.query_log_window
        stretched = not (self.training and self.config.rope_scaling == "dynamic_doubling")
        if self.config.rope_scaling in _DYNAMIC and stretched:
            inv_freq = self.inverse_frequencies(int(position_ids.max()) + 1).to(device)
        else:
            if device not in self._fixed:
                self._fixed[device] = self.inverse_frequencies().to(device)
            inv_freq = self._fixed[device]
        if position_ids.dim() == 1:
            position_ids = position_ids[None]
        angles = position_ids[..., None].float() * inv_freq
        angles = angles.repeat_interleave(2, -1) if self.config.rope_interleaved else torch.cat((angles, angles), -1)
        cos, sin = angles.cos() * self.attention_factor, angles.sin() * self.attention_factor
        query_scale = None
        if window is not None and not self.training:
            lengths = (position_ids + 1).float()[:, :, None, None]
            query_scale = (lengths.log() / math.log(window)).clamp(min=1.0).to(dtype)
        return RopeTable(cos.to(dtype)[:, :, None], sin.to(dtype)[:, :, None], query_scale)


def rotate(x_BSHK: Tensor, table: RopeTable, interleaved: bool) -> Tensor:
    """Rotate the first R channels of every head; the others pass unchanged."""
    rotated = table.cos.shape[-1]
    cos, sin = table.cos.to(x_BSHK.dtype), table.sin.to(x_BSHK.dtype)  # fp32 only where the residual stream is
    x, rest = x_BSHK[..., :rotated], x_BSHK[..., rotated:]
    if interleaved:
        even, odd = x[..., 0::2], x[..., 1::2]
        turned = torch.stack((-odd, even), -1).flatten(-2)
    else:
        first, second = x.chunk(2, -1)
        turned = torch.cat((-second, first), -1)
    x = x * cos + turned * sin
    return torch.cat((x, rest), -1) if rest.shape[-1] else x
