"""attention's backward for Hopper, by hand: launches _attention_grad_query.py, then _attention_grad_key_value.py."""

import torch
from triton.experimental.gluon.language import NVMMASharedLayout
from triton.experimental.gluon.nvidia.hopper import TensorDescriptor

from pyfused import tiles
from pyfused.kernels.shared.attention_layout import by_rows, span
from pyfused.kernels.shared.prepared import maker
from pyfused.kernels.triton.attention import _few_keys, in_units, spread

from . import attention
from ._attention_grad_key_value import ROWS, grad_key_value_kernel
from ._attention_grad_query import grad_query_kernel

_ROWS = ROWS.value
KEY = {"CONSUMERS": 2, "BLOCK_M": 128, "STAGES": 2, "IN_REGISTERS": 1}
QUERY = {"CONSUMERS": 2, "BLOCK_N": 128, "STAGES": 2, "IN_REGISTERS": True, "LATE": True, "HALVES": True}
PERSISTENT = True


def stats_like(query, block_m):
    """Uninitialised (log-sum-exp, delta) of each row, with room for the last tile of queries."""
    b, h, sq, _ = query.shape
    return maker((b * h, -(-sq // block_m) * block_m * 2), torch.float32, None, query.device)()


def _stats_descriptor(stats, block_m):
    layout = NVMMASharedLayout(swizzle_byte_width=0, element_bitwidth=32, rank=2)
    return TensorDescriptor(stats, list(stats.shape), list(stats.stride()), [1, 2 * block_m], layout)


def _grid(works, device):
    return (min(works, tiles.multiprocessors(device)) if PERSISTENT else works,)


def grad_query(a, stats, center, by_distance, options):
    """(dQ); fills stats."""
    (b, h, sq, d), (hkv, sk), dtype, device = a.query.shape, a.key.shape[1:3], a.query.dtype, a.query.device
    shape, strides = by_rows(a.query)
    found = maker(shape, dtype, strides, device)()
    block_n = options["BLOCK_N"]
    works = b * h * -(-sq // (options["CONSUMERS"] * _ROWS))
    descriptors = [attention._descriptor(tensor, _ROWS) for tensor in (a.grad_out, a.query, a.out)]
    descriptors += [attention._descriptor(tensor, block_n) for tensor in (a.key, a.value)]
    attention.start(
        grad_query_kernel, _grid(works, device), *descriptors, a.lse.contiguous(), by_distance, stats, found,
        0.0 if sk == 1 else a.scale, in_units(a.scale, dtype), span(a), center, stats.shape[1] // 2, *strides[:3], h, sq, sk, works,
        D=d, GROUP=h // hkv, FEW=_few_keys(a), IS_CAUSAL=a.is_causal, **options, num_warps=4,
    )  # fmt: skip
    return found


def grad_key_value(a, stats, center, by_distance, options):
    (b, h, sq, d), (hkv, sk), dtype, device = a.query.shape, a.key.shape[1:3], a.query.dtype, a.query.device
    shape, strides = by_rows(a.key)
    grad_key, grad_value = (maker(shape, dtype, strides, device)() for _ in range(2))
    block_m = options["BLOCK_M"]
    works = b * hkv * -(-sk // (options["CONSUMERS"] * _ROWS))
    descriptors = [attention._descriptor(tensor, block_m) for tensor in (a.grad_out, a.query)]
    descriptors += [_stats_descriptor(stats, block_m)]
    descriptors += [attention._descriptor(tensor, _ROWS) for tensor in (a.key, a.value)]
    attention.start(
        grad_key_value_kernel, _grid(works, device), *descriptors, by_distance, grad_key, grad_value,
        0.0 if sk == 1 else a.scale, in_units(a.scale, dtype), span(a), center, *strides[:3], hkv, sq, sk, works,
        D=d, GROUP=h // hkv, IS_CAUSAL=a.is_causal, **options, num_warps=4,
    )  # fmt: skip
    return grad_key, grad_value


def backward(a, query=None, key=None):
    """(dQ, dK, dV)."""
    query, key = query or QUERY, key or KEY
    center, of = spread(a, {"BLOCK_M": 192, "BLOCK_N": 128})
    by_distance = None if of is None else of(a.bias_table)
    stats = stats_like(a.query, key["BLOCK_M"])
    found = grad_query(a, stats, center, by_distance, query)
    return (found, *grad_key_value(a, stats, center, by_distance, key))
