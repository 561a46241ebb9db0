"""Norms, MLP and dropout: the small parts of a decoder layer. D hidden, F FFN width."""

from __future__ import annotations

import contextlib
from collections.abc import Callable
from contextlib import AbstractContextManager

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from modellink.config.schema import ModelConfig
from modellink.models.projections import Enter, Leave, by_itself, separately

Runner = Callable[..., Tensor]


def run_plainly(function: Callable[..., Tensor], *inputs: object) -> Tensor:
    """The `Runner` of parts of a layer; recomputation hands in one that keeps only `inputs`, or less than the part."""
    return function(*inputs)


class RMSNorm(nn.Module):
    """x / rms(x) * w, statistics in fp32 (Zhang & Sennrich, arXiv:1910.07467).

    The product with the weight is taken after casting back to the input dtype (Llama) or before (`weight_in_fp32`,
    Gemma); the two differ in bf16. With `offset` the weight is stored minus one.
    """

    def __init__(self, size: int, epsilon: float, offset: bool = False, weight_in_fp32: bool = False) -> None:
        super().__init__()
        self.epsilon, self.offset, self.weight_in_fp32 = epsilon, offset, weight_in_fp32
        self.weight = nn.Parameter(torch.zeros(size) if offset else torch.ones(size))

    def forward(self, x: Tensor) -> Tensor:
        dtype = x.dtype
        y = x.float()
        y = y * torch.rsqrt(y.pow(2).mean(-1, keepdim=True) + self.epsilon)
        if self.weight_in_fp32:
            weight = self.weight.float()
            return (y * (1.0 + weight if self.offset else weight)).to(dtype)
        return y.to(dtype) * (1.0 + self.weight if self.offset else self.weight)


class LayerNorm(nn.Module):
    """Layer normalisation with bias; with `offset` the weight is stored minus one."""

    def __init__(self, size: int, epsilon: float, offset: bool = False) -> None:
        super().__init__()
        self.epsilon, self.offset = epsilon, offset
        self.weight = nn.Parameter(torch.zeros(size) if offset else torch.ones(size))
        self.bias = nn.Parameter(torch.zeros(size))

    def forward(self, x: Tensor) -> Tensor:
        weight = self.weight + 1.0 if self.offset else self.weight
        weight, bias = weight.to(x.dtype), self.bias.to(x.dtype)  # x is wider where the residual stream is fp32
        return F.layer_norm(x, weight.shape, weight, bias, self.epsilon)


def make_norm(config: ModelConfig, size: int) -> RMSNorm | LayerNorm:
    """The kind of norm that `config` asks for, over the last dimension of `size` channels."""
    if config.normalization == "RMSNorm":
        return RMSNorm(size, config.norm_epsilon, config.norm_offset, config.norm_weight_in_fp32)
    return LayerNorm(size, config.norm_epsilon, config.norm_offset)


class NormalizedLinear(nn.Linear):
    """A matrix whose rows have length one when it is used, whatever is stored (Baichuan2's output matrix)."""

    def forward(self, x: Tensor) -> Tensor:
        return F.linear(x, F.normalize(self.weight), self.bias)


class Dropout(nn.Module):
    """Dropout whose random stream can be exchanged.

    `region` is a context manager factory entered around the draw. Where activations are sharded the shards need
    different streams, where they are replicated the same one; whoever shards the model hands in the right region.
    """

    def __init__(self, p: float) -> None:
        super().__init__()
        self.p = p
        self.region: Callable[[], AbstractContextManager[object]] = contextlib.nullcontext

    @property
    def probability(self) -> float:
        """Share of values dropped now: 0 outside training."""
        return self.p if self.training else 0.0

    def stream(self) -> AbstractContextManager[object]:
        """The region to draw in; nothing to enter while nothing is drawn."""
        return self.region() if self.probability else contextlib.nullcontext()

    def forward(self, x: Tensor) -> Tensor:
        if self.probability == 0.0:
            return x
        with self.stream():
            return F.dropout(x, self.p)


ACTIVATIONS: dict[str, Callable[[Tensor], Tensor]] = {
    "gelu": F.gelu,
    "gelu_tanh": lambda x: F.gelu(x, approximate="tanh"),
    "silu": F.silu,
    "relu": F.relu,
    "squared_relu": lambda x: F.relu(x).square(),
}


class MLP(nn.Module):
    """down(act(gate(x)) * up(x)), or down(act(up(x))) when not gated."""

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        hidden, width, bias = config.hidden_size, config.ffn_hidden_size, config.mlp_bias
        self.gate_proj = nn.Linear(hidden, width, bias=bias) if config.gated_mlp else None
        self.up_proj = nn.Linear(hidden, width, bias=bias)
        self.down_proj = nn.Linear(width, hidden, bias=bias)
        self.activation = ACTIVATIONS[config.activation]
        self.output_runner: Runner = run_plainly
        # another way through the matrices into and out of the block can be handed in
        self.enter: Enter = separately
        self.leave: Leave = by_itself

    def forward(self, x_BSD: Tensor) -> Tensor:
        matrices = (self.up_proj,) if self.gate_proj is None else (self.gate_proj, self.up_proj)
        return self.output_runner(self._output, *self.enter(x_BSD, matrices))

    def _output(self, gate_BSF: Tensor, up_BSF: Tensor | None = None) -> Tensor:
        h_BSF = self.activation(gate_BSF)
        return self.leave(h_BSF if up_BSF is None else h_BSF * up_BSF, self.down_proj)
