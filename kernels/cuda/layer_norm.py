"""layer_norm on CUDA: launches csrc/cuda/layer_norm.cu on the current stream of the tensors' device."""

import torch

from pyfused._extensions import DTYPE_CODES, cuda
from pyfused.kernels.layout import as_rows

from ._launch import multiprocessors, pointer, where


def forward(x, weight, bias, eps, residual, save):
    rows, stride = as_rows(x)
    residual_rows, residual_stride = (None, 0) if residual is None else as_rows(residual)
    y = torch.empty(x.shape, dtype=x.dtype, device=x.device)
    total = None if residual is None else torch.empty(x.shape, dtype=x.dtype, device=x.device)
    mean = rstd = None
    if save:
        mean = torch.empty(x.shape[:-1], dtype=torch.float32, device=x.device)
        rstd = torch.empty(x.shape[:-1], dtype=torch.float32, device=x.device)
    weight = weight.contiguous()
    bias = None if bias is None else bias.contiguous()
    pointers = map(pointer, (rows, residual_rows, weight, bias, y, total, mean, rstd))
    dtype = DTYPE_CODES[x.dtype]
    cuda().layer_norm_forward(*pointers, *rows.shape, stride, residual_stride, eps, dtype, *where(x.device))
    return y, total, mean, rstd


def backward(grad_y, grad_total, x, weight, mean, rstd, has_bias):
    rows, stride = as_rows(x)
    grad_y, weight = grad_y.contiguous(), weight.contiguous()
    grad_total = None if grad_total is None else grad_total.contiguous()
    grad_x = torch.empty(x.shape, dtype=x.dtype, device=x.device)
    grad_weight = torch.empty_like(weight)
    grad_bias = torch.empty_like(weight) if has_bias else None
    parts = cuda().layer_norm_backward_parts(*rows.shape, multiprocessors(x.device))
    partial = torch.empty((parts, 2, rows.shape[1]), dtype=torch.float32, device=x.device)
    pointers = map(pointer, (grad_y, grad_total, rows, weight, mean, rstd, grad_x, grad_weight, grad_bias, partial))
    dtype = DTYPE_CODES[x.dtype]
    cuda().layer_norm_backward(*pointers, parts, *rows.shape, stride, dtype, *where(x.device))
    return grad_x, grad_weight, grad_bias
