"""layer_norm on the CPU: launches csrc/cpu/layer_norm.cpp, or torch's own where that was measured to be faster."""

import torch
import torch.nn.functional as F

from pyfused import evidence
from pyfused.extensions import DTYPE_CODES, cpu
from pyfused.kernels.shared.layout import rows_of
from pyfused.kernels.shared.prepared import dense, launched, maker

from ._launch import library_norm


def left_to_library_forward(x, weight, bias, eps, residual, save):
    return None if save else evidence.slower_call("cpu", "layer_norm", (x, weight, bias, eps, residual, save))


@launched
def forward(x, weight, bias, eps, residual, save):
    if left_to_library_forward(x, weight, bias, eps, residual, save):
        norm = library_norm(lambda t, weight, bias: F.layer_norm(t, weight.shape, weight, bias, eps))
        return lambda x, weight, bias, _eps, residual, _save, y=None, total=None: (
            *norm((weight, bias), x, residual, y, total),
            None,
            None,
        )
    rows, residual_rows = rows_of(x), (0, 0, 0) if residual is None else rows_of(residual)
    if rows is None or residual_rows is None or not dense(weight, bias):
        return None
    shape, dtype = x.shape, x.dtype
    numbers = *rows, residual_rows[2], eps, DTYPE_CODES[dtype]
    kernel, new = cpu().layer_norm_forward, maker(shape, dtype)
    new_statistic = maker(shape[:-1], torch.float32) if save else None

    def launch(x, weight, bias, _eps, residual, _save, y=None, total=None):
        y = new() if y is None else y
        total = new() if total is None and residual is not None else total
        mean, rstd = (new_statistic(), new_statistic()) if save else (None, None)
        kernel(x, residual, weight, bias, y, total, mean, rstd, *numbers)
        return y, total, mean, rstd

    return launch


@launched
def backward(grad_y, grad_total, x, weight, mean, rstd, has_bias):
    of_x = rows_of(x)
    if of_x is None or not dense(grad_y, grad_total, weight, mean, rstd):
        return None
    kernel, numbers = cpu().layer_norm_backward, (*of_x, DTYPE_CODES[x.dtype])
    new, new_parameter = maker(x.shape, x.dtype), maker(weight.shape, weight.dtype)

    def launch(grad_y, grad_total, x, weight, mean, rstd, _has_bias):
        grad_x, grad_weight, grad_bias = new(), new_parameter(), new_parameter() if has_bias else None
        kernel(
            grad_y.data_ptr(),
            0 if grad_total is None else grad_total.data_ptr(),
            x.data_ptr(),
            weight.data_ptr(),
            mean.data_ptr(),
            rstd.data_ptr(),
            grad_x.data_ptr(),
            grad_weight.data_ptr(),
            0 if grad_bias is None else grad_bias.data_ptr(),
            *numbers,
        )
        return grad_x, grad_weight, grad_bias

    return launch
