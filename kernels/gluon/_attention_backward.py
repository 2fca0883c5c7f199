"""attention's backward for Hopper, by hand: launches _attention_grad_query.py, then _attention_grad_key_value.py."""

import functools

import torch
from triton.experimental.gluon.language import NVMMASharedLayout
from triton.experimental.gluon.nvidia.hopper import TensorDescriptor

from pyfused import tiles
from pyfused.kernels.shared.attention_layout import by_rows, span
from pyfused.kernels.shared.prepared import maker
from pyfused.kernels.triton.attention import few_keys, in_units, prepare_backward, spread

from ._attention_grad_key_value import grad_key_value_kernel
from ._attention_grad_query import GROUPS, ROWS, TILE, grad_query_kernel

_ROWS, _TILE, OWN = ROWS.value, TILE.value, ROWS.value * GROUPS.value
_STAGES = 2  # tiles in shared memory; a third gained nothing


def _stats_descriptor(stats):
    """(log-sum-exp, delta) of TILE queries."""
    rows = stats.view(-1, stats.shape[2] * 2)
    layout = NVMMASharedLayout(swizzle_byte_width=0, element_bitwidth=32, rank=2)
    return TensorDescriptor(rows, list(rows.shape), list(rows.stride()), [1, 2 * _TILE], layout)


def _grid(works, device):
    return (min(works, tiles.multiprocessors(device)),)


def new_stats(query):
    b, h, sq, _ = query.shape
    return maker((b, h, -(-sq // _TILE) * _TILE, 2), torch.float32, None, query.device)()


def grad_query(a, stats, center, by_distance, start, descriptor):
    """The gradient of the queries. Fills stats, (B, H, rows, 2)."""
    (b, h, sq, d), (hkv, sk), dtype, device = a.query.shape, a.key.shape[1:3], a.query.dtype, a.query.device
    shape, strides = by_rows(a.query)
    found, works = maker(shape, dtype, strides, device)(), b * h * -(-sq // OWN)
    start(
        grad_query_kernel,
        _grid(works, device),
        *(descriptor(tensor, _ROWS) for tensor in (a.grad_out, a.query, a.out)),
        *(descriptor(tensor, _TILE) for tensor in (a.key, a.value)),
        a.lse.contiguous(),
        by_distance,
        stats,
        found,
        in_units(a.scale, dtype),
        span(a),
        center,
        stats.shape[2],
        h,
        sq,
        sk,
        works,
        D=d,
        STAGES=_STAGES,
        GROUP=h // hkv,
        FEW=few_keys(a),
        IS_CAUSAL=a.is_causal,
        num_warps=4,
    )
    return found


def grad_key_value(a, start, descriptor, stats, center, by_distance):
    """The gradients of key and value, with the stats that a kernel for the queries has written."""
    (b, h, sq, d), (hkv, sk), dtype, device = a.query.shape, a.key.shape[1:3], a.query.dtype, a.query.device
    shape, strides = by_rows(a.key)
    grad_key, grad_value = (maker(shape, dtype, strides, device)() for _ in range(2))
    works = b * hkv * -(-sk // OWN)
    start(
        grad_key_value_kernel,
        _grid(works, device),
        *(descriptor(tensor, _TILE) for tensor in (a.grad_out, a.query)),
        _stats_descriptor(stats),
        *(descriptor(tensor, _ROWS) for tensor in (a.key, a.value)),
        by_distance,
        grad_key,
        grad_value,
        in_units(a.scale, dtype),
        span(a),
        center,
        hkv,
        sq,
        sk,
        works,
        D=d,
        STAGES=_STAGES,
        GROUP=h // hkv,
        IS_CAUSAL=a.is_causal,
        num_warps=4,
    )
    return grad_key, grad_value


def gradients(a, start, descriptor):
    """(dQ, dK, dV, None, dtable) of a call. start(kernel, grid, *args, **options) starts a kernel, descriptor(tensor, rows)
    describes tiles of a head's rows to the copy engine."""
    key_value, blocks = functools.partial(grad_key_value, a, start, descriptor), {"BLOCK_M": OWN, "BLOCK_N": _TILE}
    if a.wants_table:  # the kernel for the queries sums up the table's gradient, which this file's does not
        return prepare_backward(a, key_value, blocks)(*a)
    center, of = spread(a, blocks)
    by_distance = None if of is None else of(a.bias_table)
    stats = new_stats(a.query)
    found = grad_query(a, stats, center, by_distance, start, descriptor)
    return found, *key_value(stats, center, by_distance), None, None
