"""layer_norm: y = (t - mean(t)) / sqrt(var(t) + eps) * weight + bias with t = x + residual (Ba et al. 2016, arXiv:1607.06450).

Mean and biased variance are over the last dimension, in float32 for every dtype.
"""

from __future__ import annotations

from typing import Any

import torch

from .autocast import autocast_is_on, autocasts, normalized
from .checks import as_float, check_floating, check_like, check_shape
from .cost import Cost, size
from .registration import Operator


def layer_norm(
    x: torch.Tensor,
    weight: torch.Tensor,
    bias: torch.Tensor | None = None,
    *,
    eps: float = 1e-5,
    residual: torch.Tensor | None = None,
) -> torch.Tensor | tuple[torch.Tensor, torch.Tensor]:
    """Layer normalisation over the last dimension, with the residual addition in the same pass.

    Inside torch.autocast dtypes may be mixed. As in torch.nn.functional, the result is float32 on a GPU and has the dtype
    of x (or of x + residual) on a CPU.

    Args:
        x: (..., N), float32, float16, bfloat16 (float64 runs on the reference). Any strides; a last dimension that
            is not contiguous is copied.
        weight, bias: (N,), of x's dtype and device; bias may be None.
        eps: added to the variance.
        residual: of x's shape, dtype and device, or None.

    Returns:
        The normalised tensor, of x's shape and dtype, contiguous; with `residual` the pair (normalised, x + residual).
        The sum is rounded to x's dtype before it is normalised.

    Raises:
        TypeError, ValueError: an argument does not fit; the message names it.
    """
    if autocast_is_on() and autocasts(x):
        return normalized(layer_norm, x, weight, bias, eps=eps, residual=residual)
    given = x, weight, bias, eps, residual
    outputs = _LAYER_NORM.call_prepared(given)
    if outputs is None:
        outputs = _LAYER_NORM.call_checked(given, bind(x, weight, bias, eps=eps, residual=residual))
    return outputs[0] if residual is None else (outputs[0], outputs[1])


def bind(x, weight, bias=None, *, eps=1e-5, residual=None) -> tuple[Any, ...]:
    """Checks the arguments and puts them in the registered operator's order."""
    check_floating(x, "x")
    full = x.shape
    if not full:
        raise ValueError("x has shape (); it takes (..., N)")
    shape = full[-1:]
    check_like(weight, "weight", x, "x")
    check_shape(weight, "weight", shape, "(N,)")
    if bias is not None:
        check_like(bias, "bias", x, "x")
        check_shape(bias, "bias", shape, "(N,)")
    if residual is not None:
        check_like(residual, "residual", x, "x")
        check_shape(residual, "residual", full, "x's shape")
    save = torch.is_grad_enabled() and (
        x.requires_grad
        or weight.requires_grad
        or (bias is not None and bias.requires_grad)
        or (residual is not None and residual.requires_grad)
    )
    return x, weight, bias, as_float(eps, "eps"), residual, save


def _fake(x, weight, bias, eps, residual, save):
    rows = x.shape[:-1] if save else (0,)
    total = torch.empty(x.shape, dtype=x.dtype, device=x.device) if residual is not None else x.new_empty(0)
    stats = (
        [torch.empty(rows, dtype=torch.float32, device=x.device) for _ in range(2)] if save else [x.new_empty(0)] * 2
    )
    return torch.empty(x.shape, dtype=x.dtype, device=x.device), total, stats[0], stats[1]


def _setup_context(ctx, inputs, output):
    x, weight, bias, ctx.eps, residual, _ = inputs
    _, total, mean, rstd = output
    ctx.has_bias, ctx.has_residual = bias is not None, residual is not None
    ctx.save_for_backward(x if residual is None else total, weight, mean, rstd)


def _backward(ctx, grad_y, grad_total=None, *_unused):
    total, weight, mean, rstd = ctx.saved_tensors
    if torch.is_grad_enabled():  # create_graph=True
        *_, mean, rstd = _LAYER_NORM.plainly(total, weight, None, ctx.eps, None, True)
    if grad_y is None:
        grad_y = torch.zeros_like(total)
    grad_x, grad_weight, grad_bias = _LAYER_NORM_BACKWARD(
        grad_y, grad_total if ctx.has_residual else None, total, weight, mean, rstd, ctx.has_bias
    )
    return grad_x, grad_weight, grad_bias if ctx.has_bias else None, None, grad_x if ctx.has_residual else None, None


def _backward_fake(grad_y, grad_total, x, weight, mean, rstd, has_bias):
    grad_x = torch.empty(x.shape, dtype=x.dtype, device=x.device)
    return grad_x, torch.empty_like(weight), torch.empty_like(weight) if has_bias else weight.new_empty(0)


def _cost(x, weight, bias, eps, residual, save):
    """Mean 1, centring 1, variance 2, scaling 1, weight 1, and 1 each for bias and residual."""
    sums = residual is not None
    return Cost(size(x, weight, bias, residual) + size(x) * (1 + sums), x.numel() * (6 + (bias is not None) + sums))


def _backward_cost(grad_y, grad_total, x, weight, mean, rstd, has_bias):
    """The normalised value 2, its product with the gradient 1, two sums over the row 3, the gradient 4, the weight's 2."""
    moved = size(grad_y, grad_total, x, weight, mean, rstd) + size(x) + size(weight) * (1 + has_bias)
    return Cost(moved, x.numel() * (12 + has_bias + (grad_total is not None)))


_LAYER_NORM = Operator(
    "layer_norm",
    "(Tensor x, Tensor weight, Tensor? bias, float eps, Tensor? residual, bool save)"
    " -> (Tensor y, Tensor total, Tensor mean, Tensor rstd)",
    fake=_fake,
    setup_context=_setup_context,
    backward=_backward,
    residual=4,
    cost=_cost,
)
_LAYER_NORM_BACKWARD = Operator(
    "layer_norm_backward",
    "(Tensor grad_y, Tensor? grad_total, Tensor x, Tensor weight, Tensor mean, Tensor rstd, bool has_bias)"
    " -> (Tensor grad_x, Tensor grad_weight, Tensor grad_bias)",
    fake=_backward_fake,
    cost=_backward_cost,
)
