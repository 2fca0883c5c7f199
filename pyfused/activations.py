"""Which activations are there, and who calls them what? One row for each activation; all other files read these rows.

GELU: Hendrycks and Gimpel 2016 (arXiv:1606.08415), exact with erf and approximated with tanh or with the logistic function.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn


class Activation(NamedTuple):
    """One activation: its names, its function and its gradient."""

    name: str  # in pyfused's operators and modules, and inside Triton's kernels
    code: int  # inside the C++ kernels: csrc/include/pyfused/activation_codes.h
    function: Callable[[Tensor], Tensor]
    gradient: Callable[[Tensor, Tensor, Tensor], Tensor]  # (y's gradient, x, y) -> x's gradient
    gates: bool  # x times a factor from 0 to 1; at infinity torch's result depends on the processor
    spellings: tuple[str, ...]  # in configurations and checkpoints; the first is what pyfused writes there
    of_torch: tuple[Any, ...] = ()  # torch's functions and module classes; nn.GELU may be either GELU
    of_transformers: tuple[str, ...] = ()  # the classes in transformers.activations


_ATEN = torch.ops.aten  # torch's derivatives by name; autograd records nothing inside a registered operator


def _silu_gradient(g: Tensor, x: Tensor, y: Tensor) -> Tensor:
    if not torch.is_grad_enabled():
        return _ATEN.silu_backward(g, x)
    sigmoid = torch.sigmoid(x)  # torch cannot differentiate silu_backward
    return g * sigmoid * (1 + x * (1 - sigmoid))


def _quick_gelu(x: Tensor) -> Tensor:
    return x * torch.sigmoid(1.702 * x)  # silu(c x) / c


def _quick_gelu_gradient(g: Tensor, x: Tensor, y: Tensor) -> Tensor:
    return _silu_gradient(g, (1.702 * x).clamp(-1024.0, 1024.0), y)  # float16's product may be infinite


_TANH_FORMULA = (  # five classes of transformers; their constants agree to 4e-12, below float32's rounding
    *("NewGELUActivation", "GELUTanh", "PytorchGELUTanh", "FastGELUActivation", "AccurateGELUActivation"),
)
_ROWS = (
    Activation("gelu_tanh", 5, partial(F.gelu, approximate="tanh"),
               lambda g, x, y: _ATEN.gelu_backward(g, x, approximate="tanh"), True,
               ("gelu_new", "gelu_pytorch_tanh", "gelu_fast", "gelu_accurate"), (), _TANH_FORMULA),
    Activation("gelu", 4, F.gelu, lambda g, x, y: _ATEN.gelu_backward(g, x), True,
               ("gelu", "gelu_python"), (F.gelu,), ("GELUActivation",)),
    Activation("relu", 1, F.relu, lambda g, x, y: _ATEN.threshold_backward(g, x, 0), False,
               ("relu",), (F.relu, torch.relu, nn.ReLU)),
    Activation("silu", 2, F.silu, _silu_gradient, True,
               ("silu", "swish"), (F.silu, nn.SiLU), ("SiLUActivation",)),
    Activation("quick_gelu", 6, _quick_gelu, _quick_gelu_gradient, True,
               ("quick_gelu",), (), ("QuickGELUActivation",)),
    Activation("tanh", 3, torch.tanh, lambda g, x, y: _ATEN.tanh_backward(g, y), False,
               ("tanh",), (F.tanh, torch.tanh, nn.Tanh)),
)  # fmt: skip
ACTIVATIONS: dict[str, Activation] = {row.name: row for row in _ROWS}
SPELLINGS: dict[str, Activation] = {spelling: row for row in _ROWS for spelling in row.spellings}
_ALIASES = {row.spellings[0]: row.name for row in _ROWS if row.spellings[0] != row.name}
_OF_TORCH = {theirs: row.name for row in _ROWS for theirs in row.of_torch}


def canonical(name: str) -> str:
    """The kernels' name of an activation. Also takes the name that pyfused writes in configurations, such as "gelu_new".
    Raises ValueError for other names."""
    found = _ALIASES.get(name, name)
    if found not in ACTIVATIONS:
        raise ValueError(f"activation={name!r} is unknown; it takes {', '.join((*ACTIVATIONS, *_ALIASES))}")
    return found


def name_of(activation: Any) -> str | None:
    """The kernels' name for a torch function or a torch.nn module with its present settings; None for anything else."""
    if type(activation) is nn.GELU:
        return "gelu" if activation.approximate == "none" else "gelu_tanh"
    try:
        return _OF_TORCH.get(type(activation) if isinstance(activation, nn.Module) else activation)
    except TypeError:  # not hashable
        return None
