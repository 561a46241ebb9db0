"""cadam, Muon and 8-bit AdamW against float64 loops of their formulas; the packed forms of states against theirs."""

import copy
from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn

from modellink.optim.adamw import MixedPrecisionAdamW
from modellink.optim.cadam import MixedPrecisionCAdam
from modellink.optim.mixed_precision import MixedPrecisionOptimizer
from modellink.optim.muon import MixedPrecisionMuon, is_hidden_matrix, orthogonalise
from modellink.optim.states import BlockState, RowScaledState, dynamic_map

SHAPES = {
    "embed_tokens.weight": (37, 11),
    "layers.0.mlp.up_proj.weight": (23, 9),
    "layers.0.mlp.down_proj.weight": (9, 23),
    "layers.0.mlp.up_proj.bias": (23,),
    "layers.0.mlp.experts.up_proj": (3, 7, 5),
    "layers.0.mlp.experts.up_proj_bias": (3, 7),
    "layers.0.mlp.shared_expert_gate.weight": (1, 9),
    "norm.weight": (11,),
}
MATRICES = ("layers.0.mlp.up_proj.weight", "layers.0.mlp.down_proj.weight", "layers.0.mlp.experts.up_proj")
UNDECAYED = ("norm.weight", "layers.0.mlp.up_proj.bias", "layers.0.mlp.experts.up_proj_bias")
COMMON = {"lr": 3e-3, "weight_decay": 0.1}
BUILDERS: dict[str, Callable[..., MixedPrecisionOptimizer]] = {
    "cadam": MixedPrecisionCAdam,
    "muon": MixedPrecisionMuon,
    "adamw8bit": lambda *args, **kwargs: MixedPrecisionAdamW(*args, eight_bits=True, **kwargs),
}


def make_params(dtype: torch.dtype = torch.float32, seed: int = 0, shapes=SHAPES) -> dict[str, nn.Parameter]:
    generator = torch.Generator().manual_seed(seed)
    return {name: nn.Parameter(torch.randn(s, generator=generator).to(dtype)) for name, s in shapes.items()}


def set_grads(params: dict[str, nn.Parameter], step: int, dtype: torch.dtype | None = None) -> None:
    generator = torch.Generator().manual_seed(1000 + step)
    for param in params.values():
        # rows of very different sizes, as embeddings of common and rare words have
        sizes = torch.logspace(-6, 1, param.shape[0]).view(-1, *[1] * (param.ndim - 1))
        grad = torch.randn(param.shape, generator=generator) * sizes
        if dtype in (None, param.dtype):
            param.grad = grad.to(param.dtype)
        else:
            param.main_grad = grad.to(dtype)


def decay(name: str, lr: float) -> float:
    return 1.0 if name in UNDECAYED else 1 - lr * COMMON["weight_decay"]


def half_rows(value: Tensor) -> Tensor:
    """What fp16 with a power-of-two scale per row keeps of a float64 tensor: 11 bits of mantissa."""
    mantissa, exponent = torch.frexp(value)
    return torch.ldexp((mantissa * 2**11).round() / 2**11, exponent)


@pytest.mark.parametrize("bucket_elements", [1 << 20, 30])
def test_cadam_is_its_formula(bucket_elements: int) -> None:
    params = make_params()
    optimizer = MixedPrecisionCAdam(
        params.items(), beta=0.965, master="none", bucket_elements=bucket_elements, **COMMON
    )
    weights = {name: p.detach().double() for name, p in params.items()}
    momenta = {name: torch.zeros_like(w) for name, w in weights.items()}
    for step in range(1, 31):
        lr = COMMON["lr"] / step
        for group in optimizer.param_groups:
            group["lr"] = lr
        set_grads(params, step)
        grads = {name: p.grad.double() * 0.5 for name, p in params.items()}
        optimizer.step(0.5)
        for name in params:
            momenta[name] = 0.965 * momenta[name] + 0.035 * grads[name]
            weights[name] = weights[name] * decay(name, lr) - lr * momenta[name].sign()
            momenta[name] = half_rows(momenta[name])
    for name, param in params.items():
        torch.testing.assert_close(param.detach().double(), weights[name], rtol=1e-5, atol=1e-6)
        torch.testing.assert_close(
            optimizer.state_dict()[f"momentum.{name}"].double(), momenta[name], rtol=2**-11 * 1.01, atol=1e-20
        )


def test_cadam_leaves_what_never_had_a_gradient() -> None:
    param = nn.Parameter(torch.ones(3, 4))
    optimizer = MixedPrecisionCAdam([("w", param)], lr=0.1, weight_decay=0.0)
    for _ in range(3):
        param.grad = torch.tensor([[0.0], [1e-30], [-1e30]]) * torch.ones(3, 4)
        optimizer.step()
    torch.testing.assert_close(param.detach(), torch.tensor([[1.0], [0.7], [1.3]]).expand(3, 4))


def test_rows_keep_eleven_bits_whatever_their_size_and_their_company() -> None:
    generator = torch.Generator().manual_seed(0)
    sizes = torch.logspace(-14, 30, 64)[:, None]
    value = torch.randn(64, 96, generator=generator) * sizes
    whole = RowScaledState(nn.Parameter(torch.zeros(64, 96)))
    whole.write(0, value.numel(), value.view(-1).clone())
    kept = whole.read(0, value.numel()).view_as(value)
    assert ((kept - value).abs() <= value.abs() * 2.0**-11 + sizes * 1e-11).all()
    # columns 0..31 alone, as a rank has them: the same bits, though their largest value is another
    part = RowScaledState(nn.Parameter(torch.zeros(64, 32)))
    part.write(0, 64 * 32, value[:, :32].reshape(-1))
    assert not torch.equal(part.tensors()[1], whole.tensors()[1])
    assert torch.equal(part.read(0, 64 * 32).view(64, 32), kept[:, :32])
    # and packing what was unpacked changes nothing
    again = RowScaledState(nn.Parameter(torch.zeros(64, 96)))
    again.write(0, kept.numel(), kept.reshape(-1).clone())
    assert torch.equal(again.read(0, kept.numel()).view_as(kept), kept)


def test_a_row_that_is_not_finite_stays_so() -> None:
    state = RowScaledState(nn.Parameter(torch.zeros(2, 3)))
    for bad in (float("nan"), float("inf")):
        state.write(0, 6, torch.tensor([1.0, bad, 2.0, 1.0, 2.0, 3.0]))
        read = state.read(0, 6)
        assert not read[1].isfinite() and torch.equal(read[3:], torch.tensor([1.0, 2.0, 3.0]))


def reference_orthogonal(matrix: Tensor, steps: int) -> Tensor:
    """The iteration on singular values: a s + b s^3 + c s^5 with s normalised by the Frobenius norm, in float64."""
    u, s, vh = torch.linalg.svd(matrix.double(), full_matrices=False)
    s = s / s.square().sum().sqrt()
    for _ in range(steps):
        s = 3.4445 * s - 4.7750 * s**3 + 2.0315 * s**5
    return (u * s) @ vh


@pytest.mark.parametrize("shape", [(9, 23), (23, 9), (12, 12)])
def test_orthogonalisation_maps_singular_values(shape: tuple[int, int]) -> None:
    matrix = torch.randn(shape, generator=torch.Generator().manual_seed(1))
    want = reference_orthogonal(matrix, 5)
    torch.testing.assert_close(orthogonalise(matrix, 5).double(), want, rtol=1e-4, atol=1e-5)
    values = torch.linalg.svdvals(orthogonalise(matrix.bfloat16(), 5).float())
    assert values.min() > 0.6 and values.max() < 1.3
    assert torch.count_nonzero(orthogonalise(torch.zeros(shape), 5)) == 0


def test_muon_is_its_formula_and_adamw_elsewhere() -> None:
    params, others = make_params(), make_params()
    optimizer = MixedPrecisionMuon(params.items(), momentum=0.9, dtype=torch.float32, master="none", **COMMON)
    adamw = MixedPrecisionAdamW(others.items(), master="none", **COMMON)
    weights = {name: params[name].detach().double() for name in MATRICES}
    momenta = {name: torch.zeros_like(w) for name, w in weights.items()}
    assert {name for name, p in params.items() if is_hidden_matrix(name, p)} == set(MATRICES)
    for step in range(10):
        set_grads(params, step)
        set_grads(others, step)
        for name in MATRICES:
            grad = params[name].grad.double()
            momenta[name] = 0.9 * momenta[name] + 0.1 * grad
            ahead = 0.9 * momenta[name] + 0.1 * grad
            stack = ahead if ahead.ndim == 3 else ahead[None]
            update = torch.stack([reference_orthogonal(matrix, 5) for matrix in stack]).view_as(ahead)
            size = 0.2 * max(ahead.shape[-2:]) ** 0.5
            weights[name] = weights[name] * decay(name, COMMON["lr"]) - COMMON["lr"] * size * update
        optimizer.step()
        adamw.step()
    for name, param in params.items():
        if name in MATRICES:
            torch.testing.assert_close(param.detach().double(), weights[name], rtol=1e-5, atol=1e-5)
        else:
            assert torch.equal(param, others[name]), name
    keys = {key.partition(".")[0] for key in optimizer.state_dict() if key.endswith(MATRICES)}
    assert keys == {"momentum_buffer"}


def test_an_update_of_muon_is_as_large_as_one_of_adamw() -> None:
    param = nn.Parameter(torch.zeros(64, 160))
    optimizer = MixedPrecisionMuon([("layers.0.w", param)], lr=1.0, weight_decay=0.0)
    param.grad = torch.randn(64, 160, generator=torch.Generator().manual_seed(0))
    optimizer.step()
    # AdamW's is 0.2 to 0.4 (Liu et al.)
    assert 0.15 < param.detach().square().mean().sqrt() < 0.3


def test_eight_bits_are_the_nearest_of_the_map() -> None:
    generator = torch.Generator().manual_seed(2)
    for signed in (True, False):
        value = torch.randn(1000, generator=generator) * torch.logspace(-3, 3, 1000)
        value = value if signed else value.square()
        state = BlockState(nn.Parameter(torch.zeros(10, 100)), signed)
        state.write(0, 1000, value.clone())
        read = state.read(0, 1000)
        numbers = dynamic_map(signed).double()
        assert len(numbers) == 256 and numbers.diff().min() > 0
        for start in range(0, 1000, 256):
            block = value[start : start + 256].double()
            choices = numbers * block[block.abs().argmax()]
            nearest = (block[:, None] - choices).abs()
            if not signed:
                nearest[:, 0] = torch.where(block > 0, torch.inf, nearest[:, 0])
            want = nearest.min(1).values
            error = (read[start : start + 256].double() - block).abs()
            assert (error <= want + 1e-6 * block.abs().max()).all()
            if not signed:
                assert (read[start : start + 256] > 0).all()


@pytest.mark.parametrize("signed", [True, False])
def test_eight_bit_codes_are_those_of_a_binary_search(signed: bool):
    """On both sides of every border, on the numbers themselves, and on values of every size."""
    numbers = dynamic_map(signed)
    borders = (numbers[1:] + numbers[:-1]) / 2
    beside = [torch.nextafter(borders, borders + sign) for sign in (1, -1)]
    drawn = torch.randn(1 << 16, generator=torch.Generator().manual_seed(0)) * 10.0 ** -torch.arange(16).repeat(1 << 12)
    values = torch.cat([numbers, borders, *beside, drawn]).clamp(-0.999 if signed else 0, 1)
    values = torch.nn.functional.pad(values, (0, -values.numel() % 255)).view(-1, 255)
    blocks = torch.cat([values, torch.ones(len(values), 1)], 1)  # a largest value of 1 is a scale of 1
    state = BlockState(torch.zeros(blocks.shape), signed)
    state.write(0, blocks.numel(), blocks.view(-1))
    codes = torch.bucketize(blocks, borders, right=True)
    if not signed:
        codes = torch.maximum(codes, (blocks > 0).long())
    torch.testing.assert_close(state.read(0, blocks.numel()).view(blocks.shape), numbers[codes], rtol=0, atol=0)


@pytest.mark.parametrize("signed", [True, False])
def test_eight_bits_are_those_of_torchao(signed: bool) -> None:
    from torchao.optim.quant_utils import create_dynamic_map, dequant_with_qmap, quantize_8bit_with_qmap, scale_tensor

    value = torch.randn(4096, generator=torch.Generator().manual_seed(3))
    value = value if signed else value.square().clamp(min=1e-5)
    value[::256] = 6.0 if signed else 20.0  # its scales have no sign
    numbers = torch.tensor(create_dynamic_map(signed))
    torch.testing.assert_close(dynamic_map(signed), numbers, rtol=1e-6, atol=0)
    scaled, scale = scale_tensor(value, 256)
    want = dequant_with_qmap(quantize_8bit_with_qmap(scaled, numbers), numbers, scale)
    state = BlockState(nn.Parameter(torch.zeros(4096)), signed)
    state.write(0, 4096, value.clone())
    torch.testing.assert_close(state.read(0, 4096), want, rtol=1e-6, atol=0)


def test_eight_bit_adamw_stays_near_adamw() -> None:
    shapes = {"large.weight": (64, 80), "small.weight": (8, 8)}
    ours, exact = make_params(shapes=shapes), make_params(shapes=shapes)
    optimizer = MixedPrecisionAdamW(ours.items(), master="none", eight_bits=True, betas=(0.9, 0.95), **COMMON)
    reference = MixedPrecisionAdamW(exact.items(), master="none", betas=(0.9, 0.95), **COMMON)
    start = copy.deepcopy(ours)
    for step in range(30):
        for params in (ours, exact):
            set_grads(params, step)
        optimizer.step()
        reference.step()
    assert torch.equal(ours["small.weight"], exact["small.weight"])
    moved = (exact["large.weight"] - start["large.weight"]).norm()
    assert 0 < (ours["large.weight"] - exact["large.weight"]).norm() < 0.1 * moved


@pytest.mark.parametrize("name", BUILDERS)
@pytest.mark.parametrize(("dtype", "master"), [("float32", "none"), ("bfloat16", "separate"), ("bfloat16", "split")])
def test_resume_from_state_is_bitwise(name: str, dtype: str, master: str) -> None:
    shapes = SHAPES | {"layers.1.large.weight": (70, 65)}

    def train(optimizer: MixedPrecisionOptimizer, params: dict, steps: range) -> None:
        for step in steps:
            set_grads(params, step)
            optimizer.step(0.5)

    whole = make_params(getattr(torch, dtype), shapes=shapes)
    straight = BUILDERS[name](whole.items(), master=master, **COMMON)
    train(straight, whole, range(5))
    saved = copy.deepcopy((straight.state_dict(), straight.master_state()))
    train(straight, whole, range(5, 10))
    params = make_params(getattr(torch, dtype), seed=5, shapes=shapes)
    resumed = BUILDERS[name](params.items(), master=master, **COMMON)
    resumed.load_state_dict(saved[0])
    resumed.load_master_state(saved[1])
    train(resumed, params, range(5, 10))
    masters = straight.master_state()
    assert all(torch.equal(value, masters[key]) for key, value in resumed.master_state().items())
    states = straight.state_dict()
    assert all(torch.equal(torch.as_tensor(v), torch.as_tensor(states[k])) for k, v in resumed.state_dict().items())


@pytest.mark.parametrize("name", BUILDERS)
def test_split_has_the_bits_of_separate(name: str) -> None:
    masters = []
    for master in ("separate", "split"):
        params = make_params(torch.bfloat16)
        optimizer = BUILDERS[name](params.items(), master=master, bucket_elements=60, **COMMON)
        for step in range(5):
            set_grads(params, step)
            optimizer.step()
        masters.append(optimizer.master_state())
    assert all(torch.equal(masters[0][key], masters[1][key]) for key in SHAPES)


@pytest.mark.parametrize(
    ("name", "weights", "grads", "master", "total", "held"),
    [
        ("cadam", "float32", "float32", "none", 10, 2),
        ("cadam", "bfloat16", "float32", "separate", 12, 6),
        ("cadam", "bfloat16", "float32", "split", 10, 4),
        ("cadam", "bfloat16", "bfloat16", "split", 8, 4),
        ("muon", "float32", "float32", "none", 12, 4),
        ("muon", "bfloat16", "float32", "separate", 14, 8),
        ("muon", "bfloat16", "float32", "split", 12, 6),
        ("muon", "bfloat16", "bfloat16", "split", 10, 6),
        ("adamw8bit", "float32", "float32", "none", 10, 2),
        ("adamw8bit", "bfloat16", "float32", "separate", 12, 6),
        ("adamw8bit", "bfloat16", "float32", "split", 10, 4),
        ("adamw8bit", "bfloat16", "bfloat16", "split", 8, 4),
    ],
)
def test_bytes_per_parameter(name, weights, grads, master, total, held) -> None:
    params = make_params(getattr(torch, weights), shapes={"layers.0.w": (512, 512)})
    optimizer = BUILDERS[name](params.items(), master=master, **COMMON)
    set_grads(params, 0, dtype=getattr(torch, grads))
    optimizer.step()
    # a scale a row of 512, or two a block of 256
    scales = {"cadam": 4 / 512, "muon": 0.0, "adamw8bit": 2 * 4 / 256}[name]
    assert sum(optimizer.bytes_per_parameter().values()) == pytest.approx(total + scales, abs=1e-9)
    assert optimizer.state_bytes_per_parameter() == pytest.approx(held + scales, abs=1e-9)
