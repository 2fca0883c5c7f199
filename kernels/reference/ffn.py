"""ffn in plain PyTorch: the definition of truth (Vaswani et al. 2017, section 3.3)."""

import torch
import torch.nn.functional as F

ACTIVATIONS = {
    "relu": F.relu,
    "silu": F.silu,
    "tanh": torch.tanh,
    "gelu": F.gelu,
    "gelu_tanh": lambda x: F.gelu(x, approximate="tanh"),
}


def _silu_gradient(g, x):
    if not torch.is_grad_enabled():
        return torch.ops.aten.silu_backward(g, x)
    sigmoid = torch.sigmoid(x)  # the only derivative here that torch itself cannot differentiate
    return g * sigmoid * (1 + x * (1 - sigmoid))


# (gradient of activation(x), x, activation(x)) -> gradient of x
GRADIENTS = {
    "relu": lambda g, x, y: torch.ops.aten.threshold_backward(g, x, 0),
    "silu": lambda g, x, y: _silu_gradient(g, x),
    "tanh": lambda g, x, y: torch.ops.aten.tanh_backward(g, y),
    "gelu": lambda g, x, y: torch.ops.aten.gelu_backward(g, x),
    "gelu_tanh": lambda g, x, y: torch.ops.aten.gelu_backward(g, x, approximate="tanh"),
}


def forward(x, w_in, b_in, w_out, b_out, activation, residual, save):
    """(y, pre); pre = x w_in^T + b_in is kept for the backward."""
    pre = F.linear(x, w_in, b_in)
    y = F.linear(ACTIVATIONS[activation](pre), w_out, b_out)
    return y if residual is None else y + residual, pre if save else None


def backward(grad_y, x, w_in, w_out, pre, activation, has_b_in, has_b_out):
    """(grad_x, grad_w_in, grad_b_in, grad_w_out, grad_b_out)."""
    inner = ACTIVATIONS[activation](pre)
    # torch's own derivatives, called by name: inside a registered operator autograd records nothing.
    grad_pre = GRADIENTS[activation](grad_y @ w_out, pre, inner)
    return linear_gradients(grad_y, x, w_in, inner, grad_pre, has_b_in, has_b_out)


def linear_gradients(grad_y, x, w_in, inner, grad_pre, has_b_in, has_b_out):
    """What remains of the backward once the activation is through: four library products and two sums."""
    g, p = grad_y.reshape(-1, grad_y.shape[-1]), grad_pre.reshape(-1, grad_pre.shape[-1])
    grad_b_in = p.sum(0) if has_b_in else None
    grad_b_out = g.sum(0) if has_b_out else None
    grad_w_in = p.t() @ x.reshape(-1, x.shape[-1])
    grad_w_out = g.t() @ inner.reshape(-1, inner.shape[-1])
    return (p @ w_in).view(x.shape), grad_w_in, grad_b_in, grad_w_out, grad_b_out
