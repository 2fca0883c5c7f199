"""How does a launcher see a tensor of any strides as rows? Shared by the launchers of every backend."""

from __future__ import annotations

import torch


def as_rows(x: torch.Tensor) -> tuple[torch.Tensor, int]:
    """x (..., N) as (rows, N) with N contiguous, and the row stride; a copy only where one row stride will not do."""
    x = x.reshape(x.shape[:-1].numel(), x.shape[-1])
    if x.stride(1) != 1 and x.shape[1] != 1:
        x = x.contiguous()
    return x, x.stride(0)
