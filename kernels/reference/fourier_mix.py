"""fourier_mix in plain PyTorch: the definition of truth (Lee-Thorp et al. 2021, arXiv:2105.03824)."""

import torch


def forward(x):
    """(y,): the real part of the unnormalised DFT over the last two dimensions, in float32, or float64 for float64 input."""
    if x.numel() == 0:  # MKL refuses
        return (torch.empty_like(x, memory_format=torch.contiguous_format),)
    wide = x if x.dtype == torch.float64 else x.float()
    return (torch.fft.fft2(wide).real.to(x.dtype, memory_format=torch.contiguous_format, copy=True),)
