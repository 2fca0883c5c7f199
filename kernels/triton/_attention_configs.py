"""Which row of pyfused.tiles does an attention kernel use? The row depends on the head size, on T5's bias, and on the number
of extras (dense bias, dropout). Each takes registers, so the plain case's tile would spill.

The rows and their reasons are in pyfused/evidence/triton_*.json; `pyfused tune` writes its own to the user's file. Nothing is
timed at a kernel's first call: that would take seconds a shape and could not run inside a CUDA graph. Masked tiles (the
diagonal, the tail, padding with holes) run unpipelined: MASKED_STAGES in _attention_tiles.py. Only the forward of few blocks
pipelines them: half of a short text's tiles are masked, and no other block computes while a tile is on its way.
"""

from __future__ import annotations

import torch

from pyfused import tiles


def block_d(head_size: int) -> int:
    """The least power of two that holds a head. A matrix instruction takes at least 16."""
    return max(16, 1 << (head_size - 1).bit_length())


def config(
    kernel: str, head_size: int, dtype: torch.dtype, where: torch.device | str, extras: int, relative: bool = False
) -> tiles.Tile | None:
    """The tile of one launch. None only for "few", if no row serves it.

    Args:
        kernel: "forward", "few", "decode", "grad_query" or "grad_key_value".
        where: the tensors' device, or a name in tiles.ARCHITECTURES.
        extras: how many of attn_bias and dropout there are.
        relative: whether there is T5's bias.
    """
    cases = (f"relative {extras}", "relative", "") if relative else (str(extras), "")
    return tiles.find(f"attention_{kernel}", where, dtype, head_size, cases)
