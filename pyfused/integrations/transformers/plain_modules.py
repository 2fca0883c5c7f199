"""May a fused forward read the parameters of a child module instead of calling it? Asked at every call."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from ...own_forward import is_bare, is_fused
from ...rules import with_article
from ..torch_nn import go_together
from .symbols import Op, either_order, trace

# Subclasses of nn.Linear that compute the same, with a bias or without: the forward that was looked at.
_same: dict[tuple[type, bool], Any] = {}


def is_plain_linear(x: Tensor, *modules: nn.Module) -> bool:
    """Whether each module is exactly an nn.Linear, or a class of transformers' that computes the same, and the kernels can
    multiply x by its weight.

    False for other subclasses (LoRA, quantised, parametrized, sharded), hooks, weights of a tensor subclass (torchao,
    DTensor) and weights of another dtype (T5 keeps `wo` in float32 beside float16; under autocast dtypes may differ).
    """
    return all((type(m) is nn.Linear or _is_known(m)) and go_together(m, x) for m in modules) and is_bare(*modules)


def _is_known(module: Any) -> bool:
    if not isinstance(module, nn.Linear):
        return False
    forward = _same.get((type(module), module.bias is None))
    return forward is not None and forward is type(module).forward


def other_linear(module: nn.Module) -> str:
    """Why is_plain_linear is never true for this subclass of nn.Linear; "" if it may be."""
    kind: Any = type(module)
    if kind is nn.Linear or _is_known(module):
        return ""
    if kind.__module__.startswith("transformers.") and not module._buffers and not module._modules:
        x, weight, bias = Op("input", (0,)), Op("parameter", ("weight",)), Op("parameter", ("bias",))
        product = Op("matmul", (x, Op("T", (weight,))))
        if trace(module, 1, torch.bfloat16) == (product if module.bias is None else either_order("add", product, bias)):
            _same[kind, module.bias is None] = kind.forward
            return ""
    return f"is {with_article(kind.__name__)}, whose product is its own"


def is_fused_norm(x: Tensor, *norms: nn.Module) -> bool:
    """Whether fuse_ fused each of these norms, the kernels take x, and no hook would be skipped."""
    return all(is_fused(m) and go_together(m, x) for m in norms) and is_bare(*norms)


def drops(module: nn.Module) -> bool:
    """Whether calling this dropout module may change its input or run a hook."""
    if type(module) is nn.Dropout:
        return (module.training and module.p > 0.0) or not is_bare(module)
    return not (type(module) is nn.Identity and is_bare(module))


def overridden(module: nn.Module, base: type, *methods: str) -> str:
    """Why a subclass keeps its own forward: it overrides a method that base's forward calls. "" if it overrides none."""
    for method in methods:
        if getattr(type(module), method) is not getattr(base, method) or method in module.__dict__:
            return f"its class has a {method} other than {base.__name__}'s"
    return ""
