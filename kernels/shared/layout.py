"""How does a launcher treat a tensor of any strides as rows? Every backend's launchers use this."""

from __future__ import annotations

import math

import torch


def rows_of(x: torch.Tensor | None) -> tuple[int, int, int] | None:
    """(rows, N, row stride) of x (..., N) for a kernel. None if x has no single row stride; zeros if x is None."""
    if x is None:
        return 0, 0, 0
    *outer, n = x.shape
    if x.is_contiguous():
        return math.prod(outer), n, n
    *strides, within = x.stride()
    if within != 1 and n != 1:
        return None
    stride = following = None
    for size, step in zip(reversed(outer), reversed(strides), strict=True):
        if size == 1:
            continue
        if stride is None:
            stride = step
        elif step != following:
            return None
        following = step * size
    return math.prod(outer), n, n if stride is None else stride


def is_by_columns(weight: torch.Tensor) -> bool:
    """Whether memory holds a weight (N, K) transposed, as Hugging Face's Conv1D does."""
    across, along = weight.stride()
    return along != 1 and across == 1
