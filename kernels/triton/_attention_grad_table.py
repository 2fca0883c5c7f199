"""How does the gradient of T5's table run on a GPU? Tiles of scores that lie alike are added up before anything is sorted.

All tiles whose first pair has the same distance, the corner, have the same distances throughout. So one program recomputes dS
in such tiles, of many query tiles, and adds them up element by element. At its end it adds up the diagonals and sorts them into
buckets, once. Tiles with no pair closer than span have one bucket: _attention_grad_query.py sums them. It has the formulas.

A program's tiles and their order are fixed, so the result is bitwise repeatable.
"""

import triton
import triton.language as tl

from ._attention_relative import BY_QUERY, relative_tile, spread_row
from ._attention_tiles import dot_rows, exponential, in_units, keep_tile, load_tile, sequence_tile

_DIAGONALS = tl.constexpr(16)
_LEAST_TILES = 16  # of a program, so that its end costs little
_MOST_PROGRAMS = 2048  # each has a tile in memory


def corners(query_length, key_length, span, is_causal, packed, block_m, block_n):
    """(first, count): the corners of the tiles that this kernel sums are those of step * (first + n) - shift, n < count.
    `step` is the tile's shorter side, and `shift` the position of query 0."""
    step, shift = min(block_m, block_n), 0 if packed else key_length - query_length
    last_query = (query_length - 1) // block_m * block_m
    below = max(shift - span - block_n + 1, -last_query - 1)
    last = min(shift + span + block_m - 2, key_length - 1, shift + block_m - 1 if is_causal else key_length - 1)
    first = below // step + 1
    return first, max(0, last // step - first + 1)


def visits(batch, query_length, sequences, block_m, block_n):
    """How many query tiles a program may look at: those of the batch with a key tile at its corner, or all packed ones."""
    if sequences is not None:
        return query_length // block_m + sequences
    return batch * triton.cdiv(triton.cdiv(query_length, block_m), max(1, block_n // block_m))


def parts(heads, count, visits):
    """(parts, visits of each): how many programs share the query tiles of one head and one of `count` corners."""
    wanted = max(1, min(triton.cdiv(visits, _LEAST_TILES), _MOST_PROGRAMS // (heads * count)))
    chunk = triton.cdiv(visits, wanted)
    return triton.cdiv(visits, chunk), chunk


@triton.jit
def _allowed(live, visible, last, j, NATURAL: tl.constexpr):
    """(rows, columns): which pairs count. Of a live row those are the visible columns up to `last`.

    A row's limit and a column's place make one comparison for each pair: on Hopper an eighth fewer instructions than three
    truth values for each. On an MI300 a truth value takes two of 102 scalar registers, and 71 did not fit. In float32 the
    products need `visible` anyway, and places would be one thing more in registers.
    """
    if NATURAL:
        return live[:, None] & visible[None, :] & (j[None, :] <= last[:, None])
    else:
        place = tl.where(visible, j, j + 0x40000000)
        return place[None, :] <= tl.where(live, last, -1)[:, None]


@triton.jit
def _sum_by_bucket(tile, corner, buckets_ptr, span, M: tl.constexpr, N: tl.constexpr, BUCKETS: tl.constexpr):
    """(BUCKETS,): the sums of the tile (M, N) at this address, over the pairs of each bucket."""
    total = tl.zeros((BUCKETS,), tl.float32)
    rows = tl.arange(0, M)
    for at in tl.range(0, M + N, _DIAGONALS, num_stages=1):
        diagonals = at - (M - 1) + tl.arange(0, _DIAGONALS)
        columns = diagonals[None, :] + rows[:, None]
        inside = (columns >= 0) & (columns < N)
        sums = tl.sum(tl.load(tile + (rows * N)[:, None] + columns, mask=inside, other=0.0), 0)
        bucket = tl.load(buckets_ptr + span + tl.minimum(tl.maximum(corner + diagonals, -span), span))
        total += tl.sum(tl.where(bucket[:, None] == tl.arange(0, BUCKETS)[None, :], sums[:, None], 0.0), 0)
    return total


@triton.jit(
    do_not_specialize=[
        "threshold", "span", "center", "table_rows", "first_table_row", "first_corner", "count", "parts", "chunk", "visits",
        "query_length", "key_length", "sequences",
    ]
)  # fmt: skip
def grad_table_kernel(
    grad_out_ptr, query_ptr, key_ptr, value_ptr, stats_ptr, correction_ptr, mask_ptr, bias_ptr, spread_ptr, buckets_ptr,
    seed_ptr, cu_seqlens_ptr, tile_ptr, table_sum_ptr,
    scale, keep_scale, threshold, span, center, table_rows, first_table_row, first_corner, count, parts, chunk, visits,
    stride_stats, stride_gb, stride_gh, stride_gs, stride_qb, stride_qh, stride_qs, stride_kb, stride_kh, stride_ks,
    stride_vb, stride_vh, stride_vs, stride_bb, stride_bh, stride_bq, stride_bk,
    heads, query_length, key_length, sequences,
    D: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, GROUP: tl.constexpr,
    BUCKETS: tl.constexpr, IS_CAUSAL: tl.constexpr, START_AT_BIAS: tl.constexpr,
):  # fmt: skip
    """Grid (parts * count * heads). Each program makes `chunk` of the `visits` to query tiles and stores one row of sums, of a
    head's table_rows rows, from first_table_row on. `tile` holds a (BLOCK_M, BLOCK_N) tile for each program."""
    STEP: tl.constexpr = BLOCK_M if BLOCK_M < BLOCK_N else BLOCK_N
    EACH: tl.constexpr = BLOCK_N // STEP  # of so many query tiles, one has a tile of keys at this corner
    NATURAL: tl.constexpr = query_ptr.dtype.element_ty == tl.float32
    program = tl.program_id(0)
    part, head = program % parts, program // parts // count
    step = first_corner + program // parts % count
    head64, key_head = head.to(tl.int64), (head // GROUP).to(tl.int64)
    query_ptr += head64 * stride_qh
    grad_out_ptr += head64 * stride_gh
    key_ptr += key_head * stride_kh
    value_ptr += key_head * stride_vh
    seed = seed_ptr
    if seed_ptr is not None:
        seed = tl.load(seed_ptr)
    sequence_tiles = tl.cdiv(tl.cdiv(query_length, BLOCK_M), EACH)
    residue = ((EACH << 20) - step) % EACH
    i, j, dims = tl.arange(0, BLOCK_M), tl.arange(0, BLOCK_N), tl.arange(0, BLOCK_D)
    corner = step * STEP
    if cu_seqlens_ptr is None:
        corner -= key_length - query_length
    row = spread_row(spread_ptr, head, center, BY_QUERY)
    relative = relative_tile(row, corner, center, BLOCK_M, BLOCK_N, not NATURAL)
    ds_sum = tl.zeros((BLOCK_M, BLOCK_N), tl.float32)
    for n in range(part * chunk, tl.minimum(part * chunk + chunk, visits)):
        if cu_seqlens_ptr is not None:
            batch, tile, first_row, length = sequence_tile(cu_seqlens_ptr, sequences, n, BLOCK_M)
            tensor = first_row * 0
            end = length
            here = (tile % EACH == residue) & (length > 1)  # as in grad_query_kernel
        else:
            batch, tile = n // sequence_tiles, n % sequence_tiles * EACH + residue
            tensor, first_row = batch.to(tl.int64), tl.full((), 0, tl.int64)
            length, end = query_length, key_length
            here = tile >= 0
        first_key = tile * BLOCK_M + step * STEP  # a multiple of BLOCK_N here, so keys are all negative or none is
        queries, keys = tile * BLOCK_M + i, first_key + j
        live = (queries < length) & here & (first_key >= 0)
        visible = keys < end
        # A pair outside reads some other row, and its dS is thrown away.
        query_places = first_row + tl.minimum(queries, (query_length - 1 - first_row).to(tl.int32))
        key_places = first_row + tl.minimum(tl.maximum(keys, 0), (key_length - 1 - first_row).to(tl.int32))
        if mask_ptr is not None:
            visible = visible & (tl.load(mask_ptr + tensor * key_length + key_places) != 0)
        flat = (tensor * heads + head) * query_length + query_places
        stats = stats_ptr + 2 * ((tensor * heads + head) * stride_stats + query_places)
        lse, delta = tl.load(stats), tl.load(stats + 1)
        live = live & (lse != float("inf"))
        query_rows = query_ptr + tensor * stride_qb + query_places * stride_qs
        grad_rows = grad_out_ptr + tensor * stride_gb + query_places * stride_gs
        key_rows = key_ptr + tensor * stride_kb + key_places * stride_ks
        value_rows = value_ptr + tensor * stride_vb + key_places * stride_vs
        if NATURAL:
            s = dot_rows(query_rows, live, key_rows, visible, D, BLOCK_M, BLOCK_N)
            dp = dot_rows(grad_rows, live, value_rows, visible, D, BLOCK_M, BLOCK_N)
        else:
            query = load_tile(query_rows[:, None] + dims[None, :], live, dims, D, False)
            key = load_tile(key_rows[:, None] + dims[None, :], visible, dims, D, False)
            if START_AT_BIAS:
                s = tl.dot(query, tl.trans(key), relative)
            else:
                s = tl.dot(query, tl.trans(key))
            grad_out = load_tile(grad_rows[:, None] + dims[None, :], live, dims, D, False)
            value = load_tile(value_rows[:, None] + dims[None, :], visible, dims, D, False)
            dp = tl.dot(grad_out, tl.trans(value))
        s *= scale
        if not START_AT_BIAS:
            s += relative
        last = i - corner if IS_CAUSAL else tl.full((BLOCK_M,), BLOCK_N, tl.int32)
        allowed = _allowed(live, visible, last, j, NATURAL)
        if bias_ptr is not None:
            bias_rows = bias_ptr + tensor * stride_bb + head64 * stride_bh + query_places * stride_bq
            bias = tl.load(bias_rows[:, None] + key_places[None, :] * stride_bk)
            s += in_units(bias.to(tl.float32), NATURAL)
        p = exponential(s - lse[:, None], NATURAL)
        if correction_ptr is not None:
            p *= tl.load(correction_ptr + flat)[:, None]
        if seed_ptr is not None:
            flat_heads = batch * heads + head + tl.zeros_like(queries)
            keep = keep_tile(seed, flat_heads, queries, first_key, threshold, BLOCK_M, BLOCK_N)
            dp = tl.where(keep, dp * keep_scale, 0.0)
        ds_sum += tl.where(allowed, p * (dp - delta[:, None]), 0.0)
    tile_sum = tile_ptr + program.to(tl.int64) * (BLOCK_M * BLOCK_N)
    tl.store(tile_sum + (i * BLOCK_N)[:, None] + j[None, :], ds_sum)
    tl.debug_barrier()  # the diagonals are read by other threads
    table_sum = _sum_by_bucket(tile_sum, corner, buckets_ptr, span, BLOCK_M, BLOCK_N, BUCKETS)
    table_row = head64 * table_rows + first_table_row + program % (parts * count)
    tl.store(table_sum_ptr + table_row * BUCKETS + tl.arange(0, BUCKETS), table_sum)
