"""What does fuse_ replace in transformers' FNet? The Fourier mixing, and the residual before the norm behind it.

The feed-forward has a usual shape, so shaped.py replaces it.
"""

from __future__ import annotations

import functools
from typing import Any

import torch
from torch import Tensor, nn

from ... import notices
from ...ops import fourier_mix, layer_norm
from ...own_forward import Adapter, Forward, fused_forward, original
from ..torch_nn import takes
from .plain_modules import is_fused_norm
from .releases import full_name

_OTHER_TRANSFORM = "FNet's transform is another than torch.fft.fftn (use_tpu_fourier_optimizations): it stays as it is"


@fused_forward
def fourier_transform(module: Any, hidden_states: Tensor) -> Any:
    """pyfused.fourier_mix"""
    if not _is_fft(module.fourier_transform):
        notices.once(_OTHER_TRANSFORM)
        return original(module, hidden_states)
    if not takes(hidden_states):
        return original(module, hidden_states)
    if hidden_states.is_cpu and torch.is_autocast_enabled("cpu"):
        hidden_states = hidden_states.float()  # autocast runs torch.fft in float32 on the CPU
    return (fourier_mix(hidden_states),)  # also in float16 and bfloat16, which torch.fft refuses


@fused_forward
def basic_output(module: Any, hidden_states: Tensor, input_tensor: Tensor) -> Any:
    """pyfused.layer_norm with the residual"""
    norm = module.LayerNorm
    if not is_fused_norm(input_tensor, norm) or hidden_states.dtype != input_tensor.dtype:
        return original(module, hidden_states, input_tensor)
    return layer_norm(hidden_states, norm.weight, norm.bias, eps=norm.eps, residual=input_tensor)[0]


def _is_fft(transform: Any) -> bool:
    return (
        isinstance(transform, functools.partial)
        and transform.func is torch.fft.fftn
        and not transform.args
        and transform.keywords == {"dim": (1, 2)}
    )


def _mixing(module: nn.Module) -> Forward | str:
    if _is_fft(module.fourier_transform):
        return fourier_transform
    notices.once(_OTHER_TRANSFORM)
    return _OTHER_TRANSFORM


ADAPTERS: dict[str, Adapter] = {
    full_name("fnet.FNetBasicFourierTransform"): _mixing,
    full_name("fnet.FNetBasicOutput"): lambda module: basic_output,
}
