"""How does attention's forward run on Hopper, by hand? Candidates, one of which stays. (An experiment.)

A program walks tiles of CONSUMERS * 64 queries. Warpgroups attend, each for 64 of the queries; a warp copies. The copies run
ahead into the next tile while the warpgroups end the last one.

    a step    S = Q K_i^T and O += P V_(i-1) start together; while the second runs, P of S is computed

A key's stage and the values' of the tile before are free together: one word a step.
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

_KEEP_ORDER = gl.constexpr(
    "{ .reg .pred never; .reg .b32 nowhere; mov.b32 nowhere, 0; setp.lt.f32 never, $1, 0f00000000; "
    "@never st.shared.f32 [nowhere], $1; mov.b32 $0, $1; }"
)
# Its result comes, as far as ptxas knows, from shared memory behind what the products read.
_BEHIND = gl.constexpr(
    "{ .reg .pred never; .reg .b32 nowhere; mov.b32 nowhere, 0; setp.lt.f32 never, $2, 0f00000000; "
    "@never st.shared.f32 [nowhere], $1; mov.b32 $0, $1; @never ld.volatile.shared.f32 $0, [nowhere]; }"
)
_CLOCK = gl.constexpr("mov.u32 $0, %clock;")


@gluon.jit
def _start(i, count, masked, near_first, near_last, BLOCK_N: gl.constexpr):
    far = count - masked - (near_last - near_first)
    k = i - masked
    unmasked = gl.where(k < near_first, k, k + near_last - near_first)
    unmasked = gl.where(k < far, unmasked, near_first + k - far)
    return gl.where(i < masked, count - 1 - i, unmasked) * BLOCK_N


@gluon.jit
def _rounds(works):
    """How many works this program has: one of every gl.num_programs(), forwards and backwards in turn."""
    program, programs = gl.program_id(0), gl.num_programs(0)
    whole, rest = works // programs, works % programs
    place = gl.where(whole % 2 == 0, program, programs - 1 - program)
    return whole + gl.where(place < rest, 1, 0)


@gluon.jit
def _plan(
    k, heads, together, query_length, key_length, span, QUERIES: gl.constexpr, BLOCK_N: gl.constexpr,
    IS_CAUSAL: gl.constexpr, NEAR: gl.constexpr,
):  # fmt: skip
    """The k-th work: (batch, head, first_query, count, masked, near_first, near_last). `together` heads' tiles come together,
    those with the most keys first."""
    program, programs = gl.program_id(0), gl.num_programs(0)
    work = k * programs + gl.where(k % 2 == 0, program, programs - 1 - program)
    tiles = gl.cdiv(query_length, QUERIES)
    some, place = work // (tiles * together), work % (tiles * together)
    row = some * together + place % together
    first_query = (tiles - 1 - place // together) * QUERIES
    shift = key_length - query_length
    end, full_end = key_length, key_length
    if IS_CAUSAL:
        end = gl.minimum(end, first_query + QUERIES + shift)
        full_end = gl.minimum(end, first_query + shift + 1)
    count = gl.maximum(gl.cdiv(end, BLOCK_N), 1)  # a tile at least: its masks leave rows without a key zeros
    masked = gl.maximum(count - gl.maximum(full_end, 0) // BLOCK_N, 1)
    near_first, near_last = 0, 0
    if NEAR:
        first = first_query + shift
        near_first = gl.minimum(gl.cdiv(gl.maximum(first - span - BLOCK_N + 2, 0), BLOCK_N), count - masked)
        near_last = gl.minimum(gl.cdiv(gl.maximum(first + QUERIES - 1 + span, 0), BLOCK_N), count - masked)
        near_last = gl.maximum(near_last, near_first)
    return row // heads, row % heads, first_query, count, masked, near_first, near_last


@gluon.jit
def _copy_tile(desc, tiles, ready, n, batch, key_head, start, STAGES: gl.constexpr):
    stage = n % STAGES
    mbarrier.expect(ready.index(stage), desc.block_type.nbytes)
    tma.async_copy_global_to_shared(desc, [batch, key_head, start, 0], ready.index(stage), tiles.index(stage))


@gluon.jit
def _copy(
    query_desc, key_desc, value_desc, queries, keys, values, query_ready, query_free, key_ready, value_ready, free,
    works, heads, group, together, query_length, key_length, span,
    CONSUMERS: gl.constexpr, BLOCK_N: gl.constexpr, STAGES: gl.constexpr,
    IS_CAUSAL: gl.constexpr, NEAR: gl.constexpr,
):  # fmt: skip
    """The warp that copies: K_n, and the values of the tile before. Rows behind a tensor's end become zeros."""
    QUERIES: gl.constexpr = CONSUMERS * ROWS
    n, last_batch, last_head, last_start = 0, 0, 0, 0
    for k in range(_rounds(works)):
        batch, head, first_query, count, masked, near_first, near_last = _plan(
            k, heads, together, query_length, key_length, span, QUERIES, BLOCK_N, IS_CAUSAL, NEAR
        )
        for i in range(count):
            start = _start(i, count, masked, near_first, near_last, BLOCK_N)
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
    E: gl.constexpr = gl.reshape(gl.zeros([ROWS, BLOCK_N], gl.float32, S), [ROWS, BLOCK_N // 8, 8]).type.layout
    first = gl.minimum(gl.maximum(corner, ROWS - center), center - BLOCK_N) + center
    row = first - gl.arange(0, ROWS, gl.SliceLayout(1, gl.SliceLayout(2, E)))
    place = row % 2 * (2 * center) + row // 2 * 2  # of the two copies the one in which this address is even
    eight = gl.arange(0, 8, gl.SliceLayout(0, gl.SliceLayout(1, E)))
    eights = gl.arange(0, BLOCK_N // 8, gl.SliceLayout(0, gl.SliceLayout(2, E))) * 8  # a thread's are constants
    found = gl.load(spread + (place[:, None, None] + eight[None, None, :]) + eights[None, :, None])
    return gl.convert_layout(gl.reshape(found, [ROWS, BLOCK_N]), S)


@gluon.jit
def _halves(x):
    """The first and the last half of the columns."""
    M: gl.constexpr = x.shape[0]
    N: gl.constexpr = x.shape[1]
    return gl.split(gl.permute(gl.reshape(x, [M, 2, N // 2]), (0, 2, 1)))


@gluon.jit
def _glue(a, b, LAYOUT: gl.constexpr):
    M: gl.constexpr = a.shape[0]
    N: gl.constexpr = a.shape[1]
    return gl.convert_layout(gl.reshape(gl.permute(gl.join(a, b), (0, 2, 1)), [M, 2 * N]), LAYOUT)


@gluon.jit
def _pack(p, dtype: gl.constexpr):
    """Two neighbouring columns in one number."""
    N: gl.constexpr = p.shape[1]
    a, b = gl.split(gl.reshape(p, [ROWS, N // 2, 2]))
    if dtype == gl.bfloat16:
        CODE: gl.constexpr = "cvt.rn.bf16x2.f32 $0, $2, $1;"
    else:
        CODE: gl.constexpr = "cvt.rn.f16x2.f32 $0, $2, $1;"
    return gl.inline_asm_elementwise(CODE, "=r,f,f", [a, b], gl.int32, True, 1)


@gluon.jit
def _unpack(x, dtype: gl.constexpr, LAYOUT: gl.constexpr):
    M: gl.constexpr = x.shape[0]
    N: gl.constexpr = x.shape[1]
    a = x.to(gl.int16).to(dtype, bitcast=True)
    b = (x >> 16).to(gl.int16).to(dtype, bitcast=True)
    return gl.convert_layout(gl.reshape(gl.join(a, b), [M, 2 * N]), LAYOUT)


@gluon.jit
def _parts(p):
    """(ROWS, 4): the sums of the columns that one thread has."""
    N: gl.constexpr = p.shape[1]
    return gl.sum(gl.sum(gl.reshape(p, [ROWS, N // 8, 4, 2]), 3), 1)


@gluon.jit
def _power(x):
    """2^x for x <= 0 without the special function unit; relative error 1e-4."""
    x = gl.maximum(x, -126.0)
    whole = x + 12582912.0
    f = x - (whole - 12582912.0)
    y = ((f * 0.05550411 + 0.24022651) * f + 0.69314718) * f + 1.0
    return (y.to(gl.int32, bitcast=True) + (whole.to(gl.int32, bitcast=True) << 23)).to(gl.float32, bitcast=True)


@gluon.jit
def _softmax(
    s, far, row_max, row_sum, scale, first_query, start, shift, key_length,
    IS_CAUSAL: gl.constexpr, MASKED: gl.constexpr, BLOCK_N: gl.constexpr, PARTS: gl.constexpr, TREE: gl.constexpr, POWERS: gl.constexpr,
    BEHIND: gl.constexpr = False,
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
    if TREE:
        a, b = _halves(s)
        most = gl.convert_layout(gl.max(gl.maximum(a, b), 1), gl.SliceLayout(1, S))
    else:
        most = gl.max(s, 1)
    new_max = gl.maximum(row_max, most * scale + far)
    if BEHIND:
        new_max = gl.inline_asm_elementwise(_BEHIND, "=f,f,f", [new_max, gl.abs(row_max)], gl.float32, False, 1)
    less = new_max
    if MASKED:
        less = gl.where(new_max == float("-inf"), 0.0, new_max)  # nothing seen yet: exp(-inf - 0) is 0, not NaN
    x = s * scale - (less - far)[:, None]
    if POWERS == 0 or MASKED:
        p = gl.exp2(x)
    else:
        a, b = _halves(x)
        if POWERS == 2:
            p = _glue(gl.exp2(a), _power(b), S)
        else:
            c, d = _halves(b)
            H: gl.constexpr = b.type.layout
            p = _glue(gl.exp2(a), _glue(gl.exp2(c), _power(d), H), S)
    alpha = gl.exp2(row_max - less)
    if PARTS:
        more = _parts(p)
        W: gl.constexpr = more.type.layout
        row_sum = row_sum * gl.convert_layout(alpha, gl.SliceLayout(1, W))[:, None] + more
    else:
        row_sum = row_sum * alpha + gl.sum(p, 1)
    return p, alpha, new_max, row_sum


@gluon.jit
def _stamp(stamps, at, STAMP: gl.constexpr):
    if STAMP:
        gl.store(stamps + at, gl.inline_asm_elementwise(_CLOCK, "=r", [], gl.int32, False, 1))


@gluon.jit
def _step(
    query, keys, values, key_ready, value_ready, free, turns, spread, stamps, p, acc, row_max, row_sum, n, step, start,
    far, scale, first_query, shift, key_length, center,
    WHICH: gl.constexpr, CONSUMERS: gl.constexpr, D: gl.constexpr, BLOCK_N: gl.constexpr, STAGES: gl.constexpr,
    IS_CAUSAL: gl.constexpr, TURNS: gl.constexpr, NEAR: gl.constexpr, MASKED: gl.constexpr, PARTS: gl.constexpr, TREE: gl.constexpr,
    POWERS: gl.constexpr, EARLY: gl.constexpr, QREG: gl.constexpr, DOUBLE: gl.constexpr, STAMP: gl.constexpr,
):  # fmt: skip
    """A tile, but for its product with the values; that of the tile before is made here, from its p. n is the tile's number
    among all that this program walks."""
    S: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, BLOCK_N, 16])
    O: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, D, 16])
    stage, before = n % STAGES, (n - 1) % STAGES
    _stamp(stamps, n * 5, STAMP)
    if not EARLY:
        half = _unpack(p, keys.dtype, gl.DotOperandLayout(0, O, 2))
    if NEAR:
        s = _bias(spread, start - shift - first_query, center, BLOCK_N)
    else:
        s = gl.zeros([ROWS, BLOCK_N], gl.float32, S)
    mbarrier.wait(key_ready.index(stage), n // STAGES % 2)
    key = keys.index(stage).reshape([BLOCK_N, D]).permute([1, 0])
    if TURNS:
        mbarrier.wait(turns.index(WHICH), (step + (WHICH == 0)) % 2)
    _stamp(stamps, n * 5 + 1, STAMP)
    scores = warpgroup_mma(query, key, s, use_acc=NEAR, is_async=True)
    if EARLY:
        half = gl.convert_layout(p.to(keys.dtype), gl.DotOperandLayout(0, O, 2))
    mbarrier.wait(value_ready.index(before), (n - 1) // STAGES % 2)
    product = warpgroup_mma(half, values.index(before).reshape([BLOCK_N, D]), acc, is_async=True)
    if TURNS:
        mbarrier.arrive(turns.index((WHICH + 1) % CONSUMERS))
    _stamp(stamps, n * 5 + 2, STAMP)
    s = warpgroup_mma_wait(1, [scores])
    _stamp(stamps, n * 5 + 3, STAMP)
    new_p, alpha, row_max, row_sum = _softmax(
        s, far, row_max, row_sum, scale, first_query, start, shift, key_length, IS_CAUSAL, MASKED, BLOCK_N, PARTS, TREE, POWERS
    )
    row_sum = gl.inline_asm_elementwise(_KEEP_ORDER, "=f,f", [row_sum], gl.float32, False, 1)
    _stamp(stamps, n * 5 + 4, STAMP)
    acc, half = warpgroup_mma_wait(0, [product, half])
    mbarrier.arrive(free.index(stage))
    acc = acc * gl.convert_layout(alpha, gl.SliceLayout(1, O))[:, None]
    if not EARLY:
        new_p = _pack(new_p, keys.dtype)
    return new_p, acc, row_max, row_sum


@gluon.jit
def _double_step(
    query, keys, values, key_ready, value_ready, free, turns, stamps, s, p, acc, row_max, row_sum, n, more, step, start,
    far, scale, first_query, shift, key_length,
    WHICH: gl.constexpr, CONSUMERS: gl.constexpr, D: gl.constexpr, BLOCK_N: gl.constexpr, STAGES: gl.constexpr,
    IS_CAUSAL: gl.constexpr, TURNS: gl.constexpr, MASKED: gl.constexpr, PARTS: gl.constexpr, TREE: gl.constexpr,
    POWERS: gl.constexpr, STAMP: gl.constexpr,
):  # fmt: skip
    """As _step(), but the scores come from the step before, and those of the next tile (`more` = 1; 0: nobody reads them) are
    made here."""
    S: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, BLOCK_N, 16])
    O: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, D, 16])
    stage, before, following = n % STAGES, (n - 1) % STAGES, (n + more) % STAGES
    _stamp(stamps, n * 5, STAMP)
    half = _unpack(p, keys.dtype, gl.DotOperandLayout(0, O, 2))
    mbarrier.wait(key_ready.index(following), (n + more) // STAGES % 2)
    mbarrier.wait(value_ready.index(before), (n - 1) // STAGES % 2)
    key = keys.index(following).reshape([BLOCK_N, D]).permute([1, 0])
    if TURNS:
        mbarrier.wait(turns.index(WHICH), (step + (WHICH == 0)) % 2)
    _stamp(stamps, n * 5 + 1, STAMP)
    scores = warpgroup_mma(query, key, gl.zeros([ROWS, BLOCK_N], gl.float32, S), use_acc=False, is_async=True)
    product = warpgroup_mma(half, values.index(before).reshape([BLOCK_N, D]), acc, is_async=True)
    if TURNS:
        mbarrier.arrive(turns.index((WHICH + 1) % CONSUMERS))
    _stamp(stamps, n * 5 + 2, STAMP)
    _stamp(stamps, n * 5 + 3, STAMP)
    new_p, alpha, row_max, row_sum = _softmax(
        s, far, row_max, row_sum, scale, first_query, start, shift, key_length, IS_CAUSAL, MASKED, BLOCK_N, PARTS, TREE, POWERS, True
    )
    row_sum = gl.inline_asm_elementwise(_KEEP_ORDER, "=f,f", [row_sum], gl.float32, False, 1)
    _stamp(stamps, n * 5 + 4, STAMP)
    s, acc, half, new_p = warpgroup_mma_wait(0, [scores, product, half, new_p])
    mbarrier.arrive(free.index(stage))
    acc = acc * gl.convert_layout(alpha, gl.SliceLayout(1, O))[:, None]
    return s, _pack(new_p, keys.dtype), acc, row_max, row_sum


@gluon.jit
def _attend(
    queries, keys, values, query_ready, query_free, key_ready, value_ready, free, turns, out_ptr, lse_ptr, spread_ptr, stamps,
    works, scale, span, center, heads, together, query_length, key_length, stride_ob, stride_oh, stride_os,
    WHICH: gl.constexpr, CONSUMERS: gl.constexpr, D: gl.constexpr, BLOCK_N: gl.constexpr, STAGES: gl.constexpr,
    IS_CAUSAL: gl.constexpr, TURNS: gl.constexpr, NEAR: gl.constexpr, SAVE: gl.constexpr,
    PARTS: gl.constexpr, TREE: gl.constexpr, POWERS: gl.constexpr, EARLY: gl.constexpr, QREG: gl.constexpr, DOUBLE: gl.constexpr, STAMP: gl.constexpr,
):  # fmt: skip
    """A warpgroup that attends."""
    S: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, BLOCK_N, 16])
    O: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, D, 16])
    ROW: gl.constexpr = gl.SliceLayout(1, S)
    QUERIES: gl.constexpr = CONSUMERS * ROWS
    shift = key_length - query_length
    n, step = 0, 0
    if STAMP:
        stamps += (gl.program_id(0) * CONSUMERS + WHICH) * 2048
    for k in range(_rounds(works)):
        batch, head, first_query, count, masked, near_first, near_last = _plan(
            k, heads, together, query_length, key_length, span, QUERIES, BLOCK_N, IS_CAUSAL, NEAR
        )
        first_query += WHICH * ROWS
        spread = spread_ptr
        far_before, far_after = 0.0, 0.0
        skip, own_masked = 0, masked
        if IS_CAUSAL:  # this warpgroup's queries may see no key of the first tiles, and all keys of some masked ones
            own_end = gl.minimum(key_length, first_query + ROWS + shift)
            skip = count - gl.maximum(gl.cdiv(own_end, BLOCK_N), 1)
            if not NEAR:
                own_masked = count - gl.maximum(gl.minimum(own_end, first_query + shift + 1), 0) // BLOCK_N
            own_masked = gl.maximum(own_masked, skip + 1)
            for i in range(skip):
                mbarrier.wait(key_ready.index((n + i) % STAGES), (n + i) // STAGES % 2)
                if TURNS:
                    mbarrier.wait(turns.index(WHICH), (step + i + (WHICH == 0)) % 2)
                    mbarrier.arrive(turns.index((WHICH + 1) % CONSUMERS))
                mbarrier.arrive(free.index((n + i) % STAGES))
        start = (count - 1 - skip) * BLOCK_N
        if NEAR:
            spread = spread_ptr + head * (_COPIES * 2 * center)
            far_before, far_after = gl.load(spread + center - span) * scale, gl.load(spread + center + span) * scale
            s = _bias(spread, start - shift - first_query, center, BLOCK_N)
        else:
            s = gl.zeros([ROWS, BLOCK_N], gl.float32, S)
        mbarrier.wait(query_ready.index(WHICH), k % 2)
        query = queries.index(WHICH).reshape([ROWS, D])
        if QREG:
            query = query.load(gl.DotOperandLayout(0, S, 2))
            mbarrier.arrive(query_free.index(WHICH))
        here = n + skip
        mbarrier.wait(key_ready.index(here % STAGES), here // STAGES % 2)
        s = warpgroup_mma(query, keys.index(here % STAGES).reshape([BLOCK_N, D]).permute([1, 0]), s, use_acc=NEAR)
        if DOUBLE:
            following = here + gl.minimum(count - 1 - skip, 1)
            stage = following % STAGES
            mbarrier.wait(key_ready.index(stage), following // STAGES % 2)
            key = keys.index(stage).reshape([BLOCK_N, D]).permute([1, 0])
            scores = warpgroup_mma(query, key, gl.zeros([ROWS, BLOCK_N], gl.float32, S), use_acc=False, is_async=True)
        else:
            mbarrier.arrive(free.index(here % STAGES))
        row_max = gl.full([ROWS], float("-inf"), gl.float32, ROW)
        if PARTS:
            row_sum = _parts(gl.zeros([ROWS, BLOCK_N], gl.float32, S))
        else:
            row_sum = gl.zeros([ROWS], gl.float32, ROW)
        p, _, row_max, row_sum = _softmax(
            s, 0.0, row_max, row_sum, scale, first_query, start, shift, key_length, IS_CAUSAL, True, BLOCK_N, PARTS, TREE, 0
        )
        if not EARLY:
            p = _pack(p, keys.dtype)
        acc = gl.zeros([ROWS, D], gl.float32, O)
        if DOUBLE:
            s = warpgroup_mma_wait(0, [scores])
            mbarrier.arrive(free.index(here % STAGES))
            for i in range(skip + 1, own_masked):
                start = _start(i, count, masked, near_first, near_last, BLOCK_N)
                s, p, acc, row_max, row_sum = _double_step(
                    query, keys, values, key_ready, value_ready, free, turns, stamps, s, p, acc, row_max, row_sum, n + i,
                    gl.minimum(count - 1 - i, 1), step + i - 1, start, 0.0, scale, first_query, shift, key_length,
                    WHICH, CONSUMERS, D, BLOCK_N, STAGES, IS_CAUSAL, TURNS, True, PARTS, TREE, POWERS, STAMP,
                )  # fmt: skip
            for i in range(own_masked, count):
                start = _start(i, count, masked, near_first, near_last, BLOCK_N)
                s, p, acc, row_max, row_sum = _double_step(
                    query, keys, values, key_ready, value_ready, free, turns, stamps, s, p, acc, row_max, row_sum, n + i,
                    gl.minimum(count - 1 - i, 1), step + i - 1, start, 0.0, scale, first_query, shift, key_length,
                    WHICH, CONSUMERS, D, BLOCK_N, STAGES, IS_CAUSAL, TURNS, False, PARTS, TREE, POWERS, STAMP,
                )  # fmt: skip
        for i in range(skip + 1, 0 if DOUBLE else own_masked):
            start = _start(i, count, masked, near_first, near_last, BLOCK_N)
            p, acc, row_max, row_sum = _step(
                query, keys, values, key_ready, value_ready, free, turns, spread, stamps, p, acc, row_max, row_sum, n + i,
                step + i - 1, start, 0.0, scale, first_query, shift, key_length, center,
                WHICH, CONSUMERS, D, BLOCK_N, STAGES, IS_CAUSAL, TURNS, NEAR, True, PARTS, TREE, POWERS, EARLY, QREG, DOUBLE, STAMP,
            )  # fmt: skip
        for i in range(own_masked, 0 if DOUBLE else count - (near_last - near_first)):
            start = _start(i, count, masked, near_first, near_last, BLOCK_N)
            far = gl.where(start < near_first * BLOCK_N, far_before, far_after)
            p, acc, row_max, row_sum = _step(
                query, keys, values, key_ready, value_ready, free, turns, spread, stamps, p, acc, row_max, row_sum, n + i,
                step + i - 1, start, far, scale, first_query, shift, key_length, center,
                WHICH, CONSUMERS, D, BLOCK_N, STAGES, IS_CAUSAL, TURNS, False, False, PARTS, TREE, POWERS, EARLY, QREG, DOUBLE, STAMP,
            )  # fmt: skip
        if NEAR:
            for i in range(count - (near_last - near_first), count):
                start = _start(i, count, masked, near_first, near_last, BLOCK_N)
                p, acc, row_max, row_sum = _step(
                    query, keys, values, key_ready, value_ready, free, turns, spread, stamps, p, acc, row_max, row_sum, n + i,
                    step + i - 1, start, 0.0, scale, first_query, shift, key_length, center,
                    WHICH, CONSUMERS, D, BLOCK_N, STAGES, IS_CAUSAL, TURNS, True, False, PARTS, TREE, POWERS, EARLY, QREG, DOUBLE, STAMP,
                )  # fmt: skip
        if not QREG:
            mbarrier.arrive(query_free.index(WHICH))
        step += count - 1
        n += count
        stage = (n - 1) % STAGES
        if EARLY:
            half = gl.convert_layout(p.to(keys.dtype), gl.DotOperandLayout(0, O, 2))
        else:
            half = _unpack(p, keys.dtype, gl.DotOperandLayout(0, O, 2))
        mbarrier.wait(value_ready.index(stage), (n - 1) // STAGES % 2)
        acc = warpgroup_mma(half, values.index(stage).reshape([BLOCK_N, D]), acc)

        if PARTS:
            row_sum = gl.convert_layout(gl.sum(row_sum, 1), ROW)
        dead = row_sum == 0.0
        row_sum = gl.where(dead, 1.0, row_sum)
        WIDE: gl.constexpr = gl.BlockedLayout([1, 8], [256 // D, D // 8], [4, 1], [1, 0])  # 16 bytes a thread
        out = acc * gl.convert_layout(1.0 / row_sum, gl.SliceLayout(1, O))[:, None]
        out = gl.convert_layout(out.to(keys.dtype), WIDE)
        row = first_query + gl.arange(0, ROWS, gl.SliceLayout(1, WIDE))
        columns = gl.arange(0, D, gl.SliceLayout(0, WIDE))
        place = out_ptr + batch.to(gl.int64) * stride_ob + head.to(gl.int64) * stride_oh
        gl.store(place + (row.to(gl.int64) * stride_os)[:, None] + columns[None, :], out, mask=(row < query_length)[:, None])
        if SAVE:
            row = first_query + gl.arange(0, ROWS, ROW)
            lse = gl.where(dead, float("inf"), row_max * 0.6931471805599453 + gl.log(row_sum))
            place = lse_ptr + (batch.to(gl.int64) * heads + head) * query_length
            gl.store(place + row, lse, mask=row < query_length)


@gluon.jit(do_not_specialize=["span", "center", "heads", "query_length", "key_length", "works", "group", "together"])
def forward_kernel(
    query_desc, key_desc, value_desc, out_ptr, lse_ptr, spread_ptr, stamps_ptr, scale, span, center, stride_ob, stride_oh,
    stride_os, heads, query_length, key_length, works, group, together,
    D: gl.constexpr, BLOCK_N: gl.constexpr, STAGES: gl.constexpr,
    IS_CAUSAL: gl.constexpr, CONSUMERS: gl.constexpr, TURNS: gl.constexpr, PARTS: gl.constexpr, TREE: gl.constexpr, POWERS: gl.constexpr,
    EARLY: gl.constexpr, QREG: gl.constexpr, DOUBLE: gl.constexpr, REGISTERS: gl.constexpr,
):  # fmt: skip
    """Any grid: its programs share the works, (query tiles * B * heads) of them. With spread_ptr the scores start at T5's
    bias divided by the scale."""
    dtype: gl.constexpr = query_desc.dtype
    NEAR: gl.constexpr = spread_ptr is not None
    SAVE: gl.constexpr = lse_ptr is not None
    STAMP: gl.constexpr = stamps_ptr is not None
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
    lse, spread, stamps = out_ptr, out_ptr, out_ptr  # a partition takes no None
    if SAVE:
        lse = lse_ptr
    if NEAR:
        spread = spread_ptr
    if STAMP:
        stamps = stamps_ptr
    if CONSUMERS == 2:
        gl.warp_specialize(
            [
                (_attend, (queries, keys, values, query_ready, query_free, key_ready, value_ready, free, turns, out_ptr, lse,
                           spread, stamps, works, scale, span, center, heads, together, query_length, key_length, stride_ob, stride_oh,
                           stride_os, 0, CONSUMERS, D, BLOCK_N, STAGES, IS_CAUSAL, TURNS, NEAR, SAVE, PARTS, TREE, POWERS,
                           EARLY, QREG, DOUBLE, STAMP)),
                (_attend, (queries, keys, values, query_ready, query_free, key_ready, value_ready, free, turns, out_ptr, lse,
                           spread, stamps, works, scale, span, center, heads, together, query_length, key_length, stride_ob, stride_oh,
                           stride_os, 1, CONSUMERS, D, BLOCK_N, STAGES, IS_CAUSAL, TURNS, NEAR, SAVE, PARTS, TREE, POWERS,
                           EARLY, QREG, DOUBLE, STAMP)),
                (_copy, (query_desc, key_desc, value_desc, queries, keys, values, query_ready, query_free, key_ready,
                         value_ready, free, works, heads, group, together, query_length, key_length, span, CONSUMERS, BLOCK_N,
                         STAGES, IS_CAUSAL, NEAR)),
            ],
            [4, 1],
            [REGISTERS, 24],
        )  # fmt: skip
    else:
        gl.warp_specialize(
            [
                (_attend, (queries, keys, values, query_ready, query_free, key_ready, value_ready, free, turns, out_ptr, lse,
                           spread, stamps, works, scale, span, center, heads, together, query_length, key_length, stride_ob, stride_oh,
                           stride_os, 0, CONSUMERS, D, BLOCK_N, STAGES, IS_CAUSAL, TURNS, NEAR, SAVE, PARTS, TREE, POWERS,
                           EARLY, QREG, DOUBLE, STAMP)),
                (_attend, (queries, keys, values, query_ready, query_free, key_ready, value_ready, free, turns, out_ptr, lse,
                           spread, stamps, works, scale, span, center, heads, together, query_length, key_length, stride_ob, stride_oh,
                           stride_os, 1, CONSUMERS, D, BLOCK_N, STAGES, IS_CAUSAL, TURNS, NEAR, SAVE, PARTS, TREE, POWERS,
                           EARLY, QREG, DOUBLE, STAMP)),
                (_attend, (queries, keys, values, query_ready, query_free, key_ready, value_ready, free, turns, out_ptr, lse,
                           spread, stamps, works, scale, span, center, heads, together, query_length, key_length, stride_ob, stride_oh,
                           stride_os, 2, CONSUMERS, D, BLOCK_N, STAGES, IS_CAUSAL, TURNS, NEAR, SAVE, PARTS, TREE, POWERS,
                           EARLY, QREG, DOUBLE, STAMP)),
                (_copy, (query_desc, key_desc, value_desc, queries, keys, values, query_ready, query_free, key_ready,
                         value_ready, free, works, heads, group, together, query_length, key_length, span, CONSUMERS, BLOCK_N,
                         STAGES, IS_CAUSAL, NEAR)),
            ],
            [4, 4, 1],
            [REGISTERS, REGISTERS, 24],
        )  # fmt: skip
