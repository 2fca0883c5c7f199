"""How does a model compute in a dtype other than its parameters', as in Keras's mixed_float16 and mixed_bfloat16?

Each module casts a parameter to the compute dtype whenever it is read, as Keras does. The model then computes like a model of
that dtype. Gradients reach the parameters, which keep their dtype, their names and their places in the state dict.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor, nn

from ..nn.reading import read_through
from ..spread import is_spread


@dataclass(frozen=True)
class _Cast:
    dtype: torch.dtype

    def __call__(self, parameter: Tensor) -> Tensor:
        return parameter if is_spread(parameter) else parameter.to(self.dtype)  # fully_shard reads its own as they are


def compute_in(model: nn.Module, dtype: torch.dtype) -> None:
    """Makes every module of `model` read its parameters in `dtype`."""
    for module in model.modules():
        if module._parameters:
            read_through(module, _Cast(dtype))
