"""How is a DFT split into stages, and what are its tables? Both are computed once per length, the tables in float64.

csrc/cpu/fft.h and csrc/cuda/fft.cuh read them and say how they lie.
"""

from __future__ import annotations

import functools

import torch

LARGEST_DIRECT = 127  # Bluestein's convolution is cheaper for larger prime factors; kLargestDirect of csrc/cpu/fft.h
_RADICES = (8, 5, 4, 3, 2)


@functools.cache
def radices(n: int) -> tuple[int, ...]:
    """The factors of n in stage order: 8 as often as possible, then 5, 4, 3, 2, then larger primes."""
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
    """e^(-2 pi i j / n) as (..., 2) float64 for integers j. j is reduced modulo n before it is rounded."""
    angles = (numerators % n).double() * (-2 * torch.pi / n)
    return torch.stack((angles.cos(), angles.sin()), -1)


def _stages(n: int, by_output: bool) -> list[torch.Tensor]:
    tables, length = [], n
    for r in radices(n):
        m = length // r
        if m > 1:
            twiddles = _roots(torch.arange(m, device="cpu")[:, None] * torch.arange(1, r, device="cpu"), length)
            tables.append(twiddles.transpose(0, 1) if by_output else twiddles)
        if r not in _RADICES:
            conjugate = torch.tensor([1.0, -1.0], dtype=torch.float64, device="cpu")
            tables.append(_roots(torch.arange(r, device="cpu"), r) * conjugate)
        length = m
    return tables


def _convolution_length(n: int) -> int:
    """The least length >= 2 n - 1 whose only prime factors are 2, 3 and 5."""
    length = 2 * n - 1
    while any(r > 8 or r == 7 for r in radices(length)):
        length += 1
    return length


@functools.cache
def plan(n: int, *, by_output: bool = False) -> tuple[torch.Tensor, torch.Tensor]:
    """(plan, tables) of a DFT of length n in the layout of csrc/cpu/fft.h: int64 and float32, on the CPU.

    by_output: a stage's twiddles lie by a butterfly's output, then by butterfly, as csrc/cuda/fft.cuh reads them.
    """
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
    tables += _stages(length or n, by_output)
    stages = radices(length or n)
    floats = torch.cat([t.reshape(-1) for t in tables]).float() if tables else torch.empty(0, device="cpu")
    return torch.tensor([n, convolution, len(stages), *stages], device="cpu"), floats
