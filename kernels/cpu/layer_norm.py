"""layer_norm on the CPU: launches csrc/cpu/layer_norm.cpp."""

import torch

from pyfused._extensions import DTYPE_CODES, cpu
from pyfused.kernels.layout import as_rows


def forward(x, weight, bias, eps, residual, save):
    rows, stride = as_rows(x)
    y = torch.empty(x.shape, dtype=x.dtype, device=x.device)
    mean = rstd = total = None
    residual_rows, residual_stride = None, 0
    if residual is not None:
        residual_rows, residual_stride = as_rows(residual)
        total = torch.empty(x.shape, dtype=x.dtype, device=x.device)
    if save:
        mean = torch.empty(x.shape[:-1], dtype=torch.float32)
        rstd = torch.empty(x.shape[:-1], dtype=torch.float32)
    weight = weight.contiguous()
    bias = None if bias is None else bias.contiguous()
    cpu().layer_norm_forward(
        rows.data_ptr(),
        0 if residual is None else residual_rows.data_ptr(),
        weight.data_ptr(),
        0 if bias is None else bias.data_ptr(),
        y.data_ptr(),
        0 if total is None else total.data_ptr(),
        0 if mean is None else mean.data_ptr(),
        0 if rstd is None else rstd.data_ptr(),
        rows.shape[0],
        rows.shape[1],
        stride,
        residual_stride,
        eps,
        DTYPE_CODES[x.dtype],
    )
    return y, total, mean, rstd


def backward(grad_y, grad_total, x, weight, mean, rstd, has_bias):
    rows, stride = as_rows(x)
    grad_y, weight = grad_y.contiguous(), weight.contiguous()
    grad_total = None if grad_total is None else grad_total.contiguous()
    grad_x = torch.empty(x.shape, dtype=x.dtype)
    grad_weight = torch.empty_like(weight)
    grad_bias = torch.empty_like(weight) if has_bias else None
    cpu().layer_norm_backward(
        grad_y.data_ptr(),
        0 if grad_total is None else grad_total.data_ptr(),
        rows.data_ptr(),
        weight.data_ptr(),
        mean.data_ptr(),
        rstd.data_ptr(),
        grad_x.data_ptr(),
        grad_weight.data_ptr(),
        0 if grad_bias is None else grad_bias.data_ptr(),
        rows.shape[0],
        rows.shape[1],
        stride,
        DTYPE_CODES[x.dtype],
    )
    return grad_x, grad_weight, grad_bias
