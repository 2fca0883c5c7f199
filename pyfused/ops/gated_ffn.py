"""gated_ffn: y = (activation(x w_gate^T) * (x w_up^T)) w_out^T (+ residual), a gated feed-forward as in T5 1.1.

Shazeer 2020, "GLU variants improve transformer" (arXiv:2002.05202).
"""

from __future__ import annotations

from typing import Any

import torch

from .. import activations
from .autocast import autocast_is_on, autocasts, in_lower_precision
from .checks import check_floating, check_like, check_shape
from .cost import Cost, size
from .ffn import added
from .registration import Operator


def gated_ffn(
    x: torch.Tensor,
    w_gate: torch.Tensor,
    w_up: torch.Tensor,
    w_out: torch.Tensor,
    *,
    activation: str,
    residual: torch.Tensor | None = None,
) -> torch.Tensor:
    """The gated feed-forward network, with the activation, the product and the residual addition inside the kernels.

    float16: Flan-T5's activation(gate) * up reaches 1e6, beyond float16's 65504. The kernels therefore keep this product in
    float32, or in float16 with a power-of-two scale for each row. A result that float16 can hold is finite if x w_gate^T
    and x w_up^T each fit into float16 (the backward keeps both; plain PyTorch has them in float16 too). bfloat16 has
    float32's range.

    torch.autocast casts all tensors to its dtype. A wider residual is not cast: it is added to the result, which is float32.

    Args:
        x: (..., N), float32, float16, bfloat16 (float64 runs on the reference).
        w_gate, w_up: (F, N) as nn.Linear stores it; of x's dtype and device, as all tensors below.
        w_out: (M, F).
        activation: "relu", "silu", "tanh", "gelu" (exact), "gelu_tanh" (alias "gelu_new") or "quick_gelu".
        residual: (..., M), added to the result, or None.

    Returns:
        (..., M) of x's dtype, contiguous.

    Raises:
        TypeError, ValueError: an argument does not fit; the message names it.
    """
    if autocast_is_on() and autocasts(x):
        return in_lower_precision(gated_ffn, x, w_gate, w_up, w_out, activation=activation, residual=residual)
    given = x, w_gate, w_up, w_out, activation, residual
    outputs = _GATED_FFN.call_prepared(given)
    if outputs is None:
        outputs = _GATED_FFN.call_checked(given, bind(x, w_gate, w_up, w_out, activation=activation, residual=residual))
    return outputs[0]


def bind(x, w_gate, w_up, w_out, *, activation, residual=None) -> tuple[Any, ...]:
    """Checks the arguments and puts them in the registered operator's order."""
    check_floating(x, "x")
    shape = x.shape
    if not shape:
        raise ValueError("x has shape (); it takes (..., N)")
    check_like(w_gate, "w_gate", x, "x")
    check_like(w_up, "w_up", x, "x")
    check_like(w_out, "w_out", x, "x")
    of_gate, of_out = w_gate.shape, w_out.shape
    if len(of_gate) != 2 or of_gate[1] != shape[-1]:
        raise ValueError(f"w_gate has shape {tuple(of_gate)}; it takes (F, N) with x's N = {shape[-1]}")
    check_shape(w_up, "w_up", of_gate, "w_gate's (F, N)")
    if len(of_out) != 2 or of_out[1] != of_gate[0]:
        raise ValueError(f"w_out has shape {tuple(of_out)}; it takes (M, F) with w_gate's F = {of_gate[0]}")
    if residual is not None:
        check_like(residual, "residual", x, "x")
        check_shape(residual, "residual", (*shape[:-1], of_out[0]), "(..., M)")
    save = torch.is_grad_enabled() and any(
        t is not None and t.requires_grad for t in (x, w_gate, w_up, w_out, residual)
    )
    return x, w_gate, w_up, w_out, activations.canonical(activation), residual, save


def _fake(x, w_gate, w_up, w_out, activation, residual, save):
    def like_x(features):
        return torch.empty((*x.shape[:-1], features), dtype=x.dtype, device=x.device)

    f = w_gate.shape[0]
    return like_x(w_out.shape[0]), like_x(f) if save else x.new_empty(0), like_x(f) if save else x.new_empty(0)


def _setup_context(ctx, inputs, output):
    x, w_gate, w_up, w_out, activation, _, _ = inputs
    ctx.activation = activation
    ctx.follows_kept = not any(ctx.needs_input_grad[1:3])  # ffn says why
    ctx.save_for_backward(None if ctx.follows_kept else x, w_gate, w_up, w_out, *output[1:])


def _backward(ctx, grad_y, *of_kept):
    """of_kept: gate's and up's gradients, from the gradient of a gradient, where autograd follows them."""
    x, w_gate, w_up, w_out, gate, up = ctx.saved_tensors
    *wants, _, wants_residual, _ = ctx.needs_input_grad  # x, w_gate, w_up, w_out
    grads: list[Any] = [None] * 4
    if grad_y is not None:
        if torch.is_grad_enabled() and x is not None:  # create_graph=True
            gate, up = (torch.nn.functional.linear(x, w) for w in (w_gate, w_up))
        found = _GATED_FFN_BACKWARD(grad_y, x, w_gate, w_up, w_out, gate, up, ctx.activation, *wants)
        grads = [grad if wanted else None for grad, wanted in zip(found, wants, strict=True)]
    for grad, weight in zip(of_kept, (w_gate, w_up)):
        if grad is not None and wants[0]:
            grads[0] = added(grads[0], grad @ weight)
    return *grads, None, grad_y if wants_residual else None, None


def _backward_fake(grad_y, x, w_gate, w_up, w_out, gate, up, activation, *wants):
    shapes = (*grad_y.shape[:-1], w_gate.shape[1]), w_gate.shape, w_up.shape, w_out.shape
    return tuple(grad_y.new_empty(shape if wanted else (0,)) for shape, wanted in zip(shapes, wants, strict=True))


def _cost(x, w_gate, w_up, w_out, activation, residual, save):
    weights = w_gate, w_up, w_out
    return Cost(size(x, *weights, residual, x), 2 * x.shape[:-1].numel() * sum(w.numel() for w in weights))


def _backward_cost(grad_y, x, w_gate, w_up, w_out, gate, up, activation, wants_x, wants_gate, wants_up, wants_out):
    """One product for the gradient of the hidden values, two for x's gradient, and one for each weight's."""
    rows = grad_y.shape[:-1].numel()
    of_x = rows * w_gate.shape[1] * grad_y.element_size()
    moved = size(grad_y, x, w_gate, w_up, w_out, gate, up) + of_x * wants_x
    moved += size(w_gate) * wants_gate + size(w_up) * wants_up + size(w_out) * wants_out
    products = w_gate.numel() * (wants_x + wants_gate) + w_up.numel() * (wants_x + wants_up)
    return Cost(moved, 2 * rows * (products + w_out.numel() * (1 + wants_out)))


_GATED_FFN = Operator(
    "gated_ffn",
    "(Tensor x, Tensor w_gate, Tensor w_up, Tensor w_out, str activation, Tensor? residual, bool save)"
    " -> (Tensor y, Tensor gate, Tensor up)",
    fake=_fake,
    setup_context=_setup_context,
    backward=_backward,
    cost=_cost,
)
_GATED_FFN_BACKWARD = Operator(
    "gated_ffn_backward",
    "(Tensor grad_y, Tensor? x, Tensor w_gate, Tensor w_up, Tensor w_out, Tensor gate, Tensor up, str activation,"
    " bool wants_x, bool wants_gate, bool wants_up, bool wants_out)"
    " -> (Tensor grad_x, Tensor grad_w_gate, Tensor grad_w_up, Tensor grad_w_out)",
    fake=_backward_fake,
    cost=_backward_cost,
)
