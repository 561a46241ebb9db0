"""`--swap-attention`: what is swapped is not held during forward, moves once, comes back once, and changes no bit."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from modellink.config.load import load_config
from modellink.config.recompute_plan import recompute_plan
from modellink.config.schema import ModelConfig, ParallelConfig
from modellink.errors import ModelLinkError
from modellink.models.decoder import Decoder
from modellink.parallel.memory import estimate_memory
from modellink.parallel.meter import Meter
from modellink.parallel.offload import Swap, apply_swap
from modellink.parallel.recompute import apply_recompute

LAYERS, HIDDEN, ROWS, LENGTH, VOCABULARY = 3, 32, 2, 64, 48
EVERYTHING = "input_norm,self_attention,post_attention_norm,mlp"
ACTIVATION = ROWS * LENGTH * HIDDEN * 4  # bytes of one [B, S, D]


def decoder(swap: str | None, recompute: dict[str, Any] | None = None, **fields: Any) -> tuple[Decoder, Swap | None]:
    torch.manual_seed(1)
    base: dict[str, Any] = {
        "num_layers": LAYERS, "hidden_size": HIDDEN, "num_attention_heads": 4, "ffn_hidden_size": 48,
        "padded_vocab_size": VOCABULARY, "normalization": "RMSNorm", "position_embedding": "rope", "gated_mlp": True,
        "activation": "silu", "attention_dropout": 0.0, "hidden_dropout": 0.0,
    }  # fmt: skip
    model = Decoder(ModelConfig(**(base | fields)).resolve())
    parallel = ParallelConfig(**(recompute or {}))
    if swap is not None:
        parallel.swap_attention, parallel.swap_modules = True, swap
    apply_recompute(model, *recompute_plan(parallel, [range(len(model.layers))], 0, len(model.layers)))
    return model, apply_swap(model, parallel)


def tokens(seed: int = 0) -> Tensor:
    return torch.randint(0, VOCABULARY, (ROWS, LENGTH), generator=torch.Generator().manual_seed(seed))


def held_after_forward(swap: str | None, **options: Any) -> tuple[int, Swap | None]:
    """Bytes that a forward pass left on the device; what was moved to host memory is not there."""
    model, swapped = decoder(swap, **options)
    with Meter() as meter:
        out = model(tokens())
        held = meter.live
    assert out.requires_grad
    return held, swapped


def test_what_is_swapped_is_not_held_during_forward() -> None:
    plain, _ = held_after_forward(None)
    attention, swap = held_after_forward("input_layernorm,self_attention,post_attention_layernorm")
    everything, all_swapped = held_after_forward(EVERYTHING)
    assert swap is not None and all_swapped is not None
    assert swap.restored_bytes == all_swapped.restored_bytes == 0
    # the input of the MLP is saved by the norm's successor, so it stays; all else of these modules is gone
    saved = plain - attention
    assert 0.9 * swap.moved_bytes <= saved <= swap.moved_bytes
    assert plain - everything >= 0.95 * all_swapped.moved_bytes > saved
    # what is left of the layers is small: rotation tables, statistics of norms, parameters' neighbours
    assert everything < plain / 3


def test_a_shared_tensor_moves_once_and_comes_back_once() -> None:
    model, swap = decoder("self_attention", num_layers=1)
    assert swap is not None
    model(tokens()).sum().backward()
    # input of q, k and v; rotated q and k, v; output of attention for two: its own backward and that of o_proj; lse
    heads = ROWS * 4 * LENGTH * 4
    assert 5 * ACTIVATION <= swap.moved_bytes <= 5 * ACTIVATION + heads
    assert swap.restored_bytes == swap.moved_bytes


MODELS: dict[str, dict[str, Any]] = {
    "llama": {},
    "capped": {"attention_logit_softcap": 5.0, "sandwich_norm": True},
    "moe": {"num_experts": 4, "moe_ffn_hidden_size": 24, "router_topk": 2, "aux_loss_coeff": 0.05},
}
RECOMPUTE: dict[str, dict[str, Any]] = {
    "nothing": {},
    "selective": {"recompute_granularity": "selective"},
    "activations": {"recompute_activation_function": True},
    "modules": {"recompute_granularity": "selective", "recompute_modules": ["layernorm", "mlp"]},
    "block": {"recompute_granularity": "full", "recompute_method": "block", "recompute_num_layers": 1},
}


@pytest.mark.parametrize("recompute", RECOMPUTE)
@pytest.mark.parametrize("kind", MODELS)
def test_not_a_bit_changes(kind: str, recompute: str) -> None:
    found = []
    for swap in (None, EVERYTHING):
        model, swapped = decoder(swap, RECOMPUTE[recompute], **MODELS[kind])
        # two micro-batches under way, their backward passes in either order
        outputs = [model(tokens(seed)) for seed in range(2)]
        for out in reversed(outputs):
            out.logsumexp(-1).sum().backward()
        found.append({name: p.grad for name, p in model.named_parameters()})
        assert swapped is None or 0 < swapped.moved_bytes == swapped.restored_bytes
    for name, gradient in found[0].items():
        assert torch.equal(gradient, found[1][name]), name


def test_backward_may_visit_a_graph_twice() -> None:
    """As a zero-bubble pipeline does: gradients of inputs first, of weights later."""
    plain, _ = decoder(None)
    model, swap = decoder(EVERYTHING)
    assert swap is not None
    for each in (plain, model):
        loss = each(tokens()).logsumexp(-1).sum()
        (first,) = torch.autograd.grad(loss, [each.embed_tokens.weight], retain_graph=True)
        loss.backward()
        assert torch.equal(first, each.embed_tokens.weight.grad)
    for (name, ours), theirs in zip(model.named_parameters(), plain.parameters(), strict=True):
        assert torch.equal(ours.grad, theirs.grad), name
    assert swap.moved_bytes < swap.restored_bytes <= 2 * swap.moved_bytes


def test_device_copies_follow_backward() -> None:
    """No more than two modules of a pass are on the device at a time."""
    model, swap = decoder(EVERYTHING, num_layers=6)
    assert swap is not None
    out = model(tokens())
    highest = 0
    copies = list(swap._copies.values())

    def look(_: Tensor) -> None:
        nonlocal highest
        highest = max(highest, sum(copy.host.numel() for copy in copies if copy.here is not None))

    for layer in model.layers.values():
        layer.input_layernorm.weight.register_hook(look)
    out.sum().backward(retain_graph=True)  # autograd lets go of nothing: what is dropped was dropped here
    assert 0 < highest < swap.moved_bytes / 4


def test_recomputed_layers_and_evaluation_save_nothing() -> None:
    model, swap = decoder(EVERYTHING)
    assert swap is not None
    with torch.no_grad():
        model(tokens())
    assert swap.moved_bytes == 0
    checkpoint(model, tokens(), use_reentrant=False).sum().backward()
    assert swap.moved_bytes == 0


def test_an_error_inside_a_module_leaves_no_hooks_behind() -> None:
    model, swap = decoder(EVERYTHING)
    assert swap is not None
    with pytest.raises(RuntimeError):
        model.layers["1"].self_attn(torch.zeros(1, 2, 3), rope=None, mask=None)
    moved, x = swap.moved_bytes, torch.ones(4096, requires_grad=True)
    x.exp().sum().backward()
    assert swap.moved_bytes == moved and torch.allclose(x.grad, x.exp())


COMMON = "--model tiny-llama --seq-length 64 --micro-batch-size 1 --train-iters 1 --lr 1e-3 --mock-data".split()


@pytest.mark.parametrize(
    ("flags", "words"),
    [
        (["--swap-modules", "self_atention"], ["'self_atention'", "self_attention", "mlp"]),
        (["--swap-modules", ""], ["--swap-modules", "input_layernorm"]),
        (["--recompute-granularity", "full"], ["--swap-attention", "--recompute-method block"]),
        (["--recompute-granularity", "operators"], ["--swap-attention", "operators"]),
        (["--compile"], ["--swap-attention", "--compile"]),
    ],
)
def test_what_cannot_be_swapped_is_refused(flags: list[str], words: list[str]) -> None:
    with pytest.raises(ModelLinkError) as caught:
        load_config([*COMMON, "--swap-attention", *flags], "train")
    assert all(word in str(caught.value) for word in words), caught.value


def test_the_estimate_knows_what_leaves_the_device() -> None:
    def activations(*flags: str) -> int:
        return estimate_memory(load_config([*COMMON, "--global-batch-size", "2", *flags], "train")).activations

    plain, attention = activations(), activations("--swap-attention")
    everything = activations("--swap-attention", "--swap-modules", EVERYTHING)
    assert plain > attention > everything > 0
    assert plain > activations("--output-layer-slice-num", "4") > activations("--output-layer-slice-num", "8")
    whole, beside = (
        estimate_memory(load_config([*COMMON, "--bf16", *flags], "train")) for flags in ([], ["--cpu-optimizer"])
    )
    assert whole.optimizer > beside.optimizer == 0 and whole.weights == beside.weights
