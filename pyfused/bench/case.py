"""What is one row of a benchmark? A call of pyfused beside the same in plain PyTorch, and beside its peers.

benchmarks/bench_<name>.py has `cases(setup)`, which yields Cases. A Case is cheap: its tensors and models are made when it is
measured, by `make`.
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
    """Where, and in which dtypes. `small`: sizes of a few numbers, which show that a case runs and is right."""

    device: str = "cpu"
    dtypes: tuple[torch.dtype, ...] = DTYPES
    small: bool = False

    @property
    def model_dtypes(self) -> tuple[torch.dtype, ...]:
        """The dtypes for whole models: float16 only where the device multiplies it itself, else a call takes many seconds."""
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
    """What a Case runs.

    Args:
        pyfused: takes *inputs and returns a tensor, or a tuple of them.
        plain: the same in plain PyTorch, in the same dtype: what pyfused must never be slower than, and what sets the scale
            of errors.
        inputs: what both get.
        exact: the result in float64; by default `plain` on the inputs in float64. Of a tuple, as many items are judged as this
            one returns.
        scale: plain PyTorch that sets the scale of errors where `plain` cannot; `plain` by default.
        peers: name -> a function that makes the peer's call, which takes *inputs. It may raise what it likes: the row names
            the peer and the reason.
        loose: of these peers the numbers are of lower precision (int8): RMS errors up to a tenth of the result's RMS.
        baseline: what `plain` is called.
        trains: the calls differentiate: gradient mode is on.
        cost: what pyfused's call moves and computes at least, where that is not what its operators declare: a bound step of
            generation calls no operator.
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
    """Numbers of "pyfused" and its peers that are measured otherwise, less is better: a unit, such as "MiB"."""

    unit: str
    values: dict[str, float]


@dataclass(frozen=True)
class Case:
    """One row: its name, such as "512x768 residual", its dtype, and what makes its calls."""

    name: str
    dtype: torch.dtype
    make: Callable[[], Calls | Values]


def training(function: Function) -> Function:
    """From a function of tensors to one that also takes the gradient of its result, and returns those of the tensors that
    require one."""

    def run(*inputs: Any) -> tuple[torch.Tensor, ...]:
        *given, grad = inputs
        leaves = [t for t in given if isinstance(t, torch.Tensor) and t.requires_grad]
        return torch.autograd.grad(function(*given), leaves, grad)

    return run


def wide(inputs: tuple[Any, ...]) -> tuple[Any, ...]:
    """The inputs in float64; what is no floating-point tensor stays."""

    def widen(value: Any) -> Any:
        if isinstance(value, torch.Tensor) and value.is_floating_point():
            return value.detach().double().requires_grad_(value.requires_grad)
        return value

    return tuple(map(widen, inputs))
