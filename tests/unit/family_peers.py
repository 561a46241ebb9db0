"""Tiny models of `transformers` beside ours: made, saved, read, decoded step by step.

The peer saves a folder, we read it: so config.json in the spelling of transformers 5, the names of the weights and the
arithmetic are all under test at once. Weights are large enough for logits of order one to ten.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from modellink.checkpoint.hf import load_hf, read_config
from modellink.checkpoint.mapping import HFTensor
from modellink.models.cache import KVCache
from modellink.models.decoder import Decoder

BATCH, LENGTH, VOCAB = 3, 37, 203
STEPS = [11, 5, *[1] * 21]  # how decoding feeds the sequence: a prompt, a chunk, single tokens
SIZES = {
    "vocab_size": VOCAB,
    "hidden_size": 48,
    "intermediate_size": 80,
    "num_hidden_layers": 3,
    "num_attention_heads": 6,
    "num_key_value_heads": 2,
    "max_position_embeddings": 64,
    "attn_implementation": "eager",
    "bos_token_id": 1,
    "eos_token_id": 2,
    "pad_token_id": 0,
}
YARN = {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 16}


def randomise(model: nn.Module, seed: int = 0) -> None:
    """Weights that make every part visible: matrices of spread 0.2, norm weights and biases far from one and zero."""
    generator = torch.Generator().manual_seed(seed)
    biases = [buffer for name, buffer in model.named_buffers() if name.endswith("e_score_correction_bias")]
    for parameter in [*model.parameters(), *biases]:
        spread = 0.2 if parameter.dim() > 1 else 0.3
        parameter.data.add_(torch.randn(parameter.shape, generator=generator) * spread)


def make_peer(classes: tuple[type, type], options: dict[str, Any], without: tuple[str, ...] = ()) -> nn.Module:
    """A peer of SIZES but for those in `without`, which its family derives, and `options`."""
    sizes = {name: size for name, size in SIZES.items() if name not in without}
    peer: nn.Module = classes[1](classes[0](**sizes | options)).eval()
    randomise(peer)
    return peer


def ours_from(folder: Path, padding: int = 0) -> Decoder:
    config = read_config(folder)
    config.padded_vocab_size = config.vocab_size + padding
    model = Decoder(config).eval()
    load_hf(model, folder, progress=False)
    return model


def tokens() -> Tensor:
    return torch.randint(0, VOCAB, (BATCH, LENGTH), generator=torch.Generator().manual_seed(1))


def stepwise(model: Decoder, tokens_BS: Tensor) -> Tensor:
    """Logits of all positions, decoded with a cache: a prompt, a chunk of several tokens, then one token at a time."""
    cache = KVCache(model.config.num_layers, capacity=4)
    return torch.cat([model(part, cache=cache) for part in tokens_BS.split(STEPS, 1)], 1)


def set_of(layout: dict[str, HFTensor]) -> list[HFTensor]:
    """Every tensor of the files once."""
    return list({tensor.name: tensor for tensor in layout.values()}.values())
