"""How long do the products of attention take by themselves? Clocks of a warpgroup for 64 x 128 scores, or their product with the
values, alone and beside other warpgroups."""
from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.hopper import fence_async_shared, warpgroup_mma, warpgroup_mma_wait


@gluon.jit
def _scores(q, k, v, out, WHICH: gl.constexpr, D: gl.constexpr, TIMES: gl.constexpr):
    S: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, 128, 16])
    s = gl.zeros([64, 128], gl.float32, S)
    a = gl.inline_asm_elementwise("mov.u32 $0, %clock;", "=r", [], gl.int32, False, 1)
    for i in range(TIMES):
        x = s
        for j in gl.static_range(8):
            x = warpgroup_mma(q.index(WHICH), k.permute([1, 0]), x, is_async=True)
        s = warpgroup_mma_wait(0, [x])
    b = gl.inline_asm_elementwise("mov.u32 $0, %clock;", "=r", [], gl.int32, False, 1)
    gl.store(out + gl.program_id(0) * 8 + WHICH, b - a)
    gl.store(out + 4096 + gl.program_id(0) * 8 + WHICH, gl.sum(gl.sum(s, 1), 0).to(gl.int32))


@gluon.jit
def _values(q, k, v, out, WHICH: gl.constexpr, D: gl.constexpr, TIMES: gl.constexpr):
    O: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, D, 16])
    s = gl.zeros([64, D], gl.float32, O)
    P: gl.constexpr = gl.DotOperandLayout(0, O, 2)
    places = gl.arange(0, 64, gl.SliceLayout(1, P))[:, None] * 128 + gl.arange(0, 128, gl.SliceLayout(0, P))[None, :]
    p = gl.load(out + places).to(gl.float32).to(v.dtype)
    a = gl.inline_asm_elementwise("mov.u32 $0, %clock;", "=r", [], gl.int32, False, 1)
    for i in range(TIMES):
        x = s
        for j in gl.static_range(8):
            x = warpgroup_mma(p, v, x, is_async=True)
        s = warpgroup_mma_wait(0, [x])
    b = gl.inline_asm_elementwise("mov.u32 $0, %clock;", "=r", [], gl.int32, False, 1)
    gl.store(out + gl.program_id(0) * 8 + WHICH, b - a)
    gl.store(out + 4096 + gl.program_id(0) * 8 + WHICH, gl.sum(gl.sum(s, 1), 0).to(gl.int32))


@gluon.jit
def _exponentials(q, k, v, out, WHICH: gl.constexpr, D: gl.constexpr, TIMES: gl.constexpr):
    S: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, 128, 16])
    s = gl.full([64, 128], -1.0, gl.float32, S) * (gl.program_id(0) + 1).to(gl.float32)
    a = gl.inline_asm_elementwise("mov.u32 $0, %clock;", "=r", [], gl.int32, False, 1)
    for i in range(TIMES):
        for j in gl.static_range(8):
            s = gl.exp2(s)
    b = gl.inline_asm_elementwise("mov.u32 $0, %clock;", "=r", [], gl.int32, False, 1)
    gl.store(out + gl.program_id(0) * 8 + WHICH, b - a)
    gl.store(out + 4096 + gl.program_id(0) * 8 + WHICH, gl.sum(gl.sum(s, 1), 0).to(gl.int32))


@gluon.jit
def _part(q, k, v, out, WHICH: gl.constexpr, D: gl.constexpr, TIMES: gl.constexpr, KIND: gl.constexpr):
    if KIND == 1:
        _scores(q, k, v, out, WHICH, D, TIMES)
    elif KIND == 2:
        _values(q, k, v, out, WHICH, D, TIMES)
    elif KIND == 3:
        _exponentials(q, k, v, out, WHICH, D, TIMES)


@gluon.jit
def rate_kernel(out, D: gl.constexpr, A: gl.constexpr, B: gl.constexpr, C: gl.constexpr, TIMES: gl.constexpr):
    flat: gl.constexpr = gl.NVMMASharedLayout(swizzle_byte_width=128, element_bitwidth=16, rank=2)
    q = gl.allocate_shared_memory(gl.bfloat16, [3, 64, D], flat)
    k = gl.allocate_shared_memory(gl.bfloat16, [128, D], flat)
    v = gl.allocate_shared_memory(gl.bfloat16, [128, D], flat)
    one: gl.constexpr = gl.BlockedLayout([1, 8], [256 // D, D // 8], [4, 1], [1, 0])
    k.store(gl.full([128, D], 0.5, gl.bfloat16, one))
    v.store(gl.full([128, D], 0.5, gl.bfloat16, one))
    for i in gl.static_range(3):
        q.index(i).store(gl.full([64, D], 0.5, gl.bfloat16, one))
    fence_async_shared()
    gl.warp_specialize(
        [(_part, (q, k, v, out, 0, D, TIMES, A)), (_part, (q, k, v, out, 1, D, TIMES, B)), (_part, (q, k, v, out, 2, D, TIMES, C))], [4, 4], [160, 160]
    )
