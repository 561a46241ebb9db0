"""A float32 master weight stored as the bfloat16 weight plus 16 more bits.

What. Training in bfloat16 keeps a float32 master of every weight, because an update is usually smaller than half a
bfloat16 step. A separate master costs 4 bytes a parameter beside the 2 of the weight. But the weight is a rounded
master, so the two share information: the weight and 16 more bits hold the master exactly, 4 bytes a parameter for both.

How. A bfloat16 is the upper half of a float32. Let `bits` be the master as a 32-bit integer:

    weight    = (bits + 0x8000) >> 16          the upper half, plus one if the lower half is 0x8000 or more
    remainder = bits - (weight << 16)          -0x8000 .. 0x7fff: the lower half of `bits` read as int16
    bits      = (weight << 16) + remainder     the exact master again

Floats are sign and magnitude, so adding to the bits adds to the magnitude: this rounds to nearest, halves away from
zero. A carry out of the mantissa runs into the exponent, which is right up to and including infinity.

Why not torch's rounding. Round to nearest *even* cannot be inverted with 16 bits: 0x3f80_8000 goes down to 0x3f80 and
0x3f81_8000 up to 0x3f82, so both lower halves 0x8000 mean "half a step", one above and one below its weight, and as
int16 they are the same number: two masters would share one pair. The two rules differ on exact ties only, where both
are right. To make the split form bit-identical to a separate master, the separate form rounds in the same way.

Layout. In memory (little endian) a float32 is two int16: [lower, upper]. Splitting and merging are then two copies and
a carry: `lower >> 15` is -1 when the carry went up, else 0. No 32-bit intermediate is made.

Trade-off. The float32 master exists only while a bucket of parameters is updated, at the price of two extra passes over
those bytes. A NaN is made canonical first: NaNs near 0x7fffffff (what CUDA produces) would carry into the
sign bit, become a weight of -0.0 and so hide. Only the payload of a NaN is lost.
"""

from __future__ import annotations

import math
import sys

import torch
from torch import Tensor

assert sys.byteorder == "little", "the halves of a float32 are addressed in little-endian order"


def split_float32_(master_N: Tensor) -> tuple[Tensor, Tensor]:
    """Split contiguous float32 [N] into (bfloat16 weight [N], int16 remainder [N]); input NaNs become canonical."""
    master_N.nan_to_num_(nan=math.nan, posinf=math.inf, neginf=-math.inf)
    halves_N2 = master_N.view(torch.int16).view(-1, 2)
    remainder_N = halves_N2[:, 0].contiguous()
    weight_N = halves_N2[:, 1] - (remainder_N >> 15)
    return weight_N.view(torch.bfloat16), remainder_N


def merge_float32(weight_N: Tensor, remainder_N: Tensor) -> Tensor:
    """The exact float32 [N] that `split_float32_` took apart; both inputs contiguous, bfloat16 [N] and int16 [N]."""
    halves_N2 = torch.empty(weight_N.numel(), 2, dtype=torch.int16, device=weight_N.device)
    halves_N2[:, 0] = remainder_N
    torch.add(weight_N.view(torch.int16), remainder_N >> 15, out=halves_N2[:, 1])
    return halves_N2.view(-1).view(torch.float32)
