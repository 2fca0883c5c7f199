"""y = activation(x w^T + bias) + residual in Triton: the products of ffn, gated_ffn and linear. x (R, K), w (N, K).

A few rows stream the weights, each read once; more rows run in tiles. Sums are in float32. float32 inputs multiply in float32,
not TF32. ffn.py says what this should cost.

w may be int8, with a scale for each output. A tile of it is cast to x's dtype, which loses nothing, and the scale multiplies
the sums. With rows of x in int8 too, sums are in int32, and the step of each row multiplies them as well.
"""

import math

import torch
import triton
import triton.language as tl

from pyfused import tiles
from pyfused.kernels.shared.prepared import maker
from pyfused.kernels.triton._activation import activate
from pyfused.kernels.triton._dot import add_product
from pyfused.kernels.triton._launch import starter

FEW_ROWS = 16  # the least height of a tensor-core tile


# ---- kernels --------------------------------------------------------------------------------------------------------
@triton.jit
def _finish(
    total, row, col, live, bias_ptr, residual_ptr, y_ptr, pre_ptr, scale_ptr, n, residual_stride,
    ACTIVATION: tl.constexpr, HAS_BIAS: tl.constexpr, HAS_RESIDUAL: tl.constexpr, SAVE: tl.constexpr,
    HAS_SCALE: tl.constexpr,
):  # fmt: skip
    """The epilogue of a product: y = activation(total * scale + bias) + residual. row is int64 (., 1), col is (1, .)."""
    if HAS_SCALE:
        total *= tl.load(scale_ptr + col, mask=col < n, other=0.0)
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
    x_ptr, w_ptr, bias_ptr, residual_ptr, y_ptr, pre_ptr, scale_ptr, step_ptr,
    rows, n, k, x_stride, w_stride_n, w_stride_k, residual_stride,
    ACTIVATION: tl.constexpr, HAS_BIAS: tl.constexpr, HAS_RESIDUAL: tl.constexpr, SAVE: tl.constexpr,
    HAS_SCALE: tl.constexpr, EVEN_K: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr, GROUP: tl.constexpr,
):  # fmt: skip
    """y (rows, n) = activation(x (rows, k) w (n, k)^T + bias) + residual, one tile per program. If x is int8, row i of it
    stands for step[i] times its integers."""
    OF_INTEGERS: tl.constexpr = x_ptr.dtype.element_ty == tl.int8
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
    total = tl.zeros((BLOCK_M, BLOCK_N), tl.int32 if OF_INTEGERS else tl.float32)
    for start in range(0, k, BLOCK_K):
        if EVEN_K:
            x, w = tl.load(x_at), tl.load(w_at)
        else:
            x = tl.load(x_at, mask=deep[None, :] < k - start, other=0.0)
            w = tl.load(w_at, mask=deep[:, None] < k - start, other=0.0)
        total = add_product(total, x, w.to(x.dtype))
        x_at += BLOCK_K
        w_at += BLOCK_K * w_stride_k
    if OF_INTEGERS:
        total = total.to(tl.float32) * tl.load(step_ptr + row % rows)[:, None]
    _finish(
        total, row.to(tl.int64)[:, None], col[None, :], (row < rows)[:, None] & (col < n)[None, :],
        bias_ptr, residual_ptr, y_ptr, pre_ptr, scale_ptr, n, residual_stride,
        ACTIVATION, HAS_BIAS, HAS_RESIDUAL, SAVE, HAS_SCALE,
    )  # fmt: skip


@triton.jit(do_not_specialize=["rows"])
def _stream_kernel(
    x_ptr, w_ptr, bias_ptr, residual_ptr, y_ptr, pre_ptr, scale_ptr, partial_ptr,
    rows, n, k, share, x_stride, w_stride_n, w_stride_k, residual_stride,
    ACTIVATION: tl.constexpr, HAS_BIAS: tl.constexpr, HAS_RESIDUAL: tl.constexpr, SAVE: tl.constexpr,
    HAS_SCALE: tl.constexpr, SPLIT: tl.constexpr,
    ROWS: tl.constexpr, PIECES: tl.constexpr, STAGES: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr,
):  # fmt: skip
    """The same product for rows <= ROWS. With SPLIT, a float32 partial sum over `share` values of k.

    A step takes BLOCK_K values of k for each of PIECES warps. A warp sums its piece alone, so that the chain of products that
    wait for each other is short, and the pieces are added at the end."""
    part = tl.program_id(1)
    col = tl.program_id(0) * BLOCK_N + tl.arange(0, BLOCK_N)
    row = tl.arange(0, ROWS)
    deep = tl.arange(0, BLOCK_K)
    end = tl.minimum(part * share + share, k)
    w_ptr += (col % n).to(tl.int64)[:, None] * w_stride_n
    if ROWS == 1:  # a matrix unit has no use here; the products are summed at the end
        products = tl.zeros((BLOCK_N, BLOCK_K), tl.float32)
        for start in tl.range(part * share, end, BLOCK_K, num_stages=STAGES):
            at = start + deep
            x = tl.load(x_ptr + at, mask=at < end, other=0.0).to(tl.float32)
            w = tl.load(w_ptr + at.to(tl.int64)[None, :] * w_stride_k, mask=at[None, :] < end, other=0.0)
            products += x[None, :] * w.to(tl.float32)
        total = tl.sum(products, axis=1)[None, :]
    else:
        x_ptr += tl.minimum(row, rows - 1).to(tl.int64)[None, :, None] * x_stride
        piece = tl.arange(0, PIECES)[:, None, None] * BLOCK_K + deep[None, None, :]
        pieces = tl.zeros((PIECES, ROWS, BLOCK_N), tl.float32)
        for start in range(part * share, end, PIECES * BLOCK_K):
            at = start + piece
            x = tl.load(x_ptr + at, mask=at < end, other=0.0)
            w = tl.load(w_ptr[None] + at.to(tl.int64) * w_stride_k, mask=at < end, other=0.0)
            pieces = add_product(pieces, x, tl.trans(w.to(x.dtype), 0, 2, 1))
        total = tl.sum(pieces, axis=0)
    live = (row < rows)[:, None] & (col < n)[None, :]
    if SPLIT:
        at = (part.to(tl.int64) * rows + row[:, None]) * n + col[None, :]
        tl.store(partial_ptr + at, total, mask=live)
    else:
        _finish(
            total, row.to(tl.int64)[:, None], col[None, :], live,
            bias_ptr, residual_ptr, y_ptr, pre_ptr, scale_ptr, n, residual_stride,
            ACTIVATION, HAS_BIAS, HAS_RESIDUAL, SAVE, HAS_SCALE,
        )  # fmt: skip


@triton.jit(do_not_specialize=["rows"])
def _combine_kernel(
    partial_ptr, bias_ptr, residual_ptr, y_ptr, pre_ptr, scale_ptr, parts, rows, n, residual_stride,
    ACTIVATION: tl.constexpr, HAS_BIAS: tl.constexpr, HAS_RESIDUAL: tl.constexpr, SAVE: tl.constexpr,
    HAS_SCALE: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """Adds the parts (parts, rows, n) of one row in order, then runs the epilogue."""
    row = tl.program_id(1).to(tl.int64) + tl.zeros((1, 1), tl.int64)
    col = (tl.program_id(0) * BLOCK + tl.arange(0, BLOCK))[None, :]
    live = col < n
    total = tl.zeros((1, BLOCK), tl.float32)
    for part in range(parts):
        total += tl.load(partial_ptr + (part * rows + row) * n + col, mask=live, other=0.0)
    _finish(
        total, row, col, live, bias_ptr, residual_ptr, y_ptr, pre_ptr, scale_ptr, n, residual_stride,
        ACTIVATION, HAS_BIAS, HAS_RESIDUAL, SAVE, HAS_SCALE,
    )  # fmt: skip


# ---- launchers ------------------------------------------------------------------------------------------------------
def stream_options(rows, tile):
    """The options of a stream kernel. STAGES: Triton pipelines a loop without matrix products only if the loop says so."""
    options = {**tile.options, "STAGES": tile.options["num_stages"]}
    few = {"ROWS": FEW_ROWS, "PIECES": options["num_warps"]}
    return {**options, **(few if rows > 1 else {"ROWS": 1, "PIECES": 1})}


def share(n, k, tile, options):
    """How many values of k a program of a stream kernel takes. Sums are split if few programs would have long ones: then the
    number of programs about fills the chip, and a second kernel adds the parts. It costs a launch."""
    deep = options["PIECES"] * options["BLOCK_K"]
    split = min(tile.programs // triton.cdiv(n, tile.options["BLOCK_N"]), k // tile.least_k)
    return triton.cdiv(triton.cdiv(k, deep), max(split, 1)) * deep


def prepare_product(outer, x_stride, w, has_bias, activation, residual_stride, save, dtype=None, of_integers=False):
    """A function of (x, w, bias, residual, scale, steps). It returns (y, pre): y = activation(pre) + residual with
    pre = x w^T + bias. pre is None without `save`.

    x is (*outer, k) with x_stride from row to row, w is (n, k). residual is (*outer, n), or None if residual_stride is None.
    y is (*outer, n) and has `dtype`, by default w's. If w is int8, dtype is x's, and scale (n,) float32 is given; with
    of_integers x is int8 too, and steps (rows,) float32 are.
    """
    (n, k), rows, device = w.shape, math.prod(outer), w.device
    is_int8, dtype = w.dtype == torch.int8, dtype or w.dtype
    of_tile = dtype if is_int8 else w.dtype
    cases = ("integers", "int8", "")[0 if of_integers else 1 if is_int8 else 2 :]
    strides = (x_stride, *w.stride(), residual_stride or 0)
    flags = {"ACTIVATION": activation, "HAS_BIAS": has_bias, "HAS_RESIDUAL": residual_stride is not None, "SAVE": save}
    flags["HAS_SCALE"] = is_int8
    new_y = maker((*outer, n), dtype, None, device)
    parts = 0
    if rows > FEW_ROWS:
        tile = tiles.find("ffn_linear", device, of_tile, cases=cases).options
        multiply = starter(
            _linear_kernel, (triton.cdiv(rows, tile["BLOCK_M"]) * triton.cdiv(n, tile["BLOCK_N"]),), device,
            rows, n, k, *strides, **flags, EVEN_K=k % tile["BLOCK_K"] == 0, **tile,
        )  # fmt: skip
    else:
        tile = tiles.find("ffn_stream", device, of_tile, rows, cases)
        options = stream_options(rows, tile)
        each = share(n, k, tile, options)
        parts = triton.cdiv(k, each)
        stream = starter(
            _stream_kernel, (triton.cdiv(n, tile.options["BLOCK_N"]), parts), device,
            rows, n, k, each, *strides, **flags, SPLIT=parts > 1, **options,
        )  # fmt: skip
    if parts > 1:
        block = tiles.find("ffn_combine", device).options
        combine = starter(
            _combine_kernel, (triton.cdiv(n, block["BLOCK"]), rows), device,
            parts, rows, n, strides[3], **flags, **block,
        )  # fmt: skip
        new_partial = maker((parts, rows, n), torch.float32, None, device)

    def run(x, w, bias, residual, scale=None, steps=None):
        y, pre = new_y(), new_y() if save else None
        outputs = bias, residual, y, pre, scale
        if parts > 1:
            partial = new_partial()
            stream(x, w, *outputs, partial)
            combine(partial, *outputs)
        elif parts:
            stream(x, w, *outputs, None)
        else:
            multiply(x, w, *outputs, steps)
        return y, pre

    return run
