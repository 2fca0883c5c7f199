"""fourier_mix on the CPU: launches csrc/cpu/fourier_mix.cpp."""

import torch

from pyfused._extensions import DTYPE_CODES, cpu
from pyfused.kernels.fourier import plan


def slower_forward(x):
    b, s, n = x.shape
    if b * min(s, n) <= 4 and max(s, n) >= 1024:
        return "so few and long signals leave most lanes of a vector empty: torch.fft is up to 1.9 times faster"
    return None


def forward(x):
    y = torch.empty_like(x, memory_format=torch.contiguous_format)
    if x.shape[2] == 1:
        x = x.transpose(1, 2)  # then the samples fill the vectors, and y is the same memory
    if x.stride(2) != 1:
        x = x.contiguous()
    b, s, n = x.shape
    if b == 0:
        return (y,)
    plan_s, table_s = plan(s)
    plan_n, table_n = plan(n)
    kernels = cpu()
    scratch = torch.empty(kernels.fourier_mix_scratch(plan_s.data_ptr(), plan_n.data_ptr(), b, s, n), dtype=torch.uint8)
    kernels.fourier_mix_forward(
        x.data_ptr(),
        y.data_ptr(),
        scratch.data_ptr(),
        plan_s.data_ptr(),
        table_s.data_ptr(),
        plan_n.data_ptr(),
        table_n.data_ptr(),
        b,
        s,
        n,
        x.stride(0),
        x.stride(1),
        DTYPE_CODES[x.dtype],
    )
    return (y,)
