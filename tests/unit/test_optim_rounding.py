"""The split float32 master: exact for every bit pattern, rounding to nearest with ties away from zero."""

import numpy as np
import pytest
import torch

from modellink.optim.rounding import merge_float32, split_float32_


def floats(bits) -> torch.Tensor:
    return torch.from_numpy(np.asarray(bits, dtype=np.uint32).view(np.float32).copy())


def bits_of(x: torch.Tensor) -> np.ndarray:
    return x.contiguous().numpy().view(np.uint32)


EDGES = np.array(
    [0, 1, 0x7FFF, 0x8000, 0x8001, 0xFFFF, 0x007FFFFF, 0x00800000]  # zero, denormals, the smallest normal
    + [0x3F800000, 0x3F807FFF, 0x3F808000, 0x3F808001, 0x3F818000, 0x3FFF8000, 0x3FFFFFFF]  # ties, carries
    + [0x7F7FFFFF, 0x7F7F7FFF, 0x7F7F8000, 0x7F800000],  # the largest finite values, infinity
    dtype=np.uint32,
)


def patterns() -> np.ndarray:
    random = np.random.default_rng(0).integers(0, 2**32, size=1_000_000, dtype=np.uint32)
    every_upper = (np.arange(2**16, dtype=np.uint32) << 16) | 0x8000  # each exact tie
    return np.concatenate([EDGES, EDGES | 0x80000000, random, every_upper])


def test_round_trip_is_exact_for_every_pattern_that_is_a_number():
    bits = patterns()
    weight, remainder = split_float32_(floats(bits))
    assert (weight.dtype, remainder.dtype) == (torch.bfloat16, torch.int16)
    back = bits_of(merge_float32(weight, remainder))
    is_nan = np.isnan(floats(bits).numpy())
    assert np.array_equal(back[~is_nan], bits[~is_nan])
    assert np.isnan(back[is_nan].view(np.float32)).all()
    assert is_nan.any()


def test_weight_is_the_32_bit_formula():
    bits = patterns()
    numbers = bits[~np.isnan(floats(bits).numpy())]
    weight, _ = split_float32_(floats(numbers))
    want = ((numbers.astype(np.uint64) + 0x8000) >> 16).astype(np.uint16)
    assert np.array_equal(weight.view(torch.int16).numpy().view(np.uint16), want)


def test_differs_from_round_to_even_on_ties_only():
    bits = patterns()
    numbers = bits[~np.isnan(floats(bits).numpy())]
    weight, _ = split_float32_(floats(numbers))
    differs = (weight != floats(numbers).to(torch.bfloat16)).numpy()
    assert differs.any()
    assert (numbers[differs] & 0xFFFF == 0x8000).all()


@pytest.mark.parametrize("pattern", [0x7FFFFFFF, 0xFFFFFFFF, 0x7F800001, 0x7FC00000])
def test_nan_stays_nan(pattern: int):
    weight, remainder = split_float32_(floats([pattern]))
    assert weight.isnan().all()
    assert merge_float32(weight, remainder).isnan().all()


def test_empty():
    weight, remainder = split_float32_(torch.empty(0))
    assert merge_float32(weight, remainder).shape == (0,)
