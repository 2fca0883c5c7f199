"""What do layer_norm and rms_norm share in Triton? The kernels and their launchers. CENTRED means layer_norm, with a mean.

total = x + residual; y = (total - mean) * rstd * weight + bias. Statistics are float32. rms_norm has neither mean nor bias.

Reads x (and residual) once, writes y (and total) once. 8 N float operations a row: always bound by memory.
Predicted at 3.0 TB/s, 16 x 1024 rows, bf16, not yet measured: N = 768 alone 17 us, with residual 34 us; N = 1024 22 and
45 us. Backward, 4096 x 1024: three tensors, 8.4 us, plus a launch and 1 us for the partial sums.

Tiling: a program holds ROWS whole rows in registers. At small N several rows are in flight and a warp owns a row, so its sums
are shuffles without a barrier. A row longer than the tiles of pyfused.tiles is walked in blocks by one program; its second
and third pass read from the L2. The variance takes two passes and is corrected by the mean of the deviations, so a mean far
from zero costs no digits.

Backward: grad_x = rstd * (g - mean(g) - xhat * mean(g * xhat)) + grad_total with g = grad_y * weight, mean(g) only if
CENTRED. Weight gradients take two stages without atomics, so they are bitwise repeatable: each program sums a fixed share of
the rows, then a second kernel adds these sums in order. For rows in blocks x and grad_y are read again, by columns.
"""

import torch
import triton
import triton.language as tl

from pyfused import tiles
from pyfused.kernels.shared.prepared import maker

from ._launch import starter


# ---- kernels --------------------------------------------------------------------------------------------------------
@triton.jit(do_not_specialize=["rows"])
def forward_kernel(
    x_ptr, residual_ptr, weight_ptr, bias_ptr, y_ptr, total_ptr, mean_ptr, rstd_ptr,
    rows, n, x_stride, residual_stride, eps,
    HAS_RESIDUAL: tl.constexpr, HAS_BIAS: tl.constexpr, SAVE: tl.constexpr, CENTRED: tl.constexpr,
    ROWS: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    row = (tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS))[:, None]
    col = tl.arange(0, BLOCK)[None, :]
    live = (row < rows) & (col < n)
    t = tl.load(x_ptr + row * x_stride + col, mask=live, other=0.0)
    if HAS_RESIDUAL:
        other = tl.load(residual_ptr + row * residual_stride + col, mask=live, other=0.0)
        t = (t.to(tl.float32) + other.to(tl.float32)).to(t.dtype)  # rounded: the next layer reads this total
        tl.store(total_ptr + row * n + col, t, mask=live)
    t = t.to(tl.float32)
    if CENTRED:
        rough = tl.sum(t, axis=1)[:, None] / n
        t = tl.where(col < n, t - rough, 0.0)
        shift = tl.sum(t, axis=1)[:, None] / n
        variance = tl.maximum(tl.sum(t * t, axis=1)[:, None] / n - shift * shift, 0.0)
        t -= shift
        if SAVE:
            tl.store(mean_ptr + row, rough + shift, mask=row < rows)
    else:
        variance = tl.sum(t * t, axis=1)[:, None] / n
    rstd = 1.0 / tl.sqrt(variance + eps)
    y = t * rstd * tl.load(weight_ptr + col, mask=col < n, other=0.0).to(tl.float32)
    if HAS_BIAS:
        y += tl.load(bias_ptr + col, mask=col < n, other=0.0).to(tl.float32)
    tl.store(y_ptr + row * n + col, y, mask=live)
    if SAVE:
        tl.store(rstd_ptr + row, rstd, mask=row < rows)


@triton.jit
def forward_long_kernel(
    x_ptr, residual_ptr, weight_ptr, bias_ptr, y_ptr, total_ptr, mean_ptr, rstd_ptr,
    n, x_stride, residual_stride, eps,
    HAS_RESIDUAL: tl.constexpr, HAS_BIAS: tl.constexpr, SAVE: tl.constexpr, CENTRED: tl.constexpr,
    BLOCK: tl.constexpr,
):  # fmt: skip
    row = tl.program_id(0).to(tl.int64)
    col = tl.arange(0, BLOCK)
    x_ptr += row * x_stride
    total = tl.zeros((BLOCK,), tl.float32)
    square = tl.zeros((BLOCK,), tl.float32)
    for start in range(0, n, BLOCK):
        live = start + col < n
        t = tl.load(x_ptr + start + col, mask=live, other=0.0)
        if HAS_RESIDUAL:
            other = tl.load(residual_ptr + row * residual_stride + start + col, mask=live, other=0.0)
            t = (t.to(tl.float32) + other.to(tl.float32)).to(t.dtype)
            tl.store(total_ptr + row * n + start + col, t, mask=live)
        t = t.to(tl.float32)
        if CENTRED:
            total += t
        else:
            square += t * t
    if HAS_RESIDUAL:  # each thread reads back only what it wrote itself
        x_ptr = total_ptr + row * n
    if CENTRED:
        rough = tl.sum(total, axis=0) / n
        total = tl.zeros((BLOCK,), tl.float32)
        for start in range(0, n, BLOCK):
            live = start + col < n
            t = tl.where(live, tl.load(x_ptr + start + col, mask=live, other=0.0).to(tl.float32) - rough, 0.0)
            total += t
            square += t * t
        shift = tl.sum(total, axis=0) / n
        variance = tl.maximum(tl.sum(square, axis=0) / n - shift * shift, 0.0)
        if SAVE:
            tl.store(mean_ptr + row, rough + shift)
    else:
        variance = tl.sum(square, axis=0) / n
    rstd = 1.0 / tl.sqrt(variance + eps)
    for start in range(0, n, BLOCK):
        live = start + col < n
        t = tl.load(x_ptr + start + col, mask=live, other=0.0).to(tl.float32)
        if CENTRED:
            t = t - rough - shift
        y = t * rstd * tl.load(weight_ptr + start + col, mask=live, other=0.0).to(tl.float32)
        if HAS_BIAS:
            y += tl.load(bias_ptr + start + col, mask=live, other=0.0).to(tl.float32)
        tl.store(y_ptr + row * n + start + col, y, mask=live)
    if SAVE:
        tl.store(rstd_ptr + row, rstd)


@triton.jit(do_not_specialize=["rows", "steps"])
def backward_kernel(
    grad_y_ptr, grad_total_ptr, x_ptr, weight_ptr, mean_ptr, rstd_ptr, grad_x_ptr, partial_ptr,
    rows, n, x_stride, steps,
    HAS_TOTAL: tl.constexpr, HAS_BIAS: tl.constexpr, CENTRED: tl.constexpr, ROWS: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    program = tl.program_id(0).to(tl.int64)
    col = tl.arange(0, BLOCK)[None, :]
    weight = tl.load(weight_ptr + col, mask=col < n, other=0.0).to(tl.float32)
    grad_weight = tl.zeros((ROWS, BLOCK), tl.float32)
    grad_bias = tl.zeros((ROWS, BLOCK), tl.float32)
    for step in range(steps):
        row = ((program * steps + step) * ROWS + tl.arange(0, ROWS))[:, None]
        live = (row < rows) & (col < n)
        dy = tl.load(grad_y_ptr + row * n + col, mask=live, other=0.0).to(tl.float32)
        x = tl.load(x_ptr + row * x_stride + col, mask=live, other=0.0).to(tl.float32)
        rstd = tl.load(rstd_ptr + row, mask=row < rows, other=0.0)
        if CENTRED:
            x -= tl.load(mean_ptr + row, mask=row < rows, other=0.0)
        xhat = x * rstd
        g = dy * weight  # zero outside `live`, because dy is
        grad_weight += dy * xhat
        grad_bias += dy
        mean_gx = tl.sum(g * xhat, axis=1)[:, None] / n
        if CENTRED:
            g -= tl.sum(g, axis=1)[:, None] / n
        dx = (g - xhat * mean_gx) * rstd
        if HAS_TOTAL:
            dx += tl.load(grad_total_ptr + row * n + col, mask=live, other=0.0).to(tl.float32)
        tl.store(grad_x_ptr + row * n + col, dx, mask=live)
    one = tl.arange(0, BLOCK)
    partial_ptr += program * 2 * n
    tl.store(partial_ptr + one, tl.sum(grad_weight, axis=0), mask=one < n)
    if HAS_BIAS:
        tl.store(partial_ptr + n + one, tl.sum(grad_bias, axis=0), mask=one < n)


@triton.jit
def backward_long_kernel(
    grad_y_ptr, grad_total_ptr, x_ptr, weight_ptr, mean_ptr, rstd_ptr, grad_x_ptr,
    n, x_stride,
    HAS_TOTAL: tl.constexpr, CENTRED: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    row = tl.program_id(0).to(tl.int64)
    col = tl.arange(0, BLOCK)
    rstd = tl.load(rstd_ptr + row)
    mean = tl.load(mean_ptr + row) if CENTRED else 0.0
    sum_g = tl.zeros((BLOCK,), tl.float32)
    sum_gx = tl.zeros((BLOCK,), tl.float32)
    for start in range(0, n, BLOCK):
        live = start + col < n
        dy = tl.load(grad_y_ptr + row * n + start + col, mask=live, other=0.0).to(tl.float32)
        x = tl.load(x_ptr + row * x_stride + start + col, mask=live, other=0.0).to(tl.float32)
        g = dy * tl.load(weight_ptr + start + col, mask=live, other=0.0).to(tl.float32)
        sum_g += g
        sum_gx += g * ((x - mean) * rstd)
    mean_gx = tl.sum(sum_gx, axis=0) / n
    mean_g = tl.sum(sum_g, axis=0) / n if CENTRED else 0.0
    for start in range(0, n, BLOCK):
        live = start + col < n
        dy = tl.load(grad_y_ptr + row * n + start + col, mask=live, other=0.0).to(tl.float32)
        x = tl.load(x_ptr + row * x_stride + start + col, mask=live, other=0.0).to(tl.float32)
        g = dy * tl.load(weight_ptr + start + col, mask=live, other=0.0).to(tl.float32)
        dx = (g - mean_g - (x - mean) * rstd * mean_gx) * rstd
        if HAS_TOTAL:
            dx += tl.load(grad_total_ptr + row * n + start + col, mask=live, other=0.0).to(tl.float32)
        tl.store(grad_x_ptr + row * n + start + col, dx, mask=live)


@triton.jit(do_not_specialize=["rows", "steps"])
def column_sums_kernel(
    grad_y_ptr, x_ptr, mean_ptr, rstd_ptr, partial_ptr,
    rows, n, x_stride, steps,
    HAS_BIAS: tl.constexpr, CENTRED: tl.constexpr, ROWS: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """The first stage of the weight gradients of long rows. A program sums a share of the rows in a block of columns."""
    share = tl.program_id(1).to(tl.int64)
    col = (tl.program_id(0) * BLOCK + tl.arange(0, BLOCK))[None, :]
    grad_weight = tl.zeros((ROWS, BLOCK), tl.float32)
    grad_bias = tl.zeros((ROWS, BLOCK), tl.float32)
    for step in range(steps):
        row = ((share * steps + step) * ROWS + tl.arange(0, ROWS))[:, None]
        live = (row < rows) & (col < n)
        dy = tl.load(grad_y_ptr + row * n + col, mask=live, other=0.0).to(tl.float32)
        x = tl.load(x_ptr + row * x_stride + col, mask=live, other=0.0).to(tl.float32)
        if CENTRED:
            x -= tl.load(mean_ptr + row, mask=row < rows, other=0.0)
        grad_weight += dy * (x * tl.load(rstd_ptr + row, mask=row < rows, other=0.0))
        grad_bias += dy
    one = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    partial_ptr += share * 2 * n
    tl.store(partial_ptr + one, tl.sum(grad_weight, axis=0), mask=one < n)
    if HAS_BIAS:
        tl.store(partial_ptr + n + one, tl.sum(grad_bias, axis=0), mask=one < n)


@triton.jit(do_not_specialize=["parts"])
def reduce_kernel(
    partial_ptr, grad_weight_ptr, grad_bias_ptr, parts, n,
    HAS_BIAS: tl.constexpr, PARTS: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """The second stage: adds the partial sums of (parts, 2, n) in one fixed order."""
    col = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    weight = tl.zeros((PARTS, BLOCK), tl.float32)
    bias = tl.zeros((PARTS, BLOCK), tl.float32)
    for start in range(0, parts, PARTS):
        part = (start + tl.arange(0, PARTS))[:, None]
        live = (part < parts) & (col[None, :] < n)
        at = partial_ptr + part.to(tl.int64) * 2 * n + col[None, :]
        weight += tl.load(at, mask=live, other=0.0)
        if HAS_BIAS:
            bias += tl.load(at + n, mask=live, other=0.0)
    tl.store(grad_weight_ptr + col, tl.sum(weight, axis=0), mask=col < n)
    if HAS_BIAS:
        tl.store(grad_bias_ptr + col, tl.sum(bias, axis=0), mask=col < n)


# ---- launchers ------------------------------------------------------------------------------------------------------
def block_of(n):
    """BLOCK of the kernels that keep whole rows of n elements."""
    return max(triton.next_power_of_2(n), 16)


def begin_forward(norm):
    """A function that starts the forward's kernel. kernels/shared/row_norm.py lists its tensors."""
    device, dtype, rows, n, strides = norm.device, norm.dtype, norm.rows, norm.n, (norm.x_stride, norm.residual_stride)
    flags = {"HAS_RESIDUAL": norm.residual, "HAS_BIAS": norm.bias, "SAVE": norm.save, "CENTRED": norm.centred}
    if tile := tiles.find("row_norm_forward", device, dtype, n):
        return starter(
            forward_kernel, (triton.cdiv(rows, tile.options["ROWS"]),), device,
            rows, n, *strides, norm.eps, **flags, BLOCK=block_of(n), **tile.options,
        )  # fmt: skip
    tile = tiles.find("row_norm_forward_long", device, dtype)
    return starter(forward_long_kernel, (rows,), device, n, *strides, norm.eps, **flags, **tile.options)


def begin_backward(norm):
    """A function that starts the backward's kernels, likewise."""
    device, dtype, rows, n, x_stride = norm.device, norm.dtype, norm.rows, norm.n, norm.x_stride
    # With fused multiply-adds g - mean(g) is not exactly zero at N = 1. Memory sets the time anyway.
    exact = {"enable_fp_fusion": False}
    tile = tiles.find("row_norm_backward", device, dtype, n)
    long = tile is None
    tile = tile or tiles.find("row_norm_column_sums", device, dtype)
    tile_rows = tile.options["ROWS"]
    steps = triton.cdiv(rows, tile_rows * tile.programs)
    parts = triton.cdiv(rows, tile_rows * steps)
    if long:
        walk_rows = starter(
            backward_long_kernel, (rows,), device, n, x_stride, HAS_TOTAL=norm.residual, CENTRED=norm.centred,
            **tiles.find("row_norm_backward_long", device, dtype).options, **exact,
        )  # fmt: skip
        add_columns = starter(
            column_sums_kernel, (triton.cdiv(n, tile.options["BLOCK"]), parts), device, rows, n, x_stride, steps,
            HAS_BIAS=norm.bias, CENTRED=norm.centred, **tile.options,
        )  # fmt: skip
    else:
        whole_rows = starter(
            backward_kernel, (parts,), device, rows, n, x_stride, steps, HAS_TOTAL=norm.residual,
            HAS_BIAS=norm.bias, CENTRED=norm.centred, BLOCK=block_of(n), **tile.options, **exact,
        )  # fmt: skip
    of_reduce = tiles.find("row_norm_reduce", device, dtype, n).options
    grid = (triton.cdiv(n, of_reduce["BLOCK"]),)
    reduce = starter(reduce_kernel, grid, device, parts, n, HAS_BIAS=norm.bias, **of_reduce)
    new_partial = maker((parts, 2, n), torch.float32, None, device)

    def start(grad_y, grad_total, x, weight, mean, rstd, grad_x, grad_weight, grad_bias):
        partial = new_partial()
        if long:
            walk_rows(grad_y, grad_total, x, weight, mean, rstd, grad_x)
            add_columns(grad_y, x, mean, rstd, partial)
        else:
            whole_rows(grad_y, grad_total, x, weight, mean, rstd, grad_x, partial)
        reduce(partial, grad_weight, grad_bias)

    return start
