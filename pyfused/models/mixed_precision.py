"""How does a model compute in a dtype other than its parameters', as in Keras's mixed_float16 and mixed_bfloat16?

Each module with parameters gets a class made here, which casts a parameter to the compute dtype whenever it is read, as Keras
does. The model then computes like a model of that dtype. Gradients reach the parameters, which keep their dtype, their names
and their places in the state dict.
"""

from __future__ import annotations

import functools
from typing import Any

import torch
from torch import Tensor, nn


def compute_in(model: nn.Module, dtype: torch.dtype) -> None:
    """Makes every module of `model` read its parameters in `dtype`."""
    for module in model.modules():
        if module._parameters:
            kind: Any = type(module)
            module.__class__ = _casting(kind, dtype, tuple(module._parameters))


@functools.cache
def _casting(base: Any, dtype: torch.dtype, names: tuple[str, ...]) -> Any:
    def cast(name: str) -> property:
        def read(module: nn.Module) -> Tensor | None:
            parameter = module._parameters[name]
            return None if parameter is None else parameter.to(dtype)

        return property(read)

    def reduce(module: nn.Module, protocol: Any) -> tuple[Any, ...]:
        return _empty, (base, dtype, names), module.__dict__

    members: dict[str, Any] = {"__module__": base.__module__, "__qualname__": base.__qualname__, "__reduce_ex__": reduce}
    return type(base.__name__, (base,), {**members, **{name: cast(name) for name in names}})


def _empty(base: Any, dtype: torch.dtype, names: tuple[str, ...]) -> nn.Module:
    """An empty module for pickle and deepcopy to fill: they cannot look up the class by name."""
    cls = _casting(base, dtype, names)
    module: nn.Module = cls.__new__(cls)
    return module
