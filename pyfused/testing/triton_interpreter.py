"""Where does Triton's interpreter compute differently from a GPU, and how do the tests repair it?

Three errors, in Triton 3.6 to 3.9. The interpreter stores bfloat16 as 16 bits in unsigned integers, and
- tl.dot multiplies these integers as if they were the values;
- conversion from an integer stores its value as if that were the bits;
- conversion from float32 cuts bits off, but the hardware rounds to nearest even. Subnormals come out wrong.
One difference: a float32 tl.dot uses BLAS. Its order of summation depends on shapes and layouts, so a b^T and (b a^T)^T differ
in their last bits. On a GPU each element is one chain of multiply-adds over the inner dimension, and they agree. Attention's
backward needs that: two of its kernels compute the same scores. And a long chain has larger errors than BLAS.
Another: NumPy adds along the last axis in pairs, as the lanes of a GPU do, but along the middle one of three in one chain. To a
GPU they are the same.
The kernels contain no workaround for any of this: they are right and fast on a GPU.

And five things take most of its time, without a part in any result:
- it patches Triton's language anew for every call of a function inside a kernel, tl.sum and tl.zeros included;
- it computes whether an integer operation overflows, and drops the answer: only `debug` would raise an error;
- it makes a table of all dtypes to find one, and a type with a name for every tensor and for its shape;
- it compares the shapes of two operands number by number, in three ways, also where they are the same;
- erf calls Python for every element.
"""

from __future__ import annotations

import dataclasses
import functools
import math
from typing import Any

import numpy as np
import torch


def bfloat16_to_float32(bits: np.ndarray) -> np.ndarray:
    """The exact float32 values of bfloat16 bit patterns (uint16)."""
    return (np.ascontiguousarray(bits).view(np.uint16).astype(np.uint32) << 16).view(np.float32)


def float32_to_bfloat16(values: np.ndarray) -> np.ndarray:
    """The bfloat16 bit patterns (uint16) of float32 values, rounded to nearest, ties to even. NaN stays NaN."""
    bits = np.ascontiguousarray(values, dtype=np.float32).view(np.uint32)
    rounded = (bits + (((bits >> 16) & 1) + np.uint32(0x7FFF))) >> 16
    return np.where(np.isnan(values), np.uint32(0x7FC0), rounded).astype(np.uint16)


def ordered_product(a: np.ndarray, b: np.ndarray, total: np.ndarray) -> np.ndarray:
    """total + a @ b, each element summed over the inner dimension from its first index to its last."""
    total = np.array(np.broadcast_to(total, (*a.shape[:-1], b.shape[-1])))
    for k in range(a.shape[-1]):
        total += a[..., k, None] * b[..., k, None, :]
    return total


def erf(values: np.ndarray) -> np.ndarray:
    """The error function in the values' dtype, computed in float64."""
    return torch.special.erf(torch.from_numpy(np.ascontiguousarray(values, np.float64))).numpy().astype(values.dtype)


def sum_in_pairs(values: np.ndarray, axis: int, keep: bool) -> np.ndarray:
    """The sums along an axis, in NumPy's order for the last axis."""
    total = np.ascontiguousarray(np.moveaxis(values, axis, -1)).sum(-1)
    return np.expand_dims(total, axis) if keep else total


@functools.cache
def repair_interpreter() -> None:
    """Repairs Triton's interpreter in this process. Does nothing if Triton is not installed."""
    try:
        import triton.language as tl
        from triton.runtime import interpreter
    except ModuleNotFoundError:
        return
    builder = interpreter.InterpreterBuilder
    convert, dot, cast = interpreter._convert_float, builder.create_dot, builder.cast_impl
    to_nearest = (None, interpreter._ir.ROUNDING_MODE.RTNE)

    def convert_float(data, source, target, rounding_mode):
        if source == tl.bfloat16 and target == tl.float32:
            return bfloat16_to_float32(data)
        if source == tl.float32 and target == tl.bfloat16 and rounding_mode in to_nearest:
            return float32_to_bfloat16(data)
        return convert(data, source, target, rounding_mode)

    def cast_impl(self, source, target):
        if target.scalar == tl.bfloat16 and source.dtype.scalar.is_int():
            return interpreter.TensorHandle(float32_to_bfloat16(source.data.astype(np.float32)), tl.bfloat16)
        return cast(self, source, target)

    def widened(handle):
        kind = handle.dtype.scalar
        if kind == tl.bfloat16:
            return interpreter.TensorHandle(bfloat16_to_float32(handle.data), tl.float32)
        if kind == tl.float16:  # several times as fast with the same values: NumPy has no BLAS for float16
            return interpreter.TensorHandle(handle.data.astype(np.float32), tl.float32)
        return handle

    def create_dot(self, a, b, d, *rest):
        if a.dtype.scalar == b.dtype.scalar == d.dtype.scalar == tl.float32:
            return interpreter.TensorHandle(ordered_product(a.data, b.data, d.data), tl.float32)
        if a.dtype.scalar == b.dtype.scalar == tl.int8:  # NumPy has no BLAS for integers either; float64 sums are exact
            sums = a.data.astype(np.float64) @ b.data.astype(np.float64)
            return interpreter.TensorHandle(sums.astype(np.int32) + d.data, tl.int32)
        return dot(self, widened(a), widened(b), d, *rest)

    reduce, sum_of = interpreter.ReduceOps, interpreter.ReduceOps.sum

    def sum_(self, source):
        values = source.handle.data
        if self.axis is None or not 0 < self.axis < values.ndim - 1:
            return sum_of(self, source)
        return self.to_tensor(sum_in_pairs(values, self.axis, self.keep_dims), source.dtype)

    reduce.sum = sum_
    interpreter._convert_float = convert_float
    builder.create_dot, builder.cast_impl = create_dot, cast_impl
    _hasten(interpreter, tl)


def _hasten(interpreter: Any, tl: Any) -> None:
    semantic = interpreter.TritonSemantic
    patch, patched, numpy_type, known = interpreter._patch_lang, set(), interpreter._get_np_dtype, {}

    def patch_once(function):
        """Leaves the language patched: nothing in this process compiles a kernel."""
        module = function.__globals__["__name__"]
        if module not in patched:
            patched.add(module)
            patch(function)
        return interpreter._LangPatchScope()

    def known_numpy_type(kind):
        name = kind.name
        if name not in known:
            known[name] = numpy_type(kind)
        return known[name]

    def new_tuple_type(self, types, fields=None):
        self.types, self.fields = types, fields or [""] * len(types)

    def name_of_tuple_type(self):
        return "[" + ",".join(f"{field}:{kind}" for field, kind in zip(self.fields, self.types)) + "]"

    new_block_type, blocks, shapes = tl.core.block_type.__init__, {}, {}

    def listed(shape):  # the list inside Triton's own tuple
        return getattr(shape, "values", shape)

    def known_block_type(self, element_ty, shape):
        key = element_ty.name, *[size if size.__class__ is int else getattr(size, "value", size) for size in listed(shape)]
        if key not in blocks:
            new_block_type(self, element_ty, shape)
            blocks[key] = dict(vars(self))
        vars(self).update(blocks[key])

    def new_tensor(self, handle, type):
        self.handle, self.type, self.dtype = handle, type, type.scalar
        sizes = tuple(listed(type.shape)) if type.is_block() else ()
        if sizes not in shapes:
            shapes[sizes] = tl.core.tuple(list(map(tl.constexpr, sizes))), tl.constexpr(math.prod(sizes))
        self.shape, self.numel = shapes[sizes]

    broadcast, equal = semantic.broadcast_impl_value, tl.core.dtype.__eq__

    def broadcast_quickly(self, one, other):
        sizes, others = (t.type.is_block() and listed(t.type.shape) for t in (one, other))
        if sizes == others:
            return one, other
        both = sizes and others and len(sizes) == len(others)
        if not both or any(a != b and 1 not in (a, b) for a, b in zip(sizes, others)):
            return broadcast(self, one, other)
        wanted = [b if a == 1 else a for a, b in zip(sizes, others)]

        def broadened(tensor, sizes):
            if sizes == wanted:
                return tensor
            handle = self.builder.create_broadcast(tensor.handle, wanted)
            return self.tensor(handle, tl.block_type(tensor.type.scalar, wanted))

        return broadened(one, sizes), broadened(other, others)

    builder = interpreter.interpreter_builder
    semantic.broadcast_impl_value = broadcast_quickly
    tl.core.dtype.__eq__ = lambda self, other: self is other or equal(self, other)
    tl.core.block_type.__init__, tl.core.tensor.__init__ = known_block_type, new_tensor
    builder.options = dataclasses.replace(builder.options, sanitize_overflow=False)
    interpreter._patch_lang = patch_once
    interpreter._get_np_dtype = known_numpy_type
    interpreter.np_erf_fp32 = interpreter.np_erf_fp64 = erf
    tl.core.tuple_type.__init__ = new_tuple_type
    tl.core.tuple_type.name = property(name_of_tuple_type)
