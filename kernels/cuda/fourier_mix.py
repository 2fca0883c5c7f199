"""fourier_mix on CUDA: launches csrc/cuda/fourier_mix.cu on the current stream of the tensor's device."""

import functools

import torch

from pyfused.extensions import DTYPE_CODES, cuda
from pyfused.kernels.shared.fourier import plan
from pyfused.kernels.shared.prepared import maker, prepares_launch
from pyfused.kernels.shared.tables import kept_on_device

from ._launch import shared_memory, where


@kept_on_device
def _fourier_table(n):
    return plan(n, by_output=True)[1]


@functools.cache
def _too_long(n, shared):
    """Whether a transform of length n, or its convolution, does not fit in a block's shared memory.

    An element takes 17 bytes: a complex number in two arrays, with one unused place after every 16 (fft.cuh).
    """
    longest = min(cuda().fourier_mix_longest(), (shared - 16) // 17)
    return n > longest or int(plan(n)[0][1]) > longest


def unsupported_forward(x):
    for length in x.shape[1:]:
        if _too_long(length, shared_memory(x.device)):
            return f"a transform of length {length} does not fit in a block's shared memory"
    return None


@prepares_launch
def forward(x):
    if x.stride(2) != 1:
        return None
    (b, s, n), device, kernel = x.shape, x.device, cuda().fourier_mix_forward
    plan_s, plan_n = plan(s)[0], plan(n)[0]  # on the host
    table_s, table_n = _fourier_table(s, device=device), _fourier_table(n, device=device)
    floats = cuda().fourier_mix_scratch(plan_s.data_ptr(), b, s, n)
    new_y, new_scratch = maker(x.shape, x.dtype, None, device), maker((floats,), torch.float32, None, device)
    numbers, place = (b, s, n, x.stride(0), x.stride(1), DTYPE_CODES[x.dtype]), where(device)

    def launch(x):
        y, scratch = new_y(), new_scratch()
        kernel(x, y, scratch, plan_s, table_s, plan_n, table_n, *numbers, *place())
        return (y,)

    return launch
