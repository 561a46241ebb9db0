"""Global sums on one process; tests/dist/test_optim_sharded.py has the sharded ones."""

import math

import pytest
import torch
from torch import nn

from modellink.optim.grad_norm import (
    clip_coefficient,
    count_zeros,
    global_grad_norm,
    global_params_norm,
    has_non_finite,
)


def params_with_grads(*grads: torch.Tensor | None) -> list[tuple[str, nn.Parameter]]:
    named = []
    for index, grad in enumerate(grads):
        param = nn.Parameter(torch.full((5,) if grad is None else grad.shape, 2.0))
        if grad is not None:
            param = nn.Parameter(param.detach().to(grad.dtype))
            param.grad = grad
        named.append((f"p{index}", param))
    return named


def test_norm_equals_torch():
    grads = [torch.randn(7, 5), torch.randn(3).to(torch.bfloat16), None, torch.empty(0, 4), torch.randn(6, 4).t()]
    want = torch.cat([g.reshape(-1).double() for g in grads if g is not None]).norm()
    norm = global_grad_norm(params_with_grads(*grads))
    assert norm.dtype == torch.float32
    assert norm.item() == pytest.approx(want.item(), rel=1e-6)
    assert global_params_norm(params_with_grads(*grads)).item() == pytest.approx(2 * math.sqrt(35 + 3 + 5 + 24))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_large_tensors_do_not_lose_precision(dtype: torch.dtype):
    # torch's own float32 norm on CPU is off by about 1e-4 at this size
    grad = torch.full((1 << 22,), 0.1, dtype=dtype)
    want = grad[0].double().item() * 2**11
    assert global_grad_norm(params_with_grads(grad)).item() == pytest.approx(want, rel=1e-7)


def test_main_grad_is_preferred_and_names_are_skipped():
    named = params_with_grads(torch.full((4,), 3.0), torch.full((9,), 5.0))
    named[0][1].main_grad = torch.ones(4)
    assert global_grad_norm(named, skip_names={"p1"}).item() == 2.0


def test_zeros_and_non_finite():
    named = params_with_grads(torch.tensor([0.0, 1.0, -0.0]), torch.zeros(2, 2), None, torch.empty(0))
    assert count_zeros(named).item() == 6
    assert not has_non_finite(named)
    for bad in (math.nan, math.inf, -math.inf):
        named[0][1].grad[1] = bad
        assert has_non_finite(named)


def test_no_gradients_at_all():
    assert global_grad_norm(params_with_grads(None)).item() == 0.0
    assert not has_non_finite(params_with_grads(None))


def test_clip_coefficient():
    assert clip_coefficient(torch.tensor(0.5), 1.0).item() == 1.0
    assert clip_coefficient(torch.tensor(4.0), 1.0).item() == pytest.approx(1 / 4.000001, rel=1e-6)
    assert clip_coefficient(torch.tensor(math.nan), 1.0).isnan()
