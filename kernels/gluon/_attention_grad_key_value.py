"""How do the gradients of key and value run on Hopper, by hand? No tile of scores leaves the registers.

A program has 128 keys of one head, and 12 warps. Two warpgroups add up dK and dV for 64 keys each; a warp copies tiles of
queries, their cotangents and their (log-sum-exp, delta) into stages of shared memory (TMA). The formulas are in
pyfused/kernels/triton/_attention_grad_query.py. Scores are (keys, queries), so that P^T and dS^T, which come out of the matrix
unit, are its next operands as they are:

    a step    S^T = K Q_i^T and dP^T = V dO_i^T start together; while the second runs, P^T of S^T is computed; dV += P^T dO_i
              starts; while it runs, dS^T is computed; dK += dS^T Q_i

For a tile of 128 keys, 64 queries and D = 64 a multiprocessor needs 1024 clocks for its products (4096 FLOP a clock), 512 for
its exponentials (16 a clock), and about 520 to issue 8 warps' instructions.
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

ROWS = gl.constexpr(64)  # keys of a warpgroup: one instruction's
_COPIES = gl.constexpr(4)  # of a head's bias, as _attention_relative.py describes them
_BY_KEY = gl.constexpr(2)
OWN = gl.constexpr(2)  # tiles of keys and values in shared memory: the next one's are on their way
HALF = gl.constexpr(64)  # queries of a product
S_LAYOUT = gl.constexpr(gl.NVMMADistributedLayout([3, 0], [4, 1], [16, 64, 16]))
_PAIRS = gl.constexpr(gl.DistributedLinearLayout([[1], [2], [16], [32], [64]], [[4], [8], [0], [0], [0]], [[0], [0]], [], [128]))


@gluon.jit
def _walk(
    first_key, span, query_length, key_length,
    KEYS: gl.constexpr, BLOCK_M: gl.constexpr, IS_CAUSAL: gl.constexpr, NEAR: gl.constexpr,
):  # fmt: skip
    """(first, full, full_end, end, near, near_end), in tiles of queries. [first, full) cross the diagonal, and [full_end, end)
    the end. Of the others T5's bias differs from pair to pair in [near, near_end)."""
    shift = key_length - query_length
    end = gl.cdiv(query_length, BLOCK_M)
    first, full = 0, 0
    if IS_CAUSAL:
        first = gl.minimum(gl.maximum(first_key - shift, 0) // BLOCK_M, end)
        full = gl.minimum(gl.cdiv(gl.maximum(first_key + KEYS - 1 - shift, 0), BLOCK_M), end)
    full_end = gl.maximum(query_length // BLOCK_M, full)
    near, near_end = full, full
    if NEAR:
        near = gl.cdiv(gl.maximum(first_key - shift - span - BLOCK_M + 2, 0), BLOCK_M)
        near = gl.minimum(gl.maximum(near, full), full_end)
        near_end = gl.cdiv(gl.maximum(first_key - shift + KEYS - 1 + span, 0), BLOCK_M)
        near_end = gl.minimum(gl.maximum(near_end, near), full_end)
    return first, full, full_end, end, near, near_end


@gluon.jit
def _tile(i, first, full, full_end, end, near, near_end):
    """The tile of queries that comes i-th: those with a mask, far ones, near ones."""
    front = full - first
    k = i - front - (end - full_end)
    far = full_end - full - (near_end - near)
    whole = gl.where(k < near - full, full + k, full + k + near_end - near)
    whole = gl.where(k < far, whole, near + k - far)
    return gl.where(k >= 0, whole, gl.where(i < front, first + i, full_end + i - front))


@gluon.jit
def _copy(
    grad_desc, query_desc, stats_desc, key_desc, value_desc, grads, queries, stats, keys, values, own_ready, own_free, ready,
    free, program, programs, works, key_tiles, key_heads, span, query_length, key_length,
    CONSUMERS: gl.constexpr, BLOCK_M: gl.constexpr, STAGES: gl.constexpr, GROUP: gl.constexpr, IS_CAUSAL: gl.constexpr,
    NEAR: gl.constexpr,
):  # fmt: skip
    """The warp that copies, in the order in which _add() reads. Rows behind a tensor's end become zeros."""
    n, item = 0, 0
    for work in range(program, works, programs):
        first_key = work % key_tiles * (CONSUMERS * ROWS)
        key_head, batch = work // key_tiles % key_heads, work // key_tiles // key_heads
        own = item % OWN
        mbarrier.wait(own_free.index(own), item // OWN % 2 ^ 1)
        mbarrier.expect(own_ready.index(own), CONSUMERS * (key_desc.block_type.nbytes + value_desc.block_type.nbytes))
        for c in gl.static_range(CONSUMERS):
            place = [batch, key_head, first_key + c * ROWS, 0]
            tma.async_copy_global_to_shared(key_desc, place, own_ready.index(own), keys.index(own * CONSUMERS + c))
            tma.async_copy_global_to_shared(value_desc, place, own_ready.index(own), values.index(own * CONSUMERS + c))
        first, full, full_end, end, near, near_end = _walk(
            first_key, span, query_length, key_length, CONSUMERS * ROWS, BLOCK_M, IS_CAUSAL, NEAR
        )
        for member in range(GROUP):
            head = key_head * GROUP + member
            for i in range(end - first):
                start = _tile(i, first, full, full_end, end, near, near_end) * BLOCK_M
                stage = n % STAGES
                mbarrier.wait(free.index(stage), n // STAGES % 2 ^ 1)
                mbarrier.expect(
                    ready.index(stage),
                    query_desc.block_type.nbytes + grad_desc.block_type.nbytes + stats_desc.block_type.nbytes,
                )
                place = [batch, head, start, 0]
                tma.async_copy_global_to_shared(query_desc, place, ready.index(stage), queries.index(stage))
                row = [batch * (key_heads * GROUP) + head, 2 * start]
                tma.async_copy_global_to_shared(stats_desc, row, ready.index(stage), stats.index(stage))
                tma.async_copy_global_to_shared(grad_desc, place, ready.index(stage), grads.index(stage))
                n += 1
        item += 1


@gluon.jit
def _first_scores(spread, corner, center, NEAR: gl.constexpr):
    """(ROWS, HALF): what the scores start from. With NEAR, element (i, j) is the bias of negated distance corner + j - i."""
    if NEAR:
        first = gl.minimum(gl.maximum(corner, ROWS - center), center - HALF) + center
        row = first - gl.arange(0, ROWS, gl.SliceLayout(1, S_LAYOUT))
        place = row % 2 * (2 * center) + row // 2 * 2  # of the two copies the one in which this address is even
        return gl.load(spread + place[:, None] + gl.arange(0, HALF, gl.SliceLayout(0, S_LAYOUT))[None, :])
    else:
        return gl.zeros([ROWS, HALF], gl.float32, S_LAYOUT)


@gluon.jit
def _row_stats(stats):
    """(lse, delta) of HALF queries. A thread reads what its two neighbouring columns need at once, 16 bytes."""
    lse, delta = gl.split(stats.load(_PAIRS).reshape([HALF, 2]))
    return gl.convert_layout(lse, gl.SliceLayout(0, S_LAYOUT)), gl.convert_layout(delta, gl.SliceLayout(0, S_LAYOUT))


@gluon.jit
def _p(
    s, lse, delta, start, far, scale, first_key, shift, query_length, IS_CAUSAL: gl.constexpr, MASKED: gl.constexpr
):
    """(P, delta) of HALF queries from `start` on."""
    if MASKED:
        j = start + gl.arange(0, HALF, gl.SliceLayout(0, S_LAYOUT))
        lse = gl.where(j < query_length, lse, float("inf"))  # p = 0 past the last query
        delta = gl.where(j < query_length, delta, 0.0)
        if IS_CAUSAL:
            i = first_key + gl.arange(0, ROWS, gl.SliceLayout(1, S_LAYOUT))
            s = gl.where(i[:, None] <= (j + shift)[None, :], s, float("-inf"))
    return gl.exp2(s * scale - (lse - far)[None, :]), delta


@gluon.jit
def _step(
    grad_key, grad_value, key, value, grads, queries, stats, ready, free, spread, n, start, far, scale, first_key,
    shift, query_length, center,
    D: gl.constexpr, BLOCK_M: gl.constexpr, STAGES: gl.constexpr, IS_CAUSAL: gl.constexpr, NEAR: gl.constexpr,
    MASKED: gl.constexpr,
):  # fmt: skip
    """Adds one tile of queries, the n-th that this program visits. `far` is a bias of all pairs, in the units of scale * s."""
    A: gl.constexpr = gl.DotOperandLayout(0, gl.NVMMADistributedLayout([3, 0], [4, 1], [16, D, 16]), 2)
    stage = n % STAGES
    first_scores = _first_scores(spread, start + shift - first_key, center, NEAR)
    zero = gl.zeros([ROWS, HALF], gl.float32, S_LAYOUT)
    if BLOCK_M == HALF:
        mbarrier.wait(ready.index(stage), n // STAGES % 2)
        query, grad = queries.index(stage).reshape([BLOCK_M, D]), grads.index(stage).reshape([BLOCK_M, D])
        scores = warpgroup_mma(key, query.permute([1, 0]), first_scores, use_acc=NEAR, is_async=True)
        product = warpgroup_mma(value, grad.permute([1, 0]), zero, use_acc=False, is_async=True)
        lse, delta = _row_stats(stats.index(stage).reshape([2 * BLOCK_M]))
        s = warpgroup_mma_wait(1, [scores])
        p32, delta = _p(s, lse, delta, start, far, scale, first_key, shift, query_length, IS_CAUSAL, MASKED)
        p = gl.convert_layout(p32.to(queries.dtype), A)
        grad_value = warpgroup_mma(p, grad, grad_value, is_async=True)
        dp = warpgroup_mma_wait(1, [product])
        ds = gl.convert_layout((p32 * (dp - delta[None, :])).to(queries.dtype), A)
        grad_key = warpgroup_mma(ds, query, grad_key, is_async=True)
    else:
        more_scores = _first_scores(spread, start + HALF + shift - first_key, center, NEAR)
        mbarrier.wait(ready.index(stage), n // STAGES % 2)
        queries2, grads2 = queries.index(stage).reshape([BLOCK_M, D]), grads.index(stage).reshape([BLOCK_M, D])
        stats2 = stats.index(stage).reshape([2 * BLOCK_M])
        query, grad = queries2.slice(0, HALF), grads2.slice(0, HALF)
        scores = warpgroup_mma(key, query.permute([1, 0]), first_scores, use_acc=NEAR, is_async=True)
        product = warpgroup_mma(value, grad.permute([1, 0]), zero, use_acc=False, is_async=True)
        query1, grad1 = queries2.slice(HALF, HALF), grads2.slice(HALF, HALF)
        scores1 = warpgroup_mma(key, query1.permute([1, 0]), more_scores, use_acc=NEAR, is_async=True)
        lse, delta = _row_stats(stats2.slice(0, 2 * HALF))
        s = warpgroup_mma_wait(2, [scores])
        p32, delta = _p(s, lse, delta, start, far, scale, first_key, shift, query_length, IS_CAUSAL, MASKED)
        p = gl.convert_layout(p32.to(queries.dtype), A)
        grad_value = warpgroup_mma(p, grad, grad_value, is_async=True)
        dp = warpgroup_mma_wait(2, [product])
        ds = gl.convert_layout((p32 * (dp - delta[None, :])).to(queries.dtype), A)
        grad_key = warpgroup_mma(ds, query, grad_key, is_async=True)
        product1 = warpgroup_mma(value, grad1.permute([1, 0]), zero, use_acc=False, is_async=True)
        lse, delta = _row_stats(stats2.slice(2 * HALF, 2 * HALF))
        s = warpgroup_mma_wait(3, [scores1])
        p32, delta = _p(s, lse, delta, start + HALF, far, scale, first_key, shift, query_length, IS_CAUSAL, MASKED)
        p = gl.convert_layout(p32.to(queries.dtype), A)
        grad_value = warpgroup_mma(p, grad1, grad_value, is_async=True)
        dp = warpgroup_mma_wait(1, [product1])
        ds = gl.convert_layout((p32 * (dp - delta[None, :])).to(queries.dtype), A)
        grad_key = warpgroup_mma(ds, query1, grad_key, is_async=True)
    grad_key, grad_value = warpgroup_mma_wait(0, [grad_key, grad_value])
    mbarrier.arrive(free.index(stage))
    return grad_key, grad_value


@gluon.jit
def _store(ptr, tile, first_key, key_length, stride, D: gl.constexpr):
    WIDE: gl.constexpr = gl.BlockedLayout([1, 8], [256 // D, D // 8], [4, 1], [1, 0])  # 16 bytes a thread
    tile = gl.convert_layout(tile, WIDE)
    i = first_key + gl.arange(0, ROWS, gl.SliceLayout(1, WIDE))
    columns = gl.arange(0, D, gl.SliceLayout(0, WIDE))
    gl.store(ptr + (i.to(gl.int64) * stride)[:, None] + columns[None, :], tile, mask=(i < key_length)[:, None])


@gluon.jit
def _add(
    grads, queries, stats, keys, values, own_ready, own_free, ready, free, grad_key_ptr, grad_value_ptr, spread_ptr, program,
    programs, works, key_tiles, key_heads, grad_scale, scale, span, center, query_length, key_length, stride_db, stride_dh,
    stride_ds,
    WHICH: gl.constexpr, CONSUMERS: gl.constexpr, D: gl.constexpr, BLOCK_M: gl.constexpr, STAGES: gl.constexpr,
    GROUP: gl.constexpr, IS_CAUSAL: gl.constexpr, NEAR: gl.constexpr, IN_REGISTERS: gl.constexpr,
):  # fmt: skip
    """A warpgroup that adds up, for its 64 keys of each of the program's tiles."""
    O: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, D, 16])
    shift = key_length - query_length
    n, item = 0, 0
    for work in range(program, works, programs):
        first_of_tile = work % key_tiles * (CONSUMERS * ROWS)
        key_head, batch = work // key_tiles % key_heads, work // key_tiles // key_heads
        first_key = first_of_tile + WHICH * ROWS
        first, full, full_end, end, near, near_end = _walk(
            first_of_tile, span, query_length, key_length, CONSUMERS * ROWS, BLOCK_M, IS_CAUSAL, NEAR
        )
        masked, count = full - first + end - full_end, end - first
        far_end = count - (near_end - near)
        own = item % OWN
        key, value = keys.index(own * CONSUMERS + WHICH), values.index(own * CONSUMERS + WHICH)
        key, value = key.reshape([ROWS, D]), value.reshape([ROWS, D])
        mbarrier.wait(own_ready.index(own), item // OWN % 2)
        if IN_REGISTERS >= 1:
            value = value.load(gl.DotOperandLayout(0, S_LAYOUT, 2))
        if IN_REGISTERS >= 2:
            key = key.load(gl.DotOperandLayout(0, S_LAYOUT, 2))
            mbarrier.arrive(own_free.index(own))
        grad_key = gl.zeros([ROWS, D], gl.float32, O)
        grad_value = gl.zeros([ROWS, D], gl.float32, O)
        for member in range(GROUP):
            spread, far_before, far_after = spread_ptr, 0.0, 0.0
            if NEAR:
                spread = spread_ptr + ((key_head * GROUP + member) * _COPIES + _BY_KEY) * (2 * center)
                far_before = gl.load(spread + center - span) * scale
                far_after = gl.load(spread + center + span) * scale
            for i in range(masked):
                start = _tile(i, first, full, full_end, end, near, near_end) * BLOCK_M
                grad_key, grad_value = _step(
                    grad_key, grad_value, key, value, grads, queries, stats, ready, free, spread, n + i, start, 0.0, scale, first_key, shift, query_length, center, D, BLOCK_M, STAGES, IS_CAUSAL,
                    NEAR, True,
                )  # fmt: skip
            for i in range(masked, far_end):
                tile = _tile(i, first, full, full_end, end, near, near_end)
                far = gl.where(tile < near, far_before, far_after)
                grad_key, grad_value = _step(
                    grad_key, grad_value, key, value, grads, queries, stats, ready, free, spread, n + i, tile * BLOCK_M, far, scale, first_key, shift, query_length, center, D, BLOCK_M, STAGES,
                    IS_CAUSAL, False, False,
                )  # fmt: skip
            if NEAR:
                for i in range(far_end, count):
                    start = _tile(i, first, full, full_end, end, near, near_end) * BLOCK_M
                    grad_key, grad_value = _step(
                        grad_key, grad_value, key, value, grads, queries, stats, ready, free, spread, n + i, start, 0.0, scale, first_key, shift, query_length, center, D, BLOCK_M, STAGES,
                        IS_CAUSAL, True, False,
                    )  # fmt: skip
            n += count
        if IN_REGISTERS < 2:
            mbarrier.arrive(own_free.index(own))
        offset = batch.to(gl.int64) * stride_db + key_head.to(gl.int64) * stride_dh
        _store(grad_value_ptr + offset, grad_value.to(queries.dtype), first_key, key_length, stride_ds, D)
        _store(grad_key_ptr + offset, (grad_key * grad_scale).to(queries.dtype), first_key, key_length, stride_ds, D)
        item += 1


@gluon.jit(do_not_specialize=["span", "center", "key_heads", "query_length", "key_length", "works"])
def grad_key_value_kernel(
    grad_desc, query_desc, stats_desc, key_desc, value_desc, spread_ptr, grad_key_ptr, grad_value_ptr, grad_scale, scale, span,
    center, stride_db, stride_dh, stride_ds, key_heads, query_length, key_length, works,
    CONSUMERS: gl.constexpr, D: gl.constexpr, BLOCK_M: gl.constexpr, STAGES: gl.constexpr, GROUP: gl.constexpr,
    IS_CAUSAL: gl.constexpr, IN_REGISTERS: gl.constexpr,
):  # fmt: skip
    """A grid of any size shares `works` = key tiles * B * key heads tiles. The descriptors have blocks (1, 1, ROWS or BLOCK_M,
    D), that of stats (1, 2 * BLOCK_M). With spread_ptr the scores start at T5's bias divided by the scale."""
    dtype: gl.constexpr = query_desc.dtype
    NEAR: gl.constexpr = spread_ptr is not None
    program, programs = gl.program_id(0), gl.num_programs(0)
    key_tiles = gl.cdiv(key_length, CONSUMERS * ROWS)
    spread = grad_key_ptr  # a partition takes no None
    if NEAR:
        spread = spread_ptr
    keys = gl.allocate_shared_memory(dtype, [OWN * CONSUMERS, 1, 1, ROWS, D], key_desc.layout)
    values = gl.allocate_shared_memory(dtype, [OWN * CONSUMERS, 1, 1, ROWS, D], value_desc.layout)
    queries = gl.allocate_shared_memory(dtype, [STAGES, 1, 1, BLOCK_M, D], query_desc.layout)
    grads = gl.allocate_shared_memory(dtype, [STAGES, 1, 1, BLOCK_M, D], grad_desc.layout)
    stats = gl.allocate_shared_memory(gl.float32, [STAGES, 1, 2 * BLOCK_M], stats_desc.layout)
    own_ready = gl.allocate_shared_memory(gl.int64, [OWN, 1], mbarrier.MBarrierLayout())
    own_free = gl.allocate_shared_memory(gl.int64, [OWN, 1], mbarrier.MBarrierLayout())
    ready = gl.allocate_shared_memory(gl.int64, [STAGES, 1], mbarrier.MBarrierLayout())
    free = gl.allocate_shared_memory(gl.int64, [STAGES, 1], mbarrier.MBarrierLayout())
    for i in gl.static_range(OWN):
        mbarrier.init(own_ready.index(i), 1)
        mbarrier.init(own_free.index(i), CONSUMERS)
    for i in gl.static_range(STAGES):
        mbarrier.init(ready.index(i), 1)
        mbarrier.init(free.index(i), CONSUMERS)
    fence_async_shared()  # the copy engine sees the barriers
    if CONSUMERS == 3:
        gl.warp_specialize(
            [
                (_add, (grads, queries, stats, keys, values, own_ready, own_free, ready, free, grad_key_ptr, grad_value_ptr, spread,
                        program, programs, works, key_tiles, key_heads, grad_scale, scale, span, center, query_length, key_length,
                        stride_db, stride_dh, stride_ds, 0, CONSUMERS, D, BLOCK_M, STAGES, GROUP, IS_CAUSAL, NEAR, IN_REGISTERS)),
                (_add, (grads, queries, stats, keys, values, own_ready, own_free, ready, free, grad_key_ptr, grad_value_ptr, spread,
                        program, programs, works, key_tiles, key_heads, grad_scale, scale, span, center, query_length, key_length,
                        stride_db, stride_dh, stride_ds, 1, CONSUMERS, D, BLOCK_M, STAGES, GROUP, IS_CAUSAL, NEAR, IN_REGISTERS)),
                (_add, (grads, queries, stats, keys, values, own_ready, own_free, ready, free, grad_key_ptr, grad_value_ptr, spread,
                        program, programs, works, key_tiles, key_heads, grad_scale, scale, span, center, query_length, key_length,
                        stride_db, stride_dh, stride_ds, 2, CONSUMERS, D, BLOCK_M, STAGES, GROUP, IS_CAUSAL, NEAR, IN_REGISTERS)),
                (_copy, (grad_desc, query_desc, stats_desc, key_desc, value_desc, grads, queries, stats, keys, values, own_ready,
                         own_free, ready, free, program, programs, works, key_tiles, key_heads, span, query_length, key_length,
                         CONSUMERS, BLOCK_M, STAGES, GROUP, IS_CAUSAL, NEAR)),
            ],
            [4, 4, 1],
            [160, 160, 24],
        )  # fmt: skip
    else:
        gl.warp_specialize(
            [
                (_add, (grads, queries, stats, keys, values, own_ready, own_free, ready, free, grad_key_ptr, grad_value_ptr, spread,
                        program, programs, works, key_tiles, key_heads, grad_scale, scale, span, center, query_length, key_length,
                        stride_db, stride_dh, stride_ds, 0, CONSUMERS, D, BLOCK_M, STAGES, GROUP, IS_CAUSAL, NEAR, IN_REGISTERS)),
                (_add, (grads, queries, stats, keys, values, own_ready, own_free, ready, free, grad_key_ptr, grad_value_ptr, spread,
                        program, programs, works, key_tiles, key_heads, grad_scale, scale, span, center, query_length, key_length,
                        stride_db, stride_dh, stride_ds, 1, CONSUMERS, D, BLOCK_M, STAGES, GROUP, IS_CAUSAL, NEAR, IN_REGISTERS)),
                (_copy, (grad_desc, query_desc, stats_desc, key_desc, value_desc, grads, queries, stats, keys, values, own_ready,
                         own_free, ready, free, program, programs, works, key_tiles, key_heads, span, query_length, key_length,
                         CONSUMERS, BLOCK_M, STAGES, GROUP, IS_CAUSAL, NEAR)),
            ],
            [4, 1],
            [240, 24],
        )  # fmt: skip
