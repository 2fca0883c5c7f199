"""What would a Hopper kernel in Gluon compute? An interpreter for those of kernels/gluon: Triton has one for Triton alone.

run() calls the kernel's Python with CPU tensors in place of Gluon's. Partitions of a program are threads, of which one runs at
a time; a random generator says which, and when a copy or a product that was started happens: anywhere between its start and
the moment at which somebody has waited for it. Shared memory is NaN before a copy into it ends, so a tile that is read too
early, or overwritten too early, gives NaN. A barrier for which nobody arrives is an error.

Layouts mean nothing here: the compiler checks them (tests/gpu_codegen/test_gluon_codegen.py). Nor do warps: what all
threads of a partition do together, they do at once.
"""

import contextlib
import random
import re
import threading
import types

import torch

from pyfused import dispatch, extensions
from pyfused.kernels.gluon import attention

_block = None  # the program that runs


class _Block:
    """A program's partitions, and the copies under way."""

    def __init__(self, program, programs, seed):
        self.program, self.programs, self.random = program, programs, random.Random(seed)
        self.copies, self.threads, self.turn = [], [], threading.Semaphore(0)
        self.started = []  # the partition of each asynchronous product, in the order of their starts

    def pause(self, ready=lambda: True):
        """Lets others run; the calling partition goes on some time after ready() holds."""
        me = threading.current_thread()
        if me not in self.threads:  # before the partitions begin nobody else runs
            return
        me.ready = ready
        self.turn.release()
        me.go.acquire()
        if self.threads == []:
            raise SystemExit  # another partition failed

    def run(self, functions_and_args):
        failures = []

        def begin(function, args):
            me = threading.current_thread()
            me.products = []
            me.go.acquire()
            try:
                function(*args)
                assert me.products == [], "a product that nobody waited for"
            except SystemExit:
                return
            except Exception as error:
                failures.append(error)
            me.done = True
            self.turn.release()

        for function, args in functions_and_args:
            thread = threading.Thread(target=begin, args=(function, args), daemon=True)
            thread.go, thread.ready, thread.done = threading.Semaphore(0), lambda: True, False
            self.threads.append(thread)
            thread.start()
        threads = list(self.threads)
        while not failures and not all(thread.done for thread in threads):
            able = [thread for thread in threads if not thread.done and thread.ready()]
            able += self.copies
            if not able:
                failures.append(AssertionError("every partition waits for a barrier"))
                break
            chosen = self.random.choice(able)
            if isinstance(chosen, threading.Thread):
                chosen.go.release()
                self.turn.acquire()
            else:
                self.copies.remove(chosen)
                chosen()
        self.threads.clear()
        for thread in threads:
            thread.go.release()
            thread.join()
        if failures:
            raise failures[0]
        assert self.copies == [], "a copy that nobody waited for"


class _Pointer:
    """An address inside a tensor's memory; `at` may be a tensor."""

    def __init__(self, memory, at=0):
        self.memory, self.at, self.dtype = memory, at, memory.dtype

    def __add__(self, steps):
        return _Pointer(self.memory, self.at + steps)

    def __sub__(self, steps):
        return _Pointer(self.memory, self.at - steps)


class _Shared:
    """Memory of a program: a view that index(), reshape() and permute() change."""

    def __init__(self, memory, barriers=None):
        self.memory, self.barriers, self.dtype = memory, barriers, memory.dtype

    def index(self, i):
        return _Shared(self.memory[int(i)], self.barriers[int(i)] if self.barriers else None)

    def reshape(self, shape):
        return _Shared(self.memory.view(shape))

    def permute(self, order):
        return _Shared(self.memory.permute(order))

    def slice(self, start, length):
        return _Shared(self.memory[start : start + length])

    def load(self, layout):
        return self.memory.clone()


class _Barrier:
    """An mbarrier: a phase ends when `count` have arrived and all expected bytes have come."""

    def __init__(self, count):
        self.count, self.missing, self.bytes, self.phase = count, count, 0, 0

    def change(self, arrivals=0, bytes=0):
        self.missing -= arrivals
        self.bytes += bytes
        assert self.missing >= 0, "more arrivals at a barrier than it counts"
        if self.missing == self.bytes == 0:
            self.missing, self.phase = self.count, self.phase ^ 1


class _Descriptor:
    """A tensor descriptor: a tensor, and the shape of the tiles that are copied from it."""

    def __init__(self, base, shape, strides, block_shape, layout):
        assert base.data_ptr() % 16 == 0
        assert all(stride % 8 == 0 for stride in strides[:-1])
        assert strides[-1] == 1
        self.tensor, self.block = base.as_strided(shape, strides), tuple(block_shape)
        self.layout, self.dtype = layout, base.dtype
        self.block_type = types.SimpleNamespace(nbytes=torch.Size(self.block).numel() * base.element_size())

    def tile(self, place):
        """Zeros where the tile reaches beyond the tensor."""
        found = torch.zeros(self.block, dtype=self.dtype)
        starts = [int(at) for at in place]
        ends = [min(at + size, limit) for at, size, limit in zip(starts, self.block, self.tensor.shape)]
        part = self.tensor[tuple(slice(max(at, 0), max(end, 0)) for at, end in zip(starts, ends))]
        firsts = [max(-at, 0) for at in starts]
        found[tuple(slice(first, first + size) for first, size in zip(firsts, part.shape))] = part
        return found


def _copy(descriptor, place, barrier, shared):
    shared.memory.fill_(torch.nan)
    place = [int(at) for at in place]

    def arrive():
        shared.memory.copy_(descriptor.tile(place))
        barrier.barriers[0].change(bytes=-descriptor.block_type.nbytes)

    assert shared.memory.shape == descriptor.block
    _block.copies.append(arrive)
    _block.pause()


def _init(barrier, count):
    barrier.barriers[0] = _Barrier(count)
    barrier.memory.fill_(1)


def _wait(barrier, phase):
    _block.pause(lambda: barrier.barriers[0].phase != int(phase))


def _arrive(barrier, count=1):
    barrier.barriers[0].change(arrivals=count)
    _block.pause()


class _Product:
    """An asynchronous product. It reads shared memory at some time before it is waited for."""

    def __init__(self, *operands):
        self.operands, self.result = operands, None

    def finish(self):
        if self.result is None:
            a, b, acc, use_acc = self.operands
            a, b = (x.memory if isinstance(x, _Shared) else x for x in (a, b))
            acc = acc.finish() if isinstance(acc, _Product) else acc
            self.result = a.float() @ b.float() + (acc if use_acc else 0)
        return self.result


def _mma(a, b, acc, *, use_acc=True, is_async=False):
    product = _Product(a, b, acc, use_acc)
    if not is_async:
        return product.finish()
    threading.current_thread().products.append(product)
    _block.started.append(_block.threads.index(threading.current_thread()))
    if _block.random.random() < 0.5:
        product.finish()
    return product


def _mma_wait(outstanding, deps):
    _block.pause()
    products = threading.current_thread().products
    while len(products) > outstanding:
        products.pop(0).finish()
    found = [dep.result if isinstance(dep, _Product) else dep for dep in deps]
    assert all(each is not None for each in found), "a product is used that may not have ended"
    return found[0] if len(found) == 1 else tuple(found)


def _allocate(dtype, shape, layout):
    if dtype == torch.int64:
        barriers = [None] if len(shape) == 1 else [[None] for _ in range(shape[0])]
        return _Shared(torch.zeros(shape, dtype=dtype), barriers)
    return _Shared(torch.full(shape, torch.nan, dtype=dtype))


def _load(pointer, mask=None, other=None):
    places = torch.as_tensor(pointer.at).long()
    if mask is None:
        return pointer.memory[places]
    return torch.where(mask, pointer.memory[torch.where(mask, places, 0)], other)


def _store(pointer, value, mask):
    places, value, mask = torch.broadcast_tensors(pointer.at, value, mask)
    pointer.memory[places[mask].long()] = value[mask]


def _inline_asm(code, constraints, args, *_):
    """Conversions and products compute; everything else hands its first argument on."""
    if "mul.f32" in code:
        return args[0] * args[1]
    if (kind := re.match(r"cvt\.rn\.(bf16|f16)x2\.f32 ", code)) is None:
        return args[0]
    dtype = {"bf16": torch.bfloat16, "f16": torch.float16}[kind[1]]
    return torch.stack([x.to(dtype) for x in args], -1).view(torch.int32)[..., 0]


def _either(of_tensors):
    """A function of two numbers or tensors."""
    return lambda a, b: of_tensors(torch.as_tensor(a), torch.as_tensor(b))


_gl = types.SimpleNamespace(
    int16=torch.int16, int32=torch.int32, int64=torch.int64, float32=torch.float32, bfloat16=torch.bfloat16,
    constexpr=lambda value: value,
    NVMMADistributedLayout=lambda *_: None, DotOperandLayout=lambda *_: None, SliceLayout=lambda *_: None,
    BlockedLayout=lambda *_: None, DistributedLinearLayout=lambda *_: None,
    program_id=lambda axis: torch.tensor(_block.program, dtype=torch.int32),
    num_programs=lambda axis: torch.tensor(_block.programs, dtype=torch.int32),
    cdiv=lambda a, b: (a + b - 1) // b,
    minimum=_either(torch.minimum), maximum=_either(torch.maximum),
    arange=lambda start, end, layout: torch.arange(start, end, dtype=torch.int32),
    full=lambda shape, value, dtype, layout: torch.full(shape, value, dtype=dtype),
    zeros=lambda shape, dtype, layout: torch.zeros(shape, dtype=dtype),
    where=lambda condition, a, b: torch.where(torch.as_tensor(condition), a, b),
    max=lambda x, axis: x.amax(axis), sum=lambda x, axis: x.sum(axis), exp2=torch.exp2, log=torch.log,
    reshape=torch.reshape, permute=torch.permute, join=lambda a, b: torch.stack([a, b], -1),
    split=lambda x: x.unbind(-1), cast=lambda x, dtype, bitcast: x.view(dtype),
    abs=torch.abs,
    convert_layout=lambda x, layout: x, inline_asm_elementwise=_inline_asm,
    static_range=range, allocate_shared_memory=_allocate, load=_load, store=_store,
    warp_specialize=lambda functions_and_args, warps, registers: _block.run(functions_and_args),
)  # fmt: skip
_mbarrier = types.SimpleNamespace(
    init=_init, wait=_wait, arrive=_arrive, MBarrierLayout=lambda: None,
    expect=lambda barrier, bytes: barrier.barriers[0].change(arrivals=1, bytes=bytes),
)  # fmt: skip
_LANGUAGE = {
    "range": lambda *ends: (torch.tensor(i, dtype=torch.int32) for i in range(*map(int, ends))),
    "gl": _gl, "mbarrier": _mbarrier, "tma": types.SimpleNamespace(async_copy_global_to_shared=_copy),
    "fence_async_shared": lambda: None, "warpgroup_mma": _mma, "warpgroup_mma_wait": _mma_wait,
}  # fmt: skip


def _plain(kernel):
    """The kernel's Python, in its module with this language."""
    names = dict(kernel.fn.__globals__) | _LANGUAGE
    for name, value in names.items():
        if type(value).__name__ == "GluonJITFunction":
            names[name] = types.FunctionType(value.fn.__code__, names, name, value.fn.__defaults__)
        elif type(value).__name__ == "constexpr":
            names[name] = value.value
    return names[kernel.fn.__name__]


def run(kernel, grid, *args, seed=0, **constants):
    """kernel[grid](*args, **constants) on CPU tensors, one program after another."""
    global _block

    def given(value):
        if isinstance(value, torch.Tensor):
            size = value.untyped_storage().nbytes() // value.element_size()
            return _Pointer(value.as_strided((size,), (1,), 0), value.storage_offset())
        if type(value).__name__ == "TensorDescriptor":
            return _Descriptor(value.base, value.shape, value.strides, value.block_shape, value.layout)
        return value

    function = _plain(kernel)
    constants.pop("num_warps", None)
    for program in range(grid[0]):
        _block = _Block(program, grid[0], seed + program)
        function(*map(given, args), **constants)


def install():
    """From now on the backend gluon takes CPU tensors, and its kernels run here. Call it before any operator runs."""
    attention.start = run
    extensions.emulate_gluon()


@contextlib.contextmanager
def installed():
    """install(), inside the block."""
    before = attention.start

    def forget():
        dispatch.missing.cache_clear()
        dispatch.forget()

    install()
    forget()
    try:
        yield
    finally:
        attention.start, extensions._emulated_gluon = before, False
        forget()
