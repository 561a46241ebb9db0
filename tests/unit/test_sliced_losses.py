"""Losses computed slice by slice are those of whole logits, value and gradient, and never hold whole logits."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from modellink.config.schema import ModelConfig
from modellink.models.decoder import Decoder
from modellink.train.losses import IGNORED, token_cross_entropy
from modellink.train.sliced_losses import SlicedLosses

VOCABULARY, PADDED, ROWS, LENGTH = 45, 64, 2, 12
HEADS: dict[str, dict[str, Any]] = {
    "plain": {},
    "tied": {"tie_word_embeddings": True},
    "bias": {"lm_head_bias": True, "logits_multiplier": 0.3, "hidden_divisor": 2.0},
    "softcap": {"output_logit_softcap": 2.0},
    "normalised": {"normalize_lm_head": True},
}


def decoder(**fields: Any) -> Decoder:
    torch.manual_seed(1)
    base: dict[str, Any] = {
        "num_layers": 1, "hidden_size": 24, "num_attention_heads": 2, "ffn_hidden_size": 24, "vocab_size": VOCABULARY,
        "padded_vocab_size": PADDED, "normalization": "RMSNorm", "position_embedding": "rope",
        "attention_dropout": 0.0, "hidden_dropout": 0.0,
    }  # fmt: skip
    return Decoder(ModelConfig(**(base | fields)).resolve())


def losses_of(logits_BSV: Tensor, labels_BS: Tensor) -> Tensor:
    return token_cross_entropy(logits_BSV, labels_BS, VOCABULARY)


def batch() -> tuple[Tensor, Tensor, Tensor]:
    """(tokens, labels, weights of the tokens)"""
    generator = torch.Generator().manual_seed(0)
    tokens, labels = torch.randint(0, VOCABULARY, (2, ROWS, LENGTH), generator=generator)
    labels[0, :3] = IGNORED
    return tokens, labels, torch.rand(ROWS, LENGTH, generator=generator)


@pytest.mark.parametrize("slices", [2, 3, 5, 12, 40])
@pytest.mark.parametrize("head", HEADS)
def test_slices_equal_the_whole(head: str, slices: int) -> None:
    model = decoder(**HEADS[head])
    tokens, labels, weights = batch()
    whole = losses_of(model(tokens), labels)
    names, parameters = zip(*model.named_parameters(), strict=True)
    wanted = torch.autograd.grad((whole * weights).sum(), parameters)
    model.output_losses = SlicedLosses(losses_of, slices)
    sliced = model(tokens, labels=labels)
    assert sliced.shape == labels.shape and sliced.dtype == torch.float32
    assert torch.allclose(sliced, whole, rtol=1e-6, atol=1e-7)
    found = torch.autograd.grad((sliced * weights).sum(), parameters)
    for name, ours, theirs in zip(names, found, wanted, strict=True):
        error = (ours - theirs).abs().max() / theirs.abs().max()
        assert error <= 1e-6, (name, error)
    # without labels the same model gives logits
    assert torch.equal(losses_of(model(tokens), labels), whole)


class _Largest(TorchDispatchMode):
    """Elements of the largest tensor that any operation returns."""

    def __init__(self) -> None:
        super().__init__()
        self.elements = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        for tensor in out if isinstance(out, list | tuple) else (out,):
            if isinstance(tensor, Tensor):
                self.elements = max(self.elements, tensor.numel())
        return out


def test_no_more_logits_than_those_of_one_slice_exist() -> None:
    rows, length = 8, 64  # logits must outweigh the matrices
    tokens = torch.randint(0, VOCABULARY, (rows, length))

    def largest(slices: int) -> int:
        model = decoder()
        model.output_losses = SlicedLosses(losses_of, slices) if slices > 1 else None
        with _Largest() as seen:
            out = model(tokens, labels=tokens)
            (out if slices > 1 else losses_of(out, tokens)).sum().backward()
        return seen.elements

    assert largest(1) == rows * length * PADDED
    assert largest(2) == rows * length // 2 * PADDED


def test_gradients_of_the_output_matrix_add_up_in_fp32() -> None:
    tokens = torch.randint(0, VOCABULARY, (4, 128), generator=torch.Generator().manual_seed(0))

    def gradient(slices: int, dtype: torch.dtype) -> Tensor:
        model = decoder().cast(torch.bfloat16).cast(dtype)
        model.output_losses = SlicedLosses(losses_of, slices)
        model(tokens, labels=tokens.roll(-1, 1)).sum().backward()
        assert model.lm_head.weight.grad.dtype == dtype
        return model.lm_head.weight.grad.float()

    exact = gradient(1, torch.float32)
    whole, sliced = ((gradient(n, torch.bfloat16) - exact).norm() / exact.norm() for n in (1, 128))
    assert sliced <= 1.1 * whole  # 1.01; adding up in bf16 gives 1.7
