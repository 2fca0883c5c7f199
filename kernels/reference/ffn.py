"""ffn in plain PyTorch: the definition of truth (Vaswani et al. 2017, section 3.3)."""

import math

import torch
import torch.nn.functional as F

# Further out every activation and every derivative is at its limit, in every dtype.
_FAR = 1024.0


def _has_limits(x):
    """Whether torch's formulas, whose answer at infinity depends on the processor, are kept from it here. On a GPU that would
    take three more passes over memory; there float64, the truth, is."""
    return not x.is_cuda or x.dtype == torch.float64


def _with_limits(function):
    def limited(x):
        return torch.where(x > _FAR, x, function(x.clamp(-_FAR, _FAR))) if _has_limits(x) else function(x)

    return limited


def _near(x):
    return x.clamp(-_FAR, _FAR) if _has_limits(x) else x


ACTIVATIONS = {
    "relu": F.relu,
    "silu": _with_limits(F.silu),
    "tanh": torch.tanh,
    "gelu": _with_limits(F.gelu),
    "gelu_tanh": _with_limits(lambda x: F.gelu(x, approximate="tanh")),
}


def _silu_gradient(g, x):
    if not torch.is_grad_enabled():
        return torch.ops.aten.silu_backward(g, x)
    sigmoid = torch.sigmoid(x)  # the only derivative here that torch itself cannot differentiate
    return g * sigmoid * (1 + x * (1 - sigmoid))


# (gradient of activation(x), x, activation(x)) -> gradient of x
GRADIENTS = {
    "relu": lambda g, x, y: torch.ops.aten.threshold_backward(g, x, 0),
    "silu": lambda g, x, y: _silu_gradient(g, _near(x)),
    "tanh": lambda g, x, y: torch.ops.aten.tanh_backward(g, y),
    "gelu": lambda g, x, y: torch.ops.aten.gelu_backward(g, _near(x)),
    "gelu_tanh": lambda g, x, y: torch.ops.aten.gelu_backward(g, _near(x), approximate="tanh"),
}


def forward(x, w_in, b_in, w_out, b_out, activation, residual, save):
    """(y, pre); pre = x w_in^T + b_in is kept for the backward."""
    pre = F.linear(x, w_in, b_in)
    y = F.linear(ACTIVATIONS[activation](pre), w_out, b_out)
    return y if residual is None else y + residual, pre if save else None


def backward(grad_y, x, w_in, w_out, pre, activation, *wants):
    """(grad_x, grad_w_in, grad_b_in, grad_w_out, grad_b_out), each None where `wants` says no."""
    inner = ACTIVATIONS[activation](pre)
    # torch's own derivatives, called by name: inside a registered operator autograd records nothing.
    grad_pre = GRADIENTS[activation](grad_y @ w_out, pre, inner)
    return linear_gradients(grad_y, x, w_in, inner, grad_pre, wants)


def linear_gradients(grad_y, x, w_in, inner, grad_pre, wants):
    """What remains of the backward once the activation is through: three library products and two sums. Frozen weights want
    none of theirs."""
    wants_x, wants_w_in, wants_b_in, wants_w_out, wants_b_out = wants
    g, p, rows, inner = (t.reshape(math.prod(t.shape[:-1]), t.shape[-1]) for t in (grad_y, grad_pre, x, inner))
    return (
        (p @ w_in).view(x.shape) if wants_x else None,
        p.t() @ rows if wants_w_in else None,
        p.sum(0) if wants_b_in else None,
        g.t() @ inner if wants_w_out else None,
        g.sum(0) if wants_b_out else None,
    )
