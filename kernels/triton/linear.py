"""linear in Triton, with int8 weights: y = (x weight^T) * scale + bias (+ residual); x (R, K), weight (N, K) int8. cuBLAS
multiplies weights in floating point.

Three ways, with the products of _product.py:

1. R <= 16 rows, decoding: bound by the weights, N K bytes, each read once: half of what 16-bit weights take. A head of
   50257 x 768: 38.6 MB, 13 us at 3.0 TB/s. Not yet measured.
2. More rows, only when the Triton backend is forced or evidence says so: a tile of weights is widened in registers. The library
   way of kernels/reference widens the whole matrix first: 5 N K bytes for 16-bit x beside 1 N K here, and cuBLAS's speed
   then. Not yet measured.
3. More rows with dynamic=True, likewise: one kernel rounds each row of x to 127 steps of its largest value, then products are
   of integers. torch._int_mm does those of kernels/reference, for multiples of 8; this takes any sizes. Not yet measured.
"""

import math

import torch
import triton
import triton.language as tl

from pyfused import evidence, tiles
from pyfused.kernels.shared import int8
from pyfused.kernels.shared.layout import rows_of
from pyfused.kernels.shared.prepared import dense, maker, prepares_launch
from pyfused.kernels.triton._launch import starter
from pyfused.kernels.triton._product import FEW_ROWS, prepare_product
from pyfused.weight_format import INT8, format_of


@triton.jit
def _round_kernel(x_ptr, integers_ptr, step_ptr, k, x_stride, BLOCK: tl.constexpr):
    """integers (rows, k) = x / step, rounded to even; step is the largest value of a row over 127. A row with infinity or NaN
    has the step NaN."""
    row = tl.program_id(0).to(tl.int64)
    x_ptr += row * x_stride
    most, finite = tl.zeros((BLOCK,), tl.float32), tl.zeros((BLOCK,), tl.float32)
    for start in range(0, k, BLOCK):
        at = start + tl.arange(0, BLOCK)
        x = tl.load(x_ptr + at, mask=at < k, other=0.0).to(tl.float32)
        most = tl.maximum(most, tl.abs(x))
        finite += x * 0.0
    step = tl.maximum(tl.div_rn(tl.max(most, axis=0), 127.0), 1.1754943508222875e-38)  # the least normal number
    tl.store(step_ptr + row, step + tl.sum(finite, axis=0))
    for start in range(0, k, BLOCK):
        at = start + tl.arange(0, BLOCK)
        x = tl.load(x_ptr + at, mask=at < k, other=0.0).to(tl.float32)
        steps = tl.div_rn(x, step + tl.zeros((BLOCK,), tl.float32))
        steps = (steps + 12582912.0) - 12582912.0  # 1.5 * 2^23: the sum has no room for fractions
        tl.store(integers_ptr + row * k + at, steps.to(tl.int8), mask=at < k)


def in_float(x, weight):
    """Why dynamic=True keeps x in floating point; None if the product is of integers."""
    return int8.in_float(x, weight, "triton")


def unsupported_forward(x, weight, bias, residual, scale=None, dynamic=False):
    if format_of(scale) is INT8:
        return None
    return "takes int8 weights alone; " + ("the library multiplies others" if scale is None else "int4 is widened")


def declined_forward(*args):
    if args[0].shape[:-1].numel() <= FEW_ROWS or evidence.found("triton", "linear", "forward", args):
        return None
    return f"above {FEW_ROWS} rows no evidence shows it faster than library products on this device"


def remark_forward(x, weight, bias, residual, scale=None, dynamic=False):
    reason = in_float(x, weight) if dynamic else None
    return reason and f"dynamic=True keeps x in floating point: {reason}"


def _prepare_rows(outer, k, x_stride, device):
    """A function of x (*outer, k) that returns its integers (*outer, k) and steps (rows,)."""
    rows, tile = math.prod(outer), tiles.find("linear_rows", device).options
    start = starter(_round_kernel, (rows,), device, k, x_stride, **tile)
    new_integers, new_steps = maker((*outer, k), torch.int8, None, device), maker((rows,), torch.float32, None, device)

    def run(x):
        integers, steps = new_integers(), new_steps()
        start(x, integers, steps)
        return integers, steps

    return run


@prepares_launch
def forward(x, weight, bias, residual, scale, dynamic=False):
    of_x, of_residual = rows_of(x), (0, 0, None) if residual is None else rows_of(residual)
    if of_x is None or of_residual is None or not dense(bias, scale):
        return None
    outer, k, x_stride = x.shape[:-1], *of_x[1:]
    reason = in_float(x, weight) if dynamic else ""
    of_integers = reason is None
    if reason:
        int8.say_once(reason)
    stride = k if of_integers else x_stride
    product = prepare_product(
        outer, stride, weight, bias is not None, "none", of_residual[2], False, x.dtype, of_integers
    )
    rounded = _prepare_rows(outer, k, x_stride, x.device) if of_integers else lambda x: (x, None)

    def launch(x, weight, bias, residual, scale, _dynamic=False):
        of_x, steps = rounded(x)
        return (product(of_x, weight, bias, residual, scale, steps)[0],)

    return launch
