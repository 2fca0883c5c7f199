"""rms_norm: y = t / sqrt(mean(t^2) + eps) * weight with t = x + residual (Zhang and Sennrich 2019, arXiv:1910.07467).

The mean is over the last dimension, in float32 for every dtype. T5 calls this its layer norm.
"""

from __future__ import annotations

from typing import Any

import torch

from .autocast import autocast_is_on, autocasts, normalized
from .checks import as_float, check_floating, check_like, check_shape
from .cost import Cost, size
from .registration import Operator


def rms_norm(
    x: torch.Tensor,
    weight: torch.Tensor,
    *,
    eps: float = 1e-6,
    residual: torch.Tensor | None = None,
) -> torch.Tensor | tuple[torch.Tensor, torch.Tensor]:
    """Root mean square normalisation over the last dimension, with the residual addition in the same pass.

    Everything is computed in float32 and rounded once. Hugging Face's T5 rounds to the weight's dtype before it
    multiplies by the weight, and KerasHub's computes in the input's dtype throughout. In float32 the three agree; in
    half precision this one is closest to float64.

    Inside torch.autocast dtypes may be mixed. As in torch.nn.functional, the result is float32 on a GPU and has the dtype
    of x (or of x + residual) on a CPU.

    Args:
        x: (..., N), float32, float16, bfloat16 (float64 runs on the reference). Any strides; a last dimension that
            is not contiguous is copied.
        weight: (N,), of x's dtype and device.
        eps: added to the mean of the squares.
        residual: of x's shape, dtype and device, or None.

    Returns:
        The normalised tensor, of x's shape and dtype, contiguous; with `residual` the pair (normalised, x + residual).
        The sum is rounded to x's dtype before it is normalised.

    Raises:
        TypeError, ValueError: an argument does not fit; the message names it.
    """
    if autocast_is_on() and autocasts(x):
        return normalized(rms_norm, x, weight, eps=eps, residual=residual)
    given = x, weight, eps, residual
    outputs = _RMS_NORM.call_prepared(given)
    if outputs is None:
        outputs = _RMS_NORM.call_checked(given, bind(x, weight, eps=eps, residual=residual))
    return outputs[0] if residual is None else (outputs[0], outputs[1])


def default_eps(dtype: torch.dtype) -> float:
    """torch.nn.RMSNorm's eps for None: the machine epsilon of the dtype it computes in, which for half precision is float32."""
    return torch.finfo(torch.float64 if dtype == torch.float64 else torch.float32).eps


def bind(x, weight, *, eps=1e-6, residual=None) -> tuple[Any, ...]:
    """Checks the arguments and puts them in the registered operator's order."""
    check_floating(x, "x")
    shape = x.shape
    if not shape:
        raise ValueError("x has shape (); it takes (..., N)")
    check_like(weight, "weight", x, "x")
    check_shape(weight, "weight", shape[-1:], "(N,)")
    if residual is not None:
        check_like(residual, "residual", x, "x")
        check_shape(residual, "residual", shape, "x's shape")
    save = torch.is_grad_enabled() and (
        x.requires_grad or weight.requires_grad or (residual is not None and residual.requires_grad)
    )
    return x, weight, as_float(eps, "eps"), residual, save


def _fake(x, weight, eps, residual, save):
    total = torch.empty(x.shape, dtype=x.dtype, device=x.device) if residual is not None else x.new_empty(0)
    rstd = torch.empty(x.shape[:-1], dtype=torch.float32, device=x.device) if save else x.new_empty(0)
    return torch.empty(x.shape, dtype=x.dtype, device=x.device), total, rstd


def _setup_context(ctx, inputs, output):
    x, weight, ctx.eps, residual, _ = inputs
    _, total, rstd = output
    ctx.has_residual = residual is not None
    ctx.save_for_backward(x if residual is None else total, weight, rstd)


def _backward(ctx, grad_y, grad_total=None, *_unused):
    total, weight, rstd = ctx.saved_tensors
    if torch.is_grad_enabled():  # create_graph=True
        *_, rstd = _RMS_NORM.plainly(total, weight, ctx.eps, None, True)
    if grad_y is None:
        grad_y = torch.zeros_like(total)
    grad_x, grad_weight = _RMS_NORM_BACKWARD(grad_y, grad_total if ctx.has_residual else None, total, weight, rstd)
    return grad_x, grad_weight, None, grad_x if ctx.has_residual else None, None


def _backward_fake(grad_y, grad_total, x, weight, rstd):
    return torch.empty(x.shape, dtype=x.dtype, device=x.device), torch.empty_like(weight)


def _cost(x, weight, eps, residual, save):
    """Mean square 2, scaling 1, weight 1, and 1 for residual."""
    sums = residual is not None
    return Cost(size(x, weight, residual) + size(x) * (1 + sums), x.numel() * (4 + sums))


def _backward_cost(grad_y, grad_total, x, weight, rstd):
    """The normalised value 1, its product with the gradient 1, a sum over the row 2, the gradient 3, the weight's 2."""
    moved = size(grad_y, grad_total, x, weight, rstd) + size(x, weight)
    return Cost(moved, x.numel() * (9 + (grad_total is not None)))


_RMS_NORM = Operator(
    "rms_norm",
    "(Tensor x, Tensor weight, float eps, Tensor? residual, bool save) -> (Tensor y, Tensor total, Tensor rstd)",
    fake=_fake,
    setup_context=_setup_context,
    backward=_backward,
    residual=3,
    cost=_cost,
)
_RMS_NORM_BACKWARD = Operator(
    "rms_norm_backward",
    "(Tensor grad_y, Tensor? grad_total, Tensor x, Tensor weight, Tensor rstd) -> (Tensor grad_x, Tensor grad_weight)",
    fake=_backward_fake,
    cost=_backward_cost,
)
