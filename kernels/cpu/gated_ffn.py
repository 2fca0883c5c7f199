"""gated_ffn on the CPU: launches csrc/cpu/gated_ffn.cpp, or its activation between library products where those are faster."""

import torch
import torch.nn.functional as F

from pyfused._extensions import DTYPE_CODES, cpu

from ..reference.gated_ffn import linear_gradients, widened
from .ffn import ACTIVATION_CODES
from .linear import library_is_faster, matrix, pointer, rows_of


def _hidden_dtype(x):
    """What activation(gate) * up is kept in: float16 cannot hold it."""
    return torch.float32 if x.dtype == torch.float16 else x.dtype


def forward(x, w_gate, w_up, w_out, activation, residual, save):
    shape, dtype = x.shape[:-1], x.dtype
    rows_x, rows, n, x_stride = rows_of(x)
    if library_is_faster(rows, w_gate, w_up, w_out):
        return _library_forward(x, w_gate, w_up, w_out, activation, residual, save)
    f, m = w_gate.shape[0], w_out.shape[0]
    y = torch.empty(*shape, m, dtype=dtype)
    gate, up = (torch.empty(*shape, f, dtype=dtype) for _ in range(2)) if save else (None, None)
    w_gate, w_gate_stride = matrix(w_gate)
    w_up, w_up_stride = matrix(w_up)
    w_out, w_out_stride = matrix(w_out)
    residual, _, _, residual_stride = (None, 0, 0, 0) if residual is None else rows_of(residual)
    hidden = torch.empty(rows, f, dtype=_hidden_dtype(x))
    cpu().gated_ffn_forward(
        rows_x.data_ptr(),
        w_gate.data_ptr(),
        w_up.data_ptr(),
        w_out.data_ptr(),
        pointer(residual),
        hidden.data_ptr(),
        pointer(gate),
        pointer(up),
        y.data_ptr(),
        rows,
        n,
        f,
        m,
        x_stride,
        w_gate_stride,
        w_up_stride,
        w_out_stride,
        residual_stride,
        ACTIVATION_CODES[activation],
        DTYPE_CODES[dtype],
    )
    return y, gate, up


def _library_forward(x, w_gate, w_up, w_out, activation, residual, save):
    gate, up = (F.linear(x, w).contiguous() for w in (w_gate, w_up))
    hidden = gate if not save and gate.dtype != torch.float16 else torch.empty_like(gate, dtype=_hidden_dtype(gate))
    _activation(gate, up, None, hidden, None, None, activation)
    y = F.linear(hidden, *widened(w_out))
    y = (y if residual is None else y.add_(residual)).to(x.dtype)
    return y, gate if save else None, up if save else None


def _activation(gate, up, grad_hidden, hidden, grad_gate, grad_up, activation):
    """hidden = activation(gate) * up and, from grad_hidden, the gradients of both; contiguous; may be in place."""
    cpu().gated_ffn_activation(
        gate.data_ptr(),
        up.data_ptr(),
        pointer(grad_hidden),
        hidden.data_ptr(),
        pointer(grad_gate),
        pointer(grad_up),
        gate.numel(),
        ACTIVATION_CODES[activation],
        DTYPE_CODES[gate.dtype],
    )


def backward(grad_y, x, w_gate, w_up, w_out, gate, up, activation):
    gate, up = gate.contiguous(), up.contiguous()
    wide_grad, wide_out = widened(grad_y, w_out)
    grad_hidden = (wide_grad @ wide_out).contiguous()
    hidden = torch.empty_like(gate, dtype=_hidden_dtype(gate))
    grad_gate, grad_up = torch.empty_like(gate), torch.empty_like(up)
    _activation(gate, up, grad_hidden, hidden, grad_gate, grad_up, activation)
    return linear_gradients(grad_y, x, w_gate, w_up, hidden, grad_gate, grad_up)
