"""What do layer_norm and rms_norm share in Triton? The kernels and their launchers. CENTRED means layer_norm, with a mean.

total = x + residual; y = (total - mean) * rstd * weight + bias. Statistics are float32. rms_norm has neither mean nor bias.

Reads x (and residual) once, writes y (and total) once. 8 N float operations a row: always bound by memory. Not yet measured;
docs/performance/h100_predicted.md has the floors and what the compiled code lets one expect.

Tiling: a program holds ROWS whole rows in registers, each in blocks of BLOCK elements. Triton lays a tile (ROWS, BLOCK) over
the warps row by row if BLOCK is what the lanes of one warp load with 16 bytes each. So up to N = 4096 forward, and 1024
backward, a warp owns a row, all lanes work (768 is three blocks of 256), and sums are shuffles without a barrier. Longer rows
are one block, whose sums cross the warps of a program. Rows beyond the tiles of pyfused.tiles are walked in blocks by one
program; its second and third pass read from the L2. The variance takes two passes and is corrected by the mean of the
deviations, so a mean far from zero costs no digits.

Backward: grad_x = rstd * (g - mean(g) - xhat * mean(g * xhat)) + grad_total with g = grad_y * weight, mean(g) only if
CENTRED. Weight gradients take two stages without atomics, so they are bitwise repeatable: each program sums a fixed share of
the rows, then a second kernel adds these sums in order. One program has a multiprocessor and its registers, so it also loads
the next rows while it sums. For rows in blocks x and grad_y are read again, by columns.
"""

import torch
import triton
import triton.language as tl

from pyfused import tiles
from pyfused.kernels.shared.prepared import maker

from ._launch import starter


# ---- kernels --------------------------------------------------------------------------------------------------------
@triton.jit
def _weight(ptr, at, n, ROWS: tl.constexpr, BLOCKS: tl.constexpr):
    """A block of weight or bias in float32. Of rows in several blocks each warp loads its own copy, in the layout of its row;
    one copy for all would reach the warps through shared memory."""
    if BLOCKS > 1:
        at = tl.broadcast_to(at, (ROWS, at.shape[1]))
    return tl.load(ptr + at, mask=at < n, other=0.0).to(tl.float32)


@triton.jit
def _store_of_row(ptr, row, value, inside):
    """Stores a number for each row, from one lane. A tile (ROWS, 1) would lie across the warps."""
    lane = tl.arange(0, 32)[None, :]
    tl.store(ptr + row + lane, tl.broadcast_to(value, (row.shape[0], 32)), mask=inside & (lane == 0))


@triton.jit(do_not_specialize=["rows"])
def forward_kernel(
    x_ptr, residual_ptr, weight_ptr, bias_ptr, y_ptr, total_ptr, mean_ptr, rstd_ptr,
    rows, n, x_stride, residual_stride, eps,
    HAS_RESIDUAL: tl.constexpr, HAS_BIAS: tl.constexpr, SAVE: tl.constexpr, CENTRED: tl.constexpr,
    ROWS: tl.constexpr, BLOCKS: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    row = (tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS))[:, None]
    col = tl.arange(0, BLOCK)[None, :]
    inside = row < rows
    x, other = (), ()
    for i in tl.static_range(BLOCKS):  # all loads are under way before the first is used
        at = i * BLOCK + col
        live = inside & (at < n)
        x += (tl.load(x_ptr + row * x_stride + at, mask=live, other=0.0),)
        if HAS_RESIDUAL:
            other += (tl.load(residual_ptr + row * residual_stride + at, mask=live, other=0.0),)
    t = ()
    total = tl.zeros((ROWS, BLOCK), tl.float32)
    square = tl.zeros((ROWS, BLOCK), tl.float32)
    for i in tl.static_range(BLOCKS):
        at = i * BLOCK + col
        one = x[i]
        if HAS_RESIDUAL:
            # Rounded: the next layer reads this total.
            one = (one.to(tl.float32) + other[i].to(tl.float32)).to(one.dtype)
            tl.store(total_ptr + row * n + at, one, mask=inside & (at < n))
        one = one.to(tl.float32)
        t += (one,)
        total += one
        square += one * one
    if CENTRED:
        rough = tl.sum(total, axis=1)[:, None] / n
        total = tl.zeros((ROWS, BLOCK), tl.float32)
        square = tl.zeros((ROWS, BLOCK), tl.float32)
        deviation = ()
        for i in tl.static_range(BLOCKS):
            one = tl.where(i * BLOCK + col < n, t[i] - rough, 0.0)
            deviation += (one,)
            total += one
            square += one * one
        t = deviation
        shift = tl.sum(total, axis=1)[:, None] / n
        variance = tl.maximum(tl.sum(square, axis=1)[:, None] / n - shift * shift, 0.0)
    else:
        variance = tl.sum(square, axis=1)[:, None] / n
    rstd = 1.0 / tl.sqrt(variance + eps)
    for i in tl.static_range(BLOCKS):
        at = i * BLOCK + col
        y = (t[i] - shift if CENTRED else t[i]) * rstd * _weight(weight_ptr, at, n, ROWS, BLOCKS)
        if HAS_BIAS:
            y += _weight(bias_ptr, at, n, ROWS, BLOCKS)
        tl.store(y_ptr + row * n + at, y, mask=inside & (at < n))
    if SAVE:
        _store_of_row(rstd_ptr, row, rstd, inside)
        if CENTRED:
            _store_of_row(mean_ptr, row, rough + shift, inside)


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


@triton.jit
def _rows_of_backward(
    grad_y_ptr, grad_total_ptr, x_ptr, row, inside, n, x_stride,
    HAS_TOTAL: tl.constexpr, BLOCKS: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """Starts all loads of some rows. Returns the blocks of grad_y, x and grad_total, as they are stored."""
    col = tl.arange(0, BLOCK)[None, :]
    dy, x, extra = (), (), ()
    for i in tl.static_range(BLOCKS):
        at = i * BLOCK + col
        live = inside & (at < n)
        dy += (tl.load(grad_y_ptr + row * n + at, mask=live, other=0.0),)
        x += (tl.load(x_ptr + row * x_stride + at, mask=live, other=0.0),)
        if HAS_TOTAL:
            extra += (tl.load(grad_total_ptr + row * n + at, mask=live, other=0.0),)
    return dy, x, extra


@triton.jit(do_not_specialize=["rows", "steps"])
def backward_kernel(
    grad_y_ptr, grad_total_ptr, x_ptr, weight_ptr, mean_ptr, rstd_ptr, grad_x_ptr, partial_ptr,
    rows, n, x_stride, steps,
    HAS_TOTAL: tl.constexpr, HAS_BIAS: tl.constexpr, CENTRED: tl.constexpr, AHEAD: tl.constexpr,
    ROWS: tl.constexpr, BLOCKS: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """AHEAD: the loads of the next step's rows are under way while a step's are summed."""
    program = tl.program_id(0).to(tl.int64)
    col = tl.arange(0, BLOCK)[None, :]
    row = (program * steps * ROWS + tl.arange(0, ROWS))[:, None]
    zero = tl.zeros((ROWS, BLOCK), tl.float32)
    grad_weight, grad_bias = (), ()
    for _ in tl.static_range(BLOCKS):
        grad_weight += (zero,)
        grad_bias += (zero,)
    if AHEAD:
        dy, x, extra = _rows_of_backward(
            grad_y_ptr, grad_total_ptr, x_ptr, row, row < rows, n, x_stride, HAS_TOTAL, BLOCKS, BLOCK
        )
    for step in range(steps):
        inside = row < rows
        if AHEAD:
            after = (row + ROWS < rows) & (step + 1 < steps)
            next_dy, next_x, next_extra = _rows_of_backward(
                grad_y_ptr, grad_total_ptr, x_ptr, row + ROWS, after, n, x_stride, HAS_TOTAL, BLOCKS, BLOCK
            )
        else:
            dy, x, extra = _rows_of_backward(
                grad_y_ptr, grad_total_ptr, x_ptr, row, inside, n, x_stride, HAS_TOTAL, BLOCKS, BLOCK
            )
        rstd = tl.load(rstd_ptr + row, mask=inside, other=0.0)
        mean = tl.load(mean_ptr + row, mask=inside, other=0.0) if CENTRED else 0.0
        sum_g, sum_gx = zero, zero
        g, xhat, next_weight, next_bias = (), (), (), ()
        for i in tl.static_range(BLOCKS):
            d, hat = dy[i].to(tl.float32), (x[i].to(tl.float32) - mean) * rstd
            scaled = d * _weight(weight_ptr, i * BLOCK + col, n, ROWS, BLOCKS)  # zero outside, because d is
            sum_g += scaled
            sum_gx += scaled * hat
            g += (scaled,)
            xhat += (hat,)
            next_weight += (grad_weight[i] + d * hat,)
            next_bias += (grad_bias[i] + d,)
        grad_weight, grad_bias = next_weight, next_bias
        mean_gx = tl.sum(sum_gx, axis=1)[:, None] / n
        mean_g = tl.sum(sum_g, axis=1)[:, None] / n if CENTRED else 0.0
        for i in tl.static_range(BLOCKS):
            at = i * BLOCK + col
            dx = (g[i] - mean_g - xhat[i] * mean_gx) * rstd
            if HAS_TOTAL:
                dx += extra[i].to(tl.float32)
            tl.store(grad_x_ptr + row * n + at, dx, mask=inside & (at < n))
        row += ROWS
        if AHEAD:
            dy, x, extra = next_dy, next_x, next_extra
    partial_ptr += program * 2 * n
    for i in tl.static_range(BLOCKS):
        one = i * BLOCK + tl.arange(0, BLOCK)
        tl.store(partial_ptr + one, tl.sum(grad_weight[i], axis=0), mask=one < n)
        if HAS_BIAS:
            tl.store(partial_ptr + n + one, tl.sum(grad_bias[i], axis=0), mask=one < n)


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
def whole_rows(n, tile):
    """The options of a kernel that keeps whole rows of n elements, in as few of the tile's blocks as hold them."""
    shortest = max(triton.next_power_of_2(n), 16)
    columns = min(tile.options["BLOCK"], shortest)
    return {**tile.options, "BLOCKS": triton.cdiv(n, columns), "BLOCK": columns}


def loads_ahead(dtype, tile):
    """Whether a backward's registers hold two steps' rows: those of warps that own a row do, in 16 bits."""
    return dtype.itemsize == 2 and tile.options["ROWS"] == tile.options["num_warps"]


def begin_forward(norm):
    """A function that starts the forward's kernel. kernels/shared/row_norm.py lists its tensors."""
    device, dtype, rows, n, strides = norm.device, norm.dtype, norm.rows, norm.n, (norm.x_stride, norm.residual_stride)
    flags = {"HAS_RESIDUAL": norm.residual, "HAS_BIAS": norm.bias, "SAVE": norm.save, "CENTRED": norm.centred}
    if tile := tiles.find("row_norm_forward", device, dtype, n):
        return starter(
            forward_kernel, (triton.cdiv(rows, tile.options["ROWS"]),), device,
            rows, n, *strides, norm.eps, **flags, **whole_rows(n, tile),
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
        walk_rows = starter(
            backward_kernel, (parts,), device, rows, n, x_stride, steps, HAS_TOTAL=norm.residual,
            HAS_BIAS=norm.bias, CENTRED=norm.centred, AHEAD=loads_ahead(dtype, tile), **exact,
            **whole_rows(n, tile),
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
            walk_rows(grad_y, grad_total, x, weight, mean, rstd, grad_x, partial)
        reduce(partial, grad_weight, grad_bias)

    return start
