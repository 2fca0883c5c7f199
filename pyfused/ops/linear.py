"""linear: y = x weight^T + bias (+ residual), torch.nn.functional.linear with the residual inside the kernel."""

from __future__ import annotations

import math
from typing import Any

import torch

from .autocast import autocast_is_on, autocasts, in_lower_precision
from .checks import check_floating, check_like, check_shape
from .cost import Cost, size
from .registration import Operator


def linear(
    x: torch.Tensor,
    weight: torch.Tensor,
    bias: torch.Tensor | None = None,
    *,
    residual: torch.Tensor | None = None,
) -> torch.Tensor:
    """The affine map of nn.Linear, plus a residual.

    torch.autocast casts all tensors to its dtype. A wider residual is not cast: it is added to the result, which is float32.

    Args:
        x: (..., K), float32, float16, bfloat16 (float64 runs on the reference).
        weight, bias: (N, K) as nn.Linear stores it, and (N,) or None; of x's dtype and device, as is residual.
        residual: (..., N), added to the result, or None.

    Returns:
        (..., N) of x's dtype, contiguous.

    Raises:
        TypeError, ValueError: an argument does not fit; the message names it.
    """
    if autocast_is_on() and autocasts(x):
        return in_lower_precision(linear, x, weight, bias, residual=residual)
    given = x, weight, bias, residual
    outputs = _LINEAR.call_prepared(given)
    if outputs is None:
        outputs = _LINEAR.call_checked(given, bind(x, weight, bias, residual=residual))
    return outputs[0]


def bind(x, weight, bias=None, *, residual=None) -> tuple[Any, ...]:
    """Checks the arguments and puts them in the registered operator's order."""
    check_floating(x, "x")
    shape = x.shape
    if not shape:
        raise ValueError("x has shape (); it takes (..., K)")
    check_like(weight, "weight", x, "x")
    of_weight = weight.shape
    if len(of_weight) != 2 or of_weight[1] != shape[-1]:
        raise ValueError(f"weight has shape {tuple(of_weight)}; it takes (N, K) with x's K = {shape[-1]}")
    n = of_weight[0]
    if bias is not None:
        check_like(bias, "bias", x, "x")
        check_shape(bias, "bias", (n,), "(N,)")
    if residual is not None:
        check_like(residual, "residual", x, "x")
        check_shape(residual, "residual", (*shape[:-1], n), "(..., N)")
    return x, weight, bias, residual


def _fake(x, weight, bias, residual):
    return torch.empty((*x.shape[:-1], weight.shape[0]), dtype=x.dtype, device=x.device)


def _setup_context(ctx, inputs, output):
    x, weight, _, _ = inputs
    ctx.save_for_backward(x, weight)


def _backward(ctx, grad_y):
    """Library products: these are plain matrix products, which cuBLAS and MKL do well."""
    x, weight = ctx.saved_tensors
    wants_x, wants_weight, wants_bias, wants_residual = ctx.needs_input_grad
    n, k = weight.shape
    rows = grad_y.reshape(math.prod(x.shape[:-1]), n)
    grad_x = (rows @ weight).view(x.shape) if wants_x else None
    grad_weight = rows.t() @ x.reshape(rows.shape[0], k) if wants_weight else None
    return grad_x, grad_weight, rows.sum(0) if wants_bias else None, grad_y if wants_residual else None


def _cost(x, weight, bias, residual):
    rows = x.shape[:-1].numel()
    written = rows * weight.shape[0] * x.element_size()
    return Cost(size(x, weight, bias, residual) + written, 2 * rows * weight.numel())


_LINEAR = Operator(
    "linear",
    "(Tensor x, Tensor weight, Tensor? bias, Tensor? residual) -> Tensor y",
    fake=_fake,
    setup_context=_setup_context,
    backward=_backward,
    cost=_cost,
)
