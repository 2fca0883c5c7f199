"""How do the gradients of key and value run on Hopper, by hand? No tile of scores leaves the registers.

A program has 12 warps and one tile of 128 keys after another. Two warpgroups add up dK and dV for 64 of the keys each; a warp
copies keys, values, and tiles of 128 queries, their cotangents and their (log-sum-exp, delta) into shared memory (TMA).
_attention_grad_query.py in kernels/triton has the formulas. Scores are (keys, queries), so P^T and dS^T leave one product in
the layout in which the next one reads its first operand. A tile of queries has two halves:

    started    S0^T = K Q0^T    dP0^T = V dO0^T    S1^T    dV += P0^T dO0    dK += dS0^T Q0    dP1^T    dV    dK
    computed                    P0^T                       dS0^T             P1^T                       dS1^T

For 128 x 128 scores and D = 64 a multiprocessor needs 2048 clocks for its products (4096 FLOP a clock), 1024 for its
exponentials (16 a clock), and about 900 to issue 8 warps' instructions. An H100 took 470 us for B8 H16 S2048 D64: 585 TFLOP/s.
Triton's kernel took 908, and 601 with its best tile. What was no faster: turns as in the forward, a third stage, three
warpgroups, tiles of 64 queries. Two tiles in one step took 454.
"""

from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.hopper import (
    fence_async_shared,
    mbarrier,
    tma,
    warpgroup_mma,
    warpgroup_mma_wait,
)

from ._attention_grad_query import COPIES, GROUPS, LN2, ROWS, TILE, count_of_works, first_scores, work_of

HALF = gl.constexpr(64)  # of a tile's queries: the columns of a product
SCORES = gl.constexpr(gl.NVMMADistributedLayout([3, 0], [4, 1], [16, 64, 16]))  # (ROWS, HALF)
_OWN = gl.constexpr(2)  # tiles of keys and values in shared memory: the next ones come while these are in use
_BY_KEY = gl.constexpr(2)  # of a head's copies of T5's bias, the first by negated distance
# A thread reads (log-sum-exp, delta) of two neighbouring columns at once, 16 bytes.
_PAIRS = gl.constexpr(
    gl.DistributedLinearLayout([[1], [2], [16], [32], [64]], [[4], [8], [0], [0], [0]], [[0], [0]], [], [128])
)


@gluon.jit
def _walk(first_key, span, query_length, key_length, IS_CAUSAL: gl.constexpr, NEAR: gl.constexpr):
    """(first, full, full_end, end, near, near_end), in tiles of queries. [first, full) cross the diagonal, and [full_end, end)
    the end. Of the others T5's bias differs from pair to pair in [near, near_end)."""
    start = first_key - (key_length - query_length)  # the query at the distance 0 from the first key
    end = gl.cdiv(query_length, TILE)
    first, full = 0, 0
    if IS_CAUSAL:
        first = gl.minimum(gl.maximum(start, 0) // TILE, end)
        full = gl.minimum(gl.cdiv(gl.maximum(start + GROUPS * ROWS - 1, 0), TILE), end)
    full_end = gl.maximum(query_length // TILE, full)
    near, near_end = full, full
    if NEAR:
        near = gl.cdiv(gl.maximum(start - span - TILE + 2, 0), TILE)
        near = gl.minimum(gl.maximum(near, full), full_end)
        near_end = gl.cdiv(gl.maximum(start + GROUPS * ROWS - 1 + span, 0), TILE)
        near_end = gl.minimum(gl.maximum(near_end, near), full_end)
    # A tile at least goes the way of those with a mask: ptxas 12.9 computes the address of the keys for both loops over tiles
    # behind the branch that skips the first loop.
    none = (first == full) & (near == near_end) & (full_end == end)
    return first, full, full_end, end, near, gl.where(none, near + 1, near_end)


@gluon.jit
def _tile(i, first, full, full_end, end, near, near_end):
    """The tile of queries that comes i-th: those at the diagonal, near ones, those at the end, far ones."""
    front, nears = full - first, near_end - near
    near_or_last = gl.where(i - front < nears, near + i - front, full_end + i - front - nears)
    k = full + i - (front + nears + end - full_end)
    return gl.where(k >= full, gl.where(k < near, k, k + nears), gl.where(i < front, first + i, near_or_last))


@gluon.jit
def _copy(
    grad_desc, query_desc, stats_desc, key_desc, value_desc, grads, queries, stats, keys, values, own_ready, own_free, ready,
    free, works, key_tiles, key_heads, span, query_length, key_length,
    STAGES: gl.constexpr, GROUP: gl.constexpr, IS_CAUSAL: gl.constexpr, NEAR: gl.constexpr,
):  # fmt: skip
    """The warp that copies, in the order in which _add() reads. Rows behind a tensor's end become zeros."""
    n = 0
    for item in range(count_of_works(works, IS_CAUSAL)):
        work = work_of(item, IS_CAUSAL)
        first_key = work % key_tiles * (GROUPS * ROWS)
        key_head, batch = work // key_tiles % key_heads, work // key_tiles // key_heads
        own = item % _OWN
        mbarrier.wait(own_free.index(own), item // _OWN % 2 ^ 1)
        mbarrier.expect(own_ready.index(own), 2 * GROUPS * key_desc.block_type.nbytes)
        for group in gl.static_range(GROUPS):
            place = [batch, key_head, first_key + group * ROWS, 0]
            tma.async_copy_global_to_shared(key_desc, place, own_ready.index(own), keys.index(own * GROUPS + group))
            tma.async_copy_global_to_shared(value_desc, place, own_ready.index(own), values.index(own * GROUPS + group))
        first, full, full_end, end, near, near_end = _walk(first_key, span, query_length, key_length, IS_CAUSAL, NEAR)
        for member in range(GROUP):
            head = key_head * GROUP + member
            for i in range(end - first):
                start = _tile(i, first, full, full_end, end, near, near_end) * TILE
                stage = n % STAGES
                mbarrier.wait(free.index(stage), n // STAGES % 2 ^ 1)
                mbarrier.expect(ready.index(stage), 2 * query_desc.block_type.nbytes + stats_desc.block_type.nbytes)
                place, row = [batch, head, start, 0], [batch * (key_heads * GROUP) + head, 2 * start]
                tma.async_copy_global_to_shared(query_desc, place, ready.index(stage), queries.index(stage))
                tma.async_copy_global_to_shared(stats_desc, row, ready.index(stage), stats.index(stage))
                tma.async_copy_global_to_shared(grad_desc, place, ready.index(stage), grads.index(stage))
                n += 1


@gluon.jit
def _row_stats(stats, start, query_length, MASKED: gl.constexpr):
    """(log-sum-exp, delta) of HALF queries. Past the last query P is 0."""
    COLUMN: gl.constexpr = gl.SliceLayout(0, SCORES)
    lse, delta = gl.split(stats.load(_PAIRS).reshape([HALF, 2]))
    lse, delta = gl.convert_layout(lse, COLUMN), gl.convert_layout(delta, COLUMN)
    if MASKED:
        j = gl.arange(0, HALF, COLUMN)
        live = j // 8 * 8 < query_length - start - j % 8  # to a thread j // 8 is a constant, and it has two j % 8
        lse, delta = gl.where(live, lse, float("inf")), gl.where(live, delta, 0.0)
    return lse, delta


@gluon.jit
def _probabilities(
    s, lse, start, far, scale, first_key, shift, IS_CAUSAL: gl.constexpr, MASKED: gl.constexpr
):  # fmt: skip
    if MASKED and IS_CAUSAL:
        i = (first_key - shift - start) + gl.arange(0, ROWS, gl.SliceLayout(1, SCORES))
        j = gl.arange(0, HALF, gl.SliceLayout(0, SCORES))
        s = gl.where((j // 8 * 8)[None, :] >= i[:, None] - (j % 8)[None, :], s, float("-inf"))
    return gl.exp2(s * scale - (lse - far)[None, :])


@gluon.jit
def _step(
    grad_key, grad_value, key, value, grads, queries, stats, ready, free, spread, n, start, far, scale, first_key, shift,
    query_length, center,
    D: gl.constexpr, STAGES: gl.constexpr, IS_CAUSAL: gl.constexpr, NEAR: gl.constexpr, MASKED: gl.constexpr,
):  # fmt: skip
    """Adds one tile of queries, the n-th that this program visits. `far` is a bias of all pairs, in the units of scale * s."""
    A: gl.constexpr = gl.DotOperandLayout(0, gl.NVMMADistributedLayout([3, 0], [4, 1], [16, D, 16]), 2)
    dtype: gl.constexpr = queries.dtype
    stage = n % STAGES
    corner = start + shift - first_key
    s = first_scores(spread, corner, center, NEAR, HALF)
    zero = gl.zeros([ROWS, HALF], gl.float32, SCORES)
    mbarrier.wait(ready.index(stage), n // STAGES % 2)
    query, grad = queries.index(stage).reshape([TILE, D]), grads.index(stage).reshape([TILE, D])
    row_stats = stats.index(stage).reshape([2 * TILE])
    query0, query1 = query.slice(0, HALF), query.slice(HALF, HALF)
    grad0, grad1 = grad.slice(0, HALF), grad.slice(HALF, HALF)
    scores = warpgroup_mma(key, query0.permute([1, 0]), s, use_acc=NEAR, is_async=True)
    product = warpgroup_mma(value, grad0.permute([1, 0]), zero, use_acc=False, is_async=True)
    s = first_scores(spread, corner + HALF, center, NEAR, HALF)
    more_scores = warpgroup_mma(key, query1.permute([1, 0]), s, use_acc=NEAR, is_async=True)
    lse, delta = _row_stats(row_stats.slice(0, 2 * HALF), start, query_length, MASKED)
    s = warpgroup_mma_wait(2, [scores])
    p = _probabilities(s, lse, start, far, scale, first_key, shift, IS_CAUSAL, MASKED)
    grad_value = warpgroup_mma(gl.convert_layout(p.to(dtype), A), grad0, grad_value, is_async=True)
    dp = warpgroup_mma_wait(2, [product])
    ds = gl.convert_layout((p * (dp - delta[None, :])).to(dtype), A)
    grad_key = warpgroup_mma(ds, query0, grad_key, is_async=True)
    product = warpgroup_mma(value, grad1.permute([1, 0]), zero, use_acc=False, is_async=True)
    lse, delta = _row_stats(row_stats.slice(2 * HALF, 2 * HALF), start + HALF, query_length, MASKED)
    s = warpgroup_mma_wait(3, [more_scores])
    p = _probabilities(s, lse, start + HALF, far, scale, first_key, shift, IS_CAUSAL, MASKED)
    grad_value = warpgroup_mma(gl.convert_layout(p.to(dtype), A), grad1, grad_value, is_async=True)
    dp = warpgroup_mma_wait(1, [product])
    ds = gl.convert_layout((p * (dp - delta[None, :])).to(dtype), A)
    grad_key = warpgroup_mma(ds, query1, grad_key, is_async=True)
    # A sum that is in flight at the loop's end makes ptxas wait for each product.
    grad_key, grad_value = warpgroup_mma_wait(0, [grad_key, grad_value])
    mbarrier.arrive(free.index(stage))
    return grad_key, grad_value


@gluon.jit
def _store(ptr, tile, batch, key_head, first_key, key_heads, key_length, D: gl.constexpr):
    """Writes rows of a tensor stored as (B, S, H, D)."""
    WIDE: gl.constexpr = gl.BlockedLayout([1, 8], [256 // D, D // 8], [4, 1], [1, 0])  # 16 bytes a thread
    i = first_key + gl.arange(0, ROWS, gl.SliceLayout(1, WIDE))
    row = ((batch.to(gl.int64) * key_length + i) * key_heads + key_head) * D
    columns = gl.arange(0, D, gl.SliceLayout(0, WIDE))
    gl.store(ptr + row[:, None] + columns[None, :], gl.convert_layout(tile, WIDE), mask=(i < key_length)[:, None])


@gluon.jit
def _add(
    grads, queries, stats, keys, values, own_ready, own_free, ready, free, grad_key_ptr, grad_value_ptr, spread_ptr, works,
    key_tiles, key_heads, scale, span, center, query_length, key_length,
    WHICH: gl.constexpr, D: gl.constexpr, STAGES: gl.constexpr, GROUP: gl.constexpr, IS_CAUSAL: gl.constexpr,
    NEAR: gl.constexpr,
):  # fmt: skip
    """A warpgroup that adds up, for its 64 keys of each of the program's tiles."""
    O: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, D, 16])
    A: gl.constexpr = gl.DotOperandLayout(0, SCORES, 2)
    shift = key_length - query_length
    n = 0
    for item in range(count_of_works(works, IS_CAUSAL)):
        work = work_of(item, IS_CAUSAL)
        first_key = work % key_tiles * (GROUPS * ROWS)
        key_head, batch = work // key_tiles % key_heads, work // key_tiles // key_heads
        first, full, full_end, end, near, near_end = _walk(first_key, span, query_length, key_length, IS_CAUSAL, NEAR)
        first_key += WHICH * ROWS
        special, count = full - first + near_end - near + end - full_end, end - first
        own = item % _OWN
        mbarrier.wait(own_ready.index(own), item // _OWN % 2)
        # Values are in registers: shared memory cannot deliver two operands to every product of 64 columns. With keys in
        # registers too the kernel took 493 us in place of 470.
        key = keys.index(own * GROUPS + WHICH).reshape([ROWS, D])
        value = values.index(own * GROUPS + WHICH).reshape([ROWS, D]).load(A)
        grad_key, grad_value = gl.zeros([ROWS, D], gl.float32, O), gl.zeros([ROWS, D], gl.float32, O)
        for member in range(GROUP):
            spread, far_before, far_after = spread_ptr, 0.0, 0.0
            if NEAR:
                spread = spread_ptr + ((key_head * GROUP + member) * COPIES + _BY_KEY) * (2 * center)
                far_before = gl.load(spread + center - span) * scale
                far_after = gl.load(spread + center + span) * scale
            for i in range(special):
                start = _tile(i, first, full, full_end, end, near, near_end) * TILE
                grad_key, grad_value = _step(
                    grad_key, grad_value, key, value, grads, queries, stats, ready, free, spread, n + i, start, 0.0, scale,
                    first_key, shift, query_length, center, D, STAGES, IS_CAUSAL, NEAR, True,
                )  # fmt: skip
            for i in range(special, count):
                tile = _tile(i, first, full, full_end, end, near, near_end)
                far = gl.where(tile < near, far_before, far_after)
                grad_key, grad_value = _step(
                    grad_key, grad_value, key, value, grads, queries, stats, ready, free, spread, n + i, tile * TILE, far,
                    scale, first_key, shift, query_length, center, D, STAGES, IS_CAUSAL, False, False,
                )  # fmt: skip
            n += count
        mbarrier.arrive(own_free.index(own))
        _store(grad_value_ptr, grad_value.to(queries.dtype), batch, key_head, first_key, key_heads, key_length, D)
        grad_key *= scale * LN2
        _store(grad_key_ptr, grad_key.to(queries.dtype), batch, key_head, first_key, key_heads, key_length, D)


@gluon.jit(do_not_specialize=["span", "center", "key_heads", "query_length", "key_length", "works"])
def grad_key_value_kernel(
    grad_desc, query_desc, stats_desc, key_desc, value_desc, spread_ptr, grad_key_ptr, grad_value_ptr, scale, span, center,
    key_heads, query_length, key_length, works,
    D: gl.constexpr, STAGES: gl.constexpr, GROUP: gl.constexpr, IS_CAUSAL: gl.constexpr,
):  # fmt: skip
    """A grid of any size shares `works` = key tiles * B * key heads tiles. The descriptors have blocks (1, 1, ROWS or TILE,
    D), that of stats, (B * heads, 2 * rows), has (1, 2 * TILE). The gradients are stored as (B, S, H, D). With spread_ptr the
    scores start at T5's bias divided by the scale. `scale` is in units of log2."""
    dtype: gl.constexpr = query_desc.dtype
    NEAR: gl.constexpr = spread_ptr is not None
    key_tiles = gl.cdiv(key_length, GROUPS * ROWS)
    spread = grad_key_ptr  # a partition takes no None
    if NEAR:
        spread = spread_ptr
    keys = gl.allocate_shared_memory(dtype, [_OWN * GROUPS, 1, 1, ROWS, D], key_desc.layout)
    values = gl.allocate_shared_memory(dtype, [_OWN * GROUPS, 1, 1, ROWS, D], value_desc.layout)
    queries = gl.allocate_shared_memory(dtype, [STAGES, 1, 1, TILE, D], query_desc.layout)
    grads = gl.allocate_shared_memory(dtype, [STAGES, 1, 1, TILE, D], grad_desc.layout)
    stats = gl.allocate_shared_memory(gl.float32, [STAGES, 1, 2 * TILE], stats_desc.layout)
    own_ready = gl.allocate_shared_memory(gl.int64, [_OWN, 1], mbarrier.MBarrierLayout())
    own_free = gl.allocate_shared_memory(gl.int64, [_OWN, 1], mbarrier.MBarrierLayout())
    ready = gl.allocate_shared_memory(gl.int64, [STAGES, 1], mbarrier.MBarrierLayout())
    free = gl.allocate_shared_memory(gl.int64, [STAGES, 1], mbarrier.MBarrierLayout())
    for i in gl.static_range(_OWN):
        mbarrier.init(own_ready.index(i), 1)
        mbarrier.init(own_free.index(i), GROUPS)
    for i in gl.static_range(STAGES):
        mbarrier.init(ready.index(i), 1)
        mbarrier.init(free.index(i), GROUPS)
    fence_async_shared()  # the copy engine sees the barriers
    gl.warp_specialize(
        [
            (_add, (grads, queries, stats, keys, values, own_ready, own_free, ready, free, grad_key_ptr, grad_value_ptr, spread,
                    works, key_tiles, key_heads, scale, span, center, query_length, key_length, 0, D, STAGES, GROUP, IS_CAUSAL,
                    NEAR)),
            (_add, (grads, queries, stats, keys, values, own_ready, own_free, ready, free, grad_key_ptr, grad_value_ptr, spread,
                    works, key_tiles, key_heads, scale, span, center, query_length, key_length, 1, D, STAGES, GROUP, IS_CAUSAL,
                    NEAR)),
            (_copy, (grad_desc, query_desc, stats_desc, key_desc, value_desc, grads, queries, stats, keys, values, own_ready,
                     own_free, ready, free, works, key_tiles, key_heads, span, query_length, key_length, STAGES, GROUP,
                     IS_CAUSAL, NEAR)),
        ],
        [4, 1],
        [240, 24],
    )  # fmt: skip
