"""ffn on the CPU: launches csrc/cpu/ffn.cpp, or its activation between library products where those are faster."""

import torch
import torch.nn.functional as F

from pyfused._extensions import DTYPE_CODES, cpu

from ..reference.ffn import linear_gradients
from ._launch import CPU, dense, launched, rows_of
from .linear import library_is_faster

ACTIVATION_CODES = {"relu": 1, "silu": 2, "tanh": 3, "gelu": 4, "gelu_tanh": 5}


@launched
def forward(x, w_in, b_in, w_out, b_out, activation, residual, save):
    of_x, of_in, of_out = rows_of(x), rows_of(w_in), rows_of(w_out)
    if library_is_faster(x.numel() // max(x.shape[-1], 1), w_in, w_out):
        return lambda x, w_in, b_in, w_out, b_out, _activation, residual, _save: _library_forward(
            x, w_in, b_in, w_out, b_out, activation, residual, save
        )
    of_residual = (0, 0, 0) if residual is None else rows_of(residual)
    if of_x is None or of_in is None or of_out is None or of_residual is None or not dense(b_in, b_out):
        return None
    (rows, n, x_stride), (f, _, in_stride), (m, _, out_stride) = of_x, of_in, of_out
    outer, dtype = x.shape[:-1], x.dtype
    numbers = *(rows, n, f, m, x_stride, in_stride, out_stride, of_residual[2]), ACTIVATION_CODES[activation]
    code, kernel = DTYPE_CODES[dtype], cpu().ffn_forward

    def launch(x, w_in, b_in, w_out, b_out, _activation, residual, _save):
        y = torch.empty(*outer, m, dtype=dtype, device=CPU)
        inner = torch.empty(rows, f, dtype=dtype, device=CPU)
        pre = torch.empty(*outer, f, dtype=dtype, device=CPU) if save else None
        kernel(x, w_in, b_in, w_out, b_out, residual, inner, pre, y, *numbers, code)
        return y, pre

    return launch


def _library_forward(x, w_in, b_in, w_out, b_out, activation, residual, save):
    pre = F.linear(x.reshape(-1, x.shape[-1]), w_in, b_in)
    inner = torch.empty_like(pre) if save else pre
    _activation(pre, None, inner, None, activation)
    y = F.linear(inner, w_out, b_out).view(*x.shape[:-1], w_out.shape[0])
    return y if residual is None else y.add_(residual), pre.view(*x.shape[:-1], w_in.shape[0]) if save else None


def _activation(pre, grad_inner, inner, grad_pre, activation):
    """inner = activation(pre), grad_pre = grad_inner activation'(pre); contiguous, in place if one is given twice."""
    cpu().ffn_activation(
        pre, grad_inner, inner, grad_pre, pre.numel(), ACTIVATION_CODES[activation], DTYPE_CODES[pre.dtype]
    )


def backward(grad_y, x, w_in, w_out, pre, activation, has_b_in, has_b_out):
    pre = pre.contiguous()
    grad_pre = (grad_y @ w_out).contiguous()
    inner = torch.empty_like(pre)
    _activation(pre, grad_pre, inner, grad_pre, activation)
    return linear_gradients(grad_y, x, w_in, inner, grad_pre, has_b_in, has_b_out)
