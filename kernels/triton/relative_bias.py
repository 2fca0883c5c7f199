"""relative_bias in Triton: bias[h][i][j] = table[bucket of j - i - offset][h], and the gradient of the table.

Forward: writes H Sq Sk elements, and these writes are the bound; the table stays in L1. Backward: a bucket's distances are
one interval, so its elements are a band along the diagonals. A program adds up one head's band in ROWS rows and reads no
other bucket. torch adds the parts. The order is fixed, so the result is bitwise repeatable.
"""

import torch
import triton
import triton.language as tl

from pyfused import tiles
from pyfused.kernels.shared.buckets import distance_buckets
from pyfused.kernels.shared.prepared import maker, prepares_launch

from ._launch import starter

_FAR = tl.constexpr(1 << 30)


# ---- kernels --------------------------------------------------------------------------------------------------------
@triton.jit(do_not_specialize=["query_length", "offset", "span"])
def _forward_kernel(
    table_ptr, buckets_ptr, bias_ptr, heads, query_length, key_length, offset, span, stride_bucket, stride_head,
    ROWS: tl.constexpr, COLUMNS: tl.constexpr,
):  # fmt: skip
    """Grid (H * row tiles * column tiles)."""
    high, wide = tl.cdiv(query_length, ROWS), tl.cdiv(key_length, COLUMNS)
    above = tl.program_id(0) // wide
    head = above // high
    i = above % high * ROWS + tl.arange(0, ROWS)
    j = tl.program_id(0) % wide * COLUMNS + tl.arange(0, COLUMNS)
    relative = tl.minimum(tl.maximum(j[None, :] - (i[:, None] + offset), -span), span)
    bucket = tl.load(buckets_ptr + span + relative)
    bias = tl.load(table_ptr + head * stride_head + bucket * stride_bucket)
    row = head.to(tl.int64) * query_length + i
    stored = (i < query_length)[:, None] & (j < key_length)[None, :]
    tl.store(bias_ptr + row[:, None] * key_length + j[None, :], bias, mask=stored)


@triton.jit(do_not_specialize=["query_length", "offset", "span"])
def _backward_kernel(
    grad_ptr, buckets_ptr, part_ptr, heads, num_buckets, query_length, key_length, offset, span,
    ROWS: tl.constexpr, COLUMNS: tl.constexpr,
):  # fmt: skip
    """Grid (row tiles * num_buckets * H), in the order of `part`, (row tiles, num_buckets, H)."""
    program = tl.program_id(0)
    tile, bucket, head = program // heads // num_buckets, program // heads % num_buckets, program % heads
    lanes = tl.arange(0, 256)
    least, most = span + 1, -span - 1
    for at in range(0, 2 * span + 1, 256):
        member = tl.load(buckets_ptr + at + lanes, mask=at + lanes <= 2 * span, other=-1) == bucket
        least = tl.minimum(least, tl.min(tl.where(member, at + lanes - span, span + 1), 0))
        most = tl.maximum(most, tl.max(tl.where(member, at + lanes - span, -span - 1), 0))
    least = tl.where(least == -span, -_FAR, least)  # distances beyond span belong to the buckets at both ends
    most = tl.where(most == span, _FAR, most)

    i = tile * ROWS + tl.arange(0, ROWS)
    first = tl.minimum(tl.maximum(tile * ROWS + offset + least, 0), key_length)
    end = tl.maximum(tl.minimum(tile * ROWS + ROWS + offset + most, key_length), first)
    rows = grad_ptr + (head.to(tl.int64) * query_length + i)[:, None] * key_length
    total = tl.zeros((ROWS,), tl.float32)
    for start in range(first, end, COLUMNS):
        j = start + tl.arange(0, COLUMNS)
        relative = j[None, :] - (i[:, None] + offset)
        inside = (i < query_length)[:, None] & (j < end)[None, :] & (relative >= least) & (relative <= most)
        total += tl.sum(tl.load(rows + j[None, :], mask=inside, other=0.0).to(tl.float32), 1)
    tl.store(part_ptr + program, tl.sum(total, 0))


# ---- launchers ------------------------------------------------------------------------------------------------------
@prepares_launch
def forward(table, query_length, key_length, bidirectional, max_distance, query_offset):
    (num_buckets, heads), device = table.shape, table.device
    buckets = distance_buckets(bidirectional, num_buckets, max_distance, device)
    span = buckets.shape[0] // 2
    tile = tiles.find("relative_bias_forward", device).options
    high, wide = triton.cdiv(query_length, tile["ROWS"]), triton.cdiv(key_length, tile["COLUMNS"])
    start = starter(
        _forward_kernel, (heads * high * wide,), device,
        heads, query_length, key_length, query_offset, span, *table.stride(), **tile,
    )  # fmt: skip
    new = maker((1, heads, query_length, key_length), table.dtype, None, device)

    def launch(table, *_):
        bias = new()
        start(table, buckets, bias)
        return (bias,)

    return launch


@prepares_launch
def backward(grad_out, num_buckets, bidirectional, max_distance, query_offset):
    if not grad_out.is_contiguous():
        return None
    (_, heads, sq, sk), device, dtype = grad_out.shape, grad_out.device, grad_out.dtype
    buckets = distance_buckets(bidirectional, num_buckets, max_distance, device)
    span = buckets.shape[0] // 2
    tile = tiles.find("relative_bias_backward", device).options
    high = triton.cdiv(sq, tile["ROWS"])
    start = starter(
        _backward_kernel, (high * num_buckets * heads,), device,
        heads, num_buckets, sq, sk, query_offset, span, **tile,
    )  # fmt: skip
    new_parts = maker((high, num_buckets, heads), torch.float32, None, device)

    def launch(grad_out, *_):
        parts = new_parts()
        start(grad_out, buckets, parts)
        return (parts.sum(0).to(dtype),)

    return launch
