"""What is the least that an operator must move and compute? Each operator says it once, beside its schema.

Benchmarks, the roofline and the tables of results read it. Bytes: every input read once, every result written once, but for
what only a gradient needs of a forward. FLOPs:
an addition and a multiplication are one each; exponentials and square roots do not count.
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


COSTS: dict[str, Callable[..., Cost]] = {}  # by the registered operator's name, of its arguments


def size(*tensors: Any) -> int:
    """Bytes of the tensors among the arguments; what is broadcast is there once."""
    return sum(_elements(t) * t.element_size() for t in tensors if isinstance(t, torch.Tensor))


def _elements(tensor: torch.Tensor) -> int:
    return math.prod(size for size, stride in zip(tensor.shape, tensor.stride()) if stride or not size)
