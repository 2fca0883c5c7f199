"""ffn in Triton: y = activation(x w_in^T + b_in) w_out^T + b_out (+ residual); x (R, N), w_in (F, N), w_out (M, F).

Three ways, all with float32 accumulation (float32 inputs multiply in float32, not TF32):

1. R <= 16 rows, decoding: bound by the weights, 2 F (N + M) bytes in 16 bits, each read once. A program streams a few
   rows of a weight matrix through shared memory, several steps ahead. Only long sums in few programs are split over
   programs; then a second kernel adds the parts in order. GPT-2 124M, one row, bf16: 9.4 MB, 3.1 us at 3.0 TB/s and 2
   launches of about 1.3 us in a CUDA graph.
2. More rows, only when the Triton backend is forced: two tiled products with bias, activation and residual in their
   epilogues. Tiles run in groups, so a group's weights stay in the L2. This saves the activation's pass over (R, F),
   4 R F bytes in 16 bits: at R = 4096, F = 3072 50 MB, 17 us at 3.0 TB/s, beside 48 us of arithmetic (39 GFLOP at
   800 TFLOP/s) at N = M = 768.
3. More rows by default: declined_forward() hands them to the library products (cuBLAS) of kernels/reference. Published
   numbers give a Triton product about 80% of cuBLAS's speed on an H100. That costs more than the saved pass, and an H100
   found the second way slower (docs/performance/index.md, which has the first too).

Backward: library products around one kernel. It reads `pre` and the gradient of the inner activations and writes the inner
activations, grad_pre, and the sums of its rows: one pass of 8 R F bytes in 16 bits. torch keeps the inner activations and needs
6 R F bytes for grad_pre, and 2 R F to sum it.
"""

import torch
import triton
import triton.language as tl

from pyfused import evidence, tiles
from pyfused.kernels.reference.ffn import linear_gradients
from pyfused.kernels.shared.layout import rows_of
from pyfused.kernels.shared.prepared import dense, maker, prepares_launch
from pyfused.kernels.triton._activation import activate_with_slope
from pyfused.kernels.triton._launch import starter
from pyfused.kernels.triton._product import FEW_ROWS, prepare_product

# A program walks over _STEPS tiles of BLOCK elements below each other, _COLUMNS wide.
_COLUMNS, _STEPS = tl.constexpr(128), tl.constexpr(8)


@triton.jit
def _activation_backward_kernel(
    pre_ptr, grad_ptr, inner_ptr, sums_ptr, rows, columns, ACTIVATION: tl.constexpr, BLOCK: tl.constexpr
):
    """inner = activation(pre). Replaces the gradient of inner in `grad` by the gradient of pre. sums (programs in a column, F),
    or None, gets that gradient's sums over a program's rows."""
    ROWS: tl.constexpr = BLOCK // _COLUMNS
    column = tl.program_id(1) * _COLUMNS + tl.arange(0, _COLUMNS)
    row = tl.program_id(0).to(tl.int64) * (ROWS * _STEPS) + tl.arange(0, ROWS)
    total = tl.zeros([ROWS, _COLUMNS], tl.float32)
    for _ in range(_STEPS):
        at = row[:, None] * columns + column[None, :]
        inside = (row < rows)[:, None] & (column < columns)[None, :]
        pre = tl.load(pre_ptr + at, mask=inside, other=0.0).to(tl.float32)
        inner, slope = activate_with_slope(pre, ACTIVATION)
        grad = tl.load(grad_ptr + at, mask=inside, other=0.0).to(tl.float32) * slope
        tl.store(inner_ptr + at, inner, mask=inside)
        tl.store(grad_ptr + at, grad, mask=inside)
        if sums_ptr is not None:
            total += grad
        row += ROWS
    if sums_ptr is not None:
        tl.store(sums_ptr + tl.program_id(0) * columns + column, tl.sum(total, 0), mask=column < columns)


@prepares_launch
def forward(x, w_in, b_in, w_out, b_out, activation, residual, save):
    of_x, of_residual = rows_of(x), (0, 0, None) if residual is None else rows_of(residual)
    if of_x is None or of_residual is None or not dense(b_in, b_out):
        return None
    outer, f = x.shape[:-1], w_in.shape[0]
    first = prepare_product(outer, of_x[2], w_in, b_in is not None, activation, None, save)
    second = prepare_product(outer, f, w_out, b_out is not None, "none", of_residual[2], False)

    def launch(x, w_in, b_in, w_out, b_out, _activation, residual, _save=False):
        inner, pre = first(x, w_in, b_in, None)
        return second(inner, w_out, b_out, residual)[0], pre

    return launch


def declined_forward(*args):
    if args[0].shape[:-1].numel() <= FEW_ROWS or evidence.found("triton", "ffn", "forward", args):
        return None
    return f"above {FEW_ROWS} rows no evidence shows it faster than cuBLAS products on this device"


@prepares_launch
def backward(grad_y, x, w_in, w_out, pre, activation, *wants):
    if not pre.is_contiguous():
        return None
    shape, columns, dtype, device = pre.shape, pre.shape[-1], pre.dtype, pre.device
    rows, tile = pre.numel() // columns, tiles.find("ffn_activation_backward", device).options
    grid = triton.cdiv(rows, tile["BLOCK"] // _COLUMNS.value * _STEPS.value), triton.cdiv(columns, _COLUMNS.value)
    new_inner, new_sums = maker(shape, dtype, None, device), maker((grid[0], columns), torch.float32, None, device)
    start = starter(_activation_backward_kernel, grid, device, rows, columns, ACTIVATION=activation, **tile)

    def launch(grad_y, x, w_in, w_out, pre, _activation, *wants):
        grad, inner = (grad_y.reshape(-1, grad_y.shape[-1]) @ w_out).view(shape), new_inner()
        wants_x, wants_w_in, wants_b_in, wants_w_out, wants_b_out = wants
        sums = new_sums() if wants_b_in else None
        start(pre, grad, inner, sums)
        others = wants_x, wants_w_in, False, wants_w_out, wants_b_out
        of_x, of_w_in, _, of_w_out, of_b_out = linear_gradients(grad_y, x, w_in, inner, grad, others)
        return of_x, of_w_in, sums.sum(0).to(dtype) if wants_b_in else None, of_w_out, of_b_out

    return launch
