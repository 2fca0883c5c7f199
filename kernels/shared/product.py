"""The library's products of matrices, for gradients. On a CPU those of half precision go through float32 where that is faster.

Without instructions for such products plain PyTorch takes up to 110 times as long (both dtypes, AVX2, 512 rows, 3072 to 768),
https://github.com/pytorch/pytorch/issues/146508. With them evidence decides: on an Emerald Rapids without AMX float32 takes 0.6
of bfloat16's time for 512 rows, and 1.1 of float16's.
"""

from __future__ import annotations

import functools
import math
import time

import torch
from torch import Tensor
from torch.utils._python_dispatch import _disable_current_modes

from pyfused import evidence

_PART = 1 << 18  # elements of a weight that are in float32 at a time: 1 MB stays in the L2, and 32 MB are new pages each time


def plain_product(a: Tensor, b: Tensor, *more: Tensor) -> Tensor:
    """a b for matrices (M, K) and (K, N) of one dtype; plus c d for two more."""
    return torch.addmm(a @ b, *more) if more else a @ b


def product(a: Tensor, b: Tensor, *more: Tensor) -> Tensor:
    """plain_product(), in float32 where that is faster."""
    return (in_float32 if _is_faster_in_float32(a, b) else plain_product)(a, b, *more)


def _is_faster_in_float32(a: Tensor, b: Tensor) -> bool:
    if not a.is_cpu or a.dtype not in (torch.bfloat16, torch.float16):
        return False
    if is_slow(a.dtype):
        return True
    sizes = [_hint(size) for size in (*a.shape, b.shape[1])]
    if None in sizes:  # known when a compiled program runs
        return False
    shapes, size = evidence.gradient_shapes(*sizes)
    reason = evidence.slower("cpu", "linear", "backward", "cpu", a.dtype, shapes, size, unmeasured=False)
    return reason is None


def _hint(size: int | torch.SymInt) -> int | None:
    """A size of a traced tensor in the call that is traced. Nothing is assumed of later calls."""
    return size.node.hint if isinstance(size, torch.SymInt) else size


@functools.cache
def is_slow(dtype: torch.dtype) -> bool:
    """Whether plain PyTorch has no instructions for products of this dtype here: then this one takes 70 times as long as in
    float32, or 6 times where oneDNN splits bfloat16, and else at most 2.5 times."""
    with _disable_current_modes(), torch.autocast("cpu", enabled=False):  # of a trace
        took = {torch.float32: math.inf, dtype: math.inf}
        for kind in list(took) * 3:
            a, b = (torch.ones(rows, 256, dtype=kind, device="cpu") for rows in (64, 256))
            began = time.perf_counter()
            a @ b
            took[kind] = min(took[kind], time.perf_counter() - began)
    return took[dtype] > 4 * took[torch.float32]


def in_float32(a: Tensor, b: Tensor, *more: Tensor) -> Tensor:
    """plain_product() with one rounding, of sums in float32. Of a gradient's three matrices one has a weight's size. It is
    converted in parts."""
    (m, k), n = a.shape, b.shape[1]
    if m > k and not isinstance(m * k * n, torch.SymInt) and max(m * k, m * n) > _PART and not more:
        y, wide = a.new_empty(m, n), b.float()
        for part in _slices(m, max(k, n)):
            y[part] = a[part].float() @ wide
        return y
    sums = _sums(a, b)
    return (sums + _sums(*more) if more else sums).to(a.dtype)


def _sums(a: Tensor, b: Tensor) -> Tensor:
    (m, k), n = a.shape, b.shape[1]
    if isinstance(m * k * n, torch.SymInt) or max(m * k, k * n) <= _PART:
        return a.float() @ b.float()
    first, *others = _slices(k, max(m, n))
    sums = a[:, first].float() @ b[first].float()
    for part in others:  # not in place: vmap may have batched only what is added
        sums = torch.addmm(sums, a[:, part].float(), b[part].float())
    return sums


def _slices(count: int, each: int) -> list[slice]:
    step = max(1, _PART // max(each, 1))
    return [slice(first, first + step) for first in range(0, count, step)]
