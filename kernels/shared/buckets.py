"""Which bucket of T5's table does a distance fall into? One small array of integers, shared by the kernels of every backend.

Raffel et al. 2020 (arXiv:1910.10683): with n buckets (half of them for each side where bidirectional) and exact = n // 2,
a distance below exact has a bucket of its own; beyond, exact + floor(ln(distance / exact) / ln(max_distance / exact) *
(n - exact)), at most n - 1. Evaluated in float32, as Hugging Face transformers and KerasHub do.
"""

from __future__ import annotations

import functools
import math

import torch

from .tables import kept_on_device


def exact_buckets(bidirectional: bool, num_buckets: int) -> int:
    """How many distances on one side have a bucket of their own; the formula needs one, and max_distance beyond it."""
    return (num_buckets // 2 if bidirectional else num_buckets) // 2


def buckets_of(distance: torch.Tensor, bidirectional: bool, num_buckets: int, max_distance: int) -> torch.Tensor:
    """int64, of distance's shape: the bucket of each distance >= 0 on its side."""
    side = num_buckets // 2 if bidirectional else num_buckets
    exact = exact_buckets(bidirectional, num_buckets)
    ratio = torch.log(distance.clamp(min=1).float() / exact) / math.log(max_distance / exact)
    return torch.where(distance < exact, distance, exact + (ratio * (side - exact)).long()).clamp(max=side - 1)


@functools.cache
def _by_distance(bidirectional: bool, num_buckets: int, max_distance: int) -> torch.Tensor:
    with torch.inference_mode(False):
        side = num_buckets // 2 if bidirectional else num_buckets
        bucket = buckets_of(torch.arange(max_distance + 1), bidirectional, num_buckets, max_distance)
        span = int((bucket < side - 1).sum())  # never falls, so this is where it stays at its last value
        bucket = bucket[: span + 1]
        after = bucket[1:] + side if bidirectional else torch.zeros(span, dtype=bucket.dtype)
        return torch.cat((bucket.flip(0), after)).to(torch.int32)


_on_device = kept_on_device(_by_distance)


def distance_buckets(
    bidirectional: bool, num_buckets: int, max_distance: int, device: torch.device | None = None
) -> torch.Tensor:
    """int32 (2 * span + 1,): element r + span is the bucket of r = key position - query position, for -span <= r <= span.

    Every distance from span on has the bucket of span: clamp r. Kept; the first call for a device copies to it.
    """
    if device is None or device.type == "cpu":
        return _by_distance(bidirectional, num_buckets, max_distance)
    return _on_device(bidirectional, num_buckets, max_distance, device=device)
