"""ffn on CUDA: launches csrc/cuda/ffn.cu for up to 16 rows, and its activation between cuBLAS products for more.

cuBLAS adds a bias in its own epilogue, so the pass between the products is the activation alone, in place, and the
backward's is one pass for the inner activations and the gradient through the activation.
"""

import torch
import torch.nn.functional as F

from pyfused._extensions import DTYPE_CODES, cuda
from pyfused.kernels.layout import as_rows

from ..reference.ffn import linear_gradients
from ._launch import pointer, where
from .linear import few

ACTIVATION_CODES = {"relu": 1, "silu": 2, "tanh": 3, "gelu": 4, "gelu_tanh": 5}


def forward(x, w_in, b_in, w_out, b_out, activation, residual, save):
    lead, (f, n), m = x.shape[:-1], w_in.shape, w_out.shape[0]
    if not few(lead.numel(), w_in, w_out):
        return _library_forward(x, w_in, b_in, w_out, b_out, activation, residual, save)
    x, x_stride = as_rows(x)
    w_in, w_in_stride = as_rows(w_in)
    w_out, w_out_stride = as_rows(w_out)
    b_in = None if b_in is None else b_in.contiguous()
    b_out = None if b_out is None else b_out.contiguous()
    residual, residual_stride = (None, 0) if residual is None else as_rows(residual)
    inner = torch.empty((*lead, f), dtype=x.dtype, device=x.device)
    pre = torch.empty_like(inner) if save else None
    y = torch.empty((*lead, m), dtype=x.dtype, device=x.device)
    pointers = map(pointer, (x, w_in, b_in, w_out, b_out, residual, inner, pre, y))
    sizes = x.shape[0], n, f, m
    strides = x_stride, w_in_stride, w_out_stride, residual_stride
    codes = ACTIVATION_CODES[activation], DTYPE_CODES[x.dtype]
    cuda().ffn_forward(*pointers, *sizes, *strides, *codes, *where(x.device))
    return y, pre


def _library_forward(x, w_in, b_in, w_out, b_out, activation, residual, save):
    pre = F.linear(x, w_in, b_in).contiguous()
    inner = torch.empty_like(pre) if save else pre
    _activation(pre, None, inner, None, activation)
    y = F.linear(inner, w_out, b_out)
    return y if residual is None else y.add_(residual), pre if save else None


def _activation(pre, grad_inner, inner, grad_pre, activation):
    """inner = activation(pre), grad_pre = grad_inner activation'(pre); contiguous, in place if one is given twice."""
    pointers = map(pointer, (pre, grad_inner, inner, grad_pre))
    codes = ACTIVATION_CODES[activation], DTYPE_CODES[pre.dtype]
    cuda().ffn_activation(*pointers, pre.numel(), *codes, *where(pre.device))


def backward(grad_y, x, w_in, w_out, pre, activation, has_b_in, has_b_out):
    pre = pre.contiguous()
    grad_pre = (grad_y @ w_out).contiguous()
    inner = torch.empty_like(pre)
    _activation(pre, grad_pre, inner, grad_pre, activation)
    return linear_gradients(grad_y, x, w_in, inner, grad_pre, has_b_in, has_b_out)
