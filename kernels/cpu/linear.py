"""linear on the CPU: launches csrc/cpu/linear.cpp, and says where the library's product is faster."""

import functools
import math

import torch

from pyfused._extensions import DTYPE_CODES, cpu, isa


def matrix(x):
    """x as (rows, columns) without a copy where its strides allow one row stride, and that stride."""
    if x.dim() != 2:
        x = x.reshape(math.prod(x.shape[:-1]), x.shape[-1])
    if x.stride(1) != 1 and x.shape[1] != 1:
        x = x.contiguous()
    return x, x.stride(0)


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

    float32, speed relative to F.linear: 1.4 to 2 at one row, 2 to 3.4 at 2 to 8 rows, 1.5 to 2 at 16 and 32, 1.1 to 1.3
    at 128, 0.98 to 1.1 at 256, 0.84 to 1.07 at 512 and 1024. float16 and bfloat16, where torch has no fast product without
    AVX-512 instructions for them: 2.2 to 2.6 at one row, 4 at 3 rows, 5 to 7 from 5 rows to 300.
    """
    if any(w.stride(1) != 1 for w in weights):
        return "a weight whose last dimension is not contiguous would be copied"
    dtype = weights[0].dtype
    if dtype == torch.float32 and rows > (192 if isa() != "baseline" else 8):
        return f"the library's float32 product is faster for {rows} rows"
    if rows > 16 and _native(dtype):
        return f"this processor multiplies {str(dtype).removeprefix('torch.')} itself, and the library uses that"
    return None


def slower_forward(x, weight, bias, residual):
    return library_is_faster(x.numel() // max(x.shape[-1], 1), weight)


def forward(x, weight, bias, residual):
    shape = (*x.shape[:-1], weight.shape[0])
    x, x_stride = matrix(x)
    weight, weight_stride = matrix(weight)
    bias = None if bias is None else bias.contiguous()
    residual, residual_stride = (None, 0) if residual is None else matrix(residual)
    y = torch.empty(shape, dtype=x.dtype)
    cpu().linear_forward(
        x.data_ptr(),
        weight.data_ptr(),
        pointer(bias),
        pointer(residual),
        y.data_ptr(),
        x.shape[0],
        weight.shape[0],
        x.shape[1],
        x_stride,
        weight_stride,
        residual_stride,
        DTYPE_CODES[x.dtype],
    )
    return (y,)
