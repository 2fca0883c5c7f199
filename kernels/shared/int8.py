"""When and how is a product with int8 weights one of integers, with the rows of x in int8 too? For dynamic=True."""

import functools

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


def library_multiplies():
    """Whether torch._int_mm on this CPU is fast and exact."""
    return torch.cpu._is_vnni_supported() and _is_exact(torch.backends.mkldnn.enabled)


@functools.cache
def _is_exact(with_onednn):
    """Whether torch._int_mm on this CPU sums without loss. Without VNNI oneDNN adds two products in int16, which saturates.
    ONEDNN_MAX_CPU_ISA makes it do so on any processor, whatever torch.cpu says, so this tries."""
    ones = torch.ones(32, 64, dtype=torch.int8, device="cpu")
    return all(bool((torch._int_mm(ones * 127, ones.t() * of) == 64 * 127 * of).all()) for of in (127, -127))


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
    if integers.is_cuda or _is_exact(torch.backends.mkldnn.enabled):
        sums = torch._int_mm(integers, _columns(weight)).to(rows.dtype)
    else:  # float64 holds every sum that fits into int32
        sums = (integers.double() @ weight.double().t()).to(rows.dtype)
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
