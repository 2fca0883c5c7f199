"""How does attention's forward run on Hopper, by hand? On an H100 it was faster than cuDNN's, but for short sequences.

TFLOP/s in bfloat16, B x H x S x D, in brackets Triton's and cuDNN's: 8x16x2048x64 496 (400, 450), causal 394 (300, 361), with
T5's bias 421 (365, no such); 4x16x2048x128 640 (431, 621), causal 520 (324, 453); 64x12x512x64 345 (311, 364).

A program walks blocks of queries (_attention_schedule.py), of which each of its 2 or 3 warpgroups attends for 64. A warp copies
tiles of keys and values into stages of shared memory (TMA), and barriers in memory say which stage is full and which is free.
It goes on with the next block while the warpgroups end the last. Three warps beside it idle: registers are moved by groups of
four.

    a step    S = Q K_i^T and O += P V_(i-1) start together; while the second runs, P of S is computed

The warpgroups start their products in turn. So one computes exponentials while another's products run.

For a tile of 192 x 128 and D = 64 a multiprocessor needs 1536 clocks for its products (4096 FLOP a clock), as many for its
exponentials (16 a clock), and 1200 to issue 12 warps' instructions. 2500 were measured. What overlaps decides, and what a warp
issues: computing a quarter of the exponentials by polynomials, as on later chips, took 7% more time. What was gained here:

- P crosses the end of the loop as 32-bit numbers. As 16-bit ones each pair was taken apart and joined: 64 instructions of 490.
- Sums of rows stay with a thread until the end. Only maxima need other threads in each step.
- Rows are scaled again only if a maximum grew by more than 2^8, which the exponentials bear.
- An arrival at a barrier stops a warpgroup, so one frees both K_i and V_(i-1).
- ptxas makes products that run on into the next step wait for each other. So each step waits for its own.
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

from pyfused.kernels.gluon._attention_schedule import block, blocks_of_program, start_of

ROWS = gl.constexpr(64)  # queries of a warpgroup: one instruction's
_COPIES = gl.constexpr(4)  # of a head's bias, as _attention_relative.py describes them

# ptxas knows no reason to wait for a product only behind the exponentials, and would wait in front of them. It keeps a store
# in its place. This one never runs: a sum of exponentials is not negative.
_KEEP_ORDER = gl.constexpr(
    "{ .reg .pred never; .reg .b32 nowhere; .reg .f32 sum; mov.b32 nowhere, 0; add.f32 sum, $2, $3; "
    "setp.lt.f32 never, sum, 0f00000000; @never st.shared.f32 [nowhere], sum; mov.b32 $0, $2; mov.b32 $1, $3; }"
)

# $0 to $31 *= $64 to $95, 32 numbers of a thread in two rows, unless a warp's factors are all 1.
_RESCALE = gl.constexpr(
    "{ .reg .pred any, other; setp.neu.f32 any, $64, 0f3F800000; setp.neu.f32 other, $66, 0f3F800000; or.pred any, any, other; "
    "vote.sync.any.pred any, any, 0xffffffff; @!any bra.uni done_${:uid}; "
    + "".join(f"mul.f32 ${i}, ${i}, ${64 + i % 4 // 2 * 2}; " for i in range(32))
    + "done_${:uid}: }"
)
_RESCALE_OPERANDS = gl.constexpr(",".join(["=f"] * 32 + [str(i) for i in range(32)] + ["f"] * 32))
_SLACK = gl.constexpr(8.0)  # rows of exponentials may reach 2^8

# Sums of rows as threads have them: four threads share a row.
_SUMS = gl.constexpr(
    gl.DistributedLinearLayout([[8, 0]], [[0, 1], [0, 2], [1, 0], [2, 0], [4, 0]], [[16, 0], [32, 0]], [], [64, 4])
)


@gluon.jit
def _copy_tile(desc, tiles, ready, n, batch, key_head, start, STAGES: gl.constexpr):
    stage = n % STAGES
    mbarrier.expect(ready.index(stage), desc.block_type.nbytes)
    tma.async_copy_global_to_shared(desc, [batch, key_head, start, 0], ready.index(stage), tiles.index(stage))


@gluon.jit
def _copy(
    descs, tiles, barriers, blocks, order, sizes, group, CONSUMERS: gl.constexpr, BLOCK_N: gl.constexpr, STAGES: gl.constexpr,
    IS_CAUSAL: gl.constexpr, NEAR: gl.constexpr,
):  # fmt: skip
    """The warp that copies: K_n, and the values of the tile before. n counts the tiles of all blocks. Rows outside of a tensor
    become zeros."""
    query_desc, key_desc, value_desc = descs
    queries, keys, values = tiles
    query_ready, query_free, key_ready, value_ready, free, _ = barriers
    n, last_batch, last_head, last_start = 0, 0, 0, 0
    for k in range(blocks_of_program(blocks)):
        batch, head, first_query, count, masked, near_first, near_last = block(
            k, order, sizes, CONSUMERS * ROWS, BLOCK_N, IS_CAUSAL, NEAR
        )
        for i in range(count):
            start = start_of(i, count, masked, near_first, near_last, BLOCK_N)
            mbarrier.wait(free.index(n % STAGES), n // STAGES % 2 ^ 1)
            _copy_tile(key_desc, keys, key_ready, n, batch, head // group, start, STAGES)
            if n > 0:
                _copy_tile(value_desc, values, value_ready, n - 1, last_batch, last_head, last_start, STAGES)
            if i == 0:
                for c in gl.static_range(CONSUMERS):
                    mbarrier.wait(query_free.index(c), k % 2 ^ 1)
                    mbarrier.expect(query_ready.index(c), query_desc.block_type.nbytes)
                    place = [batch, head, first_query + c * ROWS, 0]
                    tma.async_copy_global_to_shared(query_desc, place, query_ready.index(c), queries.index(c))
            n += 1
            last_batch, last_head, last_start = batch, head // group, start
    mbarrier.wait(free.index(n % STAGES), n // STAGES % 2 ^ 1)
    _copy_tile(value_desc, values, value_ready, n - 1, last_batch, last_head, last_start, STAGES)


@gluon.jit
def _bias(spread, corner, center, BLOCK_N: gl.constexpr):
    """(ROWS, BLOCK_N): element (i, j) is the bias of distance corner + j - i."""
    S: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, BLOCK_N, 16])
    first = gl.minimum(gl.maximum(corner, ROWS - center), center - BLOCK_N) + center
    row = first - gl.arange(0, ROWS, gl.SliceLayout(1, S))
    place = row % 2 * (2 * center) + row // 2 * 2  # of the two copies the one in which this address is even
    j = gl.arange(0, BLOCK_N, gl.SliceLayout(0, S))
    eight = j // 8 * 8  # constants to a thread
    return gl.load(spread + (place[:, None] + (j % 8)[None, :]) + eight[None, :])


@gluon.jit
def _sums_of_threads(p):
    """(ROWS, 4): the sums of the columns that a thread has."""
    N: gl.constexpr = p.shape[1]
    return gl.convert_layout(gl.sum(gl.sum(gl.reshape(p, [ROWS, N // 8, 4, 2]), 3), 1), _SUMS)


@gluon.jit
def _packed(p, dtype: gl.constexpr):
    """(ROWS, N / 2): two neighbouring columns in one number."""
    N: gl.constexpr = p.shape[1]
    left, right = gl.split(gl.reshape(p, [ROWS, N // 2, 2]))
    if dtype == gl.bfloat16:
        return gl.inline_asm_elementwise("cvt.rn.bf16x2.f32 $0, $2, $1;", "=r,f,f", [left, right], gl.int32, True, 1)
    else:
        return gl.inline_asm_elementwise("cvt.rn.f16x2.f32 $0, $2, $1;", "=r,f,f", [left, right], gl.int32, True, 1)


@gluon.jit
def _unpacked(p, dtype: gl.constexpr, O: gl.constexpr):
    """(ROWS, N): what a product takes of _packed()'s numbers."""
    N: gl.constexpr = 2 * p.shape[1]
    left = gl.cast(p.to(gl.int16), dtype, bitcast=True)
    right = gl.cast((p >> 16).to(gl.int16), dtype, bitcast=True)
    return gl.convert_layout(gl.reshape(gl.join(left, right), [ROWS, N]), gl.DotOperandLayout(0, O, 2))


@gluon.jit
def _softmax(
    s, far, row_max, row_sum, scale, first_query, start, shift, key_length,
    IS_CAUSAL: gl.constexpr, MASKED: gl.constexpr, BLOCK_N: gl.constexpr,
):  # fmt: skip
    """(p, alpha, row_max, row_sum): a tile's exponentials, the factor for what came before, and the running statistics.
    `far` is a bias of all pairs, in the units of scale * s."""
    S: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, BLOCK_N, 16])
    if MASKED:
        j = gl.arange(0, BLOCK_N, gl.SliceLayout(0, S))
        last = gl.full([ROWS], key_length - 1 - start, gl.int32, gl.SliceLayout(1, S))
        if IS_CAUSAL:
            i = first_query + gl.arange(0, ROWS, gl.SliceLayout(1, S))
            last = gl.minimum(last, i + shift - start)
        # to a thread j // 8 is a constant, and it has two j % 8: a comparison and a selection for an element
        s = gl.where((j // 8 * 8)[None, :] <= last[:, None] - (j % 8)[None, :], s, float("-inf"))
    left, right = gl.split(gl.permute(gl.reshape(s, [ROWS, 2, BLOCK_N // 2]), (0, 2, 1)))
    highest = gl.max(gl.maximum(left, right), 1)  # a chain of half the length
    new_max = gl.maximum(row_max, gl.convert_layout(highest, gl.SliceLayout(1, S)) * scale + far)
    new_max = gl.where(new_max <= row_max + _SLACK, row_max, new_max)
    less = new_max
    if MASKED:
        less = gl.where(new_max == float("-inf"), 0.0, new_max)  # nothing seen yet: exp(-inf - 0) is 0, not NaN
    p = gl.exp2(s * scale - (less - far)[:, None])
    alpha = gl.exp2(row_max - less)
    row_sum = row_sum * gl.convert_layout(alpha, gl.SliceLayout(1, _SUMS))[:, None] + _sums_of_threads(p)
    return p, alpha, new_max, row_sum


@gluon.jit
def _step(
    query, tiles, barriers, spread, center, p, acc, row_max, row_sum, n, turn, start, far, scale, first_query, shift,
    key_length,
    WHICH: gl.constexpr, CONSUMERS: gl.constexpr, D: gl.constexpr, BLOCK_N: gl.constexpr, STAGES: gl.constexpr,
    IS_CAUSAL: gl.constexpr, NEAR: gl.constexpr, MASKED: gl.constexpr,
):  # fmt: skip
    """Tile n, but for its product with the values; that of tile n - 1 is made here, from its p."""
    S: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, BLOCK_N, 16])
    O: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, D, 16])
    _, keys, values = tiles
    _, _, key_ready, value_ready, free, turns = barriers
    stage, before = n % STAGES, (n - 1) % STAGES
    corner = start - shift - first_query
    half = _unpacked(p, keys.dtype, O)
    key = keys.index(stage).reshape([BLOCK_N, D]).permute([1, 0])
    value = values.index(before).reshape([BLOCK_N, D])
    mbarrier.wait(turns.index(WHICH), (turn + (WHICH == 0)) % 2)
    if NEAR:
        mbarrier.wait(value_ready.index(before), (n - 1) // STAGES % 2)
        product = warpgroup_mma(half, value, acc, is_async=True)
        s = _bias(spread, corner, center, BLOCK_N)  # comes while that product runs
        mbarrier.wait(key_ready.index(stage), n // STAGES % 2)
        scores = warpgroup_mma(query, key, s, is_async=True)
        mbarrier.arrive(turns.index((WHICH + 1) % CONSUMERS))
        s, acc, half = warpgroup_mma_wait(0, [scores, product, half])
    else:
        mbarrier.wait(key_ready.index(stage), n // STAGES % 2)
        s = gl.zeros([ROWS, BLOCK_N], gl.float32, S)
        scores = warpgroup_mma(query, key, s, use_acc=False, is_async=True)
        mbarrier.wait(value_ready.index(before), (n - 1) // STAGES % 2)
        product = warpgroup_mma(half, value, acc, is_async=True)
        mbarrier.arrive(turns.index((WHICH + 1) % CONSUMERS))
        s = warpgroup_mma_wait(1, [scores])
    new_p, alpha, row_max, row_sum = _softmax(
        s, far, row_max, row_sum, scale, first_query, start, shift, key_length, IS_CAUSAL, MASKED, BLOCK_N
    )
    if not NEAR:
        row_sum = gl.inline_asm_elementwise(_KEEP_ORDER, "=f,=f,f,f", [row_sum], gl.float32, False, 2)
        acc, half = warpgroup_mma_wait(0, [product, half])
    mbarrier.arrive(free.index(stage))
    alpha = gl.convert_layout(alpha, gl.SliceLayout(1, O))[:, None]
    acc = gl.inline_asm_elementwise(_RESCALE, _RESCALE_OPERANDS, [acc, alpha], gl.float32, True, 32)
    return _packed(new_p, keys.dtype), acc, row_max, row_sum


@gluon.jit
def _attend(
    given, WHICH: gl.constexpr, CONSUMERS: gl.constexpr, D: gl.constexpr, BLOCK_N: gl.constexpr, STAGES: gl.constexpr,
    IS_CAUSAL: gl.constexpr, NEAR: gl.constexpr, SAVE: gl.constexpr,
):  # fmt: skip
    """A warpgroup that attends."""
    tiles, barriers, blocks, order, sizes, out_ptr, lse_ptr, spread_ptr, center, scale, strides = given
    S: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, BLOCK_N, 16])
    O: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, D, 16])
    ROW: gl.constexpr = gl.SliceLayout(1, S)
    queries, keys, values = tiles
    query_ready, query_free, key_ready, value_ready, free, turns = barriers
    heads, query_length, key_length, span = sizes
    stride_ob, stride_oh, stride_os = strides
    shift = key_length - query_length
    query = queries.index(WHICH).reshape([ROWS, D])
    n, turn = 0, 0
    for k in range(blocks_of_program(blocks)):
        batch, head, first_query, count, masked, near_first, near_last = block(
            k, order, sizes, CONSUMERS * ROWS, BLOCK_N, IS_CAUSAL, NEAR
        )
        first_query += WHICH * ROWS
        spread = spread_ptr
        far_before, far_after = 0.0, 0.0
        if NEAR:
            spread = spread_ptr + head * (_COPIES * 2 * center)
            middle = (head * (_COPIES * 2) + 1) * center  # with the span alone, sums would stay in registers all the time
            far_before, far_after = gl.load(spread_ptr + (middle - span)) * scale, gl.load(spread_ptr + (middle + span)) * scale
        hidden, own_masked = 0, masked
        if IS_CAUSAL:  # the first tiles may hold no key for this warpgroup, and some of the masked ones all keys
            own_end = gl.minimum(key_length, first_query + ROWS + shift)
            hidden = count - gl.maximum(gl.cdiv(own_end, BLOCK_N), 1)
            if not NEAR:
                own_masked = count - gl.maximum(gl.minimum(own_end, first_query + shift + 1), 0) // BLOCK_N
            own_masked = gl.maximum(own_masked, hidden + 1)
        mbarrier.wait(query_ready.index(WHICH), k % 2)
        if first_query + ROWS <= 0:  # no queries
            hidden = count
            mbarrier.arrive(query_free.index(WHICH))
        for i in range(hidden):
            mbarrier.wait(key_ready.index((n + i) % STAGES), (n + i) // STAGES % 2)
            if i < count - 1:  # each takes a turn for every tile but one
                mbarrier.wait(turns.index(WHICH), (turn + i + (WHICH == 0)) % 2)
                mbarrier.arrive(turns.index((WHICH + 1) % CONSUMERS))
            mbarrier.arrive(free.index((n + i) % STAGES))
        if hidden < count:
            start = (count - 1 - hidden) * BLOCK_N
            stage = (n + hidden) % STAGES
            if NEAR:
                s = _bias(spread, start - shift - first_query, center, BLOCK_N)
            else:
                s = gl.zeros([ROWS, BLOCK_N], gl.float32, S)
            mbarrier.wait(key_ready.index(stage), (n + hidden) // STAGES % 2)
            s = warpgroup_mma(query, keys.index(stage).reshape([BLOCK_N, D]).permute([1, 0]), s, use_acc=NEAR)
            mbarrier.arrive(free.index(stage))
            row_max = gl.full([ROWS], float("-inf"), gl.float32, ROW)
            row_sum = gl.zeros([ROWS, 4], gl.float32, _SUMS)
            p, _alpha, row_max, row_sum = _softmax(
                s, 0.0, row_max, row_sum, scale, first_query, start, shift, key_length, IS_CAUSAL, True, BLOCK_N
            )
            p = _packed(p, keys.dtype)
            acc = gl.zeros([ROWS, D], gl.float32, O)
            if IS_CAUSAL:  # else the first tile is all that may need a mask
                for i in range(hidden + 1, own_masked):
                    start = start_of(i, count, masked, near_first, near_last, BLOCK_N)
                    p, acc, row_max, row_sum = _step(
                        query, tiles, barriers, spread, center, p, acc, row_max, row_sum, n + i, turn + i - 1, start, 0.0,
                        scale, first_query, shift, key_length, WHICH, CONSUMERS, D, BLOCK_N, STAGES, IS_CAUSAL, NEAR, True,
                    )  # fmt: skip
            for i in range(own_masked, count - (near_last - near_first)):
                start = start_of(i, count, masked, near_first, near_last, BLOCK_N)
                far = gl.where(start < near_first * BLOCK_N, far_before, far_after)
                p, acc, row_max, row_sum = _step(
                    query, tiles, barriers, spread, center, p, acc, row_max, row_sum, n + i, turn + i - 1, start, far, scale,
                    first_query, shift, key_length, WHICH, CONSUMERS, D, BLOCK_N, STAGES, IS_CAUSAL, False, False,
                )  # fmt: skip
            if NEAR:
                for i in range(count - (near_last - near_first), count):
                    start = start_of(i, count, masked, near_first, near_last, BLOCK_N)
                    p, acc, row_max, row_sum = _step(
                        query, tiles, barriers, spread, center, p, acc, row_max, row_sum, n + i, turn + i - 1, start, 0.0,
                        scale, first_query, shift, key_length, WHICH, CONSUMERS, D, BLOCK_N, STAGES, IS_CAUSAL, True, False,
                    )  # fmt: skip
            mbarrier.arrive(query_free.index(WHICH))
            stage = (n + count - 1) % STAGES
            mbarrier.wait(value_ready.index(stage), (n + count - 1) // STAGES % 2)
            acc = warpgroup_mma(_unpacked(p, keys.dtype, O), values.index(stage).reshape([BLOCK_N, D]), acc)

            row_sum = gl.convert_layout(gl.sum(row_sum, 1), ROW)
            dead = row_sum == 0.0
            row_sum = gl.where(dead, 1.0, row_sum)
            WIDE: gl.constexpr = gl.BlockedLayout([1, 8], [256 // D, D // 8], [4, 1], [1, 0])  # 16 bytes a thread
            out = acc * gl.convert_layout(1.0 / row_sum, gl.SliceLayout(1, O))[:, None]
            out = gl.convert_layout(out.to(keys.dtype), WIDE)
            row = first_query + gl.arange(0, ROWS, gl.SliceLayout(1, WIDE))
            columns = gl.arange(0, D, gl.SliceLayout(0, WIDE))
            place = out_ptr + batch.to(gl.int64) * stride_ob + head.to(gl.int64) * stride_oh
            gl.store(place + (row.to(gl.int64) * stride_os)[:, None] + columns[None, :], out, mask=(row >= 0)[:, None])
            if SAVE:
                place = lse_ptr + (batch.to(gl.int64) * heads + head) * query_length
                row = first_query + gl.arange(0, ROWS, ROW)
                lse = gl.where(dead, float("inf"), row_max * 0.6931471805599453 + gl.log(row_sum))
                gl.store(place + row, lse, mask=row >= 0)
        n, turn = n + count, turn + count - 1


@gluon.jit(
    do_not_specialize=[
        "span", "center", "blocks", "late", "blocks_of_head", "together", "heads", "group", "query_length", "key_length",
    ]
)  # fmt: skip
def forward_kernel(
    query_desc, key_desc, value_desc, out_ptr, lse_ptr, spread_ptr, scale, span, center, stride_ob, stride_oh, stride_os,
    blocks, late, blocks_of_head, together, heads, group, query_length, key_length,
    D: gl.constexpr, BLOCK_N: gl.constexpr, STAGES: gl.constexpr, CONSUMERS: gl.constexpr, REGISTERS: gl.constexpr,
    IS_CAUSAL: gl.constexpr,
):  # fmt: skip
    """Any grid: its programs share the blocks of queries. The descriptors have tiles (1, 1, ROWS or BLOCK_N, D). `group` heads
    share a head of the keys. With spread_ptr the scores start at T5's bias divided by the scale."""
    dtype: gl.constexpr = query_desc.dtype
    NEAR: gl.constexpr = spread_ptr is not None
    SAVE: gl.constexpr = lse_ptr is not None
    queries = gl.allocate_shared_memory(dtype, [CONSUMERS, 1, 1, ROWS, D], query_desc.layout)
    keys = gl.allocate_shared_memory(dtype, [STAGES, 1, 1, BLOCK_N, D], key_desc.layout)
    values = gl.allocate_shared_memory(dtype, [STAGES, 1, 1, BLOCK_N, D], value_desc.layout)
    query_ready = gl.allocate_shared_memory(gl.int64, [CONSUMERS, 1], mbarrier.MBarrierLayout())
    query_free = gl.allocate_shared_memory(gl.int64, [CONSUMERS, 1], mbarrier.MBarrierLayout())
    turns = gl.allocate_shared_memory(gl.int64, [CONSUMERS, 1], mbarrier.MBarrierLayout())
    key_ready = gl.allocate_shared_memory(gl.int64, [STAGES, 1], mbarrier.MBarrierLayout())
    value_ready = gl.allocate_shared_memory(gl.int64, [STAGES, 1], mbarrier.MBarrierLayout())
    free = gl.allocate_shared_memory(gl.int64, [STAGES, 1], mbarrier.MBarrierLayout())
    for i in gl.static_range(CONSUMERS):
        mbarrier.init(query_ready.index(i), 1)
        mbarrier.init(query_free.index(i), 1)
        mbarrier.init(turns.index(i), 1)
    for i in gl.static_range(STAGES):
        mbarrier.init(key_ready.index(i), 1)
        mbarrier.init(value_ready.index(i), 1)
        mbarrier.init(free.index(i), CONSUMERS)
    fence_async_shared()  # the copy engine sees the barriers
    lse, spread = out_ptr, out_ptr  # a partition takes no None
    if SAVE:
        lse = lse_ptr
    if NEAR:
        spread = spread_ptr
    tiles = queries, keys, values
    barriers = query_ready, query_free, key_ready, value_ready, free, turns
    order, sizes = (late, blocks_of_head, together), (heads, query_length, key_length, span)
    strides = stride_ob, stride_oh, stride_os
    descs = query_desc, key_desc, value_desc
    given = tiles, barriers, blocks, order, sizes, out_ptr, lse, spread, center, scale, strides
    if CONSUMERS == 2:
        gl.warp_specialize(
            [
                (_attend, (given, 0, CONSUMERS, D, BLOCK_N, STAGES, IS_CAUSAL, NEAR, SAVE)),
                (_attend, (given, 1, CONSUMERS, D, BLOCK_N, STAGES, IS_CAUSAL, NEAR, SAVE)),
                (_copy, (descs, tiles, barriers, blocks, order, sizes, group, CONSUMERS, BLOCK_N, STAGES, IS_CAUSAL, NEAR)),
            ],
            [4, 1],
            [REGISTERS, 24],
        )
    else:
        gl.warp_specialize(
            [
                (_attend, (given, 0, CONSUMERS, D, BLOCK_N, STAGES, IS_CAUSAL, NEAR, SAVE)),
                (_attend, (given, 1, CONSUMERS, D, BLOCK_N, STAGES, IS_CAUSAL, NEAR, SAVE)),
                (_attend, (given, 2, CONSUMERS, D, BLOCK_N, STAGES, IS_CAUSAL, NEAR, SAVE)),
                (_copy, (descs, tiles, barriers, blocks, order, sizes, group, CONSUMERS, BLOCK_N, STAGES, IS_CAUSAL, NEAR)),
            ],
            [4, 4, 1],
            [REGISTERS, REGISTERS, 24],
        )
