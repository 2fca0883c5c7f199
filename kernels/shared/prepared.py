"""How does a kernel call spend little time in Python? Its launch is prepared once and reused for every call of the same
signature. pyfused.ops finds the launch (csrc/include/pyfused/python_call.h). Every backend uses this.

A launch on a GPU holds numbers, a compiled kernel and tables of tables.py, but no tensor of a call. It allocates from torch's
allocator, asks for the current stream each time and waits for nothing, so a CUDA graph can capture it.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Callable
from contextvars import ContextVar
from typing import Any

import torch

CPU = torch.device("cpu")  # pass it for every new tensor: torch.set_default_device may have set another
_makers: Any = torch._C._dynamo.guards  # torch.compile's own functions for new tensors; not public in torch
_MAKERS = {kind: getattr(_makers, f"_empty_strided_{kind}", None) for kind in ("cpu", "cuda")}
# Both only ask the runtime. The same functions of torch.cuda take 0.5 and 2 us.
current_device = getattr(torch._C, "_cuda_getDevice", torch.cuda.current_device)
current_stream = getattr(
    torch._C, "_cuda_getCurrentRawStream", lambda index: torch.cuda.current_stream(index).cuda_stream
)

# pyfused/compile_ahead.py sets it to record a thread's Triton starts instead of running them. No launch is kept meanwhile.
recorder: ContextVar[Callable[..., None] | None] = ContextVar("pyfused_recorder", default=None)


def prepares_launch(prepare: Callable[..., Any]) -> Callable[..., Any]:
    """Makes `forward(*args)` of `prepare(*args)`.

    `prepare(*args)` looks at the arguments once and returns a launch. A launch takes the same arguments and reads only the
    tensors' addresses, so it serves every later call with the same shapes, strides, dtypes and numbers. `prepare` returns None
    where strides do not fit; then a launch for copies is prepared, which copies the tensors at each call.

    A launch for GPU tensors runs with their device as the current one, because kernels start and tensors are made there.
    """

    def prepare_on_device(*args: Any) -> Any:
        launch = prepare(*args)
        if launch is None:
            of_copies = prepare(*_contiguous(args))

            def launch(*args: Any) -> Any:
                return of_copies(*_contiguous(args))

        return on_device(launch, args[0].device.index) if args[0].is_cuda else launch

    def kept(*args: Any) -> Any:
        return prepare_on_device(*args) if recorder.get() is None else None

    def forward(*args: Any) -> Any:
        return prepare_on_device(*args)(*args)

    forward.prepare = kept  # type: ignore[attr-defined]
    return forward


def _contiguous(args: tuple[Any, ...]) -> list[Any]:
    return [a.contiguous() if isinstance(a, torch.Tensor) else a for a in args]


def on_device(launch: Callable[..., Any], index: int) -> Callable[..., Any]:
    """launch(*args), with GPU number `index` as the current device."""

    def run(*args: Any) -> Any:
        if current_device() == index:
            return launch(*args)
        with torch.cuda.device(index):
            return launch(*args)

    return run


def maker(
    shape: Any, dtype: torch.dtype, strides: Any = None, device: torch.device = CPU
) -> Callable[[], torch.Tensor]:
    """A function that returns a new tensor, contiguous unless strides are given. A GPU tensor is made on the current device;
    prepares_launch() sets that one. torch.compile's function takes 1.0 us. torch.empty parses and dispatches, and takes 1.8.
    """
    if strides is None:
        strides = [math.prod(max(size, 1) for size in shape[i + 1 :]) for i in range(len(shape))]
    empty_strided = _MAKERS.get(device.type)
    if empty_strided is None:
        return functools.partial(torch.empty_strided, shape, strides, dtype=dtype, device=device)
    return functools.partial(empty_strided, tuple(shape), tuple(strides), dtype)


def dense(*tensors: torch.Tensor | None) -> bool:
    """Whether all tensors are contiguous; None counts as contiguous."""
    return all(t is None or t.is_contiguous() for t in tensors)
