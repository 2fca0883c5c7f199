"""Which tiles, warps and pipeline stages does each attention kernel use?"""

from __future__ import annotations

import functools
from typing import NamedTuple

import torch


class Config(NamedTuple):
    block_m: int
    block_n: int
    num_warps: int
    num_stages: int

    @property
    def options(self) -> dict[str, int]:
        return {
            "BLOCK_M": self.block_m,
            "BLOCK_N": self.block_n,
            "num_warps": self.num_warps,
            "num_stages": self.num_stages,
        }


def block_d(head_size: int) -> int:
    """The power of two that holds a head; 16 is the least that a matrix instruction takes."""
    return max(16, 1 << (head_size - 1).bit_length())


@functools.cache
def config(kernel: str, head_size: int, dtype: torch.dtype, chip: str) -> Config:
    """The configuration of "forward", "decode", "grad_query" or "grad_key_value"."""
    if chip == "interpreter":
        return Config(16 if kernel == "decode" else 32, 64, 4, 1)
    raise NotImplementedError
