"""gated_ffn in plain PyTorch: the definition of truth (Shazeer 2020, arXiv:2002.05202).

For float16 inputs, everything after the first two products runs in float32: activation(gate) * up overflows float16.
"""

import math

import torch
import torch.nn.functional as F

from pyfused.kernels.shared.product import plain_product

from .ffn import activate, activation_gradient


def hidden_dtype(x):
    """The dtype of activation(gate) * up, which overflows float16."""
    return torch.float32 if x.dtype == torch.float16 else x.dtype


def widened(*tensors):
    """float16 as float32, anything else as it is."""
    return tuple(t.to(hidden_dtype(t)) for t in tensors)


def forward(x, w_gate, w_up, w_out, activation, residual, save):
    """(y, gate, up); gate = x w_gate^T and up = x w_up^T are kept for the backward."""
    gate, up = F.linear(x, w_gate), F.linear(x, w_up)
    wide_gate, wide_up, wide_out = widened(gate, up, w_out)
    y = F.linear(activate(activation, wide_gate) * wide_up, wide_out)
    y = (y if residual is None else y + residual).to(x.dtype)
    return y, gate if save else None, up if save else None


def backward(grad_y, x, w_gate, w_up, w_out, gate, up, activation, *wants):
    """(grad_x, grad_w_gate, grad_w_up, grad_w_out); those not in `wants` are None."""
    wide_gate, wide_up, wide_grad, wide_out = widened(gate, up, grad_y, w_out)
    grad_hidden = wide_grad @ wide_out
    active = activate(activation, wide_gate)
    grad_gate = activation_gradient(activation, grad_hidden * wide_up, wide_gate, active).to(grad_y.dtype)
    grad_up = (grad_hidden * active).to(grad_y.dtype)
    return linear_gradients(grad_y, x, w_gate, w_up, active * wide_up, grad_gate, grad_up, wants)


def linear_gradients(grad_y, x, w_gate, w_up, hidden, grad_gate, grad_up, wants, product=plain_product):
    """The rest of the backward after the activation: library products. `hidden` may have a wider dtype than x. Gradients not
    in `wants`, such as those of frozen weights, are None. x may be None if neither w_gate nor w_up wants one."""
    wants_x, wants_gate, wants_up, wants_out = wants
    outer, n = grad_y.shape[:-1], w_gate.shape[1]
    count = math.prod(outer)
    rows = x.reshape(count, n) if wants_gate or wants_up else None
    g, p, q, hidden = (t.reshape(count, t.shape[-1]) for t in (grad_y, grad_gate, grad_up, hidden))
    return (
        product(q, w_up, p, w_gate).view(*outer, n) if wants_x else None,
        product(p.t(), rows) if wants_gate else None,
        product(q.t(), rows) if wants_up else None,
        product(g.to(hidden.dtype).t(), hidden).to(grad_y.dtype) if wants_out else None,
    )
