"""Which of torch.nn's modules does fuse_ know, and what do they compute instead?"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from ..fuse import Adapter, Forward, fused_forward, original
from ..ops import layer_norm, rms_norm

_DTYPES = frozenset({torch.float32, torch.float16, torch.bfloat16})


def takes(x: Tensor) -> bool:
    """Whether the kernels run on such a tensor; float64 and other devices are better off with torch's own functions."""
    return x.dtype in _DTYPES and (x.is_cpu or x.is_cuda)


@fused_forward
def layer_norm_forward(module: nn.LayerNorm, input: Tensor) -> Any:
    """pyfused.layer_norm"""
    if takes(input) and input.dtype == module.weight.dtype:
        return layer_norm(input, module.weight, module.bias, eps=module.eps)
    return original(module, input)


@fused_forward
def rms_norm_forward(module: nn.RMSNorm, x: Tensor) -> Any:
    """pyfused.rms_norm"""
    if takes(x) and x.dtype == module.weight.dtype:
        return rms_norm(x, module.weight, eps=torch.finfo(x.dtype).eps if module.eps is None else module.eps)
    return original(module, x)


def _norm(forward: Forward) -> Adapter:
    def adapter(module):
        if len(module.normalized_shape) != 1:
            return f"normalises over {len(module.normalized_shape)} dimensions; the kernels take the last one"
        if module.weight is None:
            return "has no weight"
        return forward

    return adapter


ADAPTERS: dict[str, Adapter] = {
    "torch.nn.modules.normalization.LayerNorm": _norm(layer_norm_forward),
    "torch.nn.modules.normalization.RMSNorm": _norm(rms_norm_forward),
}
