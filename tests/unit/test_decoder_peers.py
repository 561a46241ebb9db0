"""Every switch of the decoder that no family row uses, against a peer of `transformers` or a closed formula.

GPT-2: learned positions, LayerNorm, ungated MLP, all biases, its activations. Bloom: ALiBi and the embedding norm.
Nemotron: norm stored minus one with bias, squared ReLU, partial rotation. GLM: interleaved partial rotation. Granite:
the three multipliers and a softmax scale. MiniCPM: the hidden divisor, from reference logits of its original code.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import transformers
from safetensors.torch import load_file
from torch import Tensor, nn

from modellink.config.schema import ModelConfig
from modellink.models.attention import AttentionCore, AttentionMask
from modellink.models.cache import KVCache
from modellink.models.decoder import Decoder

BATCH, LENGTH, VOCAB = 3, 37, 203
TOKENS = torch.randint(0, VOCAB, (BATCH, LENGTH), generator=torch.Generator().manual_seed(1))
SIZES = ModelConfig(
    num_layers=2,
    hidden_size=48,
    num_attention_heads=6,
    ffn_hidden_size=80,
    vocab_size=VOCAB,
    padded_vocab_size=VOCAB,
    max_position_embeddings=64,
    activation="gelu",
    attention_dropout=0.0,
    hidden_dropout=0.0,
)
COMMON = {"vocab_size": VOCAB, "hidden_size": 48, "num_hidden_layers": 2, "num_attention_heads": 6}
IDS = {"bos_token_id": 1, "eos_token_id": 2, "pad_token_id": 0, "attn_implementation": "eager"}
LLAMA_LIKE = {"position_embedding": "rope", "tie_word_embeddings": False, "qkv_bias": False}
PLAIN = {**LLAMA_LIKE, "attention_output_bias": False, "mlp_bias": False}


def randomise(model: nn.Module) -> nn.Module:
    generator = torch.Generator().manual_seed(0)
    for parameter in model.parameters():
        spread = 0.2 if parameter.dim() > 1 else 0.3
        parameter.data.add_(torch.randn(parameter.shape, generator=generator) * spread)
    return model.eval()


def build(state: dict[str, Tensor], **switches: Any) -> Decoder:
    model = Decoder(dataclasses.replace(SIZES, **switches).resolve()).eval()
    if model.config.tie_word_embeddings:
        state = state | {"lm_head.weight": state["embed_tokens.weight"]}
    model.load_state_dict(state)
    return model


def rename(state: dict[str, Tensor], *pairs: tuple[str, str]) -> dict[str, Tensor]:
    """The state under new names; parts of names are replaced in order."""

    def new(name: str) -> str:
        for old, replacement in pairs:
            name = name.replace(old, replacement)
        return name

    return {new(name): value for name, value in state.items() if name != "lm_head.weight"}


def gpt2(activation: str) -> tuple[nn.Module, Decoder]:
    config = transformers.GPT2Config(
        vocab_size=VOCAB,
        n_embd=48,
        n_layer=2,
        n_head=6,
        n_inner=80,
        n_positions=64,
        activation_function=activation,
        **IDS,
    )
    peer = randomise(transformers.GPT2LMHeadModel(config))
    state = rename(
        peer.state_dict(),
        *(
            ("transformer.", ""),
            ("wte", "embed_tokens"),
            ("wpe", "embed_positions"),
            ("h.", "layers."),
            ("ln_f", "norm"),
        ),
        *(("ln_1", "input_layernorm"), ("ln_2", "post_attention_layernorm"), ("attn.c_proj", "self_attn.o_proj")),
        *(("mlp.c_fc", "mlp.up_proj"), ("mlp.c_proj", "mlp.down_proj")),
    )
    for name in [name for name in state if name.endswith("proj.weight")]:
        state[name] = state[name].T  # GPT-2 keeps its matrices transposed
    for name in [name for name in state if "attn.c_attn" in name]:
        value = state.pop(name)
        parts = (value.T if value.dim() == 2 else value).chunk(3)
        for part, piece in zip("qkv", parts, strict=True):
            state[name.replace("attn.c_attn", f"self_attn.{part}_proj")] = piece
    names = {"gelu_new": "gelu_tanh", "gelu": "gelu", "relu": "relu", "relu2": "squared_relu", "silu": "silu"}
    return peer, build(state, activation=names[activation])


def bloom() -> tuple[nn.Module, Decoder]:
    config = transformers.BloomConfig(vocab_size=VOCAB, hidden_size=48, n_layer=2, n_head=6, **IDS)
    peer = randomise(transformers.BloomForCausalLM(config))
    state = rename(
        peer.state_dict(),
        *(("transformer.", ""), ("word_embeddings_layernorm", "embed_norm"), ("word_embeddings", "embed_tokens")),
        *(("dense_h_to_4h", "up_proj"), ("dense_4h_to_h", "down_proj"), ("h.", "layers."), ("ln_f", "norm")),
        ("self_attention.dense", "self_attn.o_proj"),
    )
    for name in [name for name in state if "query_key_value" in name]:
        per_head = state.pop(name).unflatten(0, (6, 3, 8))
        for i, part in enumerate("qkv"):
            key = name.replace("self_attention.query_key_value", f"self_attn.{part}_proj")
            state[key] = per_head[:, i].flatten(0, 1)
    switches = {
        "position_embedding": "alibi",
        "embedding_norm": True,
        "activation": "gelu_tanh",
        "ffn_hidden_size": 192,
    }
    return peer, build(state, **switches)


def nemotron() -> tuple[nn.Module, Decoder]:
    config = transformers.NemotronConfig(
        **COMMON, **IDS, intermediate_size=80, num_key_value_heads=2, partial_rotary_factor=0.5, head_dim=8
    )
    peer = randomise(transformers.NemotronForCausalLM(config))
    state = rename(peer.state_dict(), ("model.", "")) | {"lm_head.weight": peer.lm_head.weight}
    switches = {"norm_offset": True, "activation": "squared_relu", "rope_fraction": 0.5, "num_key_value_heads": 2}
    return peer, build(state, **PLAIN | switches)


def glm() -> tuple[nn.Module, Decoder]:
    config = transformers.GlmConfig(
        **COMMON, **IDS, intermediate_size=80, num_key_value_heads=2, head_dim=8, partial_rotary_factor=0.5
    )
    peer = randomise(transformers.GlmForCausalLM(config))
    state = rename(peer.state_dict(), ("model.", "")) | {"lm_head.weight": peer.lm_head.weight}
    for name in [name for name in state if "gate_up_proj" in name]:
        gate, up = state.pop(name).chunk(2)
        state[name.replace("gate_up", "gate")], state[name.replace("gate_up", "up")] = gate, up
    switches = {
        **{"normalization": "RMSNorm", "norm_epsilon": config.rms_norm_eps, "activation": "silu", "gated_mlp": True},
        **{"rope_fraction": 0.5, "rope_interleaved": True, "num_key_value_heads": 2, "qkv_bias": config.attention_bias},
    }
    return peer, build(state, **PLAIN | switches)


def granite() -> tuple[nn.Module, Decoder]:
    config = transformers.GraniteConfig(
        **COMMON,
        **IDS,
        intermediate_size=80,
        num_key_value_heads=3,
        embedding_multiplier=2.5,
        residual_multiplier=0.4,
        attention_multiplier=0.2,
        logits_scaling=1.7,
    )
    peer = randomise(transformers.GraniteForCausalLM(config))
    state = rename(peer.state_dict(), ("model.", "")) | {"lm_head.weight": peer.lm_head.weight}
    switches = {
        **{"normalization": "RMSNorm", "norm_epsilon": config.rms_norm_eps, "activation": "silu", "gated_mlp": True},
        **{"num_key_value_heads": 3, "embedding_multiplier": 2.5, "residual_multiplier": 0.4},
        **{"query_scale": 0.2**-2, "logits_multiplier": 1 / 1.7, "tie_word_embeddings": config.tie_word_embeddings},
    }
    return peer, build(state, **PLAIN | switches)


PEERS: dict[str, Callable[[], tuple[nn.Module, Decoder]]] = {
    "gpt2 tanh gelu": lambda: gpt2("gelu_new"),
    "gpt2 erf gelu": lambda: gpt2("gelu"),
    "gpt2 relu": lambda: gpt2("relu"),
    "gpt2 squared relu": lambda: gpt2("relu2"),
    "gpt2 silu": lambda: gpt2("silu"),
    "bloom": bloom,
    "nemotron": nemotron,
    "glm": glm,
    "granite": granite,
}


@pytest.mark.parametrize("name", PEERS)
@torch.no_grad()
def test_logits_and_cache(name: str) -> None:
    peer, ours = PEERS[name]()
    theirs = peer(TOKENS, use_cache=False).logits
    assert theirs.std() > 0.1
    logits = ours(TOKENS)
    torch.testing.assert_close(logits, theirs, atol=1e-4, rtol=0)
    cache = KVCache(ours.config.num_layers)
    parts = [ours(part, cache=cache) for part in TOKENS.split([13, 4, *[1] * 20], 1)]
    torch.testing.assert_close(torch.cat(parts, 1), logits, atol=1e-4, rtol=0)


@pytest.mark.parametrize("name", ["gpt2 tanh gelu", "bloom", "nemotron", "glm", "granite"])
def test_gradients(name: str) -> None:
    peer, ours = PEERS[name]()
    theirs = peer(TOKENS, labels=TOKENS, use_cache=False).loss
    theirs.backward()
    loss = nn.functional.cross_entropy(ours(TOKENS)[:, :-1].flatten(0, 1), TOKENS[:, 1:].flatten())
    loss.backward()
    assert abs(loss.item() - theirs.item()) < 1e-5
    # fused and transposed matrices keep their entries, so the norm over all parameters must agree
    norms = [torch.stack([p.grad.norm() for p in model.parameters()]).norm().item() for model in (peer, ours)]
    assert norms[0] == pytest.approx(norms[1], rel=1e-5)


@pytest.mark.parametrize("window", [None, 9])
@torch.no_grad()
def test_left_padding(window: int | None) -> None:
    config = transformers.MistralConfig(
        **COMMON, **IDS, intermediate_size=80, num_key_value_heads=2, sliding_window=window
    )
    peer = randomise(transformers.MistralForCausalLM(config))
    state = rename(peer.state_dict(), ("model.", "")) | {"lm_head.weight": peer.lm_head.weight}
    switches = {
        **{"normalization": "RMSNorm", "norm_epsilon": config.rms_norm_eps, "activation": "silu", "gated_mlp": True},
        **{"num_key_value_heads": 2, "sliding_window": window},
    }
    ours = build(state, **PLAIN | switches)
    first_key = torch.tensor([0, 5, 17])
    real = torch.arange(LENGTH) >= first_key[:, None]
    positions = (torch.arange(LENGTH) - first_key[:, None]).clamp(min=0)
    theirs = peer(TOKENS, attention_mask=real.long(), position_ids=positions, use_cache=False).logits
    logits = ours(TOKENS, position_ids=positions, first_key=first_key)
    torch.testing.assert_close(logits[real], theirs[real], atol=1e-4, rtol=0)
    for row, first in enumerate(first_key.tolist()):
        alone = ours(TOKENS[row : row + 1, first:])
        torch.testing.assert_close(logits[row : row + 1, first:], alone, atol=1e-4, rtol=0)


@torch.no_grad()
def test_minicpm_from_its_original_code(shared: Path) -> None:
    folder = shared / "parity" / "minicpm"
    settings = transformers.PretrainedConfig.get_config_dict(folder)[0]
    reference = np.load(folder / "ref.npz")
    layers, hidden = settings["num_hidden_layers"], settings["hidden_size"]
    switches = {
        **{"num_layers": layers, "hidden_size": hidden, "num_attention_heads": settings["num_attention_heads"]},
        **{"num_key_value_heads": settings["num_key_value_heads"], "ffn_hidden_size": settings["intermediate_size"]},
        **{"vocab_size": settings["vocab_size"], "padded_vocab_size": settings["vocab_size"], "gated_mlp": True},
        **{"normalization": "RMSNorm", "norm_epsilon": settings["rms_norm_eps"], "activation": "silu"},
        **{"embedding_multiplier": settings["scale_emb"], "tie_word_embeddings": True},
        **{"residual_multiplier": settings["scale_depth"] / layers**0.5},
        **{"hidden_divisor": hidden / settings["dim_model_base"]},
    }
    state = rename(load_file(folder / "model.safetensors"), ("model.", ""))
    logits = build(state, **PLAIN | switches)(torch.tensor(reference["input_ids"]))
    torch.testing.assert_close(logits, torch.tensor(reference["logits"]), atol=2e-4, rtol=0)


@torch.no_grad()
def test_bias_of_the_output_matrix_is_added_to_the_logits() -> None:
    bias = torch.randn(VOCAB, generator=torch.Generator().manual_seed(3))
    _, plain = gpt2("gelu")
    biased = build(plain.state_dict() | {"lm_head.bias": bias}, lm_head_bias=True)
    torch.testing.assert_close(biased(TOKENS), plain(TOKENS) + bias, atol=1e-5, rtol=0)


@torch.no_grad()
def test_no_positions_means_the_past_is_a_set() -> None:
    _, model = gpt2("gelu")
    state = {name: value for name, value in model.state_dict().items() if "embed_positions" not in name}
    model = build(state, position_embedding="none", num_layers=2)
    shuffled = torch.cat((TOKENS[:, :-1].flip(1), TOKENS[:, -1:]), 1)
    # one layer sees the earlier tokens as a set; deeper ones see states that know their own past
    one = Decoder(dataclasses.replace(model.config, num_layers=1)).eval()
    one.load_state_dict({name: value for name, value in state.items() if not name.startswith("layers.1.")})
    torch.testing.assert_close(one(TOKENS)[:, -1], one(shuffled)[:, -1], atol=1e-5, rtol=0)
    assert (model(TOKENS)[:, -1] - model(shuffled)[:, -1]).abs().max() > 1e-2


@torch.no_grad()
def test_scaling_scores_by_the_layer_number_tells_large_ones_apart_in_fp16() -> None:
    _, model = gpt2("gelu")
    state = model.state_dict()
    scaled = build(state, query_key_layer_scaling=True)
    torch.testing.assert_close(scaled(TOKENS), model(TOKENS), atol=1e-5, rtol=0)
    q = torch.full((1, 6, 2, 8), 120.0, dtype=torch.float16)
    k = q + torch.tensor([0.0, 1.0]).half()[:, None]  # products 115200 and 116160 are both infinite in fp16
    v = torch.ones_like(q) * torch.tensor([0.0, 1.0]).half()[:, None]
    for switch, expected in ((False, 0.5), (True, 1.0)):
        config = dataclasses.replace(model.config, query_key_layer_scaling=switch, attention_logit_softcap=1e6)
        out = AttentionCore(config, layer=1)(q, k, v, AttentionMask(2, 2, q.device))
        assert out[0, 0, 1, 0].item() == expected


@torch.no_grad()
def test_residual_stream_in_fp32() -> None:
    _, model = gpt2("gelu")
    state = model.state_dict()
    for name in ("embed_tokens.weight", "lm_head.weight", "embed_positions.weight"):
        state[name] = state[name] * 30  # so that what the layers add is small beside the stream, and bf16 loses it
    exact = build(state).to(torch.bfloat16).float()(TOKENS)
    errors = []
    for fp32_residual in (False, True):
        low = build(state, fp32_residual=fp32_residual).to(torch.bfloat16)
        logits = low(TOKENS)
        assert logits.dtype == torch.bfloat16
        errors.append((logits.float() - exact).norm().item())
    assert errors[1] < 0.85 * errors[0]
