"""How do the projections of a transformers attention layer run on pyfused? Large ones are pyfused.linear: in float32 where no
gradient is wanted, in half precision always. There plain PyTorch may take many times as long (kernels/shared/product.py)."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

from ...ops import linear
from ...own_forward import Entry, fused_forward, give, has_another_forward, is_fused, original
from ...tracing import tracing
from ..torch_nn import go_together

# Elements of a weight. A product with a smaller one takes so little time that a call's own cost, 3 us, is more than the gain.
WORTH_A_CALL = 1 << 19
WORTH_IN_HALF = 1 << 12  # plain PyTorch may take 16 times as long for 8 rows of 256
_HALF = (torch.bfloat16, torch.float16)
# Of an input in float32. One row takes as long as reading the weight, in both. From 384 rows on both take the same time within
# 2%. Between, dispatch asks the evidence.
ROWS = range(2, 257)
_FORWARDS: dict[type, Any] = {kind: kind.forward for kind in (nn.Linear, Conv1D)}  # a later patch of a class counts


@fused_forward
def projection(module: nn.Linear, input: Tensor) -> Any:
    """pyfused.linear"""
    if not _runs(module, nn.Linear, input):
        return original(module, input)
    return linear(input, module.weight, module.bias)


@fused_forward
def projection_by_columns(module: Conv1D, x: Tensor) -> Any:
    """pyfused.linear"""
    if not _runs(module, Conv1D, x):
        return original(module, x)
    return linear(x, module.weight.t(), module.bias)  # Conv1D keeps (in, out)


def _runs(module: Any, kind: type[nn.Module], x: Tensor) -> bool:
    if type(module) is not kind or tracing() or kind.forward is not _FORWARDS[kind]:
        return False
    weight = module.weight
    is_half = weight.dtype in _HALF
    if x.is_nested or not (is_half or x.shape[:-1].numel() in ROWS):
        return False
    if not weight.is_cpu or not go_together(module, x):
        return False
    return is_half or not (torch.is_grad_enabled() and (x.requires_grad or weight.requires_grad or _learns(module.bias)))


def _learns(bias: Any) -> bool:
    return bias is not None and bias.requires_grad


def fuse_projections(model: nn.Module, wanted: Callable[[str, nn.Module], bool]) -> list[Entry]:
    """Gives large linear layers that belong to an attention layer their forward; returns those. Others stay, unmentioned."""
    done: list[Entry] = []
    for above, layer in model.named_modules():
        kind = type(layer)
        if "Attention" not in kind.__name__ or not kind.__module__.startswith("transformers"):
            continue
        for name, child in layer.named_children():
            path = f"{above}.{name}" if above else name
            if _is_large(child) and wanted(path, child) and not is_fused(child) and not has_another_forward(child):
                give(child, projection if type(child) is nn.Linear else projection_by_columns)
                done.append(Entry(path, type(child).__name__, "pyfused.linear"))
    return done


def _is_large(child: Any) -> bool:
    if type(child) not in _FORWARDS or not child.weight.is_cpu:
        return False
    return child.weight.numel() >= (WORTH_IN_HALF if child.weight.dtype in _HALF else WORTH_A_CALL)
