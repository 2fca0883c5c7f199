"""linear on the CPU: launches csrc/cpu/linear.cpp, and says where the library's product is faster."""

import functools

import torch

from pyfused._extensions import DTYPE_CODES, cpu, isa

from ._launch import dense, launched, maker, rows_of


@functools.cache
def _native(dtype):
    """Whether this processor multiplies the half-precision dtype itself, as oneDNN then does in torch."""
    if dtype == torch.bfloat16:
        return torch.cpu._is_avx512_bf16_supported() or torch.cpu._is_amx_tile_supported()
    return dtype == torch.float16 and torch.cpu._is_amx_fp16_supported()


def by_columns(rows, *weights):
    """Whether csrc/include/pyfused/gemv_columns.h takes these weights: all of them are the transposed views of matrices
    that are stored (K, N), as Hugging Face's Conv1D has them. In float32 the library is as fast for one row."""
    if rows > 8 or (rows <= 1 and weights[0].dtype == torch.float32):
        return False
    return all(w.stride()[1] != 1 and w.stride()[0] == 1 for w in weights)


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
    rows = x.shape[:-1].numel()
    return None if by_columns(rows, weight) else library_is_faster(rows, weight)


@launched
def forward(x, weight, bias, residual):
    of_x, of_residual = rows_of(x), (0, 0, 0) if residual is None else rows_of(residual)
    transposed = by_columns(x.shape[:-1].numel(), weight)
    of_weight = rows_of(weight.t() if transposed else weight)
    if of_x is None or of_weight is None or of_residual is None or not dense(bias):
        return None
    (rows, k, x_stride), n, weight_stride, residual_stride = of_x, weight.shape[0], of_weight[2], of_residual[2]
    shape, dtype = (*x.shape[:-1], n), x.dtype
    numbers = rows, n, k, x_stride, weight_stride, residual_stride, transposed, DTYPE_CODES[dtype]
    kernel, new = cpu().linear_forward, maker(shape, dtype)

    def launch(x, weight, bias, residual, y=None):
        y = new() if y is None else y
        kernel(x, weight, bias, residual, y, *numbers)
        return (y,)

    return launch
