"""gated_ffn on CUDA: launches csrc/cuda/gated_ffn.cu for up to 16 rows, and its pass between cuBLAS products for more.

In float16 activation(gate) * up may exceed the range: for a few rows it is kept in float32, for more in float16 with
a power-of-two scale for each row, so that cuBLAS multiplies in float16. The backward keeps it in float32.
"""

import torch
import torch.nn.functional as F

from pyfused._extensions import DTYPE_CODES, cuda
from pyfused.kernels.layout import as_rows

from ..reference.gated_ffn import linear_gradients
from ._launch import pointer, where
from .ffn import ACTIVATION_CODES
from .linear import few


def _hidden_dtype(x):
    return torch.float32 if x.dtype == torch.float16 else x.dtype


def forward(x, w_gate, w_up, w_out, activation, residual, save):
    lead, (f, n), m = x.shape[:-1], w_gate.shape, w_out.shape[0]
    if not few(lead.numel(), w_gate, w_out):
        return _library_forward(x, w_gate, w_up, w_out, activation, residual, save)
    x, x_stride = as_rows(x)
    weights, weight_strides = zip(*map(as_rows, (w_gate, w_up, w_out)))
    residual, residual_stride = (None, 0) if residual is None else as_rows(residual)
    gate, up = (torch.empty((*lead, f), dtype=x.dtype, device=x.device) if save else None for _ in range(2))
    hidden = torch.empty((*lead, f), dtype=_hidden_dtype(x), device=x.device)
    y = torch.empty((*lead, m), dtype=x.dtype, device=x.device)
    pointers = map(pointer, (x, *weights, residual, hidden, gate, up, y))
    sizes = x.shape[0], n, f, m
    strides = x_stride, *weight_strides, residual_stride
    codes = ACTIVATION_CODES[activation], DTYPE_CODES[x.dtype]
    cuda().gated_ffn_forward(*pointers, *sizes, *strides, *codes, *where(x.device))
    return y, gate, up


def _library_forward(x, w_gate, w_up, w_out, activation, residual, save):
    gate, up = (F.linear(x, w).contiguous() for w in (w_gate, w_up))
    hidden = torch.empty_like(gate) if save else gate
    kept = (gate, up) if save else (None, None)
    if x.dtype != torch.float16:
        _activation(gate, up, None, hidden, None, None, activation)
        y = F.linear(hidden, w_out)
        return y if residual is None else y.add_(residual), *kept
    rows, f, m = x.shape[:-1].numel(), w_gate.shape[0], w_out.shape[0]
    scale = torch.empty(rows, dtype=torch.float32, device=x.device)
    pointers = map(pointer, (gate, up, hidden, scale))
    cuda().gated_ffn_scaled(*pointers, rows, f, ACTIVATION_CODES[activation], *where(x.device))
    y = F.linear(hidden, w_out).contiguous()
    residual, residual_stride = (None, 0) if residual is None else as_rows(residual)
    pointers = map(pointer, (y, scale, residual))
    cuda().gated_ffn_unscale(*pointers, rows, m, residual_stride, *where(x.device))
    return y, *kept


def _activation(gate, up, grad_hidden, hidden, grad_gate, grad_up, activation):
    """hidden = activation(gate) * up and, from grad_hidden, the gradients of both; contiguous; may be in place."""
    pointers = map(pointer, (gate, up, grad_hidden, hidden, grad_gate, grad_up))
    codes = ACTIVATION_CODES[activation], DTYPE_CODES[gate.dtype]
    cuda().gated_ffn_activation(*pointers, gate.numel(), *codes, *where(gate.device))


def backward(grad_y, x, w_gate, w_up, w_out, gate, up, activation):
    gate, up = gate.contiguous(), up.contiguous()
    grad_hidden = (grad_y @ w_out).contiguous()
    hidden, grad_up = torch.empty_like(gate, dtype=_hidden_dtype(gate)), torch.empty_like(up)
    _activation(gate, up, grad_hidden, hidden, grad_hidden, grad_up, activation)
    return linear_gradients(grad_y, x, w_gate, w_up, hidden, grad_hidden, grad_up)
