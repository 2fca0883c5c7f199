"""How do the gradients of key and value run on a GPU? One program per tile of keys visits all queries that see the tile.

The formulas are in _attention_grad_query.py. Its kernel runs first and writes each row's log-sum-exp and delta.

Both compute the scores and dP: seven products. With the queries' gradient added up by atomics, here, it was five. An H200 took
1.40 ms at best in place of 1.35 for that (B8 H16 S2048 D64), and its sums were not repeatable.
"""

import triton
import triton.language as tl

from ._attention_relative import BY_KEY, far_biases, near_tiles, relative_tile, spread_row
from ._attention_tiles import (
    MASKED_STAGES,
    dot_rows,
    exponential,
    in_units,
    keep_tile,
    load_tile,
    sequence_tile,
)
from ._dot import add_product


@triton.jit
def _row_stats(stats_ptr, start, BLOCK_M: tl.constexpr):
    """(lse, delta) of the queries from `start`, a multiple of BLOCK_M. Rows past the last query may hold anything.

    A thread needs neighbouring pairs, 16 bytes. As two vectors, with a mask, they came by 4 bytes at a time.
    """
    pairs = tl.load(stats_ptr + start // BLOCK_M * (2 * BLOCK_M) + tl.arange(0, 2 * BLOCK_M))
    return tl.split(tl.reshape(pairs, (BLOCK_M, 2)))


@triton.jit
def _key_step(
    grad_key, grad_value, key, key_rows, value, value_rows,
    query_ptr, grad_out_ptr, stats_ptr, correction_ptr,
    bias_columns, spread, far, center, seed, flat_head, keys, first_key, visible, start, scale, keep_scale, threshold,
    stride_qs, stride_gs, stride_bq,
    query_length, key_length,
    D: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, IS_CAUSAL: tl.constexpr,
    START_AT_BIAS: tl.constexpr, MASKED: tl.constexpr,
):  # fmt: skip
    """Adds one tile of queries. Scores are computed as (keys, queries), so dK and dV need no transposed operand. `spread` and
    `far` are those of the forward.

    Rows of hidden keys may hold anything, even inf. They reach no other row, and the kernel zeroes them at its end.
    """
    NATURAL: tl.constexpr = key is None
    NEAR: tl.constexpr = spread is not None and far is None
    queries = start + tl.arange(0, BLOCK_M)
    dims = tl.arange(0, BLOCK_D)
    live = queries < query_length
    query_rows = queries.to(tl.int64)[:, None]
    lse, delta = _row_stats(stats_ptr, start, BLOCK_M)
    if MASKED:
        lse = tl.where(live, lse, float("inf"))  # p = 0 past the last query
        live = live & (lse != float("inf"))  # the rows of a query that sees no key may hold anything too
        delta = tl.where(live, delta, 0.0)
    query = load_tile(query_ptr + query_rows * stride_qs + dims[None, :], live, dims, D, MASKED)
    corner = start + (key_length - query_length) - first_key  # of negated distances
    if NATURAL:
        s = dot_rows(key_rows, visible, query_ptr + queries.to(tl.int64) * stride_qs, live, D, BLOCK_N, BLOCK_M)
    elif NEAR and START_AT_BIAS:
        s = tl.dot(key, tl.trans(query), relative_tile(spread, corner, center, BLOCK_N, BLOCK_M, True))
    else:
        s = tl.dot(key, tl.trans(query))
    s *= scale
    if bias_columns is not None:
        bias_mask = visible[:, None]
        if MASKED:
            bias_mask = bias_mask & live[None, :]
        bias = tl.load(bias_columns[:, None] + queries.to(tl.int64)[None, :] * stride_bq, mask=bias_mask, other=0.0)
        s += in_units(bias.to(tl.float32), NATURAL)
    less = lse
    if far is not None:
        less = lse - far
    elif NEAR and not START_AT_BIAS:
        s += relative_tile(spread, corner, center, BLOCK_N, BLOCK_M, not NATURAL)
    if MASKED and IS_CAUSAL:
        s = tl.where(keys[:, None] <= queries[None, :] + (key_length - query_length), s, -float("inf"))
    p = exponential(s - less[None, :], NATURAL)
    if correction_ptr is not None:
        p *= tl.load(correction_ptr + queries, mask=live, other=0.0)[None, :]
    grad_out = load_tile(grad_out_ptr + query_rows * stride_gs + dims[None, :], live, dims, D, MASKED)
    kept = p
    if seed is not None:
        flat_heads = flat_head + tl.zeros_like(queries)
        keep = tl.trans(keep_tile(seed, flat_heads, queries, first_key, threshold, BLOCK_M, BLOCK_N).to(tl.int8)) != 0
        kept = tl.where(keep, p, 0.0)
    grad_value = add_product(grad_value, kept.to(grad_out.dtype), grad_out)
    if NATURAL:
        dp = dot_rows(value_rows, visible, grad_out_ptr + queries.to(tl.int64) * stride_gs, live, D, BLOCK_N, BLOCK_M)
    else:
        dp = tl.dot(value, tl.trans(grad_out))
    if seed is not None:
        dp = tl.where(keep, dp * keep_scale, 0.0)
    ds = p * (dp - delta[None, :])
    grad_key = add_product(grad_key, ds.to(query.dtype), query)
    return grad_key, grad_value


@triton.jit(do_not_specialize=["threshold", "span", "center", "query_length", "key_length", "sequences"])
def grad_key_value_kernel(
    grad_out_ptr, query_ptr, key_ptr, value_ptr, stats_ptr, correction_ptr, mask_ptr, bias_ptr, spread_ptr, seed_ptr,
    cu_seqlens_ptr, grad_key_ptr, grad_value_ptr,
    grad_scale, scale, keep_scale, threshold, span, center,
    stride_stats, stride_gb, stride_gh, stride_gs, stride_qb, stride_qh, stride_qs, stride_kb, stride_kh, stride_ks,
    stride_vb, stride_vh, stride_vs, stride_db, stride_dh, stride_ds, stride_bb, stride_bh, stride_bq, stride_bk,
    key_heads, query_length, key_length, sequences,
    D: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, GROUP: tl.constexpr,
    IS_CAUSAL: tl.constexpr, START_AT_BIAS: tl.constexpr,
):  # fmt: skip
    """Grid (key tiles * B * key heads). A program adds up the query heads of its group. Both gradients have stride_d*.
    With cu_seqlens the grid is ((T // BLOCK_N + sequences) * key heads); the rest is as in forward_kernel."""
    tiles = tl.cdiv(key_length, BLOCK_N)
    program = tl.program_id(0)
    total = query_length
    if cu_seqlens_ptr is not None:
        slots = total // BLOCK_N + sequences
        key_head = program // slots
        batch, tile, row, key_length = sequence_tile(cu_seqlens_ptr, sequences, program % slots, BLOCK_N)
        first_key = tile * BLOCK_N
        if first_key >= key_length:
            return
        query_length = key_length
    else:
        first_key = program % tiles * BLOCK_N
        batch, key_head = program // tiles // key_heads, program // tiles % key_heads
    keys = first_key + tl.arange(0, BLOCK_N)
    dims = tl.arange(0, BLOCK_D)
    batch64, key_head64, keys64 = batch.to(tl.int64), key_head.to(tl.int64), keys.to(tl.int64)
    if cu_seqlens_ptr is not None:
        query_ptr += row * stride_qs
        key_ptr += row * stride_ks
        value_ptr += row * stride_vs
        grad_out_ptr += row * stride_gs
        grad_key_ptr += row * stride_ds
        grad_value_ptr += row * stride_ds
        stats_ptr += 2 * row
        if correction_ptr is not None:
            correction_ptr += row
        batch64 = row * 0  # the tensors have B = 1; only dropout counts the sequence as the batch
        grad_scale = tl.where(key_length == 1, 0.0, grad_scale)  # as in grad_query_kernel
    visible = keys < key_length
    if mask_ptr is not None:
        visible = visible & (tl.load(mask_ptr + batch64 * key_length + keys, mask=visible, other=0) != 0)
    key_rows = key_ptr + batch64 * stride_kb + key_head64 * stride_kh + keys64 * stride_ks
    value_rows = value_ptr + batch64 * stride_vb + key_head64 * stride_vh + keys64 * stride_vs
    NATURAL: tl.constexpr = key_ptr.dtype.element_ty == tl.float32
    key = None
    value = None
    if not NATURAL:
        key = load_tile(key_rows[:, None] + dims[None, :], visible, dims, D, True)
        value = load_tile(value_rows[:, None] + dims[None, :], visible, dims, D, True)
    seed = seed_ptr
    if seed_ptr is not None:
        seed = tl.load(seed_ptr)

    # Query tiles in [front_start, full_start) cross the diagonal. The last tile may reach past the end.
    limit = tl.cdiv(query_length, BLOCK_M) * BLOCK_M
    front_start = 0
    full_start = 0
    if IS_CAUSAL:
        shift = key_length - query_length
        front_start = tl.minimum(tl.maximum(first_key - shift, 0) // BLOCK_M * BLOCK_M, limit)
        full_start = tl.minimum(tl.cdiv(tl.maximum(first_key + BLOCK_N - 1 - shift, 0), BLOCK_M) * BLOCK_M, limit)
    if mask_ptr is not None:
        nothing = tl.max(visible.to(tl.int32), 0) == 0  # a tile of padding: no query to visit
        front_start = tl.where(nothing, limit, front_start)
        full_start = tl.where(nothing, limit, full_start)
    full_end = tl.maximum(query_length // BLOCK_M * BLOCK_M, full_start)
    front_count = (full_start - front_start) // BLOCK_M
    tail_count = tl.cdiv(tl.maximum(query_length - full_end, 0), BLOCK_M)

    near_start, near_end = full_start, full_end
    if spread_ptr is not None:
        first = first_key - (key_length - query_length)
        near_start, near_end = near_tiles(full_start, full_end, first, first + BLOCK_N - 1, span, BLOCK_M)
    before = (near_start - full_start) // BLOCK_M
    far_count = before + (full_end - near_end) // BLOCK_M

    grad_key = tl.zeros((BLOCK_N, BLOCK_D), tl.float32)
    grad_value = tl.zeros((BLOCK_N, BLOCK_D), tl.float32)
    for member in range(GROUP):
        head = key_head * GROUP + member
        head64 = head.to(tl.int64)
        query_base = query_ptr + batch64 * stride_qb + head64 * stride_qh
        grad_base = grad_out_ptr + batch64 * stride_gb + head64 * stride_gh
        flat_head = batch * (key_heads * GROUP) + head
        row_head = flat_head
        if cu_seqlens_ptr is not None:
            row_head = head
        stats_base = stats_ptr + row_head.to(tl.int64) * (2 * stride_stats)
        correction_base = correction_ptr
        if correction_ptr is not None:
            correction_base = correction_ptr + row_head.to(tl.int64) * total
        bias_columns = bias_ptr
        if bias_ptr is not None:
            bias_columns = bias_ptr + batch64 * stride_bb + head64 * stride_bh + keys64 * stride_bk
        spread = spread_ptr
        if spread_ptr is not None:
            spread = spread_row(spread_ptr, head, center, BY_KEY)
            far_before, far_after = far_biases(spread, span, center, scale, START_AT_BIAS)
            for i in range(far_count):
                # The first `before` tiles hold queries far before these keys, the others queries far after them.
                start = tl.where(i < before, full_start + i * BLOCK_M, near_end + (i - before) * BLOCK_M)
                far = tl.where(i < before, far_before, far_after)
                grad_key, grad_value = _key_step(
                    grad_key, grad_value, key, key_rows, value, value_rows, query_base, grad_base, stats_base,
                    correction_base, bias_columns, spread, far, center, seed, flat_head, keys, first_key, visible, start,
                    scale, keep_scale, threshold, stride_qs, stride_gs, stride_bq, query_length, key_length, D, BLOCK_D,
                    BLOCK_M, BLOCK_N, IS_CAUSAL, START_AT_BIAS, False,
                )  # fmt: skip
        for start in range(near_start, near_end, BLOCK_M):
            grad_key, grad_value = _key_step(
                grad_key, grad_value, key, key_rows, value, value_rows, query_base, grad_base, stats_base,
                correction_base, bias_columns, spread, None, center, seed, flat_head, keys, first_key, visible, start,
                scale, keep_scale, threshold, stride_qs, stride_gs, stride_bq, query_length, key_length, D, BLOCK_D,
                BLOCK_M, BLOCK_N, IS_CAUSAL, START_AT_BIAS, False,
            )  # fmt: skip
        for i in tl.range(0, front_count + tail_count, num_stages=MASKED_STAGES):
            start = tl.where(i < front_count, front_start + i * BLOCK_M, full_end + (i - front_count) * BLOCK_M)
            grad_key, grad_value = _key_step(
                grad_key, grad_value, key, key_rows, value, value_rows, query_base, grad_base, stats_base,
                correction_base, bias_columns, spread, None, center, seed, flat_head, keys, first_key, visible, start,
                scale, keep_scale, threshold, stride_qs, stride_gs, stride_bq, query_length, key_length, D, BLOCK_D,
                BLOCK_M, BLOCK_N, IS_CAUSAL, START_AT_BIAS, True,
            )  # fmt: skip
    grad_key *= grad_scale
    if seed_ptr is not None:
        grad_value *= keep_scale
    if mask_ptr is not None:
        grad_key = tl.where(visible[:, None], grad_key, 0.0)
        grad_value = tl.where(visible[:, None], grad_value, 0.0)
    offset = (batch64 * stride_db + key_head64 * stride_dh + keys64 * stride_ds)[:, None] + dims[None, :]
    stored = (keys < key_length)[:, None] & (dims < D)[None, :]
    tl.store(grad_key_ptr + offset, grad_key.to(grad_key_ptr.dtype.element_ty), mask=stored)
    tl.store(grad_value_ptr + offset, grad_value.to(grad_value_ptr.dtype.element_ty), mask=stored)
