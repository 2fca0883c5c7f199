"""rms_norm on the CPU: launches csrc/cpu/rms_norm.cpp."""

import torch

from pyfused._extensions import DTYPE_CODES, cpu
from pyfused.kernels.layout import as_rows


def forward(x, weight, eps, residual, save):
    n = x.shape[-1]
    rows, stride = (x, n) if x.is_contiguous() else as_rows(x)  # the view alone would cost 1 us
    y = torch.empty_like(x, memory_format=torch.contiguous_format)
    total = residual_rows = None
    residual_stride = 0
    if residual is not None:
        residual_rows, residual_stride = (residual, n) if residual.is_contiguous() else as_rows(residual)
        total = torch.empty_like(y)
    rstd = torch.empty(x.shape[:-1], dtype=torch.float32) if save else None
    weight = weight.contiguous()
    cpu().rms_norm_forward(
        rows.data_ptr(),
        0 if residual is None else residual_rows.data_ptr(),
        weight.data_ptr(),
        y.data_ptr(),
        0 if total is None else total.data_ptr(),
        0 if rstd is None else rstd.data_ptr(),
        x.numel() // n,
        n,
        stride,
        residual_stride,
        eps,
        DTYPE_CODES[x.dtype],
    )
    return y, total, rstd


def backward(grad_y, grad_total, x, weight, rstd):
    n = x.shape[-1]
    rows, stride = (x, n) if x.is_contiguous() else as_rows(x)
    grad_y, weight = grad_y.contiguous(), weight.contiguous()
    grad_total = None if grad_total is None else grad_total.contiguous()
    grad_x = torch.empty_like(x, memory_format=torch.contiguous_format)
    grad_weight = torch.empty_like(weight)
    cpu().rms_norm_backward(
        grad_y.data_ptr(),
        0 if grad_total is None else grad_total.data_ptr(),
        rows.data_ptr(),
        weight.data_ptr(),
        rstd.data_ptr(),
        grad_x.data_ptr(),
        grad_weight.data_ptr(),
        x.numel() // n,
        n,
        stride,
        DTYPE_CODES[x.dtype],
    )
    return grad_x, grad_weight
