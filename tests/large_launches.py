"""Which addresses would a Triton kernel touch for tensors of tens of gigabytes? Launchers get tensors without memory. A few
programs of each grid run in the interpreter, which checks addresses and reads or writes nothing."""

from __future__ import annotations

import inspect
import operator
import sys
from contextlib import contextmanager

import numpy as np
import torch
from triton.runtime import interpreter

from pyfused.kernels.triton import _launch

APART = 1 << 44  # bytes from one tensor's address to the next


def _ends(*bounds):
    """A range cut to its first, second and last step: the steps between touch no new kind of address."""
    whole = range(*map(operator.index, bounds))
    return whole if len(whole) <= 3 else (whole[0], whole[1], whole[-1])


class Pointer:
    """A tensor as the interpreter sees it; its address is `number` times APART."""

    def __init__(self, number, tensor):
        self.number, self.dtype = number, tensor.dtype
        last = sum((size - 1) * stride for size, stride in zip(tensor.shape, tensor.stride()))
        self.bytes = (last + 1) * tensor.element_size() if tensor.numel() else 0

    def data_ptr(self):
        return self.number * APART


class Launches:
    """Every launch, (kernel, grid), and the faults in its addresses."""

    def __init__(self, run):
        self.run, self.grids, self.faults = run, [], []

    def starter(self, kernel, grid, *args, **options):
        return _launch.starter(_Recorder(self, kernel), grid, *args, **options)

    def _start(self, kernel, grid, args, options):
        name = kernel.fn.__name__
        self.grids.append((name, grid))
        if not self.run:
            return
        names = inspect.getfullargspec(kernel.fn).args
        bound = inspect.getcallargs(kernel.fn, *args, **{k: v for k, v in options.items() if k in names})
        numbers = {}  # by storage: a launcher passes an output twice if an input is missing
        pointers = []
        for key, value in bound.items():
            if isinstance(value, torch.Tensor):
                number = numbers.setdefault(value.untyped_storage()._cdata, len(numbers) + 1)
                bound[key] = Pointer(number, value)
                pointers.append(bound[key])
        constants = [key for key, kind in kernel.fn.__annotations__.items() if "constexpr" in str(kind)]
        bound = {k: v if k in constants else interpreter._implicit_cvt(v) for k, v in bound.items()}
        sizes = (*grid, 1, 1)[:3]
        builder = interpreter.interpreter_builder
        scope = interpreter._patch_lang(kernel.fn)
        modules = {name: vars(m) for name, m in sys.modules.items() if name.startswith("pyfused.kernels.triton.")}
        modules[kernel.fn.__module__] = kernel.fn.__globals__
        for module in modules.values():
            module["range"] = _ends
        whole, patch = interpreter.tl.range, interpreter._patch_lang

        def patch_again(function):
            """A call of a function of another module patches the language, tl.range included, once more."""
            found = patch(function)
            interpreter.tl.range = lambda *bounds, **options: _ends(*bounds)
            return found

        interpreter._patch_lang = patch_again
        patch_again(kernel.fn)
        try:
            builder.set_grid_dim(*sizes)
            for at in sorted({tuple(n // 2 for n in sizes), tuple(n - 1 for n in sizes)}):
                builder.set_grid_idx(*at)
                with _looked_at(pointers, self.faults, f"{name}{at} of {grid}"):
                    kernel.fn(**bound)
        finally:
            for module in modules.values():
                del module["range"]
            interpreter.tl.range, interpreter._patch_lang = whole, patch
            scope.restore()


class _Recorder:
    def __init__(self, launches, kernel):
        self.launches, self.kernel, self.fn = launches, kernel, kernel.fn

    def __getitem__(self, grid):
        return lambda *args, **options: self.launches._start(self.kernel, tuple(grid), args, options)


@contextmanager
def _looked_at(pointers, faults, what):
    """32-bit sums and products must not wrap round; accesses must lie inside their tensors."""
    builder = interpreter.InterpreterBuilder
    ends = {}
    for pointer in pointers:
        ends[pointer.number] = max(pointer.bytes, ends.get(pointer.number, 0))
    before = builder.binary_op, builder.create_masked_load, builder.create_masked_store

    def binary_op(self, lhs, rhs, op):
        out = before[0](self, lhs, rhs, op)
        if op in (np.add, np.subtract, np.multiply) and lhs.data.dtype == rhs.data.dtype == np.int32:
            exact = op(lhs.data.astype(np.int64), rhs.data.astype(np.int64))
            if (exact != out.data).any():
                faults.append(f"{what}: {op.__name__} gives {np.abs(exact).max()}, more than 32 bits")
        return out

    def inside(access, addresses, mask, size):
        addresses = np.broadcast_to(addresses, np.shape(mask))[np.asarray(mask, dtype=bool)].astype(np.int64)
        if addresses.size:
            for address in (int(addresses.min()), int(addresses.max())):
                number, offset = (address + APART // 2) // APART, (address + APART // 2) % APART - APART // 2
                if not 0 <= offset <= ends.get(number, 0) - size:
                    faults.append(f"{what}: {access} at {offset} of {ends.get(number, 0)} bytes")

    def create_masked_load(self, ptrs, mask, other, *rest):
        kind = interpreter._get_np_dtype(ptrs.get_element_ty())
        inside("load", ptrs.data, mask.data, np.dtype(kind).itemsize)
        return interpreter.TensorHandle(np.zeros(ptrs.data.shape, kind), ptrs.get_element_ty())

    def create_masked_store(self, ptrs, value, mask, *rest):
        kind = interpreter._get_np_dtype(ptrs.get_element_ty())
        inside("store", ptrs.data, mask.data, np.dtype(kind).itemsize)

    builder.binary_op = binary_op
    builder.create_masked_load, builder.create_masked_store = create_masked_load, create_masked_store
    try:
        yield
    finally:
        builder.binary_op, builder.create_masked_load, builder.create_masked_store = before
