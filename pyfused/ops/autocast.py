"""What do the operators do inside torch.autocast? The same as the torch functions that they replace.

Products and attention run in the autocast dtype. Adding a residual promotes dtypes as in torch, so a float32 residual
stream stays float32 (T5's would overflow in float16). Norms give float32 on a GPU and x's dtype on a CPU.
float64 is left alone. The casts are differentiable: a parameter's gradient has the parameter's dtype.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from .checks import check_like, check_shape

# Whether autocast is on for any device. Outside of autocast an operator pays only this 0.1 us.
autocast_is_on = torch._C._is_any_autocast_enabled
_NARROW = (torch.float32, torch.float16, torch.bfloat16)


def _narrow(value: Any) -> bool:
    return isinstance(value, Tensor) and value.dtype in _NARROW


def autocasts(x: Any) -> bool:
    """Whether autocast is on for x's device and casts x. False for an x that the operator's checks will refuse."""
    return _narrow(x) and torch.is_autocast_enabled(x.device.type)


def to(value: Any, dtype: torch.dtype) -> Any:
    """Casts a float32, float16 or bfloat16 tensor to dtype, and returns any other value as it is."""
    return value.to(dtype) if _narrow(value) else value


def in_lower_precision(operator: Callable[..., Any], *tensors: Any, residual: Any = None, **options: Any) -> Any:
    """operator(*tensors, residual=residual, **options) in the autocast dtype. A wider residual promotes the result."""
    device = tensors[0].device.type
    dtype = torch.get_autocast_dtype(device)
    given = [to(t, dtype) for t in tensors]
    with torch.autocast(device, enabled=False):
        if residual is None:
            return operator(*given, **options)
        if _narrow(residual) and residual.dtype != dtype:
            y = operator(*given, **options)
            check_shape(residual, "residual", y.shape, "(..., M)")
            return y + residual
        return operator(*given, residual=residual, **options)


def normalized(operator: Callable[..., Any], *tensors: Any, residual: Any = None, **options: Any) -> Any:
    """A norm of x, weight and perhaps bias, of any dtypes, computed in float32.

    On a CPU the result is rounded once, to x's dtype; on a GPU it stays float32. A residual promotes x's dtype.
    """
    x, *parameters = tensors
    device = x.device.type
    dtype = torch.promote_types(x.dtype, residual.dtype) if _narrow(residual) else x.dtype
    x, residual = to(x, dtype), to(residual, dtype)
    with torch.autocast(device, enabled=False):
        if device == "cpu" and all(not _narrow(p) or p.dtype == dtype for p in parameters):
            return operator(x, *parameters, residual=residual, **options)
        total = x
        if residual is not None:
            check_like(residual, "residual", x, "x")
            check_shape(residual, "residual", x.shape, "x's shape")
            total = x + residual
        y = operator(*(to(t, torch.float32) for t in (total, *parameters)), **options)
        y = y.to(dtype) if device == "cpu" else y
        return y if residual is None else (y, total)


def without_autocast(backward: Callable[..., Any]) -> Callable[..., Any]:
    """Runs a backward with autocast off, even where backward() is called inside autocast."""

    def run(ctx: Any, *grads: Any) -> Any:
        if not autocast_is_on():
            return backward(ctx, *grads)
        device = next((g.device.type for g in grads if g is not None), "cpu")
        with torch.autocast(device, enabled=False):
            return backward(ctx, *grads)

    return run
