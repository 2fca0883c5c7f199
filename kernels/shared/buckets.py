"""Which bucket of a table does a distance fall into? Every backend's kernels read one small array of integers.

A table of DistanceBias has a bucket for each distance, in order; its max_distance is EACH. T5's formula is for all others:

Raffel et al. 2020 (arXiv:1910.10683): one side has n buckets (half of all when bidirectional), and exact = n // 2. A
distance below exact has its own bucket. A longer one has bucket exact + floor(ln(distance / exact) / ln(max_distance /
exact) * (n - exact)), at most n - 1. The formula runs in float32, as in Hugging Face transformers and KerasHub.
"""

from __future__ import annotations

import functools
import math

import torch

from .tables import kept_on_device

EACH = 0  # in place of max_distance: each distance has its own bucket


def exact_buckets(bidirectional: bool, num_buckets: int) -> int:
    """How many distances on one side have their own bucket. The formula needs at least one, and a larger max_distance."""
    return (num_buckets // 2 if bidirectional else num_buckets) // 2


def buckets_of(distance: torch.Tensor, bidirectional: bool, num_buckets: int, max_distance: int) -> torch.Tensor:
    """The bucket of each distance >= 0 within its side: int64, same shape."""
    side = num_buckets // 2 if bidirectional else num_buckets
    exact = exact_buckets(bidirectional, num_buckets)
    ratio = torch.log(distance.clamp(min=1).float() / exact) / math.log(max_distance / exact)
    return torch.where(distance < exact, distance, exact + (ratio * (side - exact)).long()).clamp(max=side - 1)


@functools.cache
def _by_distance(bidirectional: bool, num_buckets: int, max_distance: int) -> torch.Tensor:
    with torch.inference_mode(False):
        if max_distance == EACH:
            return torch.arange(num_buckets, dtype=torch.int32, device="cpu")
        side = num_buckets // 2 if bidirectional else num_buckets
        bucket = buckets_of(torch.arange(max_distance + 1, device="cpu"), bidirectional, num_buckets, max_distance)
        span = int((bucket < side - 1).sum())  # buckets never decrease, so from here on all are the last one
        bucket = bucket[: span + 1]
        after = bucket[1:] + side if bidirectional else bucket.new_zeros(span)
        return torch.cat((bucket.flip(0), after)).to(torch.int32)


_on_device = kept_on_device(_by_distance)


def distance_buckets(
    bidirectional: bool, num_buckets: int, max_distance: int, device: torch.device | None = None
) -> torch.Tensor:
    """int32 (2 * span + 1,): element r + span is the bucket of r = key position - query position, for -span <= r <= span.

    Every longer distance has the bucket of span, so clamp r. The array is kept; a device's first call copies it there.
    """
    if device is None or device.type == "cpu":
        return _by_distance(bidirectional, num_buckets, max_distance)
    return _on_device(bidirectional, num_buckets, max_distance, device=device)
