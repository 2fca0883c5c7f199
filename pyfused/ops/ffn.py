"""ffn: y = activation(x w_in^T + b_in) w_out^T + b_out (+ residual), the position-wise feed-forward of Vaswani et al. 2017."""

from __future__ import annotations

from typing import Any

import torch

from .. import activations
from .autocast import autocast_is_on, autocasts, in_lower_precision
from .checks import check_floating, check_like, check_shape
from .cost import Cost, size
from .registration import Operator


def ffn(
    x: torch.Tensor,
    w_in: torch.Tensor,
    b_in: torch.Tensor | None,
    w_out: torch.Tensor,
    b_out: torch.Tensor | None,
    *,
    activation: str,
    residual: torch.Tensor | None = None,
) -> torch.Tensor:
    """The feed-forward network, with the activation and the residual addition inside the kernels.

    torch.autocast casts all tensors to its dtype. A wider residual is not cast: it is added to the result, which is float32.

    Args:
        x: (..., N), float32, float16, bfloat16 (float64 runs on the reference).
        w_in, b_in: (F, N) as nn.Linear stores it, and (F,) or None; of x's dtype and device, as all tensors below.
        w_out, b_out: (M, F) and (M,) or None.
        activation: "relu", "silu", "tanh", "gelu" (exact), "gelu_tanh" (alias "gelu_new") or "quick_gelu".
        residual: (..., M), added to the result, or None.

    Returns:
        (..., M) of x's dtype, contiguous.

    Raises:
        TypeError, ValueError: an argument does not fit; the message names it.
    """
    if autocast_is_on() and autocasts(x):
        return in_lower_precision(ffn, x, w_in, b_in, w_out, b_out, activation=activation, residual=residual)
    given = x, w_in, b_in, w_out, b_out, activation, residual
    outputs = _FFN.call_prepared(given)
    if outputs is None:
        outputs = _FFN.call_checked(given, bind(x, w_in, b_in, w_out, b_out, activation=activation, residual=residual))
    return outputs[0]


def bind(x, w_in, b_in, w_out, b_out, *, activation, residual=None) -> tuple[Any, ...]:
    """Checks the arguments and puts them in the registered operator's order."""
    check_floating(x, "x")
    shape = x.shape
    if not shape:
        raise ValueError("x has shape (); it takes (..., N)")
    check_like(w_in, "w_in", x, "x")
    check_like(w_out, "w_out", x, "x")
    of_in, of_out = w_in.shape, w_out.shape
    if len(of_in) != 2 or of_in[1] != shape[-1]:
        raise ValueError(f"w_in has shape {tuple(of_in)}; it takes (F, N) with x's N = {shape[-1]}")
    f = of_in[0]
    if len(of_out) != 2 or of_out[1] != f:
        raise ValueError(f"w_out has shape {tuple(of_out)}; it takes (M, F) with w_in's F = {f}")
    m = of_out[0]
    if b_in is not None:
        check_like(b_in, "b_in", x, "x")
        check_shape(b_in, "b_in", (f,), "(F,)")
    if b_out is not None:
        check_like(b_out, "b_out", x, "x")
        check_shape(b_out, "b_out", (m,), "(M,)")
    if residual is not None:
        check_like(residual, "residual", x, "x")
        check_shape(residual, "residual", (*shape[:-1], m), "(..., M)")
    save = torch.is_grad_enabled() and any(
        t is not None and t.requires_grad for t in (x, w_in, b_in, w_out, b_out, residual)
    )
    return x, w_in, b_in, w_out, b_out, activations.canonical(activation), residual, save


def _fake(x, w_in, b_in, w_out, b_out, activation, residual, save):
    y = torch.empty((*x.shape[:-1], w_out.shape[0]), dtype=x.dtype, device=x.device)
    return y, torch.empty((*x.shape[:-1], w_in.shape[0]), dtype=x.dtype, device=x.device) if save else x.new_empty(0)


def _setup_context(ctx, inputs, output):
    x, w_in, b_in, w_out, _, activation, _, _ = inputs
    ctx.activation = activation
    # Only w_in's gradient reads x. Beside a frozen w_in x is not kept, as in torch, and may be overwritten. Then autograd
    # follows `pre`, so that the gradient of a gradient finds its way to x.
    ctx.follows_kept = not ctx.needs_input_grad[1]
    ctx.save_for_backward(None if ctx.follows_kept else x, w_in, b_in, w_out, output[1])


def _backward(ctx, grad_y, grad_pre=None):
    """grad_pre: from the gradient of a gradient, where autograd follows pre."""
    *wants, _, wants_residual, _ = ctx.needs_input_grad  # x, w_in, b_in, w_out, b_out
    x, w_in, b_in, w_out, pre = ctx.saved_tensors
    grads: list[Any] = [None] * 5
    if grad_y is not None:
        if torch.is_grad_enabled() and x is not None:  # create_graph=True
            pre = torch.nn.functional.linear(x, w_in, b_in)
        found = _FFN_BACKWARD(grad_y, x, w_in, w_out, pre, ctx.activation, *wants)
        grads = [grad if wanted else None for grad, wanted in zip(found, wants, strict=True)]
    if grad_pre is not None:
        grads[0] = added(grads[0], grad_pre @ w_in) if wants[0] else None
        grads[2] = added(grads[2], grad_pre.reshape(-1, grad_pre.shape[-1]).sum(0)) if wants[2] else None
    return *grads, None, grad_y if wants_residual else None, None


def added(grad, more):
    """The sum of two gradients; the first may be None."""
    return more if grad is None else grad + more


def _backward_fake(grad_y, x, w_in, w_out, pre, activation, *wants):
    of_x = (*grad_y.shape[:-1], w_in.shape[1])
    shapes = of_x, w_in.shape, w_in.shape[:1], w_out.shape, w_out.shape[:1]
    return tuple(grad_y.new_empty(shape if wanted else (0,)) for shape, wanted in zip(shapes, wants, strict=True))


def _cost(x, w_in, b_in, w_out, b_out, activation, residual, save):
    rows = x.shape[:-1].numel()
    return Cost(size(x, w_in, b_in, w_out, b_out, residual, x), 2 * rows * (w_in.numel() + w_out.numel()))


def _backward_cost(grad_y, x, w_in, w_out, pre, activation, wants_x, wants_w_in, wants_b_in, wants_w_out, wants_b_out):
    """One product for the gradient of the activation's output, and one for each gradient of x and the weights."""
    rows = grad_y.shape[:-1].numel()
    of_x = rows * w_in.shape[1] * grad_y.element_size()
    moved = size(grad_y, x, w_in, w_out, pre) + of_x * wants_x + size(w_in) * wants_w_in + size(w_out) * wants_w_out
    products = w_in.numel() * (wants_x + wants_w_in) + w_out.numel() * (1 + wants_w_out)
    return Cost(moved, 2 * rows * products)


_FFN = Operator(
    "ffn",
    "(Tensor x, Tensor w_in, Tensor? b_in, Tensor w_out, Tensor? b_out, str activation, Tensor? residual, bool save)"
    " -> (Tensor y, Tensor pre)",
    fake=_fake,
    setup_context=_setup_context,
    backward=_backward,
    cost=_cost,
)
_FFN_BACKWARD = Operator(
    "ffn_backward",
    "(Tensor grad_y, Tensor? x, Tensor w_in, Tensor w_out, Tensor pre, str activation, bool wants_x, bool wants_w_in,"
    " bool wants_b_in, bool wants_w_out, bool wants_b_out)"
    " -> (Tensor grad_x, Tensor grad_w_in, Tensor grad_b_in, Tensor grad_w_out, Tensor grad_b_out)",
    fake=_backward_fake,
    cost=_backward_cost,
)
