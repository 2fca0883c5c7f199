"""An activation between two layers that no operator joins, such as those with integer weights. On a CPU torch computes some of
them slowly. It is no operator: whoever watches, or wants a gradient, sees plain PyTorch."""

from __future__ import annotations

import torch
from torch import Tensor

from .. import dispatch
from ..activations import ACTIVATIONS
from ..extensions import DTYPE_CODES
from ..kernels.cpu import ffn, gated_ffn
from .call import watched

# torch computes the first slowly and the second in passes through memory. A gate's product is one more pass. torch's erf and
# tanh are faster than the kernel's.
_BY_KERNEL = {"gelu_tanh", "quick_gelu"}
_GATES_BY_KERNEL = _BY_KERNEL | {"silu", "relu"}


def activated(x: Tensor, activation: str, up: Tensor | None = None) -> Tensor:
    """activation(x), or activation(x) * up. The product is float32 for float16: two of its numbers may exceed it."""
    wide = torch.float32 if up is not None and x.dtype == torch.float16 else x.dtype
    if activation in (_BY_KERNEL if up is None else _GATES_BY_KERNEL) and _by_kernel(x, up):
        y = torch.empty_like(x, dtype=wide)
        if up is None:
            ffn.activate(x, None, y, None, activation)
        else:
            gated_ffn.activate(x, up, None, y, None, None, activation)
        return y
    y = ACTIVATIONS[activation].function(x.to(wide))
    return y if up is None else y * up.to(wide)


def _by_kernel(x: Tensor, up: Tensor | None) -> bool:
    if x.device.type != "cpu" or x.dtype not in DTYPE_CODES or not x.is_contiguous() or watched(x, up):
        return False
    if up is not None and (up.shape != x.shape or up.dtype != x.dtype or not up.is_contiguous()):
        return False
    forced = dispatch.forced()
    return not dispatch.missing("cpu") and (forced is None or forced[0] == "cpu")
