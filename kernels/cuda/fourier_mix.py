"""fourier_mix on CUDA: launches csrc/cuda/fourier_mix.cu on the current stream of the tensor's device."""

import functools

import torch

from pyfused._extensions import DTYPE_CODES, cuda
from pyfused.kernels.fourier import plan

from ._launch import pointer, where


@functools.cache
def _plan_on(n, device):
    """The plan, on the host, and its tables on the device; the first call of a length copies, which no graph captures."""
    stages, table = plan(n)
    return stages, table.to(device)


@functools.cache
def _too_long(n):
    """Whether a transform of length n, or the convolution that it takes, does not fit in a block's shared memory."""
    longest = cuda().fourier_mix_longest()
    return n > longest or int(plan(n)[0][1]) > longest


def unsupported_forward(x):
    for length in x.shape[1:]:
        if _too_long(length):
            return f"a transform of length {length} does not fit in a block's shared memory"
    return None


def forward(x):
    if x.stride(2) != 1:
        x = x.contiguous()
    b, s, n = x.shape
    y = torch.empty(x.shape, dtype=x.dtype, device=x.device)
    if b == 0:
        return (y,)
    plan_s, table_s = _plan_on(s, x.device)
    plan_n, table_n = _plan_on(n, x.device)
    floats = cuda().fourier_mix_scratch(pointer(plan_s), b, s, n)
    scratch = torch.empty(floats, dtype=torch.float32, device=x.device)
    pointers = map(pointer, (x, y, scratch, plan_s, table_s, plan_n, table_n))
    dtype = DTYPE_CODES[x.dtype]
    cuda().fourier_mix_forward(*pointers, b, s, n, x.stride(0), x.stride(1), dtype, *where(x.device))
    return (y,)
