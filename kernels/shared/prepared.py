"""How does a kernel cost little Python? Its launch is prepared once for arguments of some shapes, and used again for others of
the same: pyfused.ops finds it by the signature of a call (csrc/include/pyfused/python_call.h). Shared by every backend.

A launch on a GPU holds numbers and a compiled kernel, no tensor. What it makes comes from torch's allocator and it waits for
nothing, so a CUDA graph can capture it; it asks for the current stream each time.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Callable
from contextvars import ContextVar
from typing import Any

import torch

CPU = torch.device("cpu")  # for every new tensor: torch.set_default_device may say something else
_makers: Any = torch._C._dynamo.guards  # what torch.compile's programs make tensors with; no public names of torch
_MAKERS = {kind: getattr(_makers, f"_empty_strided_{kind}", None) for kind in ("cpu", "cuda")}
# Both ask the runtime alone; torch.cuda's functions of the same purpose take 0.5 and 2 us.
current_device = getattr(torch._C, "_cuda_getDevice", torch.cuda.current_device)
current_stream = getattr(
    torch._C, "_cuda_getCurrentRawStream", lambda index: torch.cuda.current_stream(index).cuda_stream
)

# Notes a thread's Triton starts down and runs nothing, for pyfused/compile_ahead.py. No launch is kept meanwhile.
recorder: ContextVar[Callable[..., None] | None] = ContextVar("pyfused_recorder", default=None)


def prepares_launch(prepare: Callable[..., Any]) -> Callable[..., Any]:
    """Makes `forward(*args)` of `prepare(*args)`.

    `prepare(*args)` looks at the arguments once and returns a launch. A launch takes the same arguments and reads only the
    tensors' addresses, so it serves every later call with the same shapes, strides, dtypes and numbers. `prepare` returns None
    where strides do not fit; then `forward` copies the tensors and prepares again.

    A launch for GPU tensors runs with their device as the current one, because kernels start and tensors are made there.
    """

    def prepare_on_device(*args: Any) -> Any:
        launch = prepare(*args)
        return on_device(launch, args[0].device.index) if args[0].is_cuda and launch is not None else launch

    def kept(*args: Any) -> Any:
        return prepare_on_device(*args) if recorder.get() is None else None

    def forward(*args: Any) -> Any:
        launch = prepare_on_device(*args)
        if launch is None:
            args = tuple(a.contiguous() if isinstance(a, torch.Tensor) else a for a in args)
            launch = prepare_on_device(*args)
        return launch(*args)

    forward.prepare = kept  # type: ignore[attr-defined]
    return forward


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
    """A function that returns a new tensor, contiguous unless strides are given; a GPU's on the current device, which
    prepares_launch() sees to. What torch.compile's programs make theirs with takes 1.0 us, where torch.empty, which parses and
    dispatches, takes 1.8."""
    if strides is None:
        strides = [math.prod(max(size, 1) for size in shape[i + 1 :]) for i in range(len(shape))]
    empty_strided = _MAKERS.get(device.type)
    if empty_strided is None:
        return functools.partial(torch.empty_strided, shape, strides, dtype=dtype, device=device)
    return functools.partial(empty_strided, tuple(shape), tuple(strides), dtype)


def dense(*tensors: torch.Tensor | None) -> bool:
    """Whether all of them, None aside, are contiguous."""
    return all(t is None or t.is_contiguous() for t in tensors)
