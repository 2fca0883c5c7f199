"""How does memory hold a matrix (N, K) as integers? A WeightFormat says how wide they are, and which of them share a scale.

A weight is the scale times its integers.

    int8    weight (N, K) int8, scale (N,) float32: 8 bits a weight
    int4    weight (N, K / 2) int8, scale (N, K / 32) bfloat16: 4.5 bits a weight. 32 values of a row lie in 16 bytes: byte i
            has value i in its low four bits and value i + 16 in its high four, both in two's complement.

Both are int8 in memory: transformers' T5 casts its input to a weight's dtype unless that is int8. The scale tells them apart.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor

# int4: the largest value of a group, over the scale. In two's complement the range is -8 to 7, so the sign matters. Past 8 the
# largest value is cut and the others get a finer step.
_LARGEST = (-8.0, -7.5, -8.5, -9.0, -7.0, 7.0, 7.5, 8.0, 8.5)
_PART = 1 << 18  # values that are rounded at a time: they stay in a cache


@dataclass(frozen=True)
class WeightFormat:
    """How a matrix (N, K) is stored.

    group: how many values of a row share a scale; 0: all. K is a multiple of it.
    scale_dtype: of the scale. The stored weight is int8, and a byte holds 8 / bits values.
    """

    name: str
    bits: int
    group: int
    scale_dtype: torch.dtype

    def shape(self, n: int, k: int) -> tuple[int, int]:
        """Of the stored weight of a matrix (n, k)."""
        return n, k * self.bits // 8

    def scale_shape(self, n: int, k: int) -> tuple[int, ...]:
        """Of the scale of a matrix (n, k)."""
        return (n, k // self.group) if self.group else (n,)

    def nbytes(self, n: int, k: int) -> int:
        """Of the stored weight and scale of a matrix (n, k)."""
        return math.prod(self.shape(n, k)) + self.scale_dtype.itemsize * math.prod(self.scale_shape(n, k))

    def columns(self, weight: Tensor) -> int:
        """K of a stored weight."""
        return weight.shape[1] * 8 // self.bits

    def misfit(self, k: int) -> str:
        """Why it cannot hold rows of k values; "" if it can."""
        return f"K = {k} is no multiple of {self.group}" if self.group and k % self.group else ""

    @property
    def weight_takes(self) -> str:
        """The stored weight, for messages."""
        return "(N, K)" if self.bits == 8 else f"(N, K / {8 // self.bits})"

    @property
    def scale_takes(self) -> str:
        """The scale's shape, for messages."""
        return f"(N, K / {self.group})" if self.group else "(N,)"

    def integers(self, weight: Tensor) -> Tensor:
        """The integers of a stored weight, (N, K) int8."""
        if self.bits == 8:
            return weight
        halves = weight.unflatten(1, (-1, self.group // 2)) if weight.shape[1] else weight[:, None]
        low, high = ((halves & 15) ^ 8) - 8, halves >> 4  # no view(torch.uint8): torch.jit.trace cannot record it
        return torch.cat([low, high], 2).flatten(1)

    def dequantized(self, weight: Tensor, scale: Tensor, dtype: torch.dtype) -> Tensor:
        """The matrix (N, K) that a stored weight and its scale stand for, rounded once."""
        integers = self.integers(weight).to(wide(dtype))
        if not self.group:
            return (integers * scale[:, None]).to(dtype)
        return (integers * scale.to(integers.dtype).repeat_interleave(self.group, 1)).to(dtype)

    def unfilled(self, n: int, k: int, device: torch.device) -> tuple[Tensor, Tensor]:
        """Memory for the stored weight and scale of a matrix (n, k)."""
        weight = torch.empty(self.shape(n, k), dtype=torch.int8, device=device)
        return weight, torch.empty(self.scale_shape(n, k), dtype=self.scale_dtype, device=device)

    def quantized(self, weight: Tensor) -> tuple[Tensor, Tensor]:
        """A finite floating-point matrix (N, K) as stored weight and scale, both contiguous. Zeros alone have scale 1."""
        weight = weight.detach()
        if self.bits == 8:
            return _by_rows(weight.float())
        n, k = weight.shape
        stored, scale = self.unfilled(n, k, weight.device)
        step = max(1, _PART // max(k, 1))
        for first in range(0, n, step):
            part = slice(first, first + step)
            stored[part], scale[part] = self._by_groups(weight[part].float())
        return stored, scale

    def _by_groups(self, rows: Tensor) -> tuple[Tensor, Tensor]:
        """Of the scales that give the largest value of a group one of _LARGEST, the one with the least squared error."""
        groups = rows.unflatten(1, (-1, self.group))
        largest = groups.gather(2, groups.abs().argmax(2, keepdim=True))
        tiny = torch.finfo(torch.float32).tiny
        kept = error = scale = groups
        for i, value in enumerate(_LARGEST):
            # Stored scales are rounded first, so that the integers are right for them.
            step = (largest / value).to(self.scale_dtype).float()
            step = torch.where(step.abs() < tiny, 1.0, step)
            exact = groups / step
            integers = exact.round().clamp_(-8, 7)
            # In shares of the largest value: squares of tiny weights would be zero.
            off = (integers - exact).square_().sum(2, keepdim=True) * (step / largest).square_()
            if not i:
                kept, error, scale = integers, off, step
                continue
            better = off < error
            kept, error, scale = (torch.where(better, a, b) for a, b in ((integers, kept), (off, error), (step, scale)))
        nibbles = kept.to(torch.int8).view(torch.uint8)
        low, high = nibbles.chunk(2, 2)
        return ((low & 15) | (high << 4)).flatten(1).view(torch.int8), scale.squeeze(2).to(self.scale_dtype)


def _by_rows(rows: Tensor) -> tuple[Tensor, Tensor]:
    """127 steps of the largest value in each row."""
    scale = rows.abs().amax(1) / 127.0
    scale = torch.where(scale > 0, scale, 1.0)
    return (rows / scale[:, None]).round_().clamp_(-127, 127).to(torch.int8).contiguous(), scale


INT8 = WeightFormat("int8", 8, 0, torch.float32)
INT4 = WeightFormat("int4", 4, 32, torch.bfloat16)
FORMATS = {form.name: form for form in (INT8, INT4)}


def format_of(scale: Tensor | None) -> WeightFormat | None:
    """The format of a weight with this scale; None for one in floating point. int4's scale has two dimensions, and may be
    float64 where the truth is computed."""
    if scale is None:
        return None
    return INT4 if scale.dim() == 2 and scale.dtype != torch.float32 else INT8


def dequantized(weight: Tensor, scale: Tensor, dtype: torch.dtype) -> Tensor:
    """The matrix (N, K) that integers and their scale stand for."""
    return (format_of(scale) or INT8).dequantized(weight, scale, dtype)


def wide(dtype: torch.dtype) -> torch.dtype:
    """The dtype of sums of products."""
    return torch.float64 if dtype == torch.float64 else torch.float32
