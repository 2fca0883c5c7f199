"""Which tiles, warps and pipeline stages does each attention kernel use? A table: nothing is tuned at run time.

Timing candidates at run time would cost seconds per shape and could not happen inside a CUDA graph. The rows compile
without a spill for the cases that they serve (tests/gpu_codegen/test_attention_codegen.py holds a sample of them); none has
been timed, so all of it is *not yet measured*.

The reasoning, for B4 H16 S2048 D64 bf16 on an H100 (132 multiprocessors, 65,536 registers and 227 KB each):
- Forward: 4 B H Sq Sk D = 69 GFLOP and 67 MB (q, k, v, out), that is 22 us of memory and 86 us at 798 TFLOP/s of matrix
  rate: compute-bound. It also takes 268 M exponentials, 16 per clock and multiprocessor: 72 us, which run beside the
  matrix unit only if two blocks share a multiprocessor. So D = 64 uses 128 x 64 tiles on one warpgroup: 231 registers x
  128 threads and 64 KB allow two such blocks. Predicted 170 us, 400 TFLOP/s; half of it under a causal mask.
- D = 128: 128 x 64 on two warpgroups, since one would need 128 registers a thread for the output alone.
- Backward: 7 products in place of 2 (scores and dP are computed in both kernels), 240 GFLOP. The key kernel holds two
  accumulators of BLOCK_N x D and three tiles of scores; 128 keys on two warpgroups leave 64 queries at D = 64, 32 at
  128. A row of warps has 16 rows of a tile on Hopper: a tile of 64 rows on 8 warps would compute its scores twice.
- A bias or dropout costs about 60 registers a thread each (a bias tile on its way, Philox's words), so those cases have
  rows of their own with smaller tiles; where a tile has fewer than 64 rows, Hopper runs mma.sync in place of wgmma.
- T5's bias gathers a tile of values by distance, and its gradient sums a tile along its diagonals, whose indices are
  kept over the loop: `_relative` rows, with smaller tiles once more. Tiles beyond the last bucket's distance do neither.
- Masked tiles (the diagonal, the tail, padding with holes) run unpipelined: MASKED_STAGES in _attention_tiles.py.
- float32 runs on the ordinary cores of an NVIDIA chip: small tiles, many warps, and 67 TFLOP/s at the very best.
- MI300 has 512 registers a thread and 64 KB of shared memory per block: one stage, four wavefronts.
"""

from __future__ import annotations

import functools
from typing import NamedTuple

import torch


class Config(NamedTuple):
    """Tile of queries, tile of keys, warps, pipeline stages."""

    block_m: int
    block_n: int
    num_warps: int
    num_stages: int

    @property
    def options(self) -> dict[str, int]:
        """As a kernel's keyword arguments."""
        return {
            "BLOCK_M": self.block_m,
            "BLOCK_N": self.block_n,
            "num_warps": self.num_warps,
            "num_stages": self.num_stages,
        }


def block_d(head_size: int) -> int:
    """The power of two that holds a head; 16 is the least that a matrix instruction takes."""
    return max(16, 1 << (head_size - 1).bit_length())


# Rows by head size: up to 64, 128, 256. A kernel's name with a number is for so many of (bias, dropout), the bare name
# for all other counts; with T5's bias the rows called _relative come before those.
_HALF: dict[str, dict[str, tuple[tuple[int, int, int, int], ...]]] = {
    "sm_90": {
        "forward0": ((128, 64, 4, 3), (128, 64, 8, 3), (128, 32, 8, 2)),
        "forward": ((128, 64, 8, 2), (128, 64, 8, 2), (32, 32, 8, 1)),
        "decode": ((16, 64, 4, 2), (16, 64, 4, 2), (16, 32, 4, 2)),
        "grad_query0": ((128, 64, 8, 2), (128, 64, 8, 2), (32, 32, 8, 1)),
        "grad_query": ((64, 32, 4, 2), (32, 32, 4, 1), (32, 32, 8, 1)),
        "grad_key_value0": ((64, 128, 8, 2), (32, 128, 8, 2), (16, 32, 8, 1)),
        "grad_key_value1": ((32, 64, 4, 2), (32, 64, 8, 2), (16, 32, 8, 1)),
        "grad_key_value": ((16, 64, 4, 1), (32, 32, 4, 1), (16, 32, 8, 1)),
        "forward_relative0": ((128, 64, 8, 2), (128, 64, 8, 2), (32, 32, 8, 1)),
        "forward_relative": ((64, 32, 4, 1), (64, 32, 8, 1), (32, 32, 8, 1)),
        "grad_query_relative0": ((64, 32, 8, 1), (32, 32, 8, 1), (16, 32, 8, 1)),
        "grad_query_relative": ((32, 32, 8, 1), (16, 32, 8, 1), (16, 32, 8, 1)),
        "grad_key_value_relative0": ((32, 64, 4, 2), (32, 32, 4, 1), (16, 16, 8, 1)),
        "grad_key_value_relative": ((16, 64, 4, 1), (16, 32, 4, 1), (16, 16, 8, 1)),
    },
    "sm_80": {
        "forward0": ((128, 64, 8, 3), (128, 64, 8, 2), (64, 64, 8, 2)),
        "forward": ((64, 32, 4, 1), (64, 32, 4, 1), (64, 32, 8, 1)),
        "decode": ((16, 64, 4, 2), (16, 64, 4, 2), (16, 32, 4, 2)),
        "grad_query0": ((128, 64, 8, 2), (64, 64, 8, 2), (32, 32, 8, 1)),
        "grad_query": ((32, 32, 4, 1), (32, 32, 4, 1), (32, 32, 8, 1)),
        "grad_key_value0": ((32, 64, 4, 2), (32, 64, 8, 2), (16, 32, 8, 1)),
        "grad_key_value": ((32, 32, 4, 2), (16, 32, 4, 1), (16, 32, 8, 1)),
        "forward_relative": ((64, 32, 4, 1), (64, 32, 8, 1), (32, 32, 8, 1)),
        "grad_query_relative": ((32, 32, 8, 1), (16, 32, 8, 1), (16, 32, 8, 1)),
        "grad_key_value_relative0": ((32, 32, 4, 2), (16, 32, 4, 1), (16, 16, 8, 1)),
        "grad_key_value_relative": ((16, 32, 4, 1), (16, 32, 8, 1), (16, 16, 8, 1)),
    },
    "gfx942": {
        "forward": ((128, 64, 4, 1), (64, 64, 4, 1), (64, 32, 4, 1)),
        "decode": ((16, 32, 4, 1), (16, 32, 4, 1), (16, 32, 4, 1)),
        "grad_query": ((64, 64, 4, 1), (64, 32, 4, 1), (32, 32, 4, 1)),
        "grad_key_value": ((64, 64, 4, 1), (32, 64, 4, 1), (32, 32, 4, 1)),
    },
}
# Chips with 99 KB of shared memory per block: the rows that leave room for a bias and dropout fit them.
_HALF["sm_86"] = {kernel: rows for kernel, rows in _HALF["sm_80"].items() if not kernel[-1].isdigit()}
_NVIDIA_FLOAT32 = {
    "forward": ((16, 32, 8, 1), (32, 32, 8, 1), (32, 32, 8, 1)),
    "decode": ((16, 32, 8, 1), (16, 32, 8, 1), (16, 32, 8, 1)),
    "grad_query": ((32, 32, 8, 1), (32, 32, 8, 1), (32, 32, 8, 1)),
    "grad_key_value": ((16, 16, 4, 1), (16, 16, 4, 1), (16, 8, 8, 1)),
}
_AMD_FLOAT32 = {
    "forward": ((32, 32, 4, 1),) * 3,
    "decode": ((16, 32, 4, 1),) * 3,
    "grad_query": ((32, 32, 4, 1),) * 3,
    "grad_key_value": ((32, 32, 4, 1),) * 3,
}
# The interpreter's time goes by the number of tiles; unequal sides, so that a mix-up of the two shows.
_INTERPRETER = {
    "forward": ((32, 64, 4, 1),) * 3,
    "decode": ((16, 64, 4, 1),) * 3,
    "grad_query": ((32, 64, 4, 1),) * 3,
    "grad_key_value": ((64, 32, 4, 1),) * 3,
}
CHIPS = (*_HALF, "interpreter")


@functools.cache
def config(kernel: str, head_size: int, dtype: torch.dtype, chip: str, extras: int, relative: bool = False) -> Config:
    """The row for one launch.

    Args:
        kernel: "forward", "decode", "grad_query" or "grad_key_value".
        chip: one of CHIPS; "sm_80" serves every NVIDIA chip without rows that has its shared memory, "sm_86" the rest.
        extras: how many of attn_bias and dropout there are.
        relative: whether there is T5's bias.
    """
    if chip == "interpreter":
        table = _INTERPRETER
    elif dtype != torch.float32:
        table = _HALF[chip]
    else:
        table = _AMD_FLOAT32 if chip == "gfx942" else _NVIDIA_FLOAT32
    names = (f"{kernel}_relative{extras}", f"{kernel}_relative", kernel) if relative else (f"{kernel}{extras}", kernel)
    rows = next(table[name] for name in names if name in table)
    return Config(*rows[0 if head_size <= 64 else 1 if head_size <= 128 else 2])
