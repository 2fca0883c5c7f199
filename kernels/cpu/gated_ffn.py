"""gated_ffn on the CPU: launches csrc/cpu/gated_ffn.cpp, or its activation between library products where those are faster."""

import torch
import torch.nn.functional as F

from pyfused.activations import ACTIVATIONS
from pyfused.extensions import DTYPE_CODES, cpu
from pyfused.kernels.shared.layout import rows_of
from pyfused.kernels.shared.prepared import maker, prepares_launch
from pyfused.kernels.shared.product import product

from ..reference.gated_ffn import hidden_dtype, linear_gradients, widened
from . import dot
from .linear import library_is_faster, would_copy


def _measured_as(save):
    """As in ffn.py."""
    return "linear" if save else "gated_ffn"


def left_to_library_forward(x, w_gate, w_up, w_out, activation, residual, save):
    weights = w_gate, w_up, w_out
    return would_copy(*weights) or library_is_faster(_measured_as(save), x.shape[:-1].numel(), *weights)


def remark_forward(x, w_gate, w_up, w_out, activation, residual, save):
    return dot.remark(dot.of_floats(_measured_as(save), x.shape[:-1].numel(), w_gate, w_up, w_out))


@prepares_launch
def forward(x, w_gate, w_up, w_out, activation, residual, save):
    if left_to_library_forward(x, w_gate, w_up, w_out, activation, residual, save):
        return lambda x, w_gate, w_up, w_out, _activation, residual, _save=False: _library_forward(
            x, w_gate, w_up, w_out, activation, residual, save
        )
    layouts = *map(rows_of, (x, w_gate, w_up, w_out)), rows_of(residual)
    if None in layouts:
        return None
    (rows, n, _), (f, _, _), _, (m, _, _), _ = layouts
    strides = (layout[2] for layout in layouts)
    outer, dtype = x.shape[:-1], x.dtype
    numbers = rows, n, f, m, *strides, ACTIVATIONS[activation].code, DTYPE_CODES[dtype]
    kernels = dot.chosen(dot.of_floats(_measured_as(save), rows, w_gate, w_up, w_out)) or cpu()
    kernel, new_y = kernels.gated_ffn_forward, maker((*outer, m), dtype)
    new_inner = maker((*outer, f), dtype) if save else None

    def launch(x, w_gate, w_up, w_out, _activation, residual, _save=False):
        y = new_y()
        gate, up = (new_inner(), new_inner()) if save else (None, None)
        kernel(x, w_gate, w_up, w_out, residual, gate, up, y, *numbers)
        return y, gate, up

    return launch


def _library_forward(x, w_gate, w_up, w_out, activation, residual, save):
    gate, up = (F.linear(x, w).contiguous() for w in (w_gate, w_up))
    hidden = gate if not save and gate.dtype != torch.float16 else torch.empty_like(gate, dtype=hidden_dtype(gate))
    activate(gate, up, None, hidden, None, None, activation)
    wide = F.linear(hidden, *widened(w_out))
    wide = wide if residual is None else wide.add_(residual)
    return wide.to(x.dtype), gate if save else None, up if save else None


def activate(gate, up, grad_hidden, hidden, grad_gate, grad_up, activation):
    """hidden = activation(gate) * up. If grad_hidden is given, also both gradients. Contiguous; may be in place."""
    numbers = gate.numel(), ACTIVATIONS[activation].code, DTYPE_CODES[gate.dtype]
    cpu().gated_ffn_activation(gate, up, grad_hidden, hidden, grad_gate, grad_up, *numbers)


def backward(grad_y, x, w_gate, w_up, w_out, gate, up, activation, *wants):
    gate, up = gate.contiguous(), up.contiguous()
    wide = hidden_dtype(gate)
    grad_hidden = product(grad_y.reshape(-1, grad_y.shape[-1]), w_out).to(wide).view(gate.shape)
    hidden = torch.empty_like(gate, dtype=wide)
    grad_gate, grad_up = torch.empty_like(gate), torch.empty_like(up)
    activate(gate, up, grad_hidden, hidden, grad_gate, grad_up, activation)
    return linear_gradients(grad_y, x, w_gate, w_up, hidden, grad_gate, grad_up, wants, product)
