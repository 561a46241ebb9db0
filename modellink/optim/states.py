"""How a state that lies beside a parameter is kept in memory: in float32, as fp16 with a scale per row, or in 8 bits.

A rule of update computes in float32 whatever the form: the optimizer reads a piece of a state, updates it, and writes
it back. Checkpoints always hold the float32 value, placed as the parameter is, so every form can be saved and loaded
into any layout, and one optimizer's momentum can be read without knowing how it was packed.

Rows in fp16. A row (the last dimension of a matrix; a whole vector) shares one float32 scale: that of its largest value
over 65503, so that it just fits fp16, rounded up to a power of two. A power of two moves exponents and leaves mantissas
alone, hence what an element is rounded to does not depend on the others of its row. That matters where a row is cut
into columns for several ranks: each rank scales its own part, nobody communicates, and the numbers stay those of one
process. It also makes packing again what was unpacked exact, so a momentum survives any change of layout bit for bit.
(Values below 2^-30 of their row's largest lose bits, as fp16's subnormals do.)

Blocks in 8 bits (Dettmers et al., arXiv:2110.02861). 256 neighbours share one float32 scale, their largest value; each
is the nearest of 256 numbers in (-1, 1] (or [0, 1]) that are spread like floats with a decimal exponent: the smaller
the exponent, the fewer bits for the fraction. Two things differ from the paper. The scale has the sign of the largest
value, which thereby becomes exactly 1: packing again what was unpacked is exact, so a run resumes bit for bit. And a
positive second moment never becomes zero: AdamW divides by its root, and a first moment that outlived it would be
divided by epsilon alone. Blocks are counted on a rank's own shard, so another layout rounds differently, by at most
half a step.
"""

from __future__ import annotations

import functools
from abc import ABC, abstractmethod
from collections.abc import Callable
from typing import Protocol

import torch
from torch import Tensor

from modellink.optim.local import like_parameter, local_tensor

HALF_LARGEST = 65503.0
BLOCK = 256
# a row of zeros has this scale; far from underflow, and so is its square
_SMALLEST = 2.0**-60


class State(Protocol):
    """One state of one parameter, zero at first. Elements are those of the flattened local shard."""

    unit: int  # a piece starts, and ends unless it is the last, at a multiple of this

    def read(self, start: int, stop: int) -> Tensor:
        """Elements [start, stop), in the dtype of the master."""

    def write(self, start: int, stop: int, value: Tensor) -> None:
        """Keep `value`, which `read` gave and a rule has changed in place."""

    def whole(self) -> Tensor:
        """All of it, placed as the parameter is: the live tensor, or an unpacked copy."""

    def tensors(self) -> list[Tensor]:
        """What is held in memory."""


StateForm = Callable[[Tensor], State]


def master_dtype(shard: Tensor) -> torch.dtype:
    """The dtype in which a parameter is updated: float64 for float64, else float32."""
    return torch.float64 if shard.dtype == torch.float64 else torch.float32


class FullState:
    """float32 (float64 beside float64 parameters), shaped and placed as the parameter: 4 bytes a parameter."""

    unit = 1

    def __init__(self, param: Tensor) -> None:
        shard = local_tensor(param)
        zeros = torch.zeros(shard.shape, dtype=master_dtype(shard), device=shard.device)
        self._tensor = like_parameter(param, zeros)
        self._flat = zeros.view(-1)

    def read(self, start: int, stop: int) -> Tensor:
        return self._flat[start:stop]

    def write(self, start: int, stop: int, value: Tensor) -> None:
        if value.data_ptr() != self._flat[start:stop].data_ptr():
            self._flat[start:stop].copy_(value)

    def whole(self) -> Tensor:
        return self._tensor

    def tensors(self) -> list[Tensor]:
        return [self._tensor]


class _PackedState(ABC):
    """A state as codes and scales, one scale for `unit` neighbours."""

    def __init__(self, param: Tensor, unit: int, codes: torch.dtype) -> None:
        shard = local_tensor(param)
        self.unit = max(1, unit)
        self._param, self._dtype = param, master_dtype(shard)
        self._codes = torch.zeros(shard.numel(), dtype=codes, device=shard.device)
        rows = -(-shard.numel() // self.unit)
        self._scales = torch.full((rows,), _SMALLEST, dtype=torch.float32, device=shard.device)

    def _rows(self, start: int, stop: int) -> slice:
        assert start % self.unit == 0
        return slice(start // self.unit, -(-stop // self.unit))

    def whole(self) -> Tensor:
        shard = local_tensor(self._param)
        return like_parameter(self._param, self.read(0, shard.numel()).view(shard.shape))

    def tensors(self) -> list[Tensor]:
        return [self._codes, self._scales]

    @abstractmethod
    def read(self, start: int, stop: int) -> Tensor:
        """Unpack elements [start, stop)."""


class RowScaledState(_PackedState):
    """fp16 with a power of two for each row: 2 bytes a parameter and 4 a row. See the top of this module."""

    def __init__(self, param: Tensor) -> None:
        shard = local_tensor(param)
        super().__init__(param, shard.shape[-1] if shard.ndim else 1, torch.float16)

    def read(self, start: int, stop: int) -> Tensor:
        values = self._codes[start:stop].view(-1, self.unit).to(self._dtype)
        return values.mul_(self._scales[self._rows(start, stop), None]).view(-1)

    def write(self, start: int, stop: int, value: Tensor) -> None:
        rows = value.view(-1, self.unit)
        needed = rows.abs().amax(1).float().div_(HALF_LARGEST).clamp_(min=_SMALLEST / 2)
        # one up in the exponent and no mantissa: the next power of two
        scales = (((needed.view(torch.int32) >> 23) + 1) << 23).view(torch.float32)
        self._scales[self._rows(start, stop)] = scales
        self._codes[start:stop].view(-1, self.unit).copy_(rows / scales[:, None])


class BlockState(_PackedState):
    """8 bits and a scale for each 256 neighbours: 1.016 bytes a parameter. `signed`: whether values may be negative."""

    def __init__(self, param: Tensor, signed: bool) -> None:
        super().__init__(param, BLOCK, torch.uint8)
        self._map, self._signed = dynamic_map(signed).to(self._codes.device), signed
        self._first, self._between = (table.to(self._codes.device) for table in _search_tables(signed))
        self._codes.fill_(int(self._map.abs().argmin()))

    def read(self, start: int, stop: int) -> Tensor:
        scales = self._scales[self._rows(start, stop)].repeat_interleave(BLOCK)[: stop - start]
        return self._map.index_select(0, self._codes[start:stop].int()).mul_(scales).to(self._dtype)

    def write(self, start: int, stop: int, value: Tensor) -> None:
        rows = self._rows(start, stop)
        blocks = value.new_zeros(rows.stop - rows.start, BLOCK, dtype=torch.float32)
        blocks.view(-1)[: stop - start] = value
        scales = blocks.gather(1, blocks.abs().argmax(1, keepdim=True)).view(-1)
        scales = torch.where(scales.abs() < _SMALLEST, _SMALLEST, scales)
        self._scales[rows] = scales
        scaled = (blocks / scales[:, None]).view(-1)
        codes = self._first.index_select(0, (scaled.view(torch.int32) >> 16).bitwise_and_(0xFFFF))
        codes.add_(self._between.index_select(0, codes) <= scaled)
        if not self._signed:
            codes = torch.maximum(codes, blocks.view(-1) > 0)
        self._codes[start:stop] = codes[: stop - start].to(torch.uint8)


@functools.cache
def dynamic_map(signed: bool) -> Tensor:
    """The 256 numbers of dynamic 8-bit quantisation, ascending, float32 [256], in (-1, 1] or [0, 1].

    Decade i of seven, 10^(i-7) to 10^(i-6), holds the means of 2^i (unsigned: 2^(i+1)) equal intervals; 0 and 1 are
    numbers of their own.
    """
    numbers = [torch.tensor([0.0, 1.0])]
    for decade in range(7):
        edges = torch.linspace(0.1, 1.0, 2 ** (decade + (0 if signed else 1)) + 1)
        means = (edges[1:] + edges[:-1]) / 2 * 10.0 ** (decade - 6)
        numbers += [means, -means] if signed else [means]
    return torch.cat(numbers).sort().values


@functools.cache
def _search_tables(signed: bool) -> tuple[Tensor, Tensor]:
    """What finds the nearest number of `dynamic_map` in two look-ups, with the bits of a binary search.

    Values with the same upper 16 bits (sign, exponent, 7 of 23 bits of the fraction) lie so close together that at most
    one of the 255 borders between neighbouring numbers is among them. So the number that is nearest to the smallest of
    them (int32 [65536]) is right, unless the border above it (float32 [256], the last NaN) is not above the value.
    """
    numbers = dynamic_map(signed)
    borders = (numbers[1:] + numbers[:-1]) / 2
    upper = torch.arange(1 << 16, dtype=torch.int32) << 16
    ends = torch.stack([upper.view(torch.float32), (upper | 0xFFFF).view(torch.float32)])
    first = torch.bucketize(ends.amin(0).nan_to_num(), borders, right=True, out_int32=True)
    return first, torch.cat([borders, borders.new_full((1,), torch.nan)])
