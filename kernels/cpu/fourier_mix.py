"""fourier_mix on the CPU: launches csrc/cpu/fourier_mix.cpp, or torch.fft where that was measured to be faster."""

import torch

from pyfused import evidence
from pyfused.extensions import DTYPE_CODES, cpu
from pyfused.kernels.shared.fourier import plan
from pyfused.kernels.shared.prepared import CPU, maker, prepares_launch

from ..reference import fourier_mix as library


def left_to_library_forward(x):
    return evidence.slower_call("cpu", "fourier_mix", (x,))


@prepares_launch
def forward(x):
    if left_to_library_forward(x):
        return library.forward
    shape, dtype = x.shape, x.dtype
    (b, s, n), (batch_stride, row_stride, within) = shape, x.stride()
    if n == 1:  # swapping s and n fills the vectors; y has the same memory layout either way
        s, n, row_stride, within = n, s, within, row_stride
    if within != 1 and n != 1 and b:
        return None
    (plan_s, table_s), (plan_n, table_n) = plan(s), plan(n)
    numbers = b, s, n, batch_stride, row_stride, DTYPE_CODES[dtype]
    kernel, scratch_bytes, new = cpu().fourier_mix_forward, cpu().fourier_mix_scratch, maker(shape, dtype)

    def launch(x):
        y = new()
        if b:
            size = scratch_bytes(plan_s, plan_n, b, s, n)  # depends on the number of threads
            scratch = torch.empty(size, dtype=torch.uint8, device=CPU)
            kernel(x, y, scratch, plan_s, table_s, plan_n, table_n, *numbers)
        return (y,)

    return launch
