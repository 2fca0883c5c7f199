"""What does a query get that sees no key, because a finite least number hides all of them? The mean of all values: the least
number swallows the scores beside it, so that their softmax is the same for all keys.

The kernels give zeros to such queries. They stand here for attention over all keys, without a tensor of Tq x Sk.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor


def mean_of(value: Tensor, heads: int) -> Tensor:
    """The mean of (B, Hkv, Sk, D) over the keys: (B, 1, H, D)."""
    return _to_heads(value.mean(2, keepdim=True), heads).transpose(1, 2)


def alike(query: Tensor, key: Tensor, value: Tensor, scale: float) -> Tensor:
    """softmax(scale * query key^T + least number) value: (B, Tq or 1, H, D). The scores have a gradient, but no influence."""
    if torch.is_grad_enabled() and (query.requires_grad or key.requires_grad):
        found: Tensor = _Alike.apply(query, key, value, scale)
        return found
    return mean_of(value, query.shape[1])


class _Alike(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, query: Tensor, key: Tensor, value: Tensor, scale: float) -> Tensor:
        ctx.save_for_backward(query, key, value)
        ctx.scale = scale
        return mean_of(value, query.shape[1]).expand(-1, query.shape[2], -1, -1)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        twice = torch.is_grad_enabled()  # the gradient will have one itself, as in create_graph=True
        compute: Any = _dense if twice else _first_order
        with torch.enable_grad():
            given = [t if twice else t.detach().requires_grad_() for t in ctx.saved_tensors]
            wanted = [t for t, needed in zip(given, ctx.needs_input_grad) if needed]
            found = list(torch.autograd.grad(compute(*given, ctx.scale), wanted, grad, create_graph=twice))
        return *(found.pop(0) if needed else None for needed in ctx.needs_input_grad[:3]), None


def _first_order(query: Tensor, key: Tensor, value: Tensor, scale: float) -> Tensor:
    """Has alike's gradient: softmax's, at scores that are all the same, is a product of two means."""
    mean = value.mean(2, keepdim=True)
    moved = key.transpose(2, 3) @ (value - mean).detach() * (scale / key.shape[2])  # (B, Hkv, D, D)
    heads = query.shape[1]
    return (_to_heads(mean, heads) + query @ _to_heads(moved, heads)).transpose(1, 2)


def _dense(query: Tensor, key: Tensor, value: Tensor, scale: float) -> Tensor:
    key, value = (_to_heads(t, query.shape[1]) for t in (key, value))
    scores = query @ key.transpose(2, 3) * scale
    return (torch.softmax(scores - scores.detach(), -1) @ value).transpose(1, 2)


def _to_heads(x: Tensor, heads: int) -> Tensor:
    return x if x.shape[1] == heads else x.repeat_interleave(heads // x.shape[1], 1)
