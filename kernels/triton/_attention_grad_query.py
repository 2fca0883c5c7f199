"""How do the gradients of query and the biases run on a GPU? One program per tile of queries recomputes the probabilities.

P are the probabilities, M is the dropout mask divided by 1 - p, and delta_i = sum_d dO_id O_id:
    dV = (P M)^T dO,   dP = (dO V^T) M,   dS = P (dP - delta),   dQ = scale dS K,   dK = scale dS^T Q,   dbias = dS
Only one program writes a row, so sums have a fixed order and the result is bitwise repeatable.
"""

import triton
import triton.language as tl

from ._attention_relative import BY_QUERY, far_biases, near_tiles, relative_tile, spread_row
from ._attention_tiles import (
    MASKED_STAGES,
    dot_rows,
    exponential,
    in_units,
    keep_tile,
    key_tiles,
    load_tile,
    sequence_tile,
)
from ._dot import add_product

# A larger log-sum-exp is rounded so much that half precision's P, which has no correction, may be off by a fifth.
_LARGEST_LSE = tl.constexpr(2.0**20)


@triton.jit
def _pairs(
    query, query_rows, grad_out, grad_rows, lse,
    key_ptr, value_ptr,
    mask_row, bias_rows, spread, far,
    center, seed, flat_heads, queries, first_query, live, start, scale, keep_scale, threshold,
    stride_ks, stride_vs, stride_bk,
    query_length, key_length,
    D: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr,
    START_AT_BIAS: tl.constexpr, MASKED: tl.constexpr,
):  # fmt: skip
    """(P, dP, keys, which keys are visible) of one tile. P of hidden pairs may be anything. `spread` and `far` are those of the
    forward."""
    NATURAL: tl.constexpr = query is None
    NEAR: tl.constexpr = spread is not None and far is None
    keys = start + tl.arange(0, BLOCK_N)
    dims = tl.arange(0, BLOCK_D)
    visible = keys < key_length
    if MASKED and mask_row is not None:
        visible = visible & (tl.load(mask_row + keys, mask=visible, other=0) != 0)
    key_rows = keys.to(tl.int64)[:, None]
    key = load_tile(key_ptr + key_rows * stride_ks + dims[None, :], visible, dims, D, MASKED)
    corner = start - first_query - (key_length - query_length)
    if NATURAL:
        s = dot_rows(query_rows, live, key_ptr + keys.to(tl.int64) * stride_ks, visible, D, BLOCK_M, BLOCK_N)
    elif NEAR and START_AT_BIAS:
        s = tl.dot(query, tl.trans(key), relative_tile(spread, corner, center, BLOCK_M, BLOCK_N, True))
    else:
        s = tl.dot(query, tl.trans(key))
    s *= scale
    tile_mask = live[:, None]
    if MASKED:
        tile_mask = tile_mask & visible[None, :]
    if bias_rows is not None:
        bias = tl.load(bias_rows[:, None] + keys.to(tl.int64)[None, :] * stride_bk, mask=tile_mask, other=0.0)
        s += in_units(bias.to(tl.float32), NATURAL)
    less = lse
    if far is not None:
        less = lse - far
    elif NEAR and not START_AT_BIAS:
        s += relative_tile(spread, corner, center, BLOCK_M, BLOCK_N, not NATURAL)
    p = exponential(s - less[:, None], NATURAL)  # lse is +inf in a row that sees nothing
    if NATURAL:
        dp = dot_rows(grad_rows, live, value_ptr + keys.to(tl.int64) * stride_vs, visible, D, BLOCK_M, BLOCK_N)
    else:
        value = load_tile(value_ptr + key_rows * stride_vs + dims[None, :], visible, dims, D, MASKED)
        dp = tl.dot(grad_out, tl.trans(value))
    if seed is not None:
        dp = tl.where(keep_tile(seed, flat_heads, queries, start, threshold, BLOCK_M, BLOCK_N), dp * keep_scale, 0.0)
    return p, dp, key, visible


@triton.jit
def _allowed(visible, queries, start, query_length, key_length, BLOCK_N: tl.constexpr, IS_CAUSAL: tl.constexpr):
    allowed = visible[None, :]
    if IS_CAUSAL:
        keys = start + tl.arange(0, BLOCK_N)
        allowed = allowed & (keys[None, :] <= queries[:, None] + (key_length - query_length))
    return allowed


@triton.jit
def _query_step(
    grad_query, row_sum, before_sum, after_sum, query, query_rows, grad_out, grad_rows, lse, delta,
    key_ptr, value_ptr,
    mask_row, bias_rows, grad_bias_rows, spread, far,
    buckets_ptr,
    span, center, seed, flat_heads, queries, first_query, live, start, scale, keep_scale, threshold,
    stride_ks, stride_vs, stride_bk,
    query_length, key_length,
    D: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, IS_CAUSAL: tl.constexpr,
    START_AT_BIAS: tl.constexpr, MASKED: tl.constexpr,
):  # fmt: skip
    """Adds one tile of keys. before_sum and after_sum are each row's sum of dS over the tiles beyond span."""
    NATURAL: tl.constexpr = query is None
    p, dp, key, visible = _pairs(
        query, query_rows, grad_out, grad_rows, lse, key_ptr, value_ptr, mask_row, bias_rows, spread, far, center, seed,
        flat_heads, queries, first_query, live, start, scale, keep_scale, threshold, stride_ks, stride_vs, stride_bk,
        query_length, key_length, D, BLOCK_D, BLOCK_M, BLOCK_N, START_AT_BIAS, MASKED,
    )  # fmt: skip
    ds = p * (dp - delta[:, None])
    if MASKED:
        allowed = _allowed(visible, queries, start, query_length, key_length, BLOCK_N, IS_CAUSAL)
        p = tl.where(allowed, p, 0.0)
        ds = tl.where(allowed, ds, 0.0)
    if NATURAL:
        row_sum += tl.sum(p, 1)
    if grad_bias_rows is not None:
        keys = start + tl.arange(0, BLOCK_N)
        tile_mask = live[:, None]
        if MASKED:
            tile_mask = tile_mask & visible[None, :]
        tl.store(grad_bias_rows[:, None] + keys[None, :], ds.to(key.dtype), mask=tile_mask)
    if buckets_ptr is not None and (MASKED or far is not None):
        corner = start - first_query - (key_length - query_length)
        sums = tl.sum(ds, 1)
        before_sum += tl.where(corner + BLOCK_N - 1 <= -span, sums, 0.0)
        after_sum += tl.where(corner - (BLOCK_M - 1) >= span, sums, 0.0)
    grad_query = add_product(grad_query, ds.to(key.dtype), key)
    return grad_query, row_sum, before_sum, after_sum


@triton.jit(do_not_specialize=["threshold", "span", "center", "table_rows", "query_length", "key_length", "sequences"])
def grad_query_kernel(
    grad_out_ptr, query_ptr, key_ptr, value_ptr, out_ptr, lse_ptr, mask_ptr, bias_ptr, spread_ptr, buckets_ptr,
    seed_ptr, cu_seqlens_ptr, grad_query_ptr, stats_ptr, correction_ptr, grad_bias_ptr, table_sum_ptr,
    grad_scale, scale, keep_scale, threshold, span, center, table_rows,
    stride_stats, stride_gb, stride_gh, stride_gs, stride_qb, stride_qh, stride_qs, stride_kb, stride_kh, stride_ks,
    stride_vb, stride_vh, stride_vs, stride_ob, stride_oh, stride_os, stride_bb, stride_bh, stride_bq, stride_bk,
    heads, query_length, key_length, sequences,
    D: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, GROUP: tl.constexpr,
    BUCKETS: tl.constexpr, IS_CAUSAL: tl.constexpr, START_AT_BIAS: tl.constexpr, FEW: tl.constexpr,
):  # fmt: skip
    """Grid (query tiles * B * heads), with cu_seqlens as in forward_kernel. Writes grad_query, the gradients of the biases,
    and correction and stats for the other kernels. stats are a row's log-sum-exp, in the scores' units, and delta. A head has
    stride_stats rows of them. grad_query has the strides of out. FEW is how many keys are few, or 0.

    Of the gradient of T5's table this kernel sums the tiles beyond span, in which a side's pairs share one bucket. Each program
    stores one (BUCKETS,) row, of a head's table_rows rows. _attention_grad_table.py has the other tiles.

    correction (float32 inputs only) is 1 over the sum of a row's recomputed probabilities. lse is rounded to float32, so
    all probabilities of a row are off in the same direction, by half a unit in lse's last place.
    """
    tiles = tl.cdiv(query_length, BLOCK_M)
    program = tl.program_id(0)
    # As in forward_kernel, late query tiles start first.
    if cu_seqlens_ptr is not None:
        total = query_length
        tiles = total // BLOCK_M + sequences
        slot = tiles - 1 - program % tiles
        head = program // tiles
        batch, tile, row, query_length = sequence_tile(cu_seqlens_ptr, sequences, slot, BLOCK_M)
        if tile * BLOCK_M >= query_length:
            return
        key_length = query_length
    else:
        tile = tiles - 1 - program % tiles
        batch, head = program // tiles // heads, program // tiles % heads
        slot = tile
    first_query = tile * BLOCK_M
    queries = first_query + tl.arange(0, BLOCK_M)
    live = queries < query_length
    dims = tl.arange(0, BLOCK_D)
    batch64, head64, queries64 = batch.to(tl.int64), head.to(tl.int64), queries.to(tl.int64)
    if cu_seqlens_ptr is not None:
        query_ptr += row * stride_qs
        key_ptr += row * stride_ks
        value_ptr += row * stride_vs
        grad_out_ptr += row * stride_gs
        out_ptr += row * stride_os
        grad_query_ptr += row * stride_os
        batch64 = row * 0  # the tensors have B = 1; only dropout counts the sequence as the batch
        # A softmax over one key is constant, so its gradient is exactly zero. dP - delta would leave a rounding error.
        grad_scale = tl.where(query_length == 1, 0.0, grad_scale)

    NATURAL: tl.constexpr = query_ptr.dtype.element_ty == tl.float32
    query_rows = query_ptr + batch64 * stride_qb + head64 * stride_qh + queries64 * stride_qs
    grad_rows = grad_out_ptr + batch64 * stride_gb + head64 * stride_gh + queries64 * stride_gs
    grad_out = load_tile(grad_rows[:, None] + dims[None, :], live, dims, D, True)
    out_offset = batch64 * stride_ob + head64 * stride_oh + queries64 * stride_os
    out = load_tile((out_ptr + out_offset)[:, None] + dims[None, :], live, dims, D, True)
    delta = tl.sum(out.to(tl.float32) * grad_out.to(tl.float32), 1)
    if cu_seqlens_ptr is not None:
        flat = row + head64 * total + queries
        stats_ptr += 2 * row
    else:
        flat = (batch64 * heads + head64) * query_length + queries
    lse = tl.load(lse_ptr + flat, mask=live, other=float("inf"))
    if not NATURAL:
        lse = tl.where(tl.abs(lse) > _LARGEST_LSE, float("inf"), lse)  # no gradient, rather than a wild one
    lse = in_units(lse, NATURAL)
    stats = stats_ptr + 2 * ((batch64 * heads + head64) * stride_stats + queries)
    tl.store(stats, lse, mask=live)
    query = None
    if NATURAL:
        grad_out = None  # dot_rows reads it and query in pieces
    else:
        query = load_tile(query_rows[:, None] + dims[None, :], live, dims, D, True)

    key_head = (head // GROUP).to(tl.int64)
    key_ptr += batch64 * stride_kb + key_head * stride_kh
    value_ptr += batch64 * stride_vb + key_head * stride_vh
    mask_row = mask_ptr
    if mask_ptr is not None:
        mask_row = mask_ptr + batch64 * key_length
    bias_rows = bias_ptr
    if bias_ptr is not None:
        bias_rows = bias_ptr + batch64 * stride_bb + head64 * stride_bh + queries64 * stride_bq
    grad_bias_rows = grad_bias_ptr
    if grad_bias_ptr is not None:
        grad_bias_rows = grad_bias_ptr + flat * key_length
    spread = spread_ptr
    if spread_ptr is not None:
        spread = spread_row(spread_ptr, head, center, BY_QUERY)
    seed = seed_ptr
    if seed_ptr is not None:
        seed = tl.load(seed_ptr)
    flat_heads = batch * heads + head + tl.zeros_like(queries)

    full_start, full_end, front_start, front_count, tail_start, tail_count, seen = key_tiles(
        mask_row,
        first_query,
        first_query + BLOCK_M - 1,
        0,
        key_length,
        query_length,
        key_length,
        IS_CAUSAL,
        BLOCK_N,
    )
    if FEW > 0:  # noqa: SIM102 - FEW is known to the compiler
        # Where a row looks at one key nearly alone, dP - delta cancels. What is left shows that an output in half precision is
        # rounded, and delta with it. If the tile's first row sees few keys, delta is the sum of P dP in place of that. Narrow
        # tiles leave registers to the loops below.
        if seen <= FEW:
            HALF: tl.constexpr = BLOCK_N // 2 if BLOCK_N > 16 else 16
            dp_sum = tl.zeros((BLOCK_M,), tl.float32)
            p_sum = tl.zeros((BLOCK_M,), tl.float32)
            first = full_start - front_count * BLOCK_N
            for start in tl.range(first, full_end + tail_count * BLOCK_N, HALF, num_stages=2):
                p, dp, _, visible = _pairs(
                    query, query_rows, grad_out, grad_rows, lse, key_ptr, value_ptr, mask_row, bias_rows, spread, None,
                    center, seed, flat_heads, queries, first_query, live, start, scale, keep_scale, threshold, stride_ks,
                    stride_vs, stride_bk, query_length, key_length, D, BLOCK_D, BLOCK_M, HALF, START_AT_BIAS, True,
                )  # fmt: skip
                allowed = _allowed(visible, queries, start, query_length, key_length, HALF, IS_CAUSAL)
                dp_sum += tl.sum(tl.where(allowed, p * dp, 0.0), 1)
                p_sum += tl.sum(tl.where(allowed, p, 0.0), 1)
            delta = dp_sum / tl.where(p_sum == 0.0, 1.0, p_sum)
    tl.store(stats + 1, delta, mask=live)
    grad_query = tl.zeros((BLOCK_M, BLOCK_D), tl.float32)
    row_sum = tl.zeros((BLOCK_M,), tl.float32)
    before_sum = tl.zeros((BLOCK_M,), tl.float32)
    after_sum = tl.zeros((BLOCK_M,), tl.float32)
    near_start, near_end = full_start, full_end
    if spread_ptr is not None:
        first = first_query + (key_length - query_length)
        near_start, near_end = near_tiles(full_start, full_end, first, first + BLOCK_M - 1, span, BLOCK_N)
        before = (near_start - full_start) // BLOCK_N
        far_before, far_after = far_biases(spread, span, center, scale, START_AT_BIAS)
        for i in range(before + (full_end - near_end) // BLOCK_N):
            start = tl.where(i < before, full_start + i * BLOCK_N, near_end + (i - before) * BLOCK_N)
            far = tl.where(i < before, far_before, far_after)
            grad_query, row_sum, before_sum, after_sum = _query_step(
                grad_query, row_sum, before_sum, after_sum, query, query_rows, grad_out, grad_rows, lse, delta, key_ptr,
                value_ptr, mask_row, bias_rows, grad_bias_rows, spread, far, buckets_ptr, span, center, seed, flat_heads,
                queries, first_query, live, start, scale, keep_scale, threshold, stride_ks, stride_vs, stride_bk,
                query_length, key_length, D, BLOCK_D, BLOCK_M, BLOCK_N, IS_CAUSAL, START_AT_BIAS, False,
            )  # fmt: skip
    for start in range(near_start, near_end, BLOCK_N):
        grad_query, row_sum, before_sum, after_sum = _query_step(
            grad_query, row_sum, before_sum, after_sum, query, query_rows, grad_out, grad_rows, lse, delta, key_ptr,
            value_ptr, mask_row, bias_rows, grad_bias_rows, spread, None, buckets_ptr, span, center, seed, flat_heads,
            queries, first_query, live, start, scale, keep_scale, threshold, stride_ks, stride_vs, stride_bk,
            query_length, key_length, D, BLOCK_D, BLOCK_M, BLOCK_N, IS_CAUSAL, START_AT_BIAS, False,
        )  # fmt: skip
    for i in tl.range(0, front_count + tail_count, num_stages=MASKED_STAGES):
        start = tl.where(i < front_count, front_start + i * BLOCK_N, tail_start + (i - front_count) * BLOCK_N)
        grad_query, row_sum, before_sum, after_sum = _query_step(
            grad_query, row_sum, before_sum, after_sum, query, query_rows, grad_out, grad_rows, lse, delta, key_ptr,
            value_ptr, mask_row, bias_rows, grad_bias_rows, spread, None, buckets_ptr, span, center, seed, flat_heads,
            queries, first_query, live, start, scale, keep_scale, threshold, stride_ks, stride_vs, stride_bk,
            query_length, key_length, D, BLOCK_D, BLOCK_M, BLOCK_N, IS_CAUSAL, START_AT_BIAS, True,
        )  # fmt: skip
    if buckets_ptr is not None:
        bucket = tl.arange(0, BUCKETS)
        table_sum = tl.where(bucket == tl.load(buckets_ptr), tl.sum(before_sum, 0), 0.0)
        table_sum += tl.where(bucket == tl.load(buckets_ptr + 2 * span), tl.sum(after_sum, 0), 0.0)
        if cu_seqlens_ptr is not None:
            table_sum = tl.where(query_length == 1, 0.0, table_sum)
            table_row = head64 * table_rows + slot
        else:
            table_row = head64 * table_rows + batch * tiles + slot
        tl.store(table_sum_ptr + table_row * BUCKETS + bucket, table_sum)
    if correction_ptr is not None:
        correction = tl.where(row_sum == 0.0, 0.0, 1.0 / tl.where(row_sum == 0.0, 1.0, row_sum))
        tl.store(correction_ptr + flat, correction, mask=live)
        grad_query *= correction[:, None]
    grad_query *= grad_scale
    tl.store(
        (grad_query_ptr + out_offset)[:, None] + dims[None, :],
        grad_query.to(grad_query_ptr.dtype.element_ty),
        mask=live[:, None] & (dims < D)[None, :],
    )
