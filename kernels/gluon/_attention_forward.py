"""How does attention's forward run on Hopper, by hand? An H200 found it right, and not faster than Triton's.

B8 H16 S2048 D64 took 356 us (343 in Triton, 306 in cuDNN), 224 causal (226, 189), 403 with T5's bias (372). The turns gained
1% without a mask, and lost 1% causal. Predicted were 300.

A program has 128 queries of one head, and 12 warps. Two warpgroups attend, each for 64 of the queries; a warp copies tiles of
keys and values into two stages of shared memory (TMA), and barriers in memory say which stage is full and which is free. Three
warps of the third group idle: registers are moved by groups of four warps.

    a step    S = Q K_i^T and O += P V_(i-1) start together; while the second runs, P of S is computed

With TURNS the warpgroups start their two products in turn. So one computes exponentials while the other's products run
(FlashAttention-3's ping-pong).

Tiles are walked from those that need a mask, last first, to those that need none: far tiles, then near ones (T5's bias, as in
pyfused/kernels/triton/_attention_relative.py).

For a tile of 128 x 128 and D = 64 a multiprocessor needs 1024 clocks each for its products (4096 FLOP a clock) and for its
exponentials (16 a clock), and as many to issue 8 warps' instructions. What overlaps decides.
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

_CONSUMERS = gl.constexpr(2)
ROWS = gl.constexpr(64)  # queries of a warpgroup: one instruction's
_COPIES = gl.constexpr(4)  # of a head's bias, as _attention_relative.py describes them

# ptxas knows no reason to wait for a product only behind the exponentials, and would wait in front of them. It keeps a store
# in its place. This one never runs: a sum of exponentials is not negative.
_KEEP_ORDER = gl.constexpr(
    "{ .reg .pred never; .reg .b32 nowhere; mov.b32 nowhere, 0; setp.lt.f32 never, $1, 0f00000000; "
    "@never st.shared.f32 [nowhere], $1; mov.b32 $0, $1; }"
)


@gluon.jit
def _start(i, count, masked, near_first, near_last, BLOCK_N: gl.constexpr):
    """The first key of the tile that comes i-th. Of `count` tiles the last `masked` come first, those from near_first on and
    before near_last come last."""
    far = count - masked - (near_last - near_first)
    k = i - masked
    unmasked = gl.where(k < near_first, k, k + near_last - near_first)
    unmasked = gl.where(k < far, unmasked, near_first + k - far)
    return gl.where(i < masked, count - 1 - i, unmasked) * BLOCK_N


@gluon.jit
def _copy_tile(desc, tiles, ready, free, i, batch, key_head, start, STAGES: gl.constexpr):
    stage = i % STAGES
    mbarrier.wait(free.index(stage), i // STAGES % 2 ^ 1)
    mbarrier.expect(ready.index(stage), desc.block_type.nbytes)
    tma.async_copy_global_to_shared(desc, [batch, key_head, start, 0], ready.index(stage), tiles.index(stage))


@gluon.jit
def _copy(
    query_desc, key_desc, value_desc, queries, keys, values, query_ready, key_ready, key_free, value_ready, value_free,
    batch, head, key_head, first_query, count, masked, near_first, near_last,
    BLOCK_N: gl.constexpr, STAGES: gl.constexpr,
):  # fmt: skip
    """The warp that copies, in the order in which _step() reads. Rows behind a tensor's end become zeros."""
    mbarrier.expect(query_ready, _CONSUMERS * query_desc.block_type.nbytes)
    for i in gl.static_range(_CONSUMERS):
        place = [batch, head, first_query + i * ROWS, 0]
        tma.async_copy_global_to_shared(query_desc, place, query_ready, queries.index(i))
    start = _start(0, count, masked, near_first, near_last, BLOCK_N)
    _copy_tile(key_desc, keys, key_ready, key_free, 0, batch, key_head, start, STAGES)
    for i in range(1, count):
        before, start = start, _start(i, count, masked, near_first, near_last, BLOCK_N)
        _copy_tile(key_desc, keys, key_ready, key_free, i, batch, key_head, start, STAGES)
        _copy_tile(value_desc, values, value_ready, value_free, i - 1, batch, key_head, before, STAGES)
    _copy_tile(value_desc, values, value_ready, value_free, count - 1, batch, key_head, start, STAGES)


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
def _softmax(
    s, far, row_max, row_sum, scale, first_query, start, shift, key_length,
    IS_CAUSAL: gl.constexpr, MASKED: gl.constexpr, BLOCK_N: gl.constexpr,
):  # fmt: skip
    """(p, alpha, row_max, row_sum): a tile's exponentials, the factor for what came before, and the running statistics.
    `far` is a bias of all pairs, in the units of scale * s."""
    S: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, BLOCK_N, 16])
    if MASKED:
        i = first_query + gl.arange(0, ROWS, gl.SliceLayout(1, S))
        j = start + gl.arange(0, BLOCK_N, gl.SliceLayout(0, S))
        last = gl.full([ROWS], key_length - 1, gl.int32, gl.SliceLayout(1, S))
        if IS_CAUSAL:
            last = gl.minimum(last, i + shift)
        s = gl.where(j[None, :] <= last[:, None], s, float("-inf"))
    new_max = gl.maximum(row_max, gl.max(s, 1) * scale + far)
    less = new_max
    if MASKED:
        less = gl.where(new_max == float("-inf"), 0.0, new_max)  # nothing seen yet: exp(-inf - 0) is 0, not NaN
    p = gl.exp2(s * scale - (less - far)[:, None])
    alpha = gl.exp2(row_max - less)
    return p, alpha, new_max, row_sum * alpha + gl.sum(p, 1)


@gluon.jit
def _step(
    query, keys, values, key_ready, key_free, value_ready, value_free, turns, spread, p, acc, row_max, row_sum, i, start,
    far, scale, first_query, shift, key_length, center,
    WHICH: gl.constexpr, D: gl.constexpr, BLOCK_N: gl.constexpr, STAGES: gl.constexpr, IS_CAUSAL: gl.constexpr,
    TURNS: gl.constexpr, NEAR: gl.constexpr, MASKED: gl.constexpr,
):  # fmt: skip
    """Tile i, but for its product with the values; that of tile i - 1 is made here, from its p."""
    O: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, D, 16])
    stage, before = i % STAGES, (i - 1) % STAGES
    s = _first_scores(spread, start - shift - first_query, center, NEAR, BLOCK_N)
    mbarrier.wait(key_ready.index(stage), i // STAGES % 2)
    key = keys.index(stage).reshape([BLOCK_N, D]).permute([1, 0])
    if TURNS:
        mbarrier.wait(turns.index(WHICH), (i + WHICH) % 2)
    scores = warpgroup_mma(query, key, s, use_acc=NEAR, is_async=True)
    mbarrier.wait(value_ready.index(before), (i - 1) // STAGES % 2)
    product = warpgroup_mma(p, values.index(before).reshape([BLOCK_N, D]), acc, is_async=True)
    if TURNS:
        mbarrier.arrive(turns.index(1 - WHICH))
    s = warpgroup_mma_wait(1, [scores])
    mbarrier.arrive(key_free.index(stage))
    new_p, alpha, row_max, row_sum = _softmax(
        s, far, row_max, row_sum, scale, first_query, start, shift, key_length, IS_CAUSAL, MASKED, BLOCK_N
    )
    row_sum = gl.inline_asm_elementwise(_KEEP_ORDER, "=f,f", [row_sum], gl.float32, False, 1)
    acc, p = warpgroup_mma_wait(0, [product, p])
    mbarrier.arrive(value_free.index(before))
    acc = acc * gl.convert_layout(alpha, gl.SliceLayout(1, O))[:, None]
    return gl.convert_layout(new_p.to(keys.dtype), gl.DotOperandLayout(0, O, 2)), acc, row_max, row_sum


@gluon.jit
def _attend(
    queries, keys, values, query_ready, key_ready, key_free, value_ready, value_free, turns, out_ptr, lse_ptr, spread,
    scale, span, center, first_query, count, masked, near_first, near_last, query_length, key_length, stride_os,
    WHICH: gl.constexpr, D: gl.constexpr, BLOCK_N: gl.constexpr, STAGES: gl.constexpr, IS_CAUSAL: gl.constexpr,
    TURNS: gl.constexpr, NEAR: gl.constexpr, SAVE: gl.constexpr,
):  # fmt: skip
    """A warpgroup that attends, for the queries from first_query on."""
    S: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, BLOCK_N, 16])
    O: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, D, 16])
    ROW: gl.constexpr = gl.SliceLayout(1, S)
    shift = key_length - query_length
    far_before, far_after = 0.0, 0.0
    if NEAR:
        far_before, far_after = gl.load(spread + center - span) * scale, gl.load(spread + center + span) * scale
    query = queries.index(WHICH).reshape([ROWS, D])
    start = (count - 1) * BLOCK_N
    s = _first_scores(spread, start - shift - first_query, center, NEAR, BLOCK_N)
    mbarrier.wait(query_ready, 0)
    mbarrier.wait(key_ready.index(0), 0)
    s = warpgroup_mma(query, keys.index(0).reshape([BLOCK_N, D]).permute([1, 0]), s, use_acc=NEAR)
    mbarrier.arrive(key_free.index(0))
    row_max, row_sum = gl.full([ROWS], float("-inf"), gl.float32, ROW), gl.zeros([ROWS], gl.float32, ROW)
    p, _, row_max, row_sum = _softmax(
        s, 0.0, row_max, row_sum, scale, first_query, start, shift, key_length, IS_CAUSAL, True, BLOCK_N
    )
    p = gl.convert_layout(p.to(keys.dtype), gl.DotOperandLayout(0, O, 2))
    acc = gl.zeros([ROWS, D], gl.float32, O)
    for i in range(1, masked):
        start = _start(i, count, masked, near_first, near_last, BLOCK_N)
        p, acc, row_max, row_sum = _step(
            query, keys, values, key_ready, key_free, value_ready, value_free, turns, spread, p, acc, row_max, row_sum, i,
            start, 0.0, scale, first_query, shift, key_length, center, WHICH, D, BLOCK_N, STAGES, IS_CAUSAL, TURNS, NEAR, True,
        )  # fmt: skip
    for i in range(masked, count - (near_last - near_first)):
        start = _start(i, count, masked, near_first, near_last, BLOCK_N)
        far = gl.where(start < near_first * BLOCK_N, far_before, far_after)
        p, acc, row_max, row_sum = _step(
            query, keys, values, key_ready, key_free, value_ready, value_free, turns, spread, p, acc, row_max, row_sum, i,
            start, far, scale, first_query, shift, key_length, center, WHICH, D, BLOCK_N, STAGES, IS_CAUSAL, TURNS, False,
            False,
        )  # fmt: skip
    if NEAR:
        for i in range(count - (near_last - near_first), count):
            start = _start(i, count, masked, near_first, near_last, BLOCK_N)
            p, acc, row_max, row_sum = _step(
                query, keys, values, key_ready, key_free, value_ready, value_free, turns, spread, p, acc, row_max, row_sum, i,
                start, 0.0, scale, first_query, shift, key_length, center, WHICH, D, BLOCK_N, STAGES, IS_CAUSAL, TURNS, True,
                False,
            )  # fmt: skip
    stage = (count - 1) % STAGES
    mbarrier.wait(value_ready.index(stage), (count - 1) // STAGES % 2)
    acc = warpgroup_mma(p, values.index(stage).reshape([BLOCK_N, D]), acc)

    dead = row_sum == 0.0
    row_sum = gl.where(dead, 1.0, row_sum)
    WIDE: gl.constexpr = gl.BlockedLayout([1, 8], [256 // D, D // 8], [4, 1], [1, 0])  # 16 bytes a thread
    out = acc * gl.convert_layout(1.0 / row_sum, gl.SliceLayout(1, O))[:, None]
    out = gl.convert_layout(out.to(keys.dtype), WIDE)
    i = first_query + gl.arange(0, ROWS, gl.SliceLayout(1, WIDE))
    columns = gl.arange(0, D, gl.SliceLayout(0, WIDE))
    gl.store(out_ptr + (i.to(gl.int64) * stride_os)[:, None] + columns[None, :], out, mask=(i < query_length)[:, None])
    if SAVE:
        i = first_query + gl.arange(0, ROWS, ROW)
        lse = gl.where(dead, float("inf"), row_max * 0.6931471805599453 + gl.log(row_sum))
        gl.store(lse_ptr + i, lse, mask=i < query_length)


@gluon.jit(do_not_specialize=["span", "center", "heads", "query_length", "key_length"])
def forward_kernel(
    query_desc, key_desc, value_desc, out_ptr, lse_ptr, spread_ptr, scale, span, center, stride_ob, stride_oh, stride_os,
    heads, query_length, key_length,
    D: gl.constexpr, BLOCK_N: gl.constexpr, STAGES: gl.constexpr, GROUP: gl.constexpr, IS_CAUSAL: gl.constexpr,
    TURNS: gl.constexpr,
):  # fmt: skip
    """Grid (query tiles * B * heads). The descriptors have blocks (1, 1, ROWS or BLOCK_N, D). With spread_ptr the scores start
    at T5's bias divided by the scale."""
    dtype: gl.constexpr = query_desc.dtype
    QUERIES: gl.constexpr = _CONSUMERS * ROWS
    NEAR: gl.constexpr = spread_ptr is not None
    SAVE: gl.constexpr = lse_ptr is not None
    program = gl.program_id(0)
    tiles = gl.cdiv(query_length, QUERIES)
    first_query = (tiles - 1 - program % tiles) * QUERIES  # under a causal mask late tiles have the most keys
    head, batch = program // tiles % heads, program // tiles // heads
    shift = key_length - query_length
    end, full_end = key_length, key_length
    if IS_CAUSAL:
        end = gl.minimum(end, first_query + QUERIES + shift)
        full_end = gl.minimum(end, first_query + shift + 1)
    count = gl.maximum(gl.cdiv(end, BLOCK_N), 1)  # a tile at least: its masks leave rows without a key zeros
    masked = gl.maximum(count - gl.maximum(full_end, 0) // BLOCK_N, 1)
    near_first, near_last = 0, 0
    spread, lse = out_ptr, out_ptr  # a partition takes no None
    if NEAR:
        spread = spread_ptr + head * (_COPIES * 2 * center)
        first = first_query + shift
        near_first = gl.minimum(gl.cdiv(gl.maximum(first - span - BLOCK_N + 2, 0), BLOCK_N), count - masked)
        near_last = gl.minimum(gl.cdiv(gl.maximum(first + QUERIES - 1 + span, 0), BLOCK_N), count - masked)
        near_last = gl.maximum(near_last, near_first)
    queries = gl.allocate_shared_memory(dtype, [_CONSUMERS, 1, 1, ROWS, D], query_desc.layout)
    keys = gl.allocate_shared_memory(dtype, [STAGES, 1, 1, BLOCK_N, D], key_desc.layout)
    values = gl.allocate_shared_memory(dtype, [STAGES, 1, 1, BLOCK_N, D], value_desc.layout)
    query_ready = gl.allocate_shared_memory(gl.int64, [1], mbarrier.MBarrierLayout())
    key_ready = gl.allocate_shared_memory(gl.int64, [STAGES, 1], mbarrier.MBarrierLayout())
    key_free = gl.allocate_shared_memory(gl.int64, [STAGES, 1], mbarrier.MBarrierLayout())
    value_ready = gl.allocate_shared_memory(gl.int64, [STAGES, 1], mbarrier.MBarrierLayout())
    value_free = gl.allocate_shared_memory(gl.int64, [STAGES, 1], mbarrier.MBarrierLayout())
    turns = gl.allocate_shared_memory(gl.int64, [_CONSUMERS, 1], mbarrier.MBarrierLayout())
    mbarrier.init(query_ready, 1)
    for i in gl.static_range(_CONSUMERS):
        mbarrier.init(turns.index(i), 1)
    for i in gl.static_range(STAGES):
        mbarrier.init(key_ready.index(i), 1)
        mbarrier.init(value_ready.index(i), 1)
        mbarrier.init(key_free.index(i), _CONSUMERS)
        mbarrier.init(value_free.index(i), _CONSUMERS)
    fence_async_shared()  # the copy engine sees the barriers
    out_ptr += batch.to(gl.int64) * stride_ob + head.to(gl.int64) * stride_oh
    if SAVE:
        lse = lse_ptr + (batch.to(gl.int64) * heads + head) * query_length
    gl.warp_specialize(
        [
            (_attend, (queries, keys, values, query_ready, key_ready, key_free, value_ready, value_free, turns, out_ptr, lse,
                       spread, scale, span, center, first_query, count, masked, near_first, near_last, query_length,
                       key_length, stride_os, 0, D, BLOCK_N, STAGES, IS_CAUSAL, TURNS, NEAR, SAVE)),
            (_attend, (queries, keys, values, query_ready, key_ready, key_free, value_ready, value_free, turns, out_ptr, lse,
                       spread, scale, span, center, first_query + ROWS, count, masked, near_first, near_last, query_length,
                       key_length, stride_os, 1, D, BLOCK_N, STAGES, IS_CAUSAL, TURNS, NEAR, SAVE)),
            (_copy, (query_desc, key_desc, value_desc, queries, keys, values, query_ready, key_ready, key_free, value_ready,
                     value_free, batch, head, head // GROUP, first_query, count, masked, near_first, near_last, BLOCK_N,
                     STAGES)),
        ],
        [4, 1],
        [240, 24],
    )  # fmt: skip
