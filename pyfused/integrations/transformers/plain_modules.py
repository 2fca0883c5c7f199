"""May a fused forward read the parameters of a child module instead of calling it? Asked at every call."""

from __future__ import annotations

from torch import Tensor, nn

from ...own_forward import is_bare, is_fused
from ..torch_nn import go_together


def is_plain_linear(x: Tensor, *modules: nn.Module) -> bool:
    """Whether each module is exactly an nn.Linear and the kernels can multiply x by its weight.

    False for subclasses (LoRA, quantised, parametrized, sharded), hooks, weights of a tensor subclass (torchao, DTensor) and
    weights of another dtype (T5 keeps `wo` in float32 beside float16; under autocast dtypes may differ).
    """
    return all(type(m) is nn.Linear and go_together(m, x) for m in modules) and is_bare(*modules)


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
