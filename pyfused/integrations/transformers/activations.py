"""Which of the kernels' activations is the function that a module of torch.nn or transformers computes?"""

from __future__ import annotations

from typing import Any

import torch
from torch import nn
from transformers import activations as of_transformers

from ...own_forward import is_bare

# The tanh approximation of GELU is in transformers four times, with constants that agree to 4e-12, below float32's rounding.
_BY_NAME = {
    "GELUActivation": "gelu",
    "NewGELUActivation": "gelu_tanh",
    "GELUTanh": "gelu_tanh",
    "PytorchGELUTanh": "gelu_tanh",
    "FastGELUActivation": "gelu_tanh",
    "AccurateGELUActivation": "gelu_tanh",
    "SiLUActivation": "silu",
}
_BY_CLASS: dict[type, str] = {
    nn.ReLU: "relu",
    nn.SiLU: "silu",
    nn.Tanh: "tanh",
    **{getattr(of_transformers, name): ours for name, ours in _BY_NAME.items() if hasattr(of_transformers, name)},
}
_BY_FUNCTION: dict[Any, str] = {
    nn.functional.relu: "relu",
    torch.relu: "relu",
    nn.functional.silu: "silu",
    nn.functional.gelu: "gelu",
    nn.functional.tanh: "tanh",
    torch.tanh: "tanh",
}


def kernel_activation(activation: Any) -> str | None:
    """The kernels' name (of pyfused.ffn's `activation`) for an activation module or function as it is now; None: not theirs.

    A module with a hook is None too: the kernels would not run the hook.
    """
    if not isinstance(activation, nn.Module):
        try:
            return _BY_FUNCTION.get(activation)
        except TypeError:  # a callable that cannot be hashed
            return None
    if not is_bare(activation):
        return None
    if type(activation) is nn.GELU:
        return "gelu" if activation.approximate == "none" else "gelu_tanh"
    return _BY_CLASS.get(type(activation))


def activation_reason(activation: Any) -> str:
    """Why the kernels do not have this activation, for fuse_'s report; "" if they have it."""
    if kernel_activation(activation) is not None:
        return ""
    name = (
        type(activation).__name__ if isinstance(activation, nn.Module) else getattr(activation, "__name__", activation)
    )
    return f"the kernels do not have the activation {name}"
