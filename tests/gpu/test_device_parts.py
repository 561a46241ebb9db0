"""What one accelerator can show: its numbers against those of the CPU, and its memory where that is the point.

Everything here runs on whatever device the process finds (CUDA, Ascend NPU); without one it is skipped.
"""

from __future__ import annotations

import gc
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from modellink import device
from modellink.config.recompute_plan import recompute_plan
from modellink.config.schema import Config, ModelConfig, OptimizerConfig, ParallelConfig
from modellink.models.blockwise import BlockMask, ScoreRule, attend, attend_backward, merge_
from modellink.models.decoder import Decoder
from modellink.models.moe import Experts
from modellink.optim.adamw import MixedPrecisionAdamW
from modellink.parallel.apply import ParallelModel, build_model
from modellink.parallel.offload import apply_swap
from modellink.parallel.recompute import apply_recompute
from modellink.parallel.topology import Topology
from modellink.train.engine import Engine
from modellink.train.losses import token_cross_entropy
from modellink.train.sliced_losses import SlicedLosses

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not device.is_accelerated(), reason="this machine has no accelerator that torch finds"),
]

CPU = torch.device("cpu")
FIELDS: dict[str, Any] = {
    "num_layers": 4, "hidden_size": 512, "num_attention_heads": 8, "num_key_value_heads": 4, "ffn_hidden_size": 1024,
    "vocab_size": 32000, "padded_vocab_size": 32000, "max_position_embeddings": 2048, "normalization": "RMSNorm",
    "activation": "silu", "gated_mlp": True, "mlp_bias": False, "qkv_bias": False, "attention_output_bias": False,
    "position_embedding": "rope", "tie_word_embeddings": False, "attention_dropout": 0.0, "hidden_dropout": 0.0,
}  # fmt: skip


def model_config(**fields: Any) -> ModelConfig:
    return ModelConfig(**(FIELDS | fields)).resolve()


def decoder(place: torch.device, dtype: torch.dtype, parallel: ParallelConfig | None = None, **fields: Any) -> Decoder:
    """The same weights wherever it lives."""
    torch.manual_seed(0)
    model = Decoder(model_config(**fields)).cast(dtype)
    if parallel is not None:
        apply_recompute(model, *recompute_plan(parallel, [range(len(model.layers))], 0, len(model.layers)))
        apply_swap(model, parallel)
    return model.to(place)


def tokens(rows: int, length: int, place: torch.device) -> Tensor:
    return torch.randint(0, 32000, (rows, length), generator=torch.Generator().manual_seed(1)).to(place)


def error(ours: Tensor, reference: Tensor) -> float:
    """Norm of the difference over the norm of the reference."""
    return ((ours.double().to(CPU) - reference.double().to(CPU)).norm() / reference.double().norm()).item()


def peak(work: Callable[[], Any]) -> tuple[Any, int]:
    """(result, bytes allocated at most beyond what was there before)."""
    gc.collect()
    device.synchronize()
    device.empty_cache()
    device.reset_peak_memory()
    before = device.memory_stats().allocated
    result = work()
    device.synchronize()
    return result, device.memory_stats().peak_allocated - before


def gradients(model: Decoder) -> dict[str, Tensor]:
    return {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}


def test_a_decoder_has_the_logits_and_gradients_of_the_cpu() -> None:
    found = []
    for place in (CPU, device.current_device()):
        model = decoder(place, torch.float32, num_layers=2, output_logit_softcap=20.0)
        logits = model(tokens(2, 128, place))
        logits.logsumexp(-1).sum().backward()
        found.append((logits.detach(), gradients(model)))
    assert error(found[1][0], found[0][0]) < 1e-4
    for name, reference in found[0][1].items():
        assert error(found[1][1][name], reference) < 1e-3, name


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("mask", [BlockMask(), BlockMask(0, True), BlockMask(0, True, 100)])
def test_attention_by_blocks_is_that_of_the_cpu(mask: BlockMask, dtype: torch.dtype) -> None:
    """Two halves of the keys, merged; the reference is one softmax in float64 on the CPU."""
    generator = torch.Generator().manual_seed(0)
    q, grad = (torch.randn(2, 8, 256, 64, generator=generator).to(dtype) for _ in range(2))
    k, v = (torch.randn(2, 4, 256, 64, generator=generator).to(dtype) for _ in range(2))
    leaves = [x.double().requires_grad_() for x in (q, k, v)]
    scores = leaves[0] @ leaves[1].repeat_interleave(2, 1).mT / 8
    hidden = ~mask.allowed(slice(0, 256), 256, CPU)
    expected = scores.masked_fill(hidden, float("-inf")).softmax(-1) @ leaves[2].repeat_interleave(2, 1)
    expected.backward(grad.double())

    place, rule = device.current_device(), ScoreRule(0.125)
    q, k, v, grad = (x.to(place) for x in (q, k, v, grad))
    halves = (slice(0, 128), slice(128, 256))
    masks = [BlockMask(-half.start, mask.causal, mask.window) for half in halves]
    out, lse = torch.zeros(q.shape, device=place), torch.full(q.shape[:-1], float("-inf"), device=place)
    for half, part in zip(halves, masks, strict=True):
        merge_(out, lse, *attend(q, k[:, :, half], v[:, :, half], rule, part))
    bound = 1e-4 if dtype == torch.float32 else 2e-2
    assert error(out, expected) < bound
    dq = torch.zeros_like(out)
    for half, part in zip(halves, masks, strict=True):
        here = attend_backward(grad, q, k[:, :, half], v[:, :, half], out.to(dtype), lse, rule, part)
        dq += here[0]
        assert error(here[1], leaves[1].grad[:, :, half]) < bound
        assert error(here[2], leaves[2].grad[:, :, half]) < bound
    assert error(dq, leaves[0].grad) < bound


@pytest.mark.parametrize("recompute", [None, "selective"])
def test_swapping_lowers_the_peak_and_changes_no_gradient(recompute: str | None) -> None:
    place, modules = device.current_device(), "input_layernorm,self_attention,post_attention_layernorm,mlp"
    found: list[tuple[dict[str, Tensor], int]] = []
    for swap in (False, True):
        parallel = ParallelConfig(swap_attention=swap, swap_modules=modules, recompute_granularity=recompute)
        model = decoder(place, torch.bfloat16, parallel, num_layers=12, padded_vocab_size=256, vocab_size=256)
        inputs = tokens(4, 2048, place) % 256

        def step(model: Decoder = model, inputs: Tensor = inputs) -> dict[str, Tensor]:
            for parameter in model.parameters():
                parameter.grad = None
            model(inputs).float().logsumexp(-1).sum().backward()
            return gradients(model)

        step()  # warm: workspaces of libraries, pinned buffers
        found.append(peak(step))
    (plain, without), (swapped, with_swap) = found
    assert with_swap < 0.7 * without
    for name, reference in plain.items():
        assert error(swapped[name], reference) < 1e-2, name  # some kernels add up in any order


def test_split_masters_have_the_bits_of_separate_ones_and_follow_the_cpu() -> None:
    def run(place: torch.device, master: Any) -> list[Tensor]:
        generator = torch.Generator().manual_seed(0)
        shapes = {"layers.0.weight": (300, 200), "layers.0.bias": (200,)}
        params = {n: nn.Parameter(torch.randn(s, generator=generator).bfloat16().to(place)) for n, s in shapes.items()}
        optimizer = MixedPrecisionAdamW(params.items(), lr=1e-2, weight_decay=0.1, master=master)
        for _ in range(5):
            for param in params.values():
                param.grad = torch.randn(param.shape, generator=generator).bfloat16().to(place)
            optimizer.step(0.5)
        return [master.clone() for master in optimizer.master_state().values()]

    here = device.current_device()
    split, separate, reference = run(here, "split"), run(here, "separate"), run(CPU, "separate")
    for ours, same, theirs in zip(split, separate, reference, strict=True):
        assert torch.equal(ours, same)
        assert error(ours, theirs) < 1e-5


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_grouped_products_of_experts_are_those_of_a_loop(dtype: torch.dtype) -> None:
    fields = {"num_experts": 8, "moe_ffn_hidden_size": 256, "router_topk": 2}
    counts = torch.tensor([100, 0, 28, 300, 1, 7, 64, 12])
    rows = torch.randn(int(counts.sum()), 512, generator=torch.Generator().manual_seed(2)).to(dtype)
    found = []
    for place, grouped in ((CPU, False), (device.current_device(), False), (device.current_device(), True)):
        torch.manual_seed(0)
        experts = Experts(model_config(**fields, moe_grouped_gemm=grouped)).to(dtype).to(place)
        x = rows.to(place).requires_grad_()
        out = experts(x, counts.to(place))
        out.square().sum().backward()
        assert x.grad is not None
        found.append([out.detach(), x.grad, *(p.grad for p in experts.parameters())])
    bound = 1e-4 if dtype == torch.float32 else 2e-2
    for ours in found[1:]:
        for mine, reference in zip(ours, found[0], strict=True):
            assert error(mine, reference) < bound


def test_sliced_losses_lower_the_peak() -> None:
    place, found = device.current_device(), []
    for slices in (1, 8):
        model = decoder(place, torch.bfloat16, num_layers=1)
        inputs = tokens(4, 2048, place)

        def losses_of(logits: Tensor, labels: Tensor) -> Tensor:
            return token_cross_entropy(logits, labels, 32000)

        model.output_losses = SlicedLosses(losses_of, slices) if slices > 1 else None

        def step(model: Decoder = model, inputs: Tensor = inputs) -> tuple[Tensor, dict[str, Tensor]]:
            for parameter in model.parameters():
                parameter.grad = None
            out = model(inputs, labels=inputs)
            losses = out if model.output_losses is not None else losses_of(out, inputs)
            losses.sum().backward()
            return losses.detach(), gradients(model)

        step()
        found.append(peak(step))
    ((whole, whole_gradients), without), ((sliced, sliced_gradients), with_slices) = found
    assert with_slices < 0.5 * without
    assert error(sliced, whole) < 1e-3
    for name, reference in whole_gradients.items():
        assert error(sliced_gradients[name], reference) < 2e-2, name


@pytest.mark.parametrize("optimizer", ["adam", "adamw8bit", "cadam", "muon", "sgd"])
def test_states_on_the_host_lower_the_peak_and_train_alike(optimizer: str) -> None:
    place, found = device.current_device(), []
    inputs = tokens(1, 64, place)
    for on_host in (False, True):
        options = OptimizerConfig(optimizer=optimizer, lr=1e-4, bf16=True, cpu_optimizer=on_host)
        config = Config(model=model_config(), parallel=ParallelConfig(), optimizer=options)

        def run(config: Config = config) -> tuple[list[float], dict[str, Tensor], ParallelModel]:
            topology = Topology(config.parallel, 1)
            model = build_model(config.model, config.parallel, topology, place, torch.bfloat16, 1)
            engine = Engine(model, config)
            losses = [engine.step({"tokens": inputs, "labels": inputs}, 1).loss.item() for _ in range(4)]
            weights = {name: master.float().to(CPU) for name, master in engine.optimizer.master_state().items()}
            return losses, weights, model

        found.append(peak(run))
    ((losses, weights, model), beside), ((host_losses, host_weights, _), on_host_peak) = found
    parameters = sum(parameter.numel() for _, parameter in model.named_parameters())
    states = {"adam": 12, "adamw8bit": 6, "cadam": 6, "muon": 8, "sgd": 8}[optimizer]
    # what is left: a device keeps weights and gradients; its buckets of temporaries are smaller, not larger
    assert beside - on_host_peak > 0.8 * states * parameters
    assert torch.allclose(torch.tensor(host_losses), torch.tensor(losses), rtol=1e-2)
    for name, reference in weights.items():
        assert error(host_weights[name], reference) < 1e-2, name


def test_packed_documents_are_those_of_the_cpu() -> None:
    found = []
    for place in (CPU, device.current_device()):
        documents = torch.tensor([[0] * 30 + [1] * 34, [0] * 50 + [1] * 14], device=place)
        model = decoder(place, torch.float32, num_layers=1)
        found.append(model(tokens(2, 64, place), documents=documents).detach())
    assert error(found[1], found[0]) < 1e-4
