"""How does a model compute in another dtype than its parameters have, as Keras's mixed_float16 and mixed_bfloat16 say?

Each module with parameters becomes one of a class made here, in which reading a parameter gives it in the compute dtype.
Everything then computes as a model of that dtype does, and gradients reach the parameters, which keep their dtype, names and
places in the state dict. Parameters are cast whenever they are read, as in Keras.
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
    """What pickle and deepcopy fill: the class has no name that they could look up."""
    cls = _casting(base, dtype, names)
    module: nn.Module = cls.__new__(cls)
    return module
