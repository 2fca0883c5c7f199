"""When and how is a product with int8 weights one of integers, with the rows of x in int8 too? For dynamic=True."""

import torch

from pyfused.notices import once
from pyfused.weight_format import wide

# Up to so many rows the weights set the pace, and integer rows of x would gain nothing. torch._int_mm on CUDA takes more rows.
FEW_ROWS = 16
_MOST_K = (2**31 - 1) // 127**2  # longer sums may leave int32
_FEW = f"up to {FEW_ROWS} rows stay in floating point: reading the weights takes the time"


def in_float(x, weight, device):
    """Why a call with dynamic=True keeps x in floating point all the same; None if the integer product takes it.

    device: the one whose limits of torch._int_mm count. The reference passes x's; on a CPU it takes any sizes. "triton" has a
        product of its own.
    """
    n, k = weight.shape
    rows = x.shape[:-1].numel()
    if rows <= FEW_ROWS:
        return _FEW
    if not 0 < k <= _MOST_K:
        return f"sums of {k} products of int8 do not fit into int32" if k else "there is nothing to sum"
    if device == "cuda" and (n % 8 or k % 8):
        return f"torch._int_mm takes multiples of 8 on a GPU, not a weight of ({n}, {k})"
    if device not in ("cpu", "cuda", "triton"):
        return f"torch._int_mm is not known to work on {device}"
    return None


def say_once(reason):
    """Tells the user that dynamic=True has no effect. Few rows are meant to stay in floating point and need no notice."""
    if reason and reason != _FEW:
        once(f"linear: dynamic=True keeps x in floating point: {reason}")


def product(x, weight, scale):
    """x (..., K) weight^T of integers -> (..., N) in wide(x.dtype). Each row of x is rounded to 127 steps of its largest
    value."""
    rows = x.reshape(-1, x.shape[-1]).to(wide(x.dtype))
    steps = (rows.abs().amax(-1, keepdim=True) / 127.0).clamp(min=torch.finfo(torch.float32).tiny)
    integers = (rows / steps).round_().clamp_(-127, 127).to(torch.int8)
    sums = torch._int_mm(integers, _columns(weight)).to(rows.dtype)
    return (sums * steps * scale).view(*x.shape[:-1], weight.shape[0])


def _columns(weight):
    """weight (N, K) as (K, N) for torch._int_mm: rows that lie apart are not copied.

    With integer instructions torch 2.13's product on a CPU returns unwritten memory where a weight has one column or its rows
    overlap (expanded): oneDNN refuses the strides, and nobody notices."""
    k, (row, column) = weight.shape[1], weight.stride()
    if column == 1 and row >= k > 1:
        return weight.t()
    weight = weight.clone(memory_format=torch.contiguous_format)
    return weight.t() if k > 1 else weight.view(weight.shape[::-1])  # strides of t() would be (1, 1)
