"""Which row of pyfused.tiles does an attention kernel use? By head size, by whether there is T5's bias, and by how many of a
dense bias and dropout there are: each takes registers, so that a tile of the plain case would spill.

The rows and their reasons are in pyfused/evidence/triton_*.json, what `pyfused tune` found in the user's own file. Nothing is
timed when a kernel is first called: candidates would take seconds a shape, and could not run inside a CUDA graph. Masked tiles
(the diagonal, the tail, padding with holes) run unpipelined whatever the row says: MASKED_STAGES in _attention_tiles.py.
"""

from __future__ import annotations

import torch

from pyfused import tiles


def block_d(head_size: int) -> int:
    """The power of two that holds a head; 16 is the least that a matrix instruction takes."""
    return max(16, 1 << (head_size - 1).bit_length())


def config(
    kernel: str, head_size: int, dtype: torch.dtype, where: torch.device | str, extras: int, relative: bool = False
) -> tiles.Tile:
    """The tile of one launch.

    Args:
        kernel: "forward", "decode", "grad_query" or "grad_key_value".
        where: the tensors' device, or a name in tiles.ARCHITECTURES.
        extras: how many of attn_bias and dropout there are.
        relative: whether there is T5's bias.
    """
    cases = (f"relative {extras}", "relative", "") if relative else (str(extras), "")
    return tiles.find(f"attention_{kernel}", where, dtype, head_size, cases)
