"""How does T5's bias reach the scores? Each head's bias lies ordered by distance, so a tile of it is a plain load.

spread_kernel() writes, once a call, the bias of every distance as float32. Row i, column j of a tile of
scores has distance corner + j - i, so a thread reads its neighbouring columns from neighbouring addresses. A load of two
numbers needs an even address, and i moves it by one. So there are two copies, the second shifted by one number, and a row reads
the copy in which its address is even. Scores of (keys, queries) read two more copies, by negated distance.

The matrix unit adds up scores from their bias on (START_AT_BIAS), which costs nothing. The bias is divided by the scale then.

The copies reach further than the last bucket's distance, by a tile at both ends. A tile beyond is moved to that end, where all
distances have one bias; no element's distance needs to be clamped.
"""

import triton
import triton.language as tl

COPIES = tl.constexpr(4)
BY_QUERY = tl.constexpr(0)  # the first copy for scores of (queries, keys)
BY_KEY = tl.constexpr(2)  # the first copy for scores of (keys, queries)


def center(span, *sides):
    """The place of distance 0 in a copy of 2 * center numbers, for tiles whose sides are at most the sum of `sides`."""
    return -(-(span + sum(sides)) // 16) * 16


@triton.jit(do_not_specialize=["span", "center"])
def spread_kernel(
    table_ptr, buckets_ptr, out_ptr, unit, span, center, stride_bucket, stride_head,
    BLOCK: tl.constexpr,
):  # fmt: skip
    """Grid (H * COPIES, blocks). out (H, COPIES, 2 * center): number k has distance k - center, or one more in odd copies."""
    head, copy = tl.program_id(0) // COPIES, tl.program_id(0) % COPIES
    k = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    distance = k + copy % 2 - center
    distance = tl.where(copy < BY_KEY, distance, -distance)
    bucket = tl.load(buckets_ptr + span + tl.minimum(tl.maximum(distance, -span), span))
    bias = tl.load(table_ptr + bucket * stride_bucket + head * stride_head).to(tl.float32)
    tl.store(out_ptr + tl.program_id(0) * (2 * center) + k, bias * unit, mask=k < 2 * center)


@triton.jit
def spread_row(spread_ptr, head, center, FIRST: tl.constexpr):
    """The address of the copy FIRST of a head. `head` may be a vector."""
    return spread_ptr + (head * COPIES + FIRST) * (2 * center)


@triton.jit
def _inside(corner, center, ROWS: tl.constexpr, COLUMNS: tl.constexpr):
    """The corner, or that of the nearest tile inside a copy."""
    return tl.minimum(tl.maximum(corner, ROWS - center), center - COLUMNS)


@triton.jit
def relative_tile(row, corner, center, ROWS: tl.constexpr, COLUMNS: tl.constexpr, FRAGMENTS: tl.constexpr):
    """(ROWS, COLUMNS): element (i, j) is the bias of distance corner + j - i. `row` comes from spread_row().

    With FRAGMENTS the dimensions are split as NVIDIA's matrix instructions lay scores out: warps, halves, 8 rows; 8 columns as
    4 times 2. The compiler gives the first dimensions of the load to threads, so a thread loads what it adds.
    """
    first = _inside(corner, center, ROWS, COLUMNS) + center
    if FRAGMENTS:
        t, g, w = tl.arange(0, 4), tl.arange(0, 8), tl.arange(0, ROWS // 16)
        half, n, b = tl.arange(0, 2), tl.arange(0, COLUMNS // 8), tl.arange(0, 2)
        place = (first - g) % 2 * (2 * center) + (first - g) // 2 * 2
        thread = (2 * t)[:, None, None, None, None, None] + place[None, :, None, None, None, None]
        thread -= (16 * w)[None, None, :, None, None, None]
        register = (8 * n)[None, None, None, None, :, None] - (8 * half)[None, None, None, :, None, None]
        register += b[None, None, None, None, None, :]
        tile = tl.load(row + thread + register)
        return tl.reshape(tl.permute(tile, (2, 3, 1, 4, 0, 5)), (ROWS, COLUMNS))
    else:
        return tl.load(row + first + (tl.arange(0, COLUMNS)[None, :] - tl.arange(0, ROWS)[:, None]))


@triton.jit
def relative_rows(rows, corner, queries, center, ROWS: tl.constexpr, COLUMNS: tl.constexpr):
    """(ROWS, COLUMNS): as relative_tile(), for rows with a copy and a query each. Queries are less than ROWS."""
    first = _inside(corner, center, ROWS, COLUMNS) + center
    return tl.load(rows[:, None] + first + (tl.arange(0, COLUMNS)[None, :] - queries[:, None]))


@triton.jit
def far_biases(row, span, center, scale, START_AT_BIAS: tl.constexpr):
    """The biases of all distances up to -span, and from span on, in the scores' units. `row` may be a vector."""
    before, after = tl.load(row + center - span), tl.load(row + center + span)
    if START_AT_BIAS:
        return before * scale, after * scale
    else:
        return before, after


@triton.jit
def near_tiles(start, end, first, last, span, BLOCK: tl.constexpr):
    """(near_start, near_end): the tiles in [start, end) with a position closer than span to one of first to last.

    All pairs of an earlier tile are span or more apart, so they share one bias. So do all pairs of a later tile. start and
    end are multiples of BLOCK.
    """
    near_start = tl.cdiv(tl.maximum(first - span - BLOCK + 2, 0), BLOCK) * BLOCK
    near_start = tl.minimum(tl.maximum(near_start, start), end)
    near_end = tl.cdiv(tl.maximum(last + span, 0), BLOCK) * BLOCK
    return near_start, tl.minimum(tl.maximum(near_end, near_start), end)
