"""ffn in plain PyTorch: the definition of truth (Vaswani et al. 2017, section 3.3)."""

import math

import torch
import torch.nn.functional as F

from pyfused.activations import ACTIVATIONS
from pyfused.kernels.shared.product import plain_product

_FAR = 1024.0  # beyond it every activation and every derivative is at its limit, in every dtype


def _kept_near(activation, x):
    """Whether x is clamped before torch's formula, whose result at infinity depends on the processor. On a GPU that takes three
    more passes over memory, so only float64, the definition of truth, is clamped there."""
    return ACTIVATIONS[activation].gates and (not x.is_cuda or x.dtype == torch.float64)


def activate(activation, x):
    function = ACTIVATIONS[activation].function
    return torch.where(x > _FAR, x, function(x.clamp(-_FAR, _FAR))) if _kept_near(activation, x) else function(x)


def activation_gradient(activation, grad_y, x, y):
    """The gradient of x from grad_y, the gradient of y = activate(activation, x)."""
    near = x.clamp(-_FAR, _FAR) if _kept_near(activation, x) else x
    return ACTIVATIONS[activation].gradient(grad_y, near, y)


def forward(x, w_in, b_in, w_out, b_out, activation, residual, save):
    """(y, pre); pre = x w_in^T + b_in is kept for the backward."""
    pre = F.linear(x, w_in, b_in)
    y = F.linear(activate(activation, pre), w_out, b_out)
    return y if residual is None else y + residual, pre if save else None


def backward(grad_y, x, w_in, w_out, pre, activation, *wants):
    """(grad_x, grad_w_in, grad_b_in, grad_w_out, grad_b_out); those not in `wants` are None."""
    inner = activate(activation, pre)
    grad_pre = activation_gradient(activation, grad_y @ w_out, pre, inner)
    return linear_gradients(grad_y, x, w_in, inner, grad_pre, wants)


def linear_gradients(grad_y, x, w_in, inner, grad_pre, wants, product=plain_product):
    """The rest of the backward after the activation: three library products and two sums. Gradients not in `wants`, such as
    those of frozen weights, are None. x may be None if w_in wants none."""
    wants_x, wants_w_in, wants_b_in, wants_w_out, wants_b_out = wants
    g, p, inner = (t.reshape(math.prod(t.shape[:-1]), t.shape[-1]) for t in (grad_y, grad_pre, inner))
    return (
        product(p, w_in).view(*grad_y.shape[:-1], w_in.shape[1]) if wants_x else None,
        product(p.t(), x.reshape(len(p), w_in.shape[1])) if wants_w_in else None,
        p.sum(0) if wants_b_in else None,
        product(g.t(), inner) if wants_w_out else None,
        g.sum(0) if wants_b_out else None,
    )
