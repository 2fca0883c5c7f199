"""linear on the CPU: launches csrc/cpu/linear.cpp, and says where the library's product is faster."""

import functools
import math

import torch

from pyfused._extensions import DTYPE_CODES, cpu, isa


def matrix(x):
    """x as (rows, columns) without a copy where its strides allow one row stride, and that stride."""
    strides = x.stride()
    if len(strides) == 2 and strides[1] == 1:
        return x, strides[0]
    if len(strides) != 2:
        x = x.reshape(math.prod(x.shape[:-1]), x.shape[-1])
    if x.stride(1) != 1 and x.shape[1] != 1:
        x = x.contiguous()
    return x, x.stride(0)


def rows_of(x):
    """(x, rows, columns, row stride) as a kernel takes them: as matrix, but without its view of a contiguous x, which
    takes 2.5 us."""
    *outer, columns = x.shape
    if x.is_contiguous():
        return x, math.prod(outer), columns, columns
    x, stride = matrix(x)
    return x, x.shape[0], columns, stride


def pointer(x):
    """The address of a tensor's data, 0 for none."""
    return 0 if x is None else x.data_ptr()


@functools.cache
def _native(dtype):
    """Whether this processor multiplies the half-precision dtype itself, as oneDNN then does in torch."""
    if dtype == torch.bfloat16:
        return torch.cpu._is_avx512_bf16_supported() or torch.cpu._is_amx_tile_supported()
    return dtype == torch.float16 and torch.cpu._is_amx_fp16_supported()


def library_is_faster(rows, *weights):
    """Why MKL or oneDNN should do these products, or None. From measurements on one Zen 3 core, at the sizes of GPT-2.

    Speed relative to F.linear, quiet and busy machine. float32: 1.2 to 2 at one row, 1.5 to 5 at 2 to 8 rows, 1.2 to
    2.6 at 16 and 32, 1.07 to 1.8 at 128, 0.98 to 1.1 at 256, 0.84 to 1.07 at 512 and 1024. bfloat16 (float16 is like
    it), where torch has no fast product without AVX-512 instructions for it: 1.2 to 2.6 at one row, 3 to 5.6 at 4 to
    16 rows, 4 to 8 from there to 300.
    """
    for w in weights:
        if w.stride()[1] != 1:
            return "a weight whose last dimension is not contiguous would be copied"
    dtype = weights[0].dtype
    if rows <= 8:
        return None
    if dtype == torch.float32 and (rows > 192 or isa() == "baseline"):
        return f"the library's float32 product is faster for {rows} rows"
    if rows > 16 and _native(dtype):
        return f"this processor multiplies {str(dtype).removeprefix('torch.')} itself, and the library uses that"
    return None


def slower_forward(x, weight, bias, residual):
    return library_is_faster(x.numel() // max(x.shape[-1], 1), weight)


def forward(x, weight, bias, residual):
    n, shape, dtype = weight.shape[0], x.shape[:-1], x.dtype
    x, rows, k, x_stride = rows_of(x)
    weight, weight_stride = matrix(weight)
    bias = None if bias is None else bias.contiguous()
    residual, _, _, residual_stride = (None, 0, 0, 0) if residual is None else rows_of(residual)
    y = torch.empty(*shape, n, dtype=dtype)  # sizes as a tuple would take 2 us more
    cpu().linear_forward(
        x.data_ptr(),
        weight.data_ptr(),
        pointer(bias),
        pointer(residual),
        y.data_ptr(),
        rows,
        n,
        k,
        x_stride,
        weight_stride,
        residual_stride,
        DTYPE_CODES[dtype],
    )
    return (y,)
