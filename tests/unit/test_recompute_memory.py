"""Bytes that layers really keep under each kind of recomputation, followed storage by storage."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from modellink.config.recompute_plan import Span
from modellink.config.schema import ModelConfig
from modellink.models.decoder import Decoder
from modellink.parallel.meter import MemoryMeter
from modellink.parallel.recompute import apply_recompute

LAYERS, ROWS, SEQUENCE, HIDDEN, WIDTH = 4, 2, 128, 64, 160
LLAMA: dict[str, Any] = {
    "num_layers": LAYERS, "hidden_size": HIDDEN, "num_attention_heads": 4, "ffn_hidden_size": WIDTH,
    "padded_vocab_size": 64, "normalization": "RMSNorm", "activation": "silu", "gated_mlp": True, "mlp_bias": False,
    "attention_dropout": 0.0, "hidden_dropout": 0.0, "max_position_embeddings": SEQUENCE, "position_embedding": "rope",
}  # fmt: skip
SPARSE = LLAMA | {"num_experts": 4, "moe_ffn_hidden_size": WIDTH, "router_topk": 2}
LATENT = LLAMA | {
    "multi_head_latent_attention": True, "q_lora_rank": 16, "kv_lora_rank": 16, "qk_nope_head_dim": 24,
    "qk_rope_head_dim": 8, "v_head_dim": 32, "qk_norm": True,
}  # fmt: skip
VALUES = 4 * ROWS * SEQUENCE  # bytes of one fp32 channel of all tokens
SIZES = {"llama": LLAMA, "moe": SPARSE, "latent": LATENT}


def kept(shape: dict[str, Any], *spans: Span) -> int:
    """Bytes that all layers keep together, beside what the rest of the model keeps."""
    model = Decoder(ModelConfig(**shape).resolve())
    apply_recompute(model, spans)
    tokens = torch.arange(ROWS * SEQUENCE).view(ROWS, SEQUENCE) % 64
    found: list[int] = []
    with MemoryMeter(model.parameters()) as meter:
        before = meter.live
        model.norm.register_forward_pre_hook(lambda *_: found.append(meter.live - before))
        model(tokens).sum().backward()
    return found[0]


def each(*parts: str) -> list[Span]:
    return [Span(1, frozenset(parts))] * LAYERS


def test_storages_are_followed_to_their_end() -> None:
    with MemoryMeter() as meter:
        a = torch.zeros(1000)
        b = a.view(10, 100)
        del a
        assert meter.live == 4000
        c = b.relu()
        assert (meter.live, meter.peak) == (8000, 8000)
        del c
        assert (meter.live, meter.peak) == (4000, 8000)
        b.untyped_storage().resize_(0)
        d = torch.zeros(100)
        meter.reset_peak()
        d = d + 1
        assert meter.peak == 800
        del b, d
        assert meter.live == 0


@pytest.mark.parametrize("shape", SIZES)
def test_each_kind_keeps_less_than_the_one_before(shape: str) -> None:
    sparse, latent = shape == "moe", shape == "latent"
    activation, whole = ("moe_act", "moe") if sparse else ("mlp_act", "mlp")
    rows: list[list[Span]] = [each(), each("layernorm"), each("layernorm", activation)]
    rows += [each("layernorm", activation, "mla_up_proj")] if latent else []
    extra = ("mla_up_proj",) if latent else ()
    rows += [each("layernorm", whole, *extra), [*each("layer")[:2], *each("layernorm", whole, *extra)[2:]]]
    rows += [each("layer"), [Span(2, frozenset(("layer",)))] * 2]
    found = [kept(SIZES[shape], *spans) for spans in rows]
    assert found == sorted(found, reverse=True) and len(set(found)) == len(found), found
    assert kept(SIZES[shape], *each("operators")) < 0.75 * found[0]
    assert kept(SIZES[shape], *each("core_attn")) < found[0]


def test_what_a_part_gives_back() -> None:
    """Of an MLP the activation and the product go, gate and up stay; groups keep their inputs alone."""
    plain = kept(LLAMA, *each())
    assert plain - kept(LLAMA, *each("mlp_act")) == LAYERS * 2 * WIDTH * VALUES
    per_layer = HIDDEN * VALUES
    whole, halves = kept(LLAMA, *each("layer")), kept(LLAMA, *[Span(2, frozenset(("layer",)))] * 2)
    assert whole - halves == 2 * per_layer
    some = kept(LLAMA, *each("layer")[:1], *each()[1:])
    assert LAYERS * (plain - some) == plain - whole


class Products(TorchDispatchMode):
    """Counts matrix products that really run."""

    count = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.count += func is torch.ops.aten.mm.default
        return func(*args, **(kwargs or {}))


def test_the_activation_is_rebuilt_without_its_product() -> None:
    """The pass that brings the activation back runs no matrix product a second time."""
    counts = []
    for spans in (each(), each("mlp_act")):
        model = Decoder(ModelConfig(**LLAMA).resolve())
        apply_recompute(model, spans)
        with Products() as products:
            model(torch.zeros(1, 8, dtype=torch.long)).sum().backward()
        counts.append(products.count)
    assert counts[0] == counts[1] > 0
