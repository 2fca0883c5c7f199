"""How does a float16 model keep values that float16 cannot hold? In float32, while its weights stay float16.

T5's residual stream reaches 99,000, and FNet's Fourier sums reach more; float16 ends at 65,504. In these models the stream is
float32, norms read it and return float16, and a feed-forward network returns float32.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from ..ops import linear


def widened(x: Tensor) -> Tensor:
    """float16 becomes float32; other dtypes stay."""
    return x.float() if x.dtype == torch.float16 else x


def is_wide(x: Tensor, narrow: Tensor) -> bool:
    """Whether x is a float32 stream and `narrow` its float16 norm."""
    return narrow.dtype == torch.float16 and x.dtype == torch.float32


def wide_norm(norm: Callable[..., Any], x: Tensor, residual: Tensor | None) -> Any:
    """norm(x + residual) as float16; with a residual, of either dtype, also the float32 sum."""
    if residual is None:
        return norm(x).to(torch.float16)
    y, total = norm(x, residual=residual.float())
    return y.to(torch.float16), total


def wide_product(hidden: Tensor, weight: Tensor, bias: Tensor | None, residual: Tensor | None) -> Tensor:
    """hidden (..., F) float32, weight (N, F) and bias (N,) float16 -> hidden weight^T + bias + residual, (..., N) float32.

    Without gradients this is a product of float16 tensors: each row of hidden is divided by 256 times its root mean square.
    The sums then fit into float16 for weights up to 1,600 on average, even if all signs agree, and the elements are far
    above float16's smallest. Reading a float32 copy of the weight would take three times as long.
    """
    if torch.is_grad_enabled() and (hidden.requires_grad or weight.requires_grad):
        y = F.linear(hidden, weight.float())
    else:
        scale = hidden.square().mean(-1, keepdim=True).sqrt().mul(256.0).clamp(min=1e-10)
        y = linear((hidden / scale).to(weight.dtype), weight) * scale
    y = y if bias is None else y + bias
    return y if residual is None else y + residual
