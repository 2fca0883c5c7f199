"""rms_norm on the CPU: launches csrc/cpu/rms_norm.cpp, or torch's own where that was measured to be faster."""

import torch
import torch.nn.functional as F

from pyfused import evidence
from pyfused.extensions import DTYPE_CODES, cpu
from pyfused.kernels.shared.layout import rows_of
from pyfused.kernels.shared.prepared import dense, launched, maker

from ._launch import library_norm


def left_to_library_forward(x, weight, eps, residual, save):
    return None if save else evidence.slower_call("cpu", "rms_norm", (x, weight, eps, residual, save))


@launched
def forward(x, weight, eps, residual, save):
    if left_to_library_forward(x, weight, eps, residual, save):
        norm = library_norm(lambda t, weight: F.rms_norm(t, weight.shape, weight, eps))
        return lambda x, weight, _eps, residual, _save, y=None, total=None: (
            *norm((weight,), x, residual, y, total),
            None,
        )
    rows, residual_rows = rows_of(x), (0, 0, 0) if residual is None else rows_of(residual)
    if rows is None or residual_rows is None or not dense(weight):
        return None
    shape, dtype = x.shape, x.dtype
    numbers = *rows, residual_rows[2], eps, DTYPE_CODES[dtype]
    kernel, new = cpu().rms_norm_forward, maker(shape, dtype)
    new_statistic = maker(shape[:-1], torch.float32) if save else None

    def launch(x, weight, _eps, residual, _save, y=None, total=None):
        y = new() if y is None else y
        total = new() if total is None and residual is not None else total
        rstd = new_statistic() if save else None
        kernel(x, residual, weight, y, total, rstd, *numbers)
        return y, total, rstd

    return launch


@launched
def backward(grad_y, grad_total, x, weight, rstd):
    of_x = rows_of(x)
    if of_x is None or not dense(grad_y, grad_total, weight, rstd):
        return None
    kernel, numbers = cpu().rms_norm_backward, (*of_x, DTYPE_CODES[x.dtype])
    new, new_weight = maker(x.shape, x.dtype), maker(weight.shape, weight.dtype)

    def launch(grad_y, grad_total, x, weight, rstd):
        grad_x, grad_weight = new(), new_weight()
        kernel(
            grad_y.data_ptr(),
            0 if grad_total is None else grad_total.data_ptr(),
            x.data_ptr(),
            weight.data_ptr(),
            rstd.data_ptr(),
            grad_x.data_ptr(),
            grad_weight.data_ptr(),
            *numbers,
        )
        return grad_x, grad_weight

    return launch
