"""ffn on the CPU: launches csrc/cpu/ffn.cpp, or its activation between library products where those are faster."""

import torch
import torch.nn.functional as F

from pyfused._extensions import DTYPE_CODES, cpu

from ..reference.ffn import linear_gradients
from .linear import library_is_faster, matrix, pointer, rows_of

ACTIVATION_CODES = {"relu": 1, "silu": 2, "tanh": 3, "gelu": 4, "gelu_tanh": 5}


def forward(x, w_in, b_in, w_out, b_out, activation, residual, save):
    shape, dtype = x.shape[:-1], x.dtype
    rows_x, rows, n, x_stride = rows_of(x)
    if library_is_faster(rows, w_in, w_out):
        return _library_forward(x, w_in, b_in, w_out, b_out, activation, residual, save)
    f, m = w_in.shape[0], w_out.shape[0]
    y = torch.empty(*shape, m, dtype=dtype)
    inner = torch.empty(rows, f, dtype=dtype)
    pre = torch.empty(*shape, f, dtype=dtype) if save else None
    w_in, w_in_stride = matrix(w_in)
    w_out, w_out_stride = matrix(w_out)
    b_in = None if b_in is None else b_in.contiguous()
    b_out = None if b_out is None else b_out.contiguous()
    residual, _, _, residual_stride = (None, 0, 0, 0) if residual is None else rows_of(residual)
    cpu().ffn_forward(
        rows_x.data_ptr(),
        w_in.data_ptr(),
        pointer(b_in),
        w_out.data_ptr(),
        pointer(b_out),
        pointer(residual),
        inner.data_ptr(),
        pointer(pre),
        y.data_ptr(),
        rows,
        n,
        f,
        m,
        x_stride,
        w_in_stride,
        w_out_stride,
        residual_stride,
        ACTIVATION_CODES[activation],
        DTYPE_CODES[dtype],
    )
    return y, pre


def _library_forward(x, w_in, b_in, w_out, b_out, activation, residual, save):
    pre = F.linear(matrix(x)[0], w_in, b_in)
    inner = torch.empty_like(pre) if save else pre
    _activation(pre, None, inner, None, activation)
    y = F.linear(inner, w_out, b_out).view(*x.shape[:-1], w_out.shape[0])
    return y if residual is None else y.add_(residual), pre.view(*x.shape[:-1], w_in.shape[0]) if save else None


def _activation(pre, grad_inner, inner, grad_pre, activation):
    """inner = activation(pre), grad_pre = grad_inner activation'(pre); contiguous, in place if one is given twice."""
    cpu().ffn_activation(
        pre.data_ptr(),
        pointer(grad_inner),
        inner.data_ptr(),
        pointer(grad_pre),
        pre.numel(),
        ACTIVATION_CODES[activation],
        DTYPE_CODES[pre.dtype],
    )


def backward(grad_y, x, w_in, w_out, pre, activation, has_b_in, has_b_out):
    pre = pre.contiguous()
    grad_pre = (grad_y @ w_out).contiguous()
    inner = torch.empty_like(pre)
    _activation(pre, grad_pre, inner, grad_pre, activation)
    return linear_gradients(grad_y, x, w_in, inner, grad_pre, has_b_in, has_b_out)
