"""gated_ffn on CUDA: launches csrc/cuda/gated_ffn.cu for up to 16 rows. With more rows one of its passes runs between cuBLAS
products.

activation(gate) * up may exceed float16's range. For a few rows it is kept in float32. For more rows it is kept in float16
with a power-of-two scale per row, so cuBLAS multiplies in float16. The backward keeps it in float32.
"""

import torch
import torch.nn.functional as F

from pyfused.activations import ACTIVATIONS
from pyfused.extensions import DTYPE_CODES, cuda
from pyfused.kernels.shared.layout import is_by_columns, rows_of
from pyfused.kernels.shared.prepared import dense, maker, prepares_launch

from ..reference.gated_ffn import hidden_dtype, linear_gradients
from ._launch import where
from .linear import few


@prepares_launch
def forward(x, w_gate, w_up, w_out, activation, residual, save):
    outer, (f, n), m, dtype, device = x.shape[:-1], w_gate.shape, w_out.shape[0], x.dtype, x.device
    of_residual = rows_of(residual)
    if of_residual is None:
        return None
    if not few(outer.numel(), w_gate, w_up, w_out) or any(map(is_by_columns, (w_gate, w_up, w_out))):
        return _prepare_library_forward(outer, f, m, of_residual[2], activation, save, dtype, device)
    rows = tuple(map(rows_of, (x, w_gate, w_up, w_out)))
    if None in rows:
        return None
    strides = *(stride for _, _, stride in rows), of_residual[2]
    numbers = outer.numel(), n, f, m, *strides, ACTIVATIONS[activation].code, DTYPE_CODES[dtype]
    place, kernel = where(device), cuda().gated_ffn_forward
    new, new_y = maker((*outer, f), dtype, None, device), maker((*outer, m), dtype, None, device)
    new_hidden = maker((*outer, f), hidden_dtype(x), None, device)

    def launch(x, w_gate, w_up, w_out, _activation, residual, _save=False):
        y, hidden = new_y(), new_hidden()
        gate, up = (new(), new()) if save else (None, None)
        kernel(x, w_gate, w_up, w_out, residual, hidden, gate, up, y, *numbers, *place())
        return y, gate, up

    return launch


def _prepare_library_forward(outer, f, m, residual_stride, activation, save, dtype, device):
    code, rows, place = ACTIVATIONS[activation].code, outer.numel(), where(device)
    activate = prepare_activation(rows * f, activation, dtype, device)
    new_scale = maker((rows,), torch.float32, None, device)
    scaled, unscale = cuda().gated_ffn_scaled, cuda().gated_ffn_unscale

    def launch(x, w_gate, w_up, w_out, _activation, residual, _save=False):
        gate, up = (F.linear(x, w).contiguous() for w in (w_gate, w_up))
        hidden = gate.new_empty(gate.shape) if save else gate
        if dtype == torch.float16:
            scale = new_scale()
            scaled(gate, up, hidden, scale, rows, f, code, *place())
            found = F.linear(hidden, w_out).contiguous()
            unscale(found, scale, residual, rows, m, residual_stride, *place())
        else:
            activate(gate, up, None, hidden, None, None)
            found = F.linear(hidden, w_out)
            found = found if residual is None else found.add_(residual)
        return (found, gate, up) if save else (found, None, None)

    return launch


def prepare_activation(size, activation, dtype, device):
    """A function of contiguous (gate, up, grad_hidden, hidden, grad_gate, grad_up) with `size` elements each. It sets hidden =
    activation(gate) * up. If grad_hidden is given, it sets both gradients. It may run in place."""
    numbers, place = (size, ACTIVATIONS[activation].code, DTYPE_CODES[dtype]), where(device)
    kernel = cuda().gated_ffn_activation
    return lambda *tensors: kernel(*tensors, *numbers, *place())


@prepares_launch
def backward(grad_y, x, w_gate, w_up, w_out, gate, up, activation, *wants):
    if not dense(gate, up):
        return None
    dtype, device = gate.dtype, gate.device
    activate = prepare_activation(gate.numel(), activation, dtype, device)
    new_hidden, new_grad = maker(gate.shape, hidden_dtype(gate), None, device), maker(gate.shape, dtype, None, device)

    def launch(grad_y, x, w_gate, w_up, w_out, gate, up, _activation, *wants):
        grad_hidden, hidden, grad_up = (grad_y @ w_out).contiguous(), new_hidden(), new_grad()
        activate(gate, up, grad_hidden, hidden, grad_hidden, grad_up)
        return linear_gradients(grad_y, x, w_gate, w_up, hidden, grad_hidden, grad_up, wants)

    return launch
