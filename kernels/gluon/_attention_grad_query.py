"""How does the gradient of the queries run on Hopper, by hand? As _attention_grad_key_value.py, with queries and keys exchanged.

Two or three warpgroups add up dQ for 64 queries each, and a warp copies tiles of keys and values:

    a step    S = Q K_i^T and dP = dO V_i^T; P and dS are computed; dQ += dS K_i

It also writes each row's log-sum-exp, in the scores' units, and delta for the other kernel. For a tile of 64 queries, 64 keys and
D = 64 a multiprocessor needs 384 clocks for its products, 256 for its exponentials, and about 230 to issue 4 warps' instructions.
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

ROWS = gl.constexpr(64)  # queries of a warpgroup: one instruction's
_COPIES = gl.constexpr(4)  # of a head's bias, as _attention_relative.py describes them
_LOG2E = gl.constexpr(1.4426950408889634)
_LARGEST_LSE = gl.constexpr(2.0**20)  # as in Triton's kernel


@gluon.jit
def _walk(
    first_query, span, query_length, key_length,
    QUERIES: gl.constexpr, BLOCK_N: gl.constexpr, FEW: gl.constexpr, IS_CAUSAL: gl.constexpr, NEAR: gl.constexpr,
):  # fmt: skip
    """(count, masked, near, near_end, passes): how many tiles of keys there are, and how many of them, the last ones, have a
    mask; those in which T5's bias differs from pair to pair; how often all are visited."""
    shift = key_length - query_length
    end, full_end = key_length, key_length
    if IS_CAUSAL:
        end = gl.minimum(end, first_query + QUERIES + shift)
        full_end = gl.minimum(end, first_query + shift + 1)
    count = gl.cdiv(end, BLOCK_N)
    masked = count - full_end // BLOCK_N
    near, near_end = 0, 0
    if NEAR:
        near = gl.cdiv(gl.maximum(first_query + shift - span - BLOCK_N + 2, 0), BLOCK_N)
        near = gl.minimum(near, count - masked)
        near_end = gl.cdiv(gl.maximum(first_query + shift + QUERIES - 1 + span, 0), BLOCK_N)
        near_end = gl.minimum(gl.maximum(near_end, near), count - masked)
    passes = 1
    if FEW > 0:
        passes = gl.where(full_end <= FEW, 2, 1)
    return count, masked, near, near_end, passes


@gluon.jit
def _start(i, count, masked, near, near_end, BLOCK_N: gl.constexpr):
    """The first key of the tile that comes i-th: tiles with a mask, last first, then far ones, near ones."""
    k = i - masked
    whole = gl.where(k < near, k, k + near_end - near)
    far = count - masked - (near_end - near)
    whole = gl.where(k < far, whole, near + k - far)
    return gl.where(k < 0, count - 1 - i, whole) * BLOCK_N


@gluon.jit
def _place(work, tiles, heads, QUERIES: gl.constexpr):
    """(batch, head, first query). Under a causal mask late tiles have the most keys."""
    return work // tiles // heads, work // tiles % heads, (tiles - 1 - work % tiles) * QUERIES


@gluon.jit
def _copy(
    grad_desc, query_desc, out_desc, key_desc, value_desc, grads, queries, outs, keys, values, own_ready, own_free, ready, free,
    program, programs, works, tiles, heads, span, query_length, key_length,
    CONSUMERS: gl.constexpr, BLOCK_N: gl.constexpr, STAGES: gl.constexpr, GROUP: gl.constexpr, FEW: gl.constexpr,
    IS_CAUSAL: gl.constexpr, NEAR: gl.constexpr,
):  # fmt: skip
    """The warp that copies, in the order in which _add() reads. Rows behind a tensor's end become zeros."""
    n, item = 0, 0
    for work in range(program, works, programs):
        batch, head, first_query = _place(work, tiles, heads, CONSUMERS * ROWS)
        mbarrier.wait(own_free, item % 2 ^ 1)
        mbarrier.expect(own_ready, 3 * CONSUMERS * query_desc.block_type.nbytes)
        for c in gl.static_range(CONSUMERS):
            place = [batch, head, first_query + c * ROWS, 0]
            tma.async_copy_global_to_shared(query_desc, place, own_ready, queries.index(c))
            tma.async_copy_global_to_shared(grad_desc, place, own_ready, grads.index(c))
            tma.async_copy_global_to_shared(out_desc, place, own_ready, outs.index(c))
        count, masked, near, near_end, passes = _walk(
            first_query, span, query_length, key_length, CONSUMERS * ROWS, BLOCK_N, FEW, IS_CAUSAL, NEAR
        )
        for i in range(passes * count):
            start = _start(i % count, count, masked, near, near_end, BLOCK_N)
            stage = n % STAGES
            mbarrier.wait(free.index(stage), n // STAGES % 2 ^ 1)
            mbarrier.expect(ready.index(stage), key_desc.block_type.nbytes + value_desc.block_type.nbytes)
            place = [batch, head // GROUP, start, 0]
            tma.async_copy_global_to_shared(key_desc, place, ready.index(stage), keys.index(stage))
            tma.async_copy_global_to_shared(value_desc, place, ready.index(stage), values.index(stage))
            n += 1
        item += 1


@gluon.jit
def _first_scores(spread, corner, center, NEAR: gl.constexpr, BLOCK_N: gl.constexpr):
    """(ROWS, BLOCK_N): what the scores start from. With NEAR, element (i, j) is the bias of distance corner + j - i."""
    S: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, BLOCK_N, 16])
    if NEAR:
        first = gl.minimum(gl.maximum(corner, ROWS - center), center - BLOCK_N) + center
        row = first - gl.arange(0, ROWS, gl.SliceLayout(1, S))
        place = row % 2 * (2 * center) + row // 2 * 2  # of the two copies the one in which this address is even
        return gl.load(spread + place[:, None] + gl.arange(0, BLOCK_N, gl.SliceLayout(0, S))[None, :])
    else:
        return gl.zeros([ROWS, BLOCK_N], gl.float32, S)


@gluon.jit
def _p(
    s, lse, start, far, scale, first_query, shift, key_length,
    BLOCK_N: gl.constexpr, IS_CAUSAL: gl.constexpr, MASKED: gl.constexpr,
):  # fmt: skip
    S: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, BLOCK_N, 16])
    lse = gl.convert_layout(lse, gl.SliceLayout(1, S))
    if MASKED:
        i = first_query + gl.arange(0, ROWS, gl.SliceLayout(1, S))
        j = start + gl.arange(0, BLOCK_N, gl.SliceLayout(0, S))
        last = gl.full([ROWS], key_length - 1, gl.int32, gl.SliceLayout(1, S))
        if IS_CAUSAL:
            last = gl.minimum(last, i + shift)
        s = gl.where(j[None, :] <= last[:, None], s, float("-inf"))
    return gl.exp2(s * scale - (lse - far)[:, None])


@gluon.jit
def _pairs(
    query, grad, lse, keys, values, ready, spread, n, start, far, scale, first_query, shift, key_length, center,
    D: gl.constexpr, BLOCK_N: gl.constexpr, STAGES: gl.constexpr, IS_CAUSAL: gl.constexpr, LATE: gl.constexpr,
    HALVES: gl.constexpr, NEAR: gl.constexpr, MASKED: gl.constexpr,
):  # fmt: skip
    """(P, dP) of one tile of keys, the n-th that this program visits. `far` is a bias of all pairs, in the units of scale * s."""
    S: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, BLOCK_N, 16])
    stage = n % STAGES
    s = _first_scores(spread, start - shift - first_query, center, NEAR, BLOCK_N)
    mbarrier.wait(ready.index(stage), n // STAGES % 2)
    key, value = keys.index(stage).reshape([BLOCK_N, D]), values.index(stage).reshape([BLOCK_N, D])
    scores = warpgroup_mma(query, key.permute([1, 0]), s, use_acc=NEAR, is_async=True)
    if LATE:
        s = warpgroup_mma_wait(0, [scores])
    zero = gl.zeros([ROWS, BLOCK_N], gl.float32, S)
    product = warpgroup_mma(grad, value.permute([1, 0]), zero, use_acc=False, is_async=True)
    if not LATE:
        s = warpgroup_mma_wait(1, [scores])
    p = _p(s, lse, start, far, scale, first_query, shift, key_length, BLOCK_N, IS_CAUSAL, MASKED)
    return p, warpgroup_mma_wait(0, [product])


@gluon.jit
def _step(
    grad_query, query, grad, lse, delta, keys, values, ready, free, spread, n, start, far, scale, first_query, shift, key_length,
    center,
    D: gl.constexpr, BLOCK_N: gl.constexpr, STAGES: gl.constexpr, IS_CAUSAL: gl.constexpr, LATE: gl.constexpr,
    HALVES: gl.constexpr, NEAR: gl.constexpr, MASKED: gl.constexpr,
):  # fmt: skip
    A: gl.constexpr = gl.DotOperandLayout(0, gl.NVMMADistributedLayout([3, 0], [4, 1], [16, D, 16]), 2)
    HALF: gl.constexpr = BLOCK_N // 2
    if HALVES:
        stage = n % STAGES
        s0 = _first_scores(spread, start - shift - first_query, center, NEAR, HALF)
        s1 = _first_scores(spread, start + HALF - shift - first_query, center, NEAR, HALF)
        zero = gl.zeros([ROWS, HALF], gl.float32, gl.NVMMADistributedLayout([3, 0], [4, 1], [16, HALF, 16]))
        mbarrier.wait(ready.index(stage), n // STAGES % 2)
        key, value = keys.index(stage).reshape([BLOCK_N, D]), values.index(stage).reshape([BLOCK_N, D])
        key0, key1, value0, value1 = key.slice(0, HALF), key.slice(HALF, HALF), value.slice(0, HALF), value.slice(HALF, HALF)
        scores0 = warpgroup_mma(query, key0.permute([1, 0]), s0, use_acc=NEAR, is_async=True)
        product0 = warpgroup_mma(grad, value0.permute([1, 0]), zero, use_acc=False, is_async=True)
        scores1 = warpgroup_mma(query, key1.permute([1, 0]), s1, use_acc=NEAR, is_async=True)
        product1 = warpgroup_mma(grad, value1.permute([1, 0]), zero, use_acc=False, is_async=True)
        s0, dp = warpgroup_mma_wait(2, [scores0, product0])
        p = _p(s0, lse, start, far, scale, first_query, shift, key_length, HALF, IS_CAUSAL, MASKED)
        ds = gl.convert_layout((p * (dp - gl.convert_layout(delta, gl.SliceLayout(1, gl.NVMMADistributedLayout([3, 0], [4, 1], [16, HALF if HALVES else BLOCK_N, 16])))[:, None])).to(keys.dtype), A)
        grad_query = warpgroup_mma(ds, key0, grad_query, is_async=True)
        s1, dp = warpgroup_mma_wait(1, [scores1, product1])
        p = _p(s1, lse, start + HALF, far, scale, first_query, shift, key_length, HALF, IS_CAUSAL, MASKED)
        ds = gl.convert_layout((p * (dp - gl.convert_layout(delta, gl.SliceLayout(1, gl.NVMMADistributedLayout([3, 0], [4, 1], [16, HALF if HALVES else BLOCK_N, 16])))[:, None])).to(keys.dtype), A)
        grad_query = warpgroup_mma(ds, key1, grad_query, is_async=True)
        grad_query = warpgroup_mma_wait(0, [grad_query])
        mbarrier.arrive(free.index(stage))
    else:
        p, dp = _pairs(
            query, grad, lse, keys, values, ready, spread, n, start, far, scale, first_query, shift, key_length, center, D, BLOCK_N,
            STAGES, IS_CAUSAL, LATE, HALVES, NEAR, MASKED,
        )  # fmt: skip
        ds = gl.convert_layout((p * (dp - gl.convert_layout(delta, gl.SliceLayout(1, gl.NVMMADistributedLayout([3, 0], [4, 1], [16, HALF if HALVES else BLOCK_N, 16])))[:, None])).to(keys.dtype), A)
        grad_query = warpgroup_mma(ds, keys.index(n % STAGES).reshape([BLOCK_N, D]), grad_query)
        mbarrier.arrive(free.index(n % STAGES))
    return grad_query


@gluon.jit
def _add(
    grads, queries, outs, keys, values, own_ready, own_free, ready, free, lse_ptr, stats_ptr, grad_query_ptr, spread_ptr, program,
    programs, works, tiles, heads, grad_scale, scale, span, center, query_length, key_length, stride_stats, stride_db, stride_dh,
    stride_ds,
    WHICH: gl.constexpr, CONSUMERS: gl.constexpr, D: gl.constexpr, BLOCK_N: gl.constexpr, STAGES: gl.constexpr,
    GROUP: gl.constexpr, FEW: gl.constexpr, IS_CAUSAL: gl.constexpr, NEAR: gl.constexpr, IN_REGISTERS: gl.constexpr, LATE: gl.constexpr, HALVES: gl.constexpr,
):  # fmt: skip
    """A warpgroup that adds up, for its 64 queries of each of the program's tiles."""
    O: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, D, 16])
    S: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, BLOCK_N, 16])
    A: gl.constexpr = gl.DotOperandLayout(0, S, 2)
    ROW: gl.constexpr = gl.SliceLayout(1, S)
    WIDE: gl.constexpr = gl.BlockedLayout([1, 8], [256 // D, D // 8], [4, 1], [1, 0])  # 16 bytes a thread
    QUERIES: gl.constexpr = CONSUMERS * ROWS
    shift = key_length - query_length
    n, item = 0, 0
    for work in range(program, works, programs):
        batch, head, first_of_tile = _place(work, tiles, heads, QUERIES)
        first_query = first_of_tile + WHICH * ROWS
        count, masked, near, near_end, passes = _walk(
            first_of_tile, span, query_length, key_length, QUERIES, BLOCK_N, FEW, IS_CAUSAL, NEAR
        )
        flat_head = (batch * heads + head).to(gl.int64)
        i = first_query + gl.arange(0, ROWS, ROW)
        live = i < query_length
        lse = gl.load(lse_ptr + flat_head * query_length + i, mask=live, other=float("inf"))
        lse = gl.where(gl.abs(lse) > _LARGEST_LSE, float("inf"), lse) * _LOG2E
        spread, far_before, far_after = spread_ptr, 0.0, 0.0
        if NEAR:
            spread = spread_ptr + head * (_COPIES * 2 * center)
            far_before = gl.load(spread + center - span) * scale
            far_after = gl.load(spread + center + span) * scale
        query, grad = queries.index(WHICH).reshape([ROWS, D]), grads.index(WHICH).reshape([ROWS, D])
        mbarrier.wait(own_ready, item % 2)
        of_out = outs.index(WHICH).reshape([ROWS, D]).load(A).to(gl.float32)
        of_grad = grad.load(A)
        delta = gl.convert_layout(gl.sum(of_out * of_grad.to(gl.float32), 1), ROW)
        if IN_REGISTERS:
            query, grad = query.load(A), of_grad
            mbarrier.arrive(own_free)
        if FEW > 0:  # noqa: SIM102 - FEW is known to the compiler
            # Rows that see few keys take delta from the same probabilities, as in Triton's kernel.
            if passes == 2:
                p_sum, dp_sum = gl.zeros([ROWS], gl.float32, ROW), gl.zeros([ROWS], gl.float32, ROW)
                for k in range(count):
                    start = _start(k, count, masked, near, near_end, BLOCK_N)
                    p, dp = _pairs(
                        query, grad, lse, keys, values, ready, spread, n + k, start, 0.0, scale, first_query, shift, key_length,
                        center, D, BLOCK_N, STAGES, IS_CAUSAL, LATE, HALVES, NEAR, True,
                    )  # fmt: skip
                    mbarrier.arrive(free.index((n + k) % STAGES))
                    p_sum += gl.sum(p, 1)
                    dp_sum += gl.sum(p * dp, 1)
                delta = dp_sum / gl.where(p_sum == 0.0, 1.0, p_sum)
                n += count
        stats = stats_ptr + 2 * (flat_head * stride_stats + i)
        gl.store(stats, lse, mask=live)
        gl.store(stats + 1, delta, mask=live)
        grad_query = gl.zeros([ROWS, D], gl.float32, O)
        for k in range(masked):
            start = _start(k, count, masked, near, near_end, BLOCK_N)
            grad_query = _step(
                grad_query, query, grad, lse, delta, keys, values, ready, free, spread, n + k, start, 0.0, scale, first_query,
                shift, key_length, center, D, BLOCK_N, STAGES, IS_CAUSAL, LATE, HALVES, NEAR, True,
            )  # fmt: skip
        for k in range(masked, count - (near_end - near)):
            start = _start(k, count, masked, near, near_end, BLOCK_N)
            far = gl.where(start < near * BLOCK_N, far_before, far_after)
            grad_query = _step(
                grad_query, query, grad, lse, delta, keys, values, ready, free, spread, n + k, start, far, scale, first_query,
                shift, key_length, center, D, BLOCK_N, STAGES, IS_CAUSAL, LATE, HALVES, False, False,
            )  # fmt: skip
        if NEAR:
            for k in range(count - (near_end - near), count):
                start = _start(k, count, masked, near, near_end, BLOCK_N)
                grad_query = _step(
                    grad_query, query, grad, lse, delta, keys, values, ready, free, spread, n + k, start, 0.0, scale, first_query,
                    shift, key_length, center, D, BLOCK_N, STAGES, IS_CAUSAL, LATE, HALVES, True, False,
                )  # fmt: skip
        n += count
        if not IN_REGISTERS:
            mbarrier.arrive(own_free)
        found = gl.convert_layout((grad_query * grad_scale).to(keys.dtype), WIDE)
        i = first_query + gl.arange(0, ROWS, gl.SliceLayout(1, WIDE))
        columns = gl.arange(0, D, gl.SliceLayout(0, WIDE))
        to = grad_query_ptr + batch.to(gl.int64) * stride_db + head.to(gl.int64) * stride_dh
        gl.store(to + (i.to(gl.int64) * stride_ds)[:, None] + columns[None, :], found, mask=(i < query_length)[:, None])
        item += 1


@gluon.jit(do_not_specialize=["span", "center", "stride_stats", "heads", "query_length", "key_length", "works"])
def grad_query_kernel(
    grad_desc, query_desc, out_desc, key_desc, value_desc, lse_ptr, spread_ptr, stats_ptr, grad_query_ptr, grad_scale, scale,
    span, center, stride_stats, stride_db, stride_dh, stride_ds, heads, query_length, key_length, works,
    CONSUMERS: gl.constexpr, D: gl.constexpr, BLOCK_N: gl.constexpr, STAGES: gl.constexpr, GROUP: gl.constexpr,
    FEW: gl.constexpr, IS_CAUSAL: gl.constexpr, IN_REGISTERS: gl.constexpr, LATE: gl.constexpr, HALVES: gl.constexpr,
):  # fmt: skip
    """A grid of any size shares `works` = query tiles * B * heads tiles. The descriptors have blocks (1, 1, ROWS or BLOCK_N, D).
    A head has stride_stats rows of stats. With spread_ptr the scores start at T5's bias divided by the scale."""
    dtype: gl.constexpr = query_desc.dtype
    NEAR: gl.constexpr = spread_ptr is not None
    program, programs = gl.program_id(0), gl.num_programs(0)
    tiles = gl.cdiv(query_length, CONSUMERS * ROWS)
    spread = stats_ptr  # a partition takes no None
    if NEAR:
        spread = spread_ptr
    queries = gl.allocate_shared_memory(dtype, [CONSUMERS, 1, 1, ROWS, D], query_desc.layout)
    grads = gl.allocate_shared_memory(dtype, [CONSUMERS, 1, 1, ROWS, D], grad_desc.layout)
    outs = gl.allocate_shared_memory(dtype, [CONSUMERS, 1, 1, ROWS, D], out_desc.layout)
    keys = gl.allocate_shared_memory(dtype, [STAGES, 1, 1, BLOCK_N, D], key_desc.layout)
    values = gl.allocate_shared_memory(dtype, [STAGES, 1, 1, BLOCK_N, D], value_desc.layout)
    own_ready = gl.allocate_shared_memory(gl.int64, [1], mbarrier.MBarrierLayout())
    own_free = gl.allocate_shared_memory(gl.int64, [1], mbarrier.MBarrierLayout())
    ready = gl.allocate_shared_memory(gl.int64, [STAGES, 1], mbarrier.MBarrierLayout())
    free = gl.allocate_shared_memory(gl.int64, [STAGES, 1], mbarrier.MBarrierLayout())
    mbarrier.init(own_ready, 1)
    mbarrier.init(own_free, CONSUMERS)
    for i in gl.static_range(STAGES):
        mbarrier.init(ready.index(i), 1)
        mbarrier.init(free.index(i), CONSUMERS)
    fence_async_shared()  # the copy engine sees the barriers
    if CONSUMERS == 3:
        gl.warp_specialize(
            [
                (_add, (grads, queries, outs, keys, values, own_ready, own_free, ready, free, lse_ptr, stats_ptr, grad_query_ptr,
                        spread, program, programs, works, tiles, heads, grad_scale, scale, span, center, query_length, key_length,
                        stride_stats, stride_db, stride_dh, stride_ds, 0, CONSUMERS, D, BLOCK_N, STAGES, GROUP, FEW, IS_CAUSAL,
                        NEAR, IN_REGISTERS, LATE, HALVES)),
                (_add, (grads, queries, outs, keys, values, own_ready, own_free, ready, free, lse_ptr, stats_ptr, grad_query_ptr,
                        spread, program, programs, works, tiles, heads, grad_scale, scale, span, center, query_length, key_length,
                        stride_stats, stride_db, stride_dh, stride_ds, 1, CONSUMERS, D, BLOCK_N, STAGES, GROUP, FEW, IS_CAUSAL,
                        NEAR, IN_REGISTERS, LATE, HALVES)),
                (_add, (grads, queries, outs, keys, values, own_ready, own_free, ready, free, lse_ptr, stats_ptr, grad_query_ptr,
                        spread, program, programs, works, tiles, heads, grad_scale, scale, span, center, query_length, key_length,
                        stride_stats, stride_db, stride_dh, stride_ds, 2, CONSUMERS, D, BLOCK_N, STAGES, GROUP, FEW, IS_CAUSAL,
                        NEAR, IN_REGISTERS, LATE, HALVES)),
                (_copy, (grad_desc, query_desc, out_desc, key_desc, value_desc, grads, queries, outs, keys, values, own_ready,
                         own_free, ready, free, program, programs, works, tiles, heads, span, query_length, key_length, CONSUMERS,
                         BLOCK_N, STAGES, GROUP, FEW, IS_CAUSAL, NEAR)),
            ],
            [4, 4, 1],
            [152, 152, 56],
        )  # fmt: skip
    else:
        gl.warp_specialize(
            [
                (_add, (grads, queries, outs, keys, values, own_ready, own_free, ready, free, lse_ptr, stats_ptr, grad_query_ptr,
                        spread, program, programs, works, tiles, heads, grad_scale, scale, span, center, query_length, key_length,
                        stride_stats, stride_db, stride_dh, stride_ds, 0, CONSUMERS, D, BLOCK_N, STAGES, GROUP, FEW, IS_CAUSAL,
                        NEAR, IN_REGISTERS, LATE, HALVES)),
                (_add, (grads, queries, outs, keys, values, own_ready, own_free, ready, free, lse_ptr, stats_ptr, grad_query_ptr,
                        spread, program, programs, works, tiles, heads, grad_scale, scale, span, center, query_length, key_length,
                        stride_stats, stride_db, stride_dh, stride_ds, 1, CONSUMERS, D, BLOCK_N, STAGES, GROUP, FEW, IS_CAUSAL,
                        NEAR, IN_REGISTERS, LATE, HALVES)),
                (_copy, (grad_desc, query_desc, out_desc, key_desc, value_desc, grads, queries, outs, keys, values, own_ready,
                         own_free, ready, free, program, programs, works, tiles, heads, span, query_length, key_length, CONSUMERS,
                         BLOCK_N, STAGES, GROUP, FEW, IS_CAUSAL, NEAR)),
            ],
            [4, 1],
            [240, 24],
        )  # fmt: skip
