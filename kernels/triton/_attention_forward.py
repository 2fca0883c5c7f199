"""How does attention's forward run on a GPU? In one pass over the keys with a running maximum and sum (FlashAttention-2)."""

import triton
import triton.language as tl

from ._attention_relative import BY_QUERY, far_biases, near_tiles, relative_rows, relative_tile, spread_row
from ._attention_tiles import (
    LN2,
    dot_rows,
    exponential,
    in_units,
    keep_tile,
    key_tiles,
    load_tile,
    sequence_tile,
)
from ._dot import add_product


@triton.jit
def _near_bias(
    spread, corner, queries, first_query, center,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, PACKED: tl.constexpr, FRAGMENTS: tl.constexpr,
):  # fmt: skip
    if PACKED:
        return relative_rows(spread, corner, queries, center, BLOCK_M, BLOCK_N)
    else:
        return relative_tile(spread, corner - first_query, center, BLOCK_M, BLOCK_N, FRAGMENTS)


@triton.jit
def _step(
    acc, row_sum, row_max, query, query_rows,
    key_ptr, value_ptr,
    mask_row, bias_rows, spread, far, center, seed, flat_heads, queries, first_query, live, start, scale, threshold,
    stride_ks, stride_vs, stride_bk,
    query_length, key_length,
    D: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, IS_CAUSAL: tl.constexpr,
    SCALE_FIRST: tl.constexpr, PACKED: tl.constexpr, START_AT_BIAS: tl.constexpr, MASKED: tl.constexpr,
):  # fmt: skip
    """Folds one tile of keys into the running output. Without MASKED every query sees every key of the tile. With `far` all
    pairs of a row have this relative bias, else they have that of `spread`, if there is one."""
    NATURAL: tl.constexpr = query is None
    FAR: tl.constexpr = far is not None
    NEAR: tl.constexpr = spread is not None and far is None
    SCALE_NOW: tl.constexpr = SCALE_FIRST or (NEAR and not START_AT_BIAS)
    keys = start + tl.arange(0, BLOCK_N)
    dims = tl.arange(0, BLOCK_D)
    visible = keys < key_length
    if MASKED and mask_row is not None:
        visible = visible & (tl.load(mask_row + keys, mask=visible, other=0) != 0)
    key_rows = keys.to(tl.int64)[:, None]
    corner = start - (key_length - query_length)
    if NATURAL:
        s = dot_rows(query_rows, live, key_ptr + keys.to(tl.int64) * stride_ks, visible, D, BLOCK_M, BLOCK_N)
    else:
        key = load_tile(key_ptr + key_rows * stride_ks + dims[None, :], visible, dims, D, MASKED)
        if NEAR and START_AT_BIAS:
            near = _near_bias(spread, corner, queries, first_query, center, BLOCK_M, BLOCK_N, PACKED, True)
            s = tl.dot(query, tl.trans(key), near)
        else:
            s = tl.dot(query, tl.trans(key))
    if SCALE_NOW:
        s = s * scale
    if bias_rows is not None:
        bias_mask = live[:, None]
        if MASKED:
            bias_mask = bias_mask & visible[None, :]
        bias = tl.load(bias_rows[:, None] + keys.to(tl.int64)[None, :] * stride_bk, mask=bias_mask, other=0.0)
        s += in_units(bias.to(tl.float32), NATURAL)
    if NEAR and not START_AT_BIAS:
        s += _near_bias(spread, corner, queries, first_query, center, BLOCK_M, BLOCK_N, PACKED, not NATURAL)
    if MASKED:
        allowed = visible[None, :]
        if IS_CAUSAL:
            allowed = allowed & (keys[None, :] <= queries[:, None] + (key_length - query_length))
        s = tl.where(allowed, s, -float("inf"))
    # With a positive scale the maximum may be taken before scaling. Then scaling is part of a multiply-add. A bias that all of
    # a row's pairs share is part of the row's shift.
    peak = tl.max(s, 1)
    if not SCALE_NOW:
        peak = peak * scale
    if FAR:
        peak += far
    new_max = tl.maximum(row_max, peak)
    shift = new_max
    if MASKED or bias_rows is not None:
        shift = tl.where(new_max == -float("inf"), 0.0, new_max)  # nothing seen yet: exp(-inf - 0) is 0, not NaN
    less = shift
    if FAR:
        less = shift - far
    if SCALE_NOW:
        p = exponential(s - less[:, None], NATURAL)
    else:
        p = exponential(s * scale - less[:, None], NATURAL)
    alpha = exponential(row_max - shift, NATURAL)
    row_sum = row_sum * alpha + tl.sum(p, 1)
    if seed is not None:
        p = tl.where(keep_tile(seed, flat_heads, queries, start, threshold, BLOCK_M, BLOCK_N), p, 0.0)
    value = load_tile(value_ptr + key_rows * stride_vs + dims[None, :], visible, dims, D, MASKED)
    p = p.to(value.dtype)
    acc = add_product(acc * alpha[:, None], p, value)
    return acc, row_sum, new_max


@triton.jit(
    do_not_specialize=["threshold", "span", "center", "stride_lc", "query_length", "key_length", "sequences", "chunk"]
)
def forward_kernel(
    query_ptr, key_ptr, value_ptr, out_ptr, lse_ptr, mask_ptr, bias_ptr, spread_ptr, seed_ptr, cu_seqlens_ptr,
    scale, keep_scale, threshold, span, center,
    stride_qb, stride_qh, stride_qs, stride_kb, stride_kh, stride_ks, stride_vb, stride_vh, stride_vs,
    stride_oc, stride_ob, stride_oh, stride_os, stride_bb, stride_bh, stride_bq, stride_bk, stride_lc,
    heads, query_length, key_length, sequences, chunk,
    D: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, GROUP: tl.constexpr,
    IS_CAUSAL: tl.constexpr, SCALE_FIRST: tl.constexpr, PACKED: tl.constexpr, START_AT_BIAS: tl.constexpr,
    MASKED_STAGES: tl.constexpr,
):  # fmt: skip
    """Grid (query tiles * B * heads, chunks of keys). Chunk c writes its own normalised output and log-sum-exp at
    c * stride_oc and c * stride_lc.

    With cu_seqlens the grid is ((T // BLOCK_M + sequences) * heads, 1). query_length and key_length are both T, and lse is
    (1, heads, T). A program moves the pointers to its sequence's first row and goes on as in a batch of that length.

    PACKED: a tile's rows are the queries of all heads that share a key head, so keys are read once for the whole group.
    PACKED and cu_seqlens never come together.
    """
    PACK: tl.constexpr = GROUP if PACKED else 1
    tiles = tl.cdiv(query_length * PACK, BLOCK_M)
    program = tl.program_id(0)
    # Under a causal mask late query tiles have the most keys. They start first, so the last wave is short.
    if cu_seqlens_ptr is not None:
        total = query_length
        slots = total // BLOCK_M + sequences
        head_set = program // slots
        batch, tile, row, query_length = sequence_tile(cu_seqlens_ptr, sequences, slots - 1 - program % slots, BLOCK_M)
        if tile * BLOCK_M >= query_length:
            return
        key_length = query_length
    else:
        tile = tiles - 1 - program % tiles
        head_sets = heads // PACK
        batch = program // tiles // head_sets
        head_set = program // tiles % head_sets
    rows = tile * BLOCK_M + tl.arange(0, BLOCK_M)
    if PACKED:
        live = rows < query_length * GROUP
        queries = rows % query_length
        head = head_set * GROUP + rows // query_length
        key_head = head_set
        first_query = 0
        last_query = query_length - 1
    else:
        live = rows < query_length
        queries = rows
        head = head_set + tl.zeros_like(rows)
        key_head = head_set // GROUP
        first_query = tile * BLOCK_M
        last_query = first_query + BLOCK_M - 1
    dims = tl.arange(0, BLOCK_D)
    batch64, head64, queries64 = batch.to(tl.int64), head.to(tl.int64), queries.to(tl.int64)
    if cu_seqlens_ptr is not None:
        query_ptr += row * stride_qs
        key_ptr += row * stride_ks
        value_ptr += row * stride_vs
        out_ptr += row * stride_os
        batch64 = row * 0  # the tensors have B = 1; only dropout counts the sequence as the batch

    query_rows = query_ptr + batch64 * stride_qb + head64 * stride_qh + queries64 * stride_qs
    NATURAL: tl.constexpr = query_ptr.dtype.element_ty == tl.float32
    query = None
    if not NATURAL:
        query = load_tile(query_rows[:, None] + dims[None, :], live, dims, D, True)
    key_ptr += batch64 * stride_kb + key_head.to(tl.int64) * stride_kh
    value_ptr += batch64 * stride_vb + key_head.to(tl.int64) * stride_vh
    mask_row = mask_ptr
    if mask_ptr is not None:
        mask_row = mask_ptr + batch64 * key_length
    bias_rows = bias_ptr
    if bias_ptr is not None:
        bias_rows = bias_ptr + batch64 * stride_bb + head64 * stride_bh + queries64 * stride_bq
    spread = spread_ptr
    if spread_ptr is not None:
        if PACKED:
            spread = spread_row(spread_ptr, head, center, BY_QUERY)
        else:
            spread = spread_row(spread_ptr, head_set, center, BY_QUERY)
    seed = seed_ptr
    if seed_ptr is not None:
        seed = tl.load(seed_ptr)
    flat_heads = batch * heads + head

    part = tl.program_id(1)
    full_start, full_end, front_start, front_count, tail_start, tail_count, _ = key_tiles(
        mask_row,
        first_query,
        last_query,
        part * chunk,
        part * chunk + chunk,
        query_length,
        key_length,
        IS_CAUSAL,
        BLOCK_N,
    )
    acc = tl.zeros((BLOCK_M, BLOCK_D), tl.float32)
    row_sum = tl.zeros((BLOCK_M,), tl.float32)
    row_max = tl.full((BLOCK_M,), -float("inf"), tl.float32)
    near_start, near_end = full_start, full_end
    if spread_ptr is not None:
        shift = key_length - query_length
        near_start, near_end = near_tiles(full_start, full_end, first_query + shift, last_query + shift, span, BLOCK_N)
        before = (near_start - full_start) // BLOCK_N
        far_before, far_after = far_biases(spread, span, center, scale, START_AT_BIAS)
        for i in range(before + (full_end - near_end) // BLOCK_N):
            start = tl.where(i < before, full_start + i * BLOCK_N, near_end + (i - before) * BLOCK_N)
            far = tl.where(i < before, far_before, far_after)
            acc, row_sum, row_max = _step(
                acc, row_sum, row_max, query, query_rows, key_ptr, value_ptr, mask_row, bias_rows, spread, far, center,
                seed, flat_heads, queries, first_query, live, start, scale, threshold, stride_ks, stride_vs, stride_bk,
                query_length, key_length, D, BLOCK_D, BLOCK_M, BLOCK_N, IS_CAUSAL, SCALE_FIRST, PACKED, START_AT_BIAS,
                False,
            )  # fmt: skip
    for start in range(near_start, near_end, BLOCK_N):
        acc, row_sum, row_max = _step(
            acc, row_sum, row_max, query, query_rows, key_ptr, value_ptr, mask_row, bias_rows, spread, None, center,
            seed, flat_heads, queries, first_query, live, start, scale, threshold, stride_ks, stride_vs, stride_bk,
            query_length, key_length, D, BLOCK_D, BLOCK_M, BLOCK_N, IS_CAUSAL, SCALE_FIRST, PACKED, START_AT_BIAS,
                False,
        )  # fmt: skip
    for i in tl.range(0, front_count + tail_count, num_stages=MASKED_STAGES):
        start = tl.where(i < front_count, front_start + i * BLOCK_N, tail_start + (i - front_count) * BLOCK_N)
        acc, row_sum, row_max = _step(
            acc, row_sum, row_max, query, query_rows, key_ptr, value_ptr, mask_row, bias_rows, spread, None, center,
            seed, flat_heads, queries, first_query, live, start, scale, threshold, stride_ks, stride_vs, stride_bk,
            query_length, key_length, D, BLOCK_D, BLOCK_M, BLOCK_N, IS_CAUSAL, SCALE_FIRST, PACKED, START_AT_BIAS, True,
        )  # fmt: skip

    dead = row_sum == 0.0
    row_sum = tl.where(dead, 1.0, row_sum)
    out = acc * (keep_scale / row_sum)[:, None]
    out_rows = (
        out_ptr + part.to(tl.int64) * stride_oc + batch64 * stride_ob + head64 * stride_oh + queries64 * stride_os
    )
    out_mask = live[:, None] & (dims < D)[None, :]
    tl.store(out_rows[:, None] + dims[None, :], out.to(out_ptr.dtype.element_ty), mask=out_mask)
    if lse_ptr is not None:
        if not NATURAL:
            row_max = row_max * LN2
        lse = tl.where(dead, float("inf"), row_max + tl.log(row_sum))
        if cu_seqlens_ptr is not None:
            lse_rows = lse_ptr + row + head64 * total + queries
        else:
            lse_rows = lse_ptr + part.to(tl.int64) * stride_lc + flat_heads.to(tl.int64) * query_length + queries
        tl.store(lse_rows, lse, mask=live)


@triton.jit(do_not_specialize=["rows", "query_length", "chunks"])
def combine_kernel(
    part_ptr, part_lse_ptr, out_ptr, lse_ptr,
    stride_ob, stride_oh, stride_os,
    rows, heads, query_length, chunks,
    D: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_C: tl.constexpr,
):  # fmt: skip
    """Adds up the chunks of one query in a fixed order, weighted by their sums. One program per (batch, head, query)."""
    row = tl.program_id(0)
    row64 = row.to(tl.int64)
    parts, dims = tl.arange(0, BLOCK_C), tl.arange(0, BLOCK_D)
    lse = tl.load(part_lse_ptr + parts.to(tl.int64) * rows + row64, mask=parts < chunks, other=float("inf"))
    lse = tl.where(lse == float("inf"), -float("inf"), lse)  # +inf marks a chunk in which the query sees no key
    peak = tl.max(lse, 0)
    weight = tl.exp(lse - tl.where(peak == -float("inf"), 0.0, peak))
    total = tl.sum(weight, 0)
    dead = total == 0.0  # not by the peak: a maximum may drop NaN
    total = tl.where(dead, 1.0, total)
    tile = (parts.to(tl.int64) * rows + row64)[:, None] * D + dims[None, :]
    part = tl.load(part_ptr + tile, mask=(parts < chunks)[:, None] & (dims < D)[None, :], other=0.0)
    out = tl.sum(part * weight[:, None], 0) / total
    batch, head, i = row64 // query_length // heads, row64 // query_length % heads, row64 % query_length
    out_row = out_ptr + batch * stride_ob + head * stride_oh + i * stride_os
    tl.store(out_row + dims, out.to(out_ptr.dtype.element_ty), mask=dims < D)
    if lse_ptr is not None:
        tl.store(lse_ptr + row64, tl.where(dead, float("inf"), peak + tl.log(total)))
