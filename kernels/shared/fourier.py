"""How is a DFT of a length split into stages, and what are its tables? Computed in float64, once per length.

For csrc/cpu/fft.h, which says how they are laid out, and csrc/cuda/fft.cuh.
"""

from __future__ import annotations

import functools

import torch

LARGEST_DIRECT = 127  # a prime factor beyond it is cheaper as Bluestein's convolution; kLargestDirect of csrc/cpu/fft.h
_RADICES = (8, 5, 4, 3, 2)


@functools.cache
def radices(n: int) -> tuple[int, ...]:
    """The factors of n, in the order of the stages: 8 as often as it goes, 4 and 2 for the rest, odd primes."""
    found = []
    for r in _RADICES:
        while n % r == 0:
            found.append(r)
            n //= r
    odd = 7
    while n > 1:
        while n % odd == 0:
            found.append(odd)
            n //= odd
        odd = odd + 2 if odd * odd <= n else max(n, odd + 2)
    return tuple(found)


def _roots(numerators: torch.Tensor, n: int) -> torch.Tensor:
    """e^(-2 pi i j / n) as (..., 2) float64 for integers j, reduced before they are rounded."""
    angles = (numerators % n).double() * (-2 * torch.pi / n)
    return torch.stack((angles.cos(), angles.sin()), -1)


def _stages(n: int) -> list[torch.Tensor]:
    tables, length = [], n
    for r in radices(n):
        m = length // r
        if m > 1:
            tables.append(_roots(torch.arange(m, device="cpu")[:, None] * torch.arange(1, r, device="cpu"), length))
        if r not in _RADICES:
            conjugate = torch.tensor([1.0, -1.0], dtype=torch.float64, device="cpu")
            tables.append(_roots(torch.arange(r, device="cpu"), r) * conjugate)
        length = m
    return tables


def _convolution_length(n: int) -> int:
    """The least length of at least 2 n - 1 with factors 2, 3 and 5 alone."""
    length = 2 * n - 1
    while any(r > 8 or r == 7 for r in radices(length)):
        length += 1
    return length


@functools.cache
def plan(n: int) -> tuple[torch.Tensor, torch.Tensor]:
    """The plan and the tables of a DFT of length n, as csrc/cpu/fft.h lays them out: int64 and float32, on the CPU."""
    tables: list[torch.Tensor] = []
    length = convolution = 0
    if max(radices(n), default=1) > LARGEST_DIRECT:
        convolution = length = _convolution_length(n)
        j = torch.arange(n, device="cpu")
        chirp = _roots(j * j, 2 * n)
        kernel = torch.zeros(length, dtype=torch.complex128, device="cpu")
        kernel[:n] = torch.view_as_complex(chirp).conj()
        kernel[length - n + 1 :] = kernel[1:n].flip(0)
        tables = [chirp, torch.view_as_real(torch.fft.fft(kernel) / length)]
    tables += _stages(length or n)
    stages = radices(length or n)
    floats = torch.cat([t.reshape(-1) for t in tables]).float() if tables else torch.empty(0, device="cpu")
    return torch.tensor([n, convolution, len(stages), *stages], device="cpu"), floats
