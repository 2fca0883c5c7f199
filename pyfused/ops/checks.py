"""What is bad input? The public operators share these checks. Each error names the argument and what it takes."""

from __future__ import annotations

import os
from typing import Any

import torch

from ..evidence import name_of as name_of
from ..rules import its_kind
from ..tracing import tracing

# A call's checks cost as much as a small kernel, so each check tests the usual case first. Reading a tensor's device takes
# 0.15 us, comparing two devices 0.3, is_cpu 0.06, reading a shape 0.3.
_PLAIN = (torch.Tensor, torch.nn.Parameter)
FLOATING = (torch.float32, torch.float16, torch.bfloat16, torch.float64)


def is_dense(tensor: torch.Tensor) -> bool:
    """Whether the tensor has memory with strides: it is neither sparse, nested nor in MKL-DNN's layout."""
    return tensor.layout is torch.strided and not tensor.is_nested


def check_dense(tensor: torch.Tensor, argument: str) -> None:
    """Raises TypeError unless this is a dense tensor."""
    if not isinstance(tensor, torch.Tensor):
        raise TypeError(f"{argument} is {its_kind(tensor)}; it takes a torch.Tensor")
    if not is_dense(tensor):
        kind = "is a nested tensor" if tensor.is_nested else f"has the layout {str(tensor.layout).removeprefix('torch.')}"
        raise TypeError(f"{argument} {kind}; it takes a dense tensor")


def check_floating(tensor: torch.Tensor, argument: str) -> None:
    """Raises TypeError unless this is a dense tensor of a dtype that pyfused computes in."""
    if tensor.__class__ in _PLAIN and tensor.dtype in FLOATING and is_dense(tensor):
        return
    check_dense(tensor, argument)
    if tensor.dtype not in FLOATING:
        raise TypeError(f"{argument} is {name_of(tensor.dtype)}; it takes float32, float16, bfloat16 or float64")


def check_like(tensor: torch.Tensor, argument: str, like: torch.Tensor, like_name: str) -> None:
    """Raises unless this is a dense tensor of `like`'s dtype and device."""
    plain = tensor.__class__ in _PLAIN and tensor.dtype is like.dtype and tensor.is_cpu and like.is_cpu
    if plain and is_dense(tensor):
        return
    check_dense(tensor, argument)
    if tensor.dtype != like.dtype:
        raise TypeError(f"{argument} is {name_of(tensor.dtype)}; it takes {like_name}'s dtype, {name_of(like.dtype)}")
    if tensor.device != like.device:
        raise ValueError(f"{argument} is on {tensor.device}; it takes {like_name}'s device, {like.device}")


def as_float(value: Any, argument: str) -> float:
    """The number as a float. Raises TypeError for anything else, such as the text '1e-5', which YAML takes for no number."""
    if not isinstance(value, str):
        try:
            return float(value)
        except (TypeError, ValueError):
            pass
    raise TypeError(f"{argument} is {value!r}; it takes a number")


def check_shape(tensor: torch.Tensor, argument: str, shape: tuple[int, ...], meaning: str) -> None:
    """Raises ValueError unless the tensor has exactly this shape. `meaning` is the shape in letters, such as "(N,)"."""
    if tensor.shape != shape:
        raise ValueError(f"{argument} has shape {tuple(tensor.shape)}; it takes {meaning} = {tuple(shape)}")


def may_look(tensor: torch.Tensor) -> bool:
    """Whether a check may read the tensor's values. It may on the host, where that needs no synchronisation, and with
    PYFUSED_CHECK=1; never in a trace."""
    if tracing() or type(tensor) not in _PLAIN:
        return False
    return tensor.device.type == "cpu" or os.environ.get("PYFUSED_CHECK") == "1"
