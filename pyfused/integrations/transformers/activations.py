"""Which kernel activation matches an activation module of torch.nn or transformers?"""

from __future__ import annotations

from typing import Any

from torch import nn
from transformers import activations as of_transformers

from ...activations import ACTIVATIONS, name_of
from ...own_forward import is_bare

_BY_CLASS: dict[type, str] = {
    getattr(of_transformers, name): row.name
    for row in ACTIVATIONS.values()
    for name in row.of_transformers
    if hasattr(of_transformers, name)
}


def kernel_activation(activation: Any) -> str | None:
    """The name, for pyfused.ffn's `activation`, of an activation module or function. None if the kernels lack it.

    A module with a hook also gives None: the kernels would not run the hook.
    """
    if isinstance(activation, nn.Module) and not is_bare(activation):
        return None
    return name_of(activation) or _BY_CLASS.get(type(activation))


def activation_reason(activation: Any) -> str:
    """Why the kernels do not have this activation, for fuse_'s report; "" if they have it."""
    if kernel_activation(activation) is not None:
        return ""
    name = (
        type(activation).__name__ if isinstance(activation, nn.Module) else getattr(activation, "__name__", activation)
    )
    return f"the kernels do not have the activation {name}"
