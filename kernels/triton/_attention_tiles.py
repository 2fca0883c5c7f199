"""What do attention's forward and backward kernels share? Visible key ranges, guarded tile loads, dropout bits, and the
choice of a program's packed sequence and tile."""

import triton
import triton.language as tl

from ._dot import add_product

LOG2E = tl.constexpr(1.4426950408889634)
LN2 = tl.constexpr(0.6931471805599453)
_SCAN = tl.constexpr(1024)
_SEARCH = tl.constexpr(128)
MASKED_STAGES = tl.constexpr(1)


@triton.jit
def in_units(x, NATURAL: tl.constexpr):
    """A log-probability in the units of the kernels' scores: base e for float32 (NATURAL), else base 2.

    The hardware has exp2. Folding log2(e) into the scale saves a multiplication per score. But it rounds each score and
    its log-sum-exp separately before they are subtracted, and float32 results show that error.
    """
    if NATURAL:
        return x
    else:
        return x * LOG2E


@triton.jit
def exponential(x, NATURAL: tl.constexpr):
    if NATURAL:
        return tl.exp2(x * LOG2E)
    else:
        return tl.exp2(x)


@triton.jit
def load_tile(pointers, row_mask, dims, D: tl.constexpr, GUARD_ROWS: tl.constexpr):
    """(rows, BLOCK_D): zeros past the head size. With GUARD_ROWS, also zeros in rows where row_mask is False.

    Memory there may hold NaN, and 0 * NaN would reach a sum.
    """
    EVEN: tl.constexpr = dims.shape[0] == D
    if GUARD_ROWS:
        if EVEN:
            return tl.load(pointers, mask=row_mask[:, None], other=0.0)
        else:
            return tl.load(pointers, mask=row_mask[:, None] & (dims < D)[None, :], other=0.0)
    else:
        if EVEN:
            return tl.load(pointers)
        else:
            return tl.load(pointers, mask=(dims < D)[None, :], other=0.0)


@triton.jit
def dot_rows(a_rows, a_mask, b_rows, b_mask, D: tl.constexpr, M: tl.constexpr, N: tl.constexpr):
    """a b^T for the float32 rows at the pointers a_rows (M) and b_rows (N), 32 columns at a time.

    Without TF32, NVIDIA multiplies float32 on the ordinary cores. The compiler then keeps the whole inner dimension of
    both operands in registers: at D = 128 every tile spills. The second read of a tile comes from L1.
    """
    total = tl.zeros((M, N), tl.float32)
    for start in tl.range(0, D, 32, num_stages=1):
        dims = start + tl.arange(0, 32)
        a = tl.load(a_rows[:, None] + dims[None, :], mask=a_mask[:, None] & (dims < D)[None, :], other=0.0)
        b = tl.load(b_rows[:, None] + dims[None, :], mask=b_mask[:, None] & (dims < D)[None, :], other=0.0)
        total = add_product(total, a, tl.trans(b))
    return total


@triton.jit
def sequence_tile(cu_seqlens_ptr, sequences, slot, BLOCK: tl.constexpr):
    """(sequence, tile, start, length) of a slot: tile number `tile` of the packed sequence that begins at row `start`.

    The slots of sequence n begin at cu_seqlens[n] // BLOCK + n. It has as many slots as tiles, or one spare slot more; in a
    spare slot tile * BLOCK >= length. So T // BLOCK + N slots hold every tile, in row order. A grid of N times the longest
    sequence's tiles would be mostly spare when lengths differ. A trace does not know the longest, and its grid would grow
    as N T. Each step of the search reads _SEARCH rows at once; two steps suffice for 16,384 sequences.
    """
    lanes = tl.arange(0, _SEARCH)
    sequence = 0
    count = sequences
    while count > 1:
        step = tl.cdiv(count, _SEARCH)
        candidates = sequence + lanes * step
        inside = lanes * step < count
        rows = tl.load(cu_seqlens_ptr + candidates, mask=inside, other=0)
        begun = tl.sum((inside & (rows // BLOCK + candidates <= slot)).to(tl.int32), 0)
        sequence += (begun - 1) * step
        count = tl.minimum(step, count - (begun - 1) * step)
    start = tl.load(cu_seqlens_ptr + sequence)
    length = tl.load(cu_seqlens_ptr + sequence + 1) - start
    return sequence, slot - sequence - start // BLOCK, start.to(tl.int64), length


@triton.jit
def key_range(mask_row, key_length):
    """(first, end, whole): real keys lie in [first, end). `whole` says that every key there is real.

    A padded row is nearly always one run of real tokens, and tiles inside the run need no mask. Each program scans
    key_length bytes, which stay in cache. A separate kernel that scans once would cost a launch.
    """
    lanes = tl.arange(0, _SCAN)
    first = tl.full((_SCAN,), 2147483647, tl.int32)
    last = tl.full((_SCAN,), -1, tl.int32)
    count = tl.zeros((_SCAN,), tl.int32)
    for start in range(0, key_length, _SCAN):
        keys = start + lanes
        real = tl.load(mask_row + keys, mask=keys < key_length, other=0) != 0
        first = tl.minimum(first, tl.where(real, keys, 2147483647))
        last = tl.maximum(last, tl.where(real, keys, -1))
        count += real.to(tl.int32)
    end = tl.max(last, 0) + 1
    first = tl.minimum(tl.min(first, 0), end)
    return first, end, tl.sum(count, 0) == end - first


@triton.jit
def key_tiles(
    mask_row, first_query, last_query, chunk_start, chunk_end, query_length, key_length,
    IS_CAUSAL: tl.constexpr, BLOCK_N: tl.constexpr,
):  # fmt: skip
    """The tiles of the keys [chunk_start, chunk_end) that queries first_query to last_query need.

    Returns (full_start, full_end, front_start, front_count, tail_start, tail_count, seen). In the tiles [full_start, full_end)
    every query sees every key; front and tail tiles need masks. The first query sees at most `seen` keys. chunk_start is a
    multiple of BLOCK_N.
    """
    first = chunk_start
    end = tl.minimum(chunk_end, key_length)
    whole = True
    if mask_row is not None:
        real_first, real_end, whole = key_range(mask_row, key_length)
        first = tl.maximum(first, real_first)
        end = tl.minimum(end, real_end)
    full_end = end
    if IS_CAUSAL:
        shift = key_length - query_length
        end = tl.minimum(end, last_query + shift + 1)
        full_end = tl.minimum(end, first_query + shift + 1)
    seen = full_end - first
    end = tl.maximum(end, first)
    front_start = first // BLOCK_N * BLOCK_N
    full_start = tl.cdiv(first, BLOCK_N) * BLOCK_N
    full_end = tl.maximum(tl.maximum(full_end, 0) // BLOCK_N * BLOCK_N, full_start)
    full_end = tl.where(whole, full_end, full_start)
    front_count = tl.where(end > first, (full_start - front_start) // BLOCK_N, 0)
    tail_count = tl.cdiv(tl.maximum(end - full_end, 0), BLOCK_N)
    return full_start, full_end, front_start, front_count, full_end, tail_count, seen


@triton.jit
def keep_tile(seed, flat_heads, queries, start, threshold, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr):
    """(BLOCK_M, BLOCK_N): True where dropout keeps. Equals kernels/reference/_philox.keep_mask bit for bit.

    One counter gives the words of four neighbouring keys, so a quarter of the columns is computed and the words are
    interleaved. Interleaving moves values between threads, so each is one byte.
    """
    zero = tl.zeros((BLOCK_M, BLOCK_N // 4), tl.int32)
    quads = zero + (start // 4 + tl.arange(0, BLOCK_N // 4))[None, :]
    w0, w1, w2, w3 = tl.philox(seed, quads, zero + queries[:, None], zero + flat_heads[:, None], zero)
    bound = threshold.to(tl.uint32, bitcast=True)
    even = tl.interleave((w0 >= bound).to(tl.int8), (w2 >= bound).to(tl.int8))
    odd = tl.interleave((w1 >= bound).to(tl.int8), (w3 >= bound).to(tl.int8))
    return tl.interleave(even, odd) != 0
