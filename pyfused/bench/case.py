"""What is one row of a benchmark? A call of pyfused beside the same call in plain PyTorch and in its peers.

benchmarks/bench_<name>.py has `cases(setup)`, which yields Cases. A Case is cheap: `make` creates its tensors and models only
when it is measured.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any, TypeVar

import torch

from ..evidence import multiplies_itself
from ..ops.cost import Cost

Function = Callable[..., Any]
T = TypeVar("T")
DTYPES = (torch.float32, torch.bfloat16, torch.float16)


@dataclass(frozen=True)
class Setup:
    """Device and dtypes. `small`: tiny sizes, only to show that a case runs and is right."""

    device: str = "cpu"
    dtypes: tuple[torch.dtype, ...] = DTYPES
    small: bool = False

    @property
    def model_dtypes(self) -> tuple[torch.dtype, ...]:
        """The dtypes for whole models. A CPU without float16 arithmetic leaves float16 out: a call would take many seconds."""
        slow = self.device == "cpu" and not self.small and not multiplies_itself(torch.float16)
        return tuple(dtype for dtype in self.dtypes if not (slow and dtype == torch.float16))

    def pick(self, cpu: Sequence[T], gpu: Sequence[T], small: Sequence[T]) -> Sequence[T]:
        """The sizes for this device, or the small ones."""
        return small if self.small else gpu if self.device == "cuda" else cpu

    def randn(self, *shape: int, dtype: torch.dtype = torch.float32) -> torch.Tensor:
        """Normal numbers, rounded to the dtype."""
        return torch.randn(*shape, device=self.device).to(dtype)


@dataclass
class Calls:
    """The calls that a Case runs.

    Args:
        pyfused: takes *inputs and returns a tensor, or a tuple of them.
        plain: the same in plain PyTorch, in the same dtype. pyfused must never be slower, and its errors are judged by plain's.
        inputs: the arguments of both.
        exact: the result in float64; by default `plain` on the inputs in float64. If it returns fewer items than `pyfused`,
            only these are judged.
        scale: plain PyTorch for the scale of errors if `plain` cannot give it; `plain` by default.
        peers: name -> a function that makes the peer's call, which takes *inputs. If it raises, the row names the peer and
            the error.
        loose: peers of lower precision (int8). Their RMS error may be a tenth of the result's RMS.
        baseline: the name of `plain` in the row.
        trains: whether the calls differentiate, so that they need gradient mode.
        cost: the least bytes and FLOPs of pyfused's call, if it calls no operators that declare them (a compiled model).
    """

    pyfused: Function
    plain: Function
    inputs: tuple[Any, ...] = ()
    exact: Callable[[], Any] | None = None
    scale: Function | None = None
    peers: dict[str, Callable[[], Function]] = field(default_factory=dict)
    loose: tuple[str, ...] = ()
    baseline: str = "eager"
    trains: bool = False
    cost: Cost | None = None


@dataclass(frozen=True)
class Values:
    """Numbers that are not times, of "pyfused" and its peers; less is better. unit: such as "MiB"."""

    unit: str
    values: dict[str, float]


@dataclass(frozen=True)
class Case:
    """One row: its name, such as "512x768 residual", its dtype, and a function that makes its calls."""

    name: str
    dtype: torch.dtype
    make: Callable[[], Calls | Values]


def training(function: Function) -> Function:
    """A function that takes the arguments of ``function`` and the gradient of its result. It returns the gradients of the
    tensors that require one."""

    def run(*inputs: Any) -> tuple[torch.Tensor, ...]:
        *given, grad = inputs
        leaves = [t for t in given if isinstance(t, torch.Tensor) and t.requires_grad]
        return torch.autograd.grad(function(*given), leaves, grad)

    return run


def wide(inputs: tuple[Any, ...]) -> tuple[Any, ...]:
    """The inputs with every floating-point tensor in float64."""

    def widen(value: Any) -> Any:
        if isinstance(value, torch.Tensor) and value.is_floating_point():
            return value.detach().double().requires_grad_(value.requires_grad)
        return value

    return tuple(map(widen, inputs))
