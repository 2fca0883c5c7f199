"""ffn in Triton: y = activation(x w_in^T + b_in) w_out^T + b_out (+ residual); x (R, N), w_in (F, N), w_out (M, F).

Three ways, all with float32 accumulation (float32 inputs multiply in float32, not TF32):

1. R <= 16 rows, decoding: bound by the weights, 2 F (N + M) bytes in 16 bits, each read once. A program streams a few
   rows of a weight matrix. If that gives too few programs to fill the chip, K is split over programs too, and the
   partial sums are added in a fixed order. GPT-2 124M, one row, bf16: 9.4 MB, 3.1 us at 3.0 TB/s and 3 to 4 launches
   of about 1.3 us in a CUDA graph. Not yet measured.
2. More rows, only when the Triton backend is forced: two tiled products with bias, activation and residual in their
   epilogues. Tiles run in groups, so a group's weights stay in the L2. This saves the activation's pass over (R, F),
   4 R F bytes in 16 bits: at R = 4096, F = 3072 50 MB, 17 us at 3.0 TB/s, beside 48 us of arithmetic (39 GFLOP at
   800 TFLOP/s) at N = M = 768. Not yet measured.
3. More rows by default: declined_forward() hands them to the library products (cuBLAS) of kernels/reference. Published
   numbers give a Triton product about 80% of cuBLAS's speed on an H100. That costs more than the saved pass. Not yet
   measured here.

Backward: library products around one kernel. It reads `pre` and the gradient of the inner activations and writes the inner
activations and grad_pre: one pass of 8 R F bytes in 16 bits instead of two.
"""

import math

import torch
import triton
import triton.language as tl

from pyfused import evidence, tiles
from pyfused.kernels.reference.ffn import linear_gradients
from pyfused.kernels.shared.layout import rows_of
from pyfused.kernels.shared.prepared import dense, maker, prepares_launch
from pyfused.kernels.triton._activation import activate, activate_with_slope
from pyfused.kernels.triton._launch import starter

FEW_ROWS = 16  # the least height of a tensor-core tile


# ---- kernels --------------------------------------------------------------------------------------------------------
@triton.jit
def _finish(
    total, row, col, live, bias_ptr, residual_ptr, y_ptr, pre_ptr, n, residual_stride,
    ACTIVATION: tl.constexpr, HAS_BIAS: tl.constexpr, HAS_RESIDUAL: tl.constexpr, SAVE: tl.constexpr,
):  # fmt: skip
    """The epilogue of a product: y = activation(total + bias) + residual. row is int64 (., 1), col is (1, .)."""
    if HAS_BIAS:
        total += tl.load(bias_ptr + col, mask=col < n, other=0.0).to(tl.float32)
    if SAVE:
        tl.store(pre_ptr + row * n + col, total, mask=live)
    total = activate(total, ACTIVATION)
    if HAS_RESIDUAL:
        total += tl.load(residual_ptr + row * residual_stride + col, mask=live, other=0.0).to(tl.float32)
    tl.store(y_ptr + row * n + col, total, mask=live)


@triton.jit(do_not_specialize=["rows"])
def _linear_kernel(
    x_ptr, w_ptr, bias_ptr, residual_ptr, y_ptr, pre_ptr, rows, n, k, x_stride, w_stride_n, w_stride_k, residual_stride,
    ACTIVATION: tl.constexpr, HAS_BIAS: tl.constexpr, HAS_RESIDUAL: tl.constexpr, SAVE: tl.constexpr,
    PRECISION: tl.constexpr, EVEN_K: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr, GROUP: tl.constexpr,
):  # fmt: skip
    """y (rows, n) = activation(x (rows, k) w (n, k)^T + bias) + residual, one tile per program."""
    # GROUP tiles of rows go through the columns together, so x and w come from the L2.
    high, wide = tl.cdiv(rows, BLOCK_M), tl.cdiv(n, BLOCK_N)
    program = tl.program_id(0)
    first = program // (GROUP * wide) * GROUP
    group = tl.minimum(high - first, GROUP)
    within = program % (GROUP * wide)
    row = (first + within % group) * BLOCK_M + tl.arange(0, BLOCK_M)
    col = within // group * BLOCK_N + tl.arange(0, BLOCK_N)
    deep = tl.arange(0, BLOCK_K)
    # Rows past the end wrap round, so the loop needs no mask for them. They are not stored.
    x_at = x_ptr + (row % rows).to(tl.int64)[:, None] * x_stride + deep[None, :]
    w_at = w_ptr + (col % n).to(tl.int64)[None, :] * w_stride_n + deep.to(tl.int64)[:, None] * w_stride_k
    total = tl.zeros((BLOCK_M, BLOCK_N), tl.float32)
    for start in range(0, k, BLOCK_K):
        if EVEN_K:
            x, w = tl.load(x_at), tl.load(w_at)
        else:
            x = tl.load(x_at, mask=deep[None, :] < k - start, other=0.0)
            w = tl.load(w_at, mask=deep[:, None] < k - start, other=0.0)
        total = tl.dot(x, w, total, input_precision=PRECISION)
        x_at += BLOCK_K
        w_at += BLOCK_K * w_stride_k
    _finish(
        total, row.to(tl.int64)[:, None], col[None, :], (row < rows)[:, None] & (col < n)[None, :],
        bias_ptr, residual_ptr, y_ptr, pre_ptr, n, residual_stride, ACTIVATION, HAS_BIAS, HAS_RESIDUAL, SAVE,
    )  # fmt: skip


@triton.jit(do_not_specialize=["rows"])
def _stream_kernel(
    x_ptr, w_ptr, bias_ptr, residual_ptr, y_ptr, pre_ptr, partial_ptr,
    rows, n, k, share, x_stride, w_stride_n, w_stride_k, residual_stride,
    ACTIVATION: tl.constexpr, HAS_BIAS: tl.constexpr, HAS_RESIDUAL: tl.constexpr, SAVE: tl.constexpr,
    SPLIT: tl.constexpr, PRECISION: tl.constexpr, ROWS: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr,
):  # fmt: skip
    """The same product for rows <= ROWS. With SPLIT, a float32 partial sum over `share` values of k."""
    part = tl.program_id(1)
    col = tl.program_id(0) * BLOCK_N + tl.arange(0, BLOCK_N)
    row = tl.arange(0, ROWS)
    deep = tl.arange(0, BLOCK_K)
    end = tl.minimum(part * share + share, k)
    w_ptr += (col % n).to(tl.int64)[:, None] * w_stride_n
    if ROWS == 1:  # a matrix unit has no use here; the products are summed at the end
        products = tl.zeros((BLOCK_N, BLOCK_K), tl.float32)
        for start in range(part * share, end, BLOCK_K):
            at = start + deep
            x = tl.load(x_ptr + at, mask=at < end, other=0.0).to(tl.float32)
            w = tl.load(w_ptr + at.to(tl.int64)[None, :] * w_stride_k, mask=at[None, :] < end, other=0.0)
            products += x[None, :] * w.to(tl.float32)
        total = tl.sum(products, axis=1)[None, :]
    else:
        x_ptr += tl.minimum(row, rows - 1).to(tl.int64)[:, None] * x_stride
        total = tl.zeros((ROWS, BLOCK_N), tl.float32)
        for start in range(part * share, end, BLOCK_K):
            at = start + deep
            x = tl.load(x_ptr + at[None, :], mask=at[None, :] < end, other=0.0)
            w = tl.load(w_ptr + at.to(tl.int64)[None, :] * w_stride_k, mask=at[None, :] < end, other=0.0)
            total = tl.dot(x, tl.trans(w), total, input_precision=PRECISION)
    live = (row < rows)[:, None] & (col < n)[None, :]
    if SPLIT:
        at = (part.to(tl.int64) * rows + row[:, None]) * n + col[None, :]
        tl.store(partial_ptr + at, total, mask=live)
    else:
        _finish(
            total, row.to(tl.int64)[:, None], col[None, :], live,
            bias_ptr, residual_ptr, y_ptr, pre_ptr, n, residual_stride, ACTIVATION, HAS_BIAS, HAS_RESIDUAL, SAVE,
        )  # fmt: skip


@triton.jit(do_not_specialize=["rows"])
def _combine_kernel(
    partial_ptr, bias_ptr, residual_ptr, y_ptr, pre_ptr, parts, rows, n, residual_stride,
    ACTIVATION: tl.constexpr, HAS_BIAS: tl.constexpr, HAS_RESIDUAL: tl.constexpr, SAVE: tl.constexpr,
    BLOCK: tl.constexpr,
):  # fmt: skip
    """Adds the parts (parts, rows, n) of one row in order, then runs the epilogue."""
    row = tl.program_id(1).to(tl.int64) + tl.zeros((1, 1), tl.int64)
    col = (tl.program_id(0) * BLOCK + tl.arange(0, BLOCK))[None, :]
    live = col < n
    total = tl.zeros((1, BLOCK), tl.float32)
    for part in range(parts):
        total += tl.load(partial_ptr + (part * rows + row) * n + col, mask=live, other=0.0)
    _finish(
        total, row, col, live, bias_ptr, residual_ptr, y_ptr, pre_ptr, n, residual_stride,
        ACTIVATION, HAS_BIAS, HAS_RESIDUAL, SAVE,
    )  # fmt: skip


@triton.jit
def _activation_backward_kernel(pre_ptr, grad_ptr, inner_ptr, size, ACTIVATION: tl.constexpr, BLOCK: tl.constexpr):
    """inner = activation(pre). Replaces the gradient of inner in `grad` by the gradient of pre."""
    at = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    pre = tl.load(pre_ptr + at, mask=at < size, other=0.0).to(tl.float32)
    grad = tl.load(grad_ptr + at, mask=at < size, other=0.0).to(tl.float32)
    inner, slope = activate_with_slope(pre, ACTIVATION)
    tl.store(inner_ptr + at, inner, mask=at < size)
    tl.store(grad_ptr + at, grad * slope, mask=at < size)


# ---- launchers ------------------------------------------------------------------------------------------------------
def stream_rows(rows):
    """ROWS of a stream kernel."""
    return 1 if rows == 1 else FEW_ROWS


def share(n, k, tile):
    """How many values of k a program of a stream kernel takes. The number of programs then about fills the chip."""
    deep = tile.options["BLOCK_K"]
    blocks = triton.cdiv(k, deep)
    split = min(max(tile.programs // triton.cdiv(n, tile.options["BLOCK_N"]), 1), blocks)
    return triton.cdiv(blocks, split) * deep


def prepare_product(outer, x_stride, w, has_bias, activation, residual_stride, save, dtype=None):
    """A function of (x, w, bias, residual). It returns (y, pre): y = activation(pre) + residual with pre = x w^T + bias. pre is
    None without `save`.

    x is (*outer, k) with x_stride from row to row, w is (n, k). residual is (*outer, n), or None if residual_stride is None.
    y is (*outer, n) and has `dtype`, by default w's.
    """
    (n, k), rows, device = w.shape, math.prod(outer), w.device
    strides = (x_stride, *w.stride(), residual_stride or 0)
    flags = {"ACTIVATION": activation, "HAS_BIAS": has_bias, "HAS_RESIDUAL": residual_stride is not None, "SAVE": save}
    precision = "ieee" if w.dtype == torch.float32 else "tf32"  # of no effect on 16-bit inputs
    new_y = maker((*outer, n), dtype or w.dtype, None, device)
    parts = 0
    if rows > FEW_ROWS:
        tile = tiles.find("ffn_linear", device, w.dtype).options
        multiply = starter(
            _linear_kernel, (triton.cdiv(rows, tile["BLOCK_M"]) * triton.cdiv(n, tile["BLOCK_N"]),), device,
            rows, n, k, *strides, **flags, PRECISION=precision, EVEN_K=k % tile["BLOCK_K"] == 0, **tile,
        )  # fmt: skip
    else:
        tile = tiles.find("ffn_stream", device, w.dtype, rows)
        each = share(n, k, tile)
        parts = triton.cdiv(k, each)
        stream = starter(
            _stream_kernel, (triton.cdiv(n, tile.options["BLOCK_N"]), parts), device,
            rows, n, k, each, *strides, **flags, SPLIT=parts > 1, PRECISION=precision,
            ROWS=stream_rows(rows), **tile.options,
        )  # fmt: skip
    if parts > 1:
        block = tiles.find("ffn_combine", device).options
        combine = starter(
            _combine_kernel, (triton.cdiv(n, block["BLOCK"]), rows), device,
            parts, rows, n, strides[3], **flags, **block,
        )  # fmt: skip
        new_partial = maker((parts, rows, n), torch.float32, None, device)

    def run(x, w, bias, residual):
        y, pre = new_y(), new_y() if save else None
        outputs = bias, residual, y, pre
        if parts > 1:
            partial = new_partial()
            stream(x, w, *outputs, partial)
            combine(partial, *outputs)
        elif parts:
            stream(x, w, *outputs, None)
        else:
            multiply(x, w, *outputs)
        return y, pre

    return run


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
    shape, size, device = pre.shape, pre.numel(), pre.device
    new_inner = maker(shape, pre.dtype, None, device)
    tile = tiles.find("ffn_activation_backward", device).options
    grid = (triton.cdiv(size, tile["BLOCK"]),)
    start = starter(_activation_backward_kernel, grid, device, size, ACTIVATION=activation, **tile)

    def launch(grad_y, x, w_in, w_out, pre, _activation, *wants):
        grad, inner = (grad_y.reshape(-1, grad_y.shape[-1]) @ w_out).view(shape), new_inner()
        start(pre, grad, inner)
        return linear_gradients(grad_y, x, w_in, inner, grad, wants)

    return launch
