"""May generation skip a model's modules and give their weights to the kernels directly?"""

from __future__ import annotations

from collections.abc import Collection

from torch import Tensor, nn
from torch.nn.modules import module as torch_module

from ..nn import Linear


def plain(model: nn.Module, known: Collection[type]) -> bool:
    """Whether skipping the modules changes nothing: no hook, no replaced or patched module, no tensor subclass."""
    if torch_module._global_forward_hooks or torch_module._global_forward_pre_hooks:
        return False
    for m in model.modules():
        if type(m) not in known or m._forward_hooks or m._forward_pre_hooks or "forward" in m.__dict__:
            return False
    return all(type(p) is nn.Parameter for p in model.parameters())


def matrix(linear: Linear) -> tuple[Tensor, Tensor | None]:
    """Weight and bias."""
    return linear.weight, linear.bias
