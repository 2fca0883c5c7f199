"""linear: y = x weight^T + bias (+ residual), torch.nn.functional.linear with the residual inside the kernel. The weight may be
int8 or int4, with scales."""

from __future__ import annotations

import math
from typing import Any

import torch

from .. import dispatch
from ..kernels.shared.product import plain_product, product
from ..rules import FLAG, check, its_kind
from ..tracing import jit_is_tracing
from ..weight_format import INT8, WeightFormat, dequantized, format_of
from .autocast import autocast_is_on, autocasts, in_lower_precision
from .call import transformed
from .checks import check_floating, check_like, check_shape, name_of
from .cost import Cost, size
from .registration import Operator


def linear(
    x: torch.Tensor,
    weight: torch.Tensor,
    bias: torch.Tensor | None = None,
    *,
    residual: torch.Tensor | None = None,
    scale: torch.Tensor | None = None,
    dynamic: bool = False,
) -> torch.Tensor:
    """The affine map of nn.Linear, plus a residual.

    torch.autocast casts all tensors but an integer weight and its scale. A wider residual is not cast: it is added to the
    result, which is float32.

    An int8 weight (N, K) has a scale (N,) float32: row j stands for scale[j] times its integers. An int4 weight is int8
    (N, K / 2) with a scale (N, K / 32) bfloat16: pyfused/weight_format.py says how. Sums are in float32 and rounded once.
    Gradients reach x, bias and residual; weight and scale get none.

    Args:
        x: (..., K), float32, float16, bfloat16 (float64 runs on the reference).
        weight, bias: (N, K) as nn.Linear stores it, and (N,) or None; of x's dtype and device, as is residual. The weight may
            also be int8 or int4.
        residual: (..., N), added to the result, or None.
        scale: of an int8 or int4 weight; None beside any other.
        dynamic: with an int8 weight, lets a backend round each row of x to int8 too, so that the products are of integers. It
            is faster for many rows where the processor has such products, and less exact. Up to 16 rows stay as they are.

    Returns:
        (..., N) of x's dtype, contiguous.

    Raises:
        TypeError, ValueError: an argument does not fit; the message names it.
    """
    if autocast_is_on() and autocasts(x):
        more: dict[str, Any] = {} if scale is None and not dynamic else {"scale": scale, "dynamic": dynamic}
        return in_lower_precision(linear, x, weight, bias, residual=residual, **more)
    given: tuple[Any, ...] = (x, weight, bias, residual)
    if scale is not None or dynamic is not False:
        # Torch's transforms cannot differentiate a product of integers.
        given = (*given, scale, False if dynamic is True and (transformed() or jit_is_tracing()) else dynamic)
    outputs = _LINEAR.call_prepared(given)
    if outputs is None:
        outputs = _LINEAR.call_checked(given, _bound(*given))
    return outputs[0]


def bind(x, weight, bias=None, *, residual=None, scale=None, dynamic=False) -> tuple[Any, ...]:
    """Checks the arguments and puts them in the registered operator's order."""
    return _bound(x, weight, bias, residual, *(() if scale is None and dynamic is False else (scale, dynamic)))


def _bound(x, weight, bias, residual, *of_integers) -> tuple[Any, ...]:
    """of_integers: scale and dynamic, or nothing where both have their defaults."""
    check_floating(x, "x")
    shape = x.shape
    if not shape:
        raise ValueError("x has shape (); it takes (..., K)")
    form = None
    if isinstance(weight, torch.Tensor) and weight.dtype is torch.int8:
        scale = of_integers[0] if of_integers else None
        form = format_of(scale) if isinstance(scale, torch.Tensor) else INT8
    if form is None:
        check_like(weight, "weight", x, "x")
    elif weight.device != x.device:
        raise ValueError(f"weight is on {weight.device}; it takes x's device, {x.device}")
    of_weight, k = weight.shape, shape[-1]
    if len(of_weight) != 2 or k != (of_weight[1] if form is None else form.columns(weight)):
        takes = "(N, K)" if form is None else form.weight_takes
        raise ValueError(f"weight has shape {tuple(of_weight)}; it takes {takes} with x's K = {k}")
    n = of_weight[0]
    if form is not None:
        _check_integers(x, weight, form, *(of_integers or (None, False)))
    elif of_integers:
        _check_none(weight, *of_integers)
    if bias is not None:
        check_like(bias, "bias", x, "x")
        check_shape(bias, "bias", (n,), "(N,)")
    if residual is not None:
        check_like(residual, "residual", x, "x")
        check_shape(residual, "residual", (*shape[:-1], n), "(..., N)")
    return x, weight, bias, residual, *of_integers


def _check_none(weight, scale, dynamic) -> None:
    """Refuses what only integer weights have."""
    check(FLAG, dynamic=dynamic)
    if scale is not None or dynamic:
        what, takes = ("scale is given", "integer") if scale is not None else ("dynamic is True", "int8")
        raise ValueError(f"{what} beside a weight of {name_of(weight.dtype)}; it is for {takes} weights")


def _check_integers(x, weight, form: WeightFormat, scale, dynamic) -> None:
    check(FLAG, dynamic=dynamic)
    takes = name_of(form.scale_dtype)
    if scale is None:
        raise ValueError(f"scale is None; beside an {form.name} weight it takes {takes} {form.scale_takes}")
    if not isinstance(scale, torch.Tensor):
        raise TypeError(f"scale is {its_kind(scale)}; it takes a torch.Tensor")
    if scale.dtype != form.scale_dtype:
        raise TypeError(f"scale is {name_of(scale.dtype)}; beside an {form.name} weight it takes {takes}")
    if scale.device != x.device:
        raise ValueError(f"scale is on {scale.device}; it takes x's device, {x.device}")
    if misfit := form.misfit(x.shape[-1]):
        raise ValueError(f"weight is {form.name} and {misfit}")
    check_shape(scale, "scale", form.scale_shape(weight.shape[0], x.shape[-1]), form.scale_takes)
    if dynamic and form is not INT8:
        raise ValueError(f"dynamic is True beside an {form.name} weight; it is for int8 weights")


def _fake(x, weight, bias, residual, scale=None, dynamic=False):
    return torch.empty((*x.shape[:-1], weight.shape[0]), dtype=x.dtype, device=x.device)


def _setup_context(ctx, inputs, output):
    x, weight, _, _, *of_integers = inputs
    ctx.shape, ctx.of_integers = x.shape, bool(of_integers) and of_integers[0] is not None
    if ctx.of_integers:
        ctx.save_for_backward(weight, of_integers[0])  # not x: only the weight's gradient would need it
    else:  # as torch: beside a frozen weight x is not kept and may be overwritten
        wants_x, wants_weight, *_ = ctx.needs_input_grad
        ctx.save_for_backward(x if wants_weight else None, weight if wants_x else None)


def _backward(ctx, grad_y):
    """Library products: cuBLAS and MKL do plain matrix products well. kernels/shared/product.py knows when not."""
    wants_x, wants_weight, wants_bias, wants_residual, *of_integers = ctx.needs_input_grad
    shape = ctx.shape
    if ctx.of_integers:
        weight, scale = ctx.saved_tensors
        wants_weight = False
        x: Any = None
        weight = dequantized(weight, scale, grad_y.dtype) if wants_x else weight
    else:
        x, weight = ctx.saved_tensors
    k = shape[-1]
    forced = dispatch.forced()
    multiply = plain_product if forced and forced[0] == "reference" else product
    rows = grad_y.reshape(math.prod(shape[:-1]), grad_y.shape[-1])
    grad_x = multiply(rows, weight).view(shape) if wants_x else None
    grad_weight = multiply(rows.t(), x.reshape(rows.shape[0], k)) if wants_weight else None
    grad_bias = rows.sum(0) if wants_bias else None
    return grad_x, grad_weight, grad_bias, grad_y if wants_residual else None, *[None] * len(of_integers)


def _cost(x, weight, bias, residual, scale=None, dynamic=False):
    rows = x.shape[:-1].numel()
    written = rows * weight.shape[0] * x.element_size()
    return Cost(size(x, weight, bias, residual, scale) + written, 2 * rows * weight.shape[0] * x.shape[-1])


_LINEAR = Operator(
    "linear",
    "(Tensor x, Tensor weight, Tensor? bias, Tensor? residual, Tensor? scale=None, bool dynamic=False) -> Tensor y",
    fake=_fake,
    setup_context=_setup_context,
    backward=_backward,
    cost=_cost,
)
