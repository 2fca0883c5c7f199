"""How does the gradient of the queries run on Hopper, by hand? As _attention_grad_key_value.py, with queries and keys swapped.

A program has 12 warps and one tile of 128 queries after another. Two warpgroups add up dQ for 64 of the queries each; a warp
copies queries, outputs and their cotangents, and tiles of 128 keys and values, into shared memory (TMA):

    started    S = Q K^T    dP = dO V^T                dQ += dS K
    computed                P             dS

Each row's log-sum-exp, in units of log2, and delta are written for the other kernel. For 128 x 128 scores and D = 64 a
multiprocessor needs 1536 clocks for its products (4096 FLOP a clock), 1024 for its exponentials (16 a clock), and about 720 to
issue 8 warps' instructions. An H100 took 347 us for B8 H16 S2048 D64: 594 TFLOP/s. Triton's kernel took 439, and 374 with its
best tile. Halves of a tile with turns, as in the forward, took 336.
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

GROUPS = gl.constexpr(2)  # warpgroups that add up
ROWS = gl.constexpr(64)  # rows of a warpgroup: one instruction's
TILE = gl.constexpr(128)  # the columns of a step
SCORES = gl.constexpr(gl.NVMMADistributedLayout([3, 0], [4, 1], [16, 128, 16]))  # (ROWS, TILE)
COPIES = gl.constexpr(4)  # of a head's bias, as _attention_relative.py describes them
LN2 = gl.constexpr(0.6931471805599453)
_LOG2E = gl.constexpr(1.4426950408889634)
_LARGEST_LSE = gl.constexpr(2.0**20)  # as in Triton's kernel


@gluon.jit
def first_scores(spread, corner, center, NEAR: gl.constexpr, COLUMNS: gl.constexpr):
    """(ROWS, COLUMNS): what the scores start from. With NEAR, element (i, j) is the bias of distance corner + j - i."""
    S: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, COLUMNS, 16])
    if NEAR:
        first = gl.minimum(gl.maximum(corner, ROWS - center), center - COLUMNS) + center
        row = first - gl.arange(0, ROWS, gl.SliceLayout(1, S))
        place = row % 2 * (2 * center) + row // 2 * 2  # of the two copies the one in which this address is even
        j = gl.arange(0, COLUMNS, gl.SliceLayout(0, S))  # to a thread j // 8 is a constant, and it has two j % 8
        return gl.load(spread + (place[:, None] + (j % 8)[None, :]) + (j // 8 * 8)[None, :])
    else:
        return gl.zeros([ROWS, COLUMNS], gl.float32, S)


@gluon.jit
def work_of(k, IS_CAUSAL: gl.constexpr):
    """The k-th of a program's tiles, by number. Under a causal mask programs take turns in the other direction each time: tiles
    have different numbers of pairs, and an H100's busiest program of 132 would have 19% more than the mean (B8 H16 S2048)."""
    program, programs = gl.program_id(0), gl.num_programs(0)
    if IS_CAUSAL:
        program = gl.where(k % 2 == 0, program, programs - 1 - program)
    return k * programs + program


@gluon.jit
def count_of_works(works, IS_CAUSAL: gl.constexpr):
    rounds = works // gl.num_programs(0)
    return rounds + gl.where(work_of(rounds, IS_CAUSAL) < works, 1, 0)


@gluon.jit
def _walk(
    first_query, span, query_length, key_length, FEW: gl.constexpr, IS_CAUSAL: gl.constexpr, NEAR: gl.constexpr
):  # fmt: skip
    """(count, masked, near, near_end, passes): the number of tiles of keys, and of those with a mask, which are the last; the
    tiles in which T5's bias differs from pair to pair; how often all are visited."""
    shift = key_length - query_length
    end, full_end = key_length, key_length
    if IS_CAUSAL:
        end = gl.minimum(end, first_query + GROUPS * ROWS + shift)
        full_end = gl.minimum(end, first_query + shift + 1)
    count = gl.cdiv(end, TILE)
    masked = count - full_end // TILE
    near, near_end = 0, 0
    if NEAR:
        near = gl.cdiv(gl.maximum(first_query + shift - span - TILE + 2, 0), TILE)
        near = gl.minimum(near, count - masked)
        near_end = gl.cdiv(gl.maximum(first_query + shift + GROUPS * ROWS - 1 + span, 0), TILE)
        near_end = gl.minimum(gl.maximum(near_end, near), count - masked)
    passes = 1
    if FEW > 0:
        passes = gl.where(full_end <= FEW, 2, 1)
    return count, masked, near, near_end, passes


@gluon.jit
def _start(i, count, masked, near, near_end):
    """The first key of the tile that comes i-th: tiles with a mask, last first, then far ones, near ones."""
    k = i - masked
    far = count - masked - (near_end - near)
    whole = gl.where(k < near, k, k + near_end - near)
    whole = gl.where(k < far, whole, near + k - far)
    return gl.where(k < 0, count - 1 - i, whole) * TILE


@gluon.jit
def _place(work, tiles, heads):
    """(batch, head, first query). Under a causal mask late tiles have the most keys."""
    return work // tiles // heads, work // tiles % heads, (tiles - 1 - work % tiles) * (GROUPS * ROWS)


@gluon.jit
def _copy(
    grad_desc, query_desc, out_desc, key_desc, value_desc, grads, queries, outs, keys, values, own_ready, own_free, ready, free,
    works, tiles, heads, span, query_length, key_length,
    STAGES: gl.constexpr, GROUP: gl.constexpr, FEW: gl.constexpr, IS_CAUSAL: gl.constexpr, NEAR: gl.constexpr,
):  # fmt: skip
    """The warp that copies, in the order in which _add() reads. Rows behind a tensor's end become zeros."""
    n = 0
    for item in range(count_of_works(works, IS_CAUSAL)):
        work = work_of(item, IS_CAUSAL)
        batch, head, first_query = _place(work, tiles, heads)
        mbarrier.wait(own_free, item % 2 ^ 1)
        mbarrier.expect(own_ready, 3 * GROUPS * query_desc.block_type.nbytes)
        for group in gl.static_range(GROUPS):
            place = [batch, head, first_query + group * ROWS, 0]
            tma.async_copy_global_to_shared(query_desc, place, own_ready, queries.index(group))
            tma.async_copy_global_to_shared(grad_desc, place, own_ready, grads.index(group))
            tma.async_copy_global_to_shared(out_desc, place, own_ready, outs.index(group))
        count, masked, near, near_end, passes = _walk(first_query, span, query_length, key_length, FEW, IS_CAUSAL, NEAR)
        for i in range(passes * count):
            start = _start(i % count, count, masked, near, near_end)
            stage = n % STAGES
            mbarrier.wait(free.index(stage), n // STAGES % 2 ^ 1)
            mbarrier.expect(ready.index(stage), key_desc.block_type.nbytes + value_desc.block_type.nbytes)
            place = [batch, head // GROUP, start, 0]
            tma.async_copy_global_to_shared(key_desc, place, ready.index(stage), keys.index(stage))
            tma.async_copy_global_to_shared(value_desc, place, ready.index(stage), values.index(stage))
            n += 1


@gluon.jit
def _step(
    grad_query, p_sum, dp_sum, query, grad, lse, delta, keys, values, ready, free, spread, n, start, far, scale, first_query,
    shift, key_length, center,
    D: gl.constexpr, STAGES: gl.constexpr, IS_CAUSAL: gl.constexpr, NEAR: gl.constexpr, MASKED: gl.constexpr,
    SUMS: gl.constexpr,
):  # fmt: skip
    """Adds one tile of keys, the n-th that this program visits, to grad_query. With SUMS it adds each row's P and P dP to the
    sums instead. `far` is a bias of all pairs, in the units of scale * s."""
    A: gl.constexpr = gl.DotOperandLayout(0, gl.NVMMADistributedLayout([3, 0], [4, 1], [16, D, 16]), 2)
    stage = n % STAGES
    s = first_scores(spread, start - shift - first_query, center, NEAR, TILE)
    mbarrier.wait(ready.index(stage), n // STAGES % 2)
    key, value = keys.index(stage).reshape([TILE, D]), values.index(stage).reshape([TILE, D])
    scores = warpgroup_mma(query, key.permute([1, 0]), s, use_acc=NEAR, is_async=True)
    zero = gl.zeros([ROWS, TILE], gl.float32, SCORES)
    product = warpgroup_mma(grad, value.permute([1, 0]), zero, use_acc=False, is_async=True)
    s = warpgroup_mma_wait(1, [scores])
    if MASKED:
        j = gl.arange(0, TILE, gl.SliceLayout(0, SCORES))
        last = gl.full([ROWS], key_length - 1 - start, gl.int32, gl.SliceLayout(1, SCORES))
        if IS_CAUSAL:
            i = first_query + gl.arange(0, ROWS, gl.SliceLayout(1, SCORES))
            last = gl.minimum(last, i + (shift - start))
        # To a thread j // 8 is a constant, and it has two j % 8.
        s = gl.where((j // 8 * 8)[None, :] <= last[:, None] - (j % 8)[None, :], s, float("-inf"))
    p = gl.exp2(s * scale - (lse - far)[:, None])
    dp = warpgroup_mma_wait(0, [product])
    if SUMS:
        p_sum, dp_sum = p_sum + gl.sum(p, 1), dp_sum + gl.sum(p * dp, 1)
    else:
        ds = gl.convert_layout((p * (dp - delta[:, None])).to(keys.dtype), A)
        grad_query = warpgroup_mma(ds, key, grad_query)
    mbarrier.arrive(free.index(stage))
    return grad_query, p_sum, dp_sum


@gluon.jit
def _add(
    grads, queries, outs, keys, values, own_ready, own_free, ready, free, lse_ptr, stats_ptr, grad_query_ptr, spread_ptr, works,
    tiles, heads, scale, span, center, query_length, key_length, stride_stats,
    WHICH: gl.constexpr, D: gl.constexpr, STAGES: gl.constexpr, GROUP: gl.constexpr, FEW: gl.constexpr, IS_CAUSAL: gl.constexpr,
    NEAR: gl.constexpr,
):  # fmt: skip
    """A warpgroup that adds up, for its 64 queries of each of the program's tiles."""
    O: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, D, 16])
    A: gl.constexpr = gl.DotOperandLayout(0, SCORES, 2)
    ROW: gl.constexpr = gl.SliceLayout(1, SCORES)
    WIDE: gl.constexpr = gl.BlockedLayout([1, 8], [256 // D, D // 8], [4, 1], [1, 0])  # 16 bytes a thread
    shift = key_length - query_length
    n = 0
    for item in range(count_of_works(works, IS_CAUSAL)):
        work = work_of(item, IS_CAUSAL)
        batch, head, first_query = _place(work, tiles, heads)
        count, masked, near, near_end, passes = _walk(first_query, span, query_length, key_length, FEW, IS_CAUSAL, NEAR)
        first_query += WHICH * ROWS
        flat_head = (batch * heads + head).to(gl.int64)
        i = first_query + gl.arange(0, ROWS, ROW)
        live = i < query_length
        lse = gl.load(lse_ptr + flat_head * query_length + i, mask=live, other=float("inf"))
        lse = gl.where(gl.abs(lse) > _LARGEST_LSE, float("inf"), lse) * _LOG2E
        spread, far_before, far_after = spread_ptr, 0.0, 0.0
        if NEAR:
            spread = spread_ptr + head * (COPIES * 2 * center)
            far_before = gl.load(spread + center - span) * scale
            far_after = gl.load(spread + center + span) * scale
        mbarrier.wait(own_ready, item % 2)
        # In registers: two operands in shared memory are all that it can deliver to products of 64 columns.
        query = queries.index(WHICH).reshape([ROWS, D]).load(A)
        grad = grads.index(WHICH).reshape([ROWS, D]).load(A)
        out = outs.index(WHICH).reshape([ROWS, D]).load(A)
        mbarrier.arrive(own_free)
        delta = gl.convert_layout(gl.sum(out.to(gl.float32) * grad.to(gl.float32), 1), ROW)
        grad_query, zeros = gl.zeros([ROWS, D], gl.float32, O), gl.zeros([ROWS], gl.float32, ROW)
        if FEW > 0:  # noqa: SIM102 - FEW is known to the compiler
            # Rows that see few keys take delta from the probabilities, as in Triton's kernel.
            if passes == 2:
                p_sum, dp_sum = zeros, zeros
                for k in range(count):
                    start = _start(k, count, masked, near, near_end)
                    _, p_sum, dp_sum = _step(
                        grad_query, p_sum, dp_sum, query, grad, lse, delta, keys, values, ready, free, spread, n + k, start,
                        0.0, scale, first_query, shift, key_length, center, D, STAGES, IS_CAUSAL, NEAR, True, True,
                    )  # fmt: skip
                delta = dp_sum / gl.where(p_sum == 0.0, 1.0, p_sum)
                n += count
        stats = stats_ptr + 2 * (flat_head * stride_stats + i)
        gl.store(stats, lse, mask=live)
        gl.store(stats + 1, delta, mask=live)
        for k in range(masked):
            start = _start(k, count, masked, near, near_end)
            grad_query, _, _ = _step(
                grad_query, zeros, zeros, query, grad, lse, delta, keys, values, ready, free, spread, n + k, start, 0.0, scale,
                first_query, shift, key_length, center, D, STAGES, IS_CAUSAL, NEAR, True, False,
            )  # fmt: skip
        for k in range(masked, count - (near_end - near)):
            start = _start(k, count, masked, near, near_end)
            far = gl.where(start < near * TILE, far_before, far_after)
            grad_query, _, _ = _step(
                grad_query, zeros, zeros, query, grad, lse, delta, keys, values, ready, free, spread, n + k, start, far, scale,
                first_query, shift, key_length, center, D, STAGES, IS_CAUSAL, False, False, False,
            )  # fmt: skip
        if NEAR:
            for k in range(count - (near_end - near), count):
                start = _start(k, count, masked, near, near_end)
                grad_query, _, _ = _step(
                    grad_query, zeros, zeros, query, grad, lse, delta, keys, values, ready, free, spread, n + k, start, 0.0,
                    scale, first_query, shift, key_length, center, D, STAGES, IS_CAUSAL, True, False, False,
                )  # fmt: skip
        n += count
        found = gl.convert_layout((grad_query * (scale * LN2)).to(keys.dtype), WIDE)
        i = first_query + gl.arange(0, ROWS, gl.SliceLayout(1, WIDE))
        row = ((batch.to(gl.int64) * query_length + i) * heads + head) * D
        columns = gl.arange(0, D, gl.SliceLayout(0, WIDE))
        gl.store(grad_query_ptr + row[:, None] + columns[None, :], found, mask=(i < query_length)[:, None])


@gluon.jit(do_not_specialize=["span", "center", "stride_stats", "heads", "query_length", "key_length", "works"])
def grad_query_kernel(
    grad_desc, query_desc, out_desc, key_desc, value_desc, lse_ptr, spread_ptr, stats_ptr, grad_query_ptr, scale, span, center,
    stride_stats, heads, query_length, key_length, works,
    D: gl.constexpr, STAGES: gl.constexpr, GROUP: gl.constexpr, FEW: gl.constexpr, IS_CAUSAL: gl.constexpr,
):  # fmt: skip
    """A grid of any size shares `works` = query tiles * B * heads tiles. The descriptors have blocks (1, 1, ROWS or TILE, D). A
    head has stride_stats rows of stats. The gradient is stored as (B, S, H, D). With spread_ptr the scores start at T5's bias
    divided by the scale. `scale` is in units of log2. FEW is how many keys are few, or 0."""
    dtype: gl.constexpr = query_desc.dtype
    NEAR: gl.constexpr = spread_ptr is not None
    tiles = gl.cdiv(query_length, GROUPS * ROWS)
    spread = stats_ptr  # a partition takes no None
    if NEAR:
        spread = spread_ptr
    queries = gl.allocate_shared_memory(dtype, [GROUPS, 1, 1, ROWS, D], query_desc.layout)
    grads = gl.allocate_shared_memory(dtype, [GROUPS, 1, 1, ROWS, D], grad_desc.layout)
    outs = gl.allocate_shared_memory(dtype, [GROUPS, 1, 1, ROWS, D], out_desc.layout)
    keys = gl.allocate_shared_memory(dtype, [STAGES, 1, 1, TILE, D], key_desc.layout)
    values = gl.allocate_shared_memory(dtype, [STAGES, 1, 1, TILE, D], value_desc.layout)
    own_ready = gl.allocate_shared_memory(gl.int64, [1], mbarrier.MBarrierLayout())
    own_free = gl.allocate_shared_memory(gl.int64, [1], mbarrier.MBarrierLayout())
    ready = gl.allocate_shared_memory(gl.int64, [STAGES, 1], mbarrier.MBarrierLayout())
    free = gl.allocate_shared_memory(gl.int64, [STAGES, 1], mbarrier.MBarrierLayout())
    mbarrier.init(own_ready, 1)
    mbarrier.init(own_free, GROUPS)
    for i in gl.static_range(STAGES):
        mbarrier.init(ready.index(i), 1)
        mbarrier.init(free.index(i), GROUPS)
    fence_async_shared()  # the copy engine sees the barriers
    gl.warp_specialize(
        [
            (_add, (grads, queries, outs, keys, values, own_ready, own_free, ready, free, lse_ptr, stats_ptr, grad_query_ptr,
                    spread, works, tiles, heads, scale, span, center, query_length, key_length, stride_stats, 0, D, STAGES,
                    GROUP, FEW, IS_CAUSAL, NEAR)),
            (_add, (grads, queries, outs, keys, values, own_ready, own_free, ready, free, lse_ptr, stats_ptr, grad_query_ptr,
                    spread, works, tiles, heads, scale, span, center, query_length, key_length, stride_stats, 1, D, STAGES,
                    GROUP, FEW, IS_CAUSAL, NEAR)),
            (_copy, (grad_desc, query_desc, out_desc, key_desc, value_desc, grads, queries, outs, keys, values, own_ready,
                     own_free, ready, free, works, tiles, heads, span, query_length, key_length, STAGES, GROUP, FEW, IS_CAUSAL,
                     NEAR)),
        ],
        [4, 1],
        [240, 24],
    )  # fmt: skip
