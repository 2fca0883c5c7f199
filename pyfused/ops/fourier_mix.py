"""fourier_mix: the real part of the 2-D Fourier transform over sequence and features (Lee-Thorp et al. 2021, arXiv:2105.03824).

y[s, n] = sum over a, b of x[a, b] cos(2 pi (s a / S + n b / N)): FNet's token mixing. The map is its own transpose,
so its backward is its forward. Also y[s, n] = y[-s, -n], indices modulo S and N.
"""

from __future__ import annotations

import math
from typing import Any

import torch

from .checks import check_floating
from .cost import Cost, size
from .registration import Operator


def fourier_mix(x: torch.Tensor) -> torch.Tensor:
    """Real part of the unnormalised forward 2-D DFT over the last two dimensions: torch.fft.fft2(x).real.

    Everything is computed in float32 and rounded once, so float16 and bfloat16 work at any size, which torch.fft refuses.
    Values grow like sqrt(S N), and y[0, 0] is the sum of x; float16 becomes infinite beyond 65504. One NaN makes its whole
    sample NaN. torch.autocast changes nothing: x keeps its dtype.

    Args:
        x: (B, S, N), float32, float16, bfloat16 (float64 runs on the reference). Any strides. S and N are at least 1 and may
            be prime; B may be 0.

    Returns:
        (B, S, N), of x's dtype, contiguous.

    Raises:
        TypeError, ValueError: x does not fit; the message says what it got and what it takes.
    """
    outputs = _FOURIER_MIX.call_prepared((x,))
    if outputs is None:
        outputs = _FOURIER_MIX.call_checked((x,), bind(x))
    return outputs[0]


def bind(x) -> tuple[Any, ...]:
    """Checks the argument and puts it in the registered operator's order."""
    check_floating(x, "x")
    if x.dim() != 3 or x.shape[1] == 0 or x.shape[2] == 0:
        raise ValueError(f"x has shape {tuple(x.shape)}; it takes (B, S, N) with S >= 1 and N >= 1")
    return (x,)


def _fake(x):
    return torch.empty(x.shape, dtype=x.dtype, device=x.device)


def _setup_context(ctx, inputs, output):
    pass  # the backward needs nothing but the gradient


def _backward(ctx, grad_y):
    return _FOURIER_MIX(grad_y)[0]


def _cost(x):
    """2.5 S N log2(S N) a sample: half of Cooley and Tukey's complex transform, as the input is real."""
    signal = x.shape[1] * x.shape[2]
    return Cost(size(x, x), int(2.5 * x.numel() * math.log2(max(signal, 2))))


_FOURIER_MIX = Operator(
    "fourier_mix",
    "(Tensor x) -> Tensor y",
    fake=_fake,
    setup_context=_setup_context,
    backward=_backward,
    cost=_cost,
)
