"""How are layer_norm and rms_norm launched? All backends share these launchers.

A backend adds begin(norm). It prepares the backend's kernel and returns a function of the tensors:
    forward   (x, residual, weight, bias, y, total, mean, rstd)
    backward  (grad_y, grad_total, x, weight, mean, rstd, grad_x, grad_weight, grad_bias)
A missing tensor is None, such as rms_norm's bias and mean.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import torch

from .layout import rows_of
from .prepared import dense, maker


class Norm(NamedTuple):
    """A call without its tensors. In a backward, `residual` says whether there is a gradient of x + residual."""

    operator: str
    dtype: torch.dtype
    device: torch.device
    rows: int
    n: int
    x_stride: int
    residual_stride: int
    residual: bool
    bias: bool
    save: bool = True
    eps: float = 0.0

    @property
    def centred(self) -> bool:
        return self.operator == "layer_norm"


Begin = Callable[[Norm], Callable[..., None]]
Prepared = tuple[Callable[..., None], Callable[[], Any], Callable[[], Any]]


def layer_norm_forward(begin: Begin, x, weight, bias, eps, residual, save):
    """A launch for prepared.prepares_launch(), like the next three functions."""
    prepared = _forward("layer_norm", begin, x, weight, bias, eps, residual, save)
    if prepared is None:
        return None
    start, new, new_statistic = prepared

    def launch(x, weight, bias, _eps, residual, _save=False):
        y, total = new(), None if residual is None else new()
        mean, rstd = (new_statistic(), new_statistic()) if save else (None, None)
        start(x, residual, weight, bias, y, total, mean, rstd)
        return y, total, mean, rstd

    return launch


def rms_norm_forward(begin: Begin, x, weight, eps, residual, save):
    prepared = _forward("rms_norm", begin, x, weight, None, eps, residual, save)
    if prepared is None:
        return None
    start, new, new_statistic = prepared

    def launch(x, weight, _eps, residual, _save=False):
        y, total = new(), None if residual is None else new()
        rstd = new_statistic() if save else None
        start(x, residual, weight, None, y, total, None, rstd)
        return y, total, rstd

    return launch


def layer_norm_backward(begin: Begin, grad_y, grad_total, x, weight, mean, rstd, has_bias):
    prepared = _backward("layer_norm", begin, grad_y, grad_total, x, weight, mean, rstd, has_bias)
    if prepared is None:
        return None
    start, new, new_parameter = prepared

    def launch(grad_y, grad_total, x, weight, mean, rstd, _has_bias):
        grad_x, grad_weight, grad_bias = new(), new_parameter(), new_parameter() if has_bias else None
        start(grad_y, grad_total, x, weight, mean, rstd, grad_x, grad_weight, grad_bias)
        return grad_x, grad_weight, grad_bias

    return launch


def rms_norm_backward(begin: Begin, grad_y, grad_total, x, weight, rstd):
    prepared = _backward("rms_norm", begin, grad_y, grad_total, x, weight, None, rstd, False)
    if prepared is None:
        return None
    start, new, new_parameter = prepared

    def launch(grad_y, grad_total, x, weight, rstd):
        grad_x, grad_weight = new(), new_parameter()
        start(grad_y, grad_total, x, weight, None, rstd, grad_x, grad_weight, None)
        return grad_x, grad_weight

    return launch


def _forward(operator, begin, x, weight, bias, eps, residual, save) -> Prepared | None:
    """(start of the kernel, maker of y and total, maker of mean and rstd); None if strides do not fit."""
    of_x, of_residual = rows_of(x), rows_of(residual)
    if of_x is None or of_residual is None or not dense(weight, bias):
        return None
    strides = of_x[2], of_residual[2]
    norm = Norm(operator, x.dtype, x.device, *of_x[:2], *strides, residual is not None, bias is not None, save, eps)
    return begin(norm), maker(x.shape, x.dtype, None, x.device), maker(x.shape[:-1], torch.float32, None, x.device)


def _backward(operator, begin, grad_y, grad_total, x, weight, mean, rstd, has_bias) -> Prepared | None:
    """(start of the kernels, maker of grad_x, maker of grad_weight and grad_bias); None if strides do not fit."""
    of_x = rows_of(x)
    if of_x is None or not dense(grad_y, grad_total, weight, mean, rstd):
        return None
    norm = Norm(operator, x.dtype, x.device, *of_x, 0, grad_total is not None, has_bias)
    return begin(norm), maker(x.shape, x.dtype, None, x.device), maker(weight.shape, weight.dtype, None, x.device)
