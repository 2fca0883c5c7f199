"""How many bytes must an operator move at least, and how much must it compute? Each says so beside its schema.

Benchmarks, the roofline and the tables of results read it. Bytes: each input is read once and each result written once;
outputs of a forward that only its gradient needs do not count. FLOPs: an addition and a multiplication are one each;
exponentials and square roots do not count.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any, NamedTuple

import torch


class Cost(NamedTuple):
    """Bytes moved and floating-point operations."""

    bytes: int = 0
    flops: int = 0


COSTS: dict[str, Callable[..., Cost]] = {}  # registered operator's name -> cost of its arguments


def size(*tensors: Any) -> int:
    """Bytes of the tensors among the arguments. Broadcast elements count once."""
    return sum(_elements(t) * t.element_size() for t in tensors if isinstance(t, torch.Tensor))


def _elements(tensor: torch.Tensor) -> int:
    return math.prod(size for size, stride in zip(tensor.shape, tensor.stride()) if stride or not size)
