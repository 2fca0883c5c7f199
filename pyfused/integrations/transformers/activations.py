"""Which kernel activation matches an activation module of torch.nn or transformers, or operations of a forward?"""

from __future__ import annotations

import math
from typing import Any

from torch import nn
from transformers import activations as of_transformers

from ...activations import ACTIVATIONS, name_of
from ...own_forward import is_bare
from .symbols import Op, either_order

_BY_CLASS: dict[type, str] = {
    getattr(of_transformers, name): row.name
    for row in ACTIVATIONS.values()
    for name in row.of_transformers
    if hasattr(of_transformers, name)
}


# Classes beside a model, by their full names. BLOOM's has 0.79788456 for sqrt(2 / pi), which is nearer than float32 can tell.
_BY_NAME = {"transformers.models.bloom.modeling_bloom.BloomGelu": "gelu_tanh"}


def kernel_activation(activation: Any) -> str | None:
    """The name, for pyfused.ffn's `activation`, of an activation module or function. None if the kernels lack it.

    A module with a hook also gives None: the kernels would not run the hook.
    """
    if isinstance(activation, nn.Module) and not is_bare(activation):
        return None
    kind = type(activation)
    return name_of(activation) or _BY_CLASS.get(kind) or _BY_NAME.get(f"{kind.__module__}.{kind.__qualname__}")


def activation_reason(activation: Any) -> str:
    """Why the kernels do not have this activation, for fuse_'s report; "" if they have it."""
    if kernel_activation(activation) is not None:
        return ""
    name = (
        type(activation).__name__ if isinstance(activation, nn.Module) else getattr(activation, "__name__", activation)
    )
    return f"the kernels do not have the activation {name}"


_CALLED = ("gelu", "relu", "silu", "tanh")  # functions of torch


def traced_activation(found: Any) -> tuple[str, Any]:
    """(name, argument) where this operation of a trace is an activation; ("", None) for others."""
    if not isinstance(found, Op):
        return "", None
    if found.name in _CALLED and len(found.args) == 1:
        if found.options in ((), (("inplace", False),)):
            return found.name, found.args[0]
        return ("gelu_tanh", found.args[0]) if found == _gelu_tanh(found.args[0]) else ("", None)
    for factor in found.args if found.name == "mul" else ():
        x = next((f for f in getattr(factor, "args", ()) if isinstance(f, Op)), None)
        if found == _gelu(x):
            return "gelu", x
    return "", None


def _gelu_tanh(x: Any) -> Op:
    return Op("gelu", (x,), (("approximate", "tanh"),))


def _gelu(x: Any) -> Op:
    """x * 0.5 * (1.0 + erf(x / sqrt(2)))"""
    half = either_order("mul", 0.5, x)
    return either_order("mul", half, either_order("add", 1.0, Op("erf", (Op("div", (x, math.sqrt(2.0))),))))
