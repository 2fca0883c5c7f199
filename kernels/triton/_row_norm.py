"""What do layer_norm and rms_norm share in Triton? The kernels and their launchers. CENTRED means layer_norm, with a mean.

total = x + residual; y = (total - mean) * rstd * weight + bias. Statistics are float32. rms_norm has neither mean nor bias.

Reads x (and residual) once, writes y (and total) once. 8 N float operations a row: always bound by memory.
docs/performance/h100_predicted.md has the floors, what was measured, and what the compiled code lets one expect.

Forward: a program holds ROWS whole rows in registers, each in blocks of BLOCK elements. Triton lays a tile (ROWS, BLOCK) over
the warps row by row if BLOCK is what the lanes of one warp load with 16 bytes each. So a warp owns a row of moderate length,
all lanes work (768 is three blocks of 256), and sums are shuffles without a barrier. Longer rows cross the warps of a program.
Rows beyond the tiles of pyfused.tiles are walked in blocks by one program; its second and third pass read from the L2. The
variance takes two passes and is corrected by the mean of the deviations, so a mean far from zero costs no digits.

Backward: grad_x = rstd * (g - mean(g) - xhat * mean(g * xhat)) + grad_total with g = grad_y * weight, mean(g) only if
CENTRED. Weight gradients take two stages without atomics, so they are bitwise repeatable: each program sums a fixed share of
the rows, then a second kernel adds these sums in order. A program holds ROWS whole rows. All its warps lie along a row unless
rows are short: then a thread has the same columns of each row, and sums them in few registers. The next rows are copied to
shared memory meanwhile. (Loads into registers started too late: ptxas put them behind a step's sums.) All programs together
read memory from its start to its end, as a copy does. For rows in blocks x and grad_y are read again, by columns.
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


@triton.jit
def _sum(blocks, SQUARED: tl.constexpr):
    """The sum of some blocks, or of their squares."""
    total = blocks[0] * blocks[0] if SQUARED else blocks[0]
    for i in tl.static_range(1, len(blocks)):
        total += blocks[i] * blocks[i] if SQUARED else blocks[i]
    return total


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
    for i in tl.static_range(BLOCKS):
        at = i * BLOCK + col
        one = x[i]
        if HAS_RESIDUAL:
            # Rounded: the next layer reads this total.
            one = (one.to(tl.float32) + other[i].to(tl.float32)).to(one.dtype)
            tl.store(total_ptr + row * n + at, one, mask=inside & (at < n))
        t += (one.to(tl.float32),)
    if CENTRED:
        rough = tl.sum(_sum(t, False), axis=1)[:, None] / n
        deviation = ()
        for i in tl.static_range(BLOCKS):
            deviation += (tl.where(i * BLOCK + col < n, t[i] - rough, 0.0),)
        t = deviation
        total, square = tl.split(tl.sum(tl.join(_sum(t, False), _sum(t, True)), axis=1))  # cross the warps together
        shift = total[:, None] / n
        variance = tl.maximum(square[:, None] / n - shift * shift, 0.0)
    else:
        variance = tl.sum(_sum(t, True), axis=1)[:, None] / n
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
def _add_rows(tile, ACROSS: tl.constexpr):
    """A tile's sums over its rows, if each thread can add its own columns."""
    return tl.sum(tile, axis=0, keep_dims=True) if ACROSS else tile


@triton.jit(do_not_specialize=["rows", "steps"])
def backward_kernel(
    grad_y_ptr, grad_total_ptr, x_ptr, weight_ptr, mean_ptr, rstd_ptr, grad_x_ptr, partial_ptr,
    rows, n, x_stride, steps,
    HAS_TOTAL: tl.constexpr, HAS_BIAS: tl.constexpr, CENTRED: tl.constexpr,
    ACROSS: tl.constexpr, STAGES: tl.constexpr, ROWS: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """ACROSS: all warps lie along a row, so a thread has the same columns of each row."""
    program = tl.program_id(0).to(tl.int64)
    row = (program * ROWS + tl.arange(0, ROWS))[:, None]
    col = tl.arange(0, BLOCK)[None, :]
    weight = tl.load(weight_ptr + col, mask=col < n, other=0.0).to(tl.float32)
    grad_weight = tl.zeros((1 if ACROSS else ROWS, BLOCK), tl.float32)
    grad_bias = tl.zeros((1 if ACROSS else ROWS, BLOCK), tl.float32)
    share = 1.0 / n
    for _ in tl.range(0, steps, num_stages=STAGES):
        inside = row < rows
        live = inside & (col < n)
        dy = tl.load(grad_y_ptr + row * n + col, mask=live, other=0.0).to(tl.float32)
        xhat = tl.load(x_ptr + row * x_stride + col, mask=live, other=0.0).to(tl.float32)
        if CENTRED:
            xhat -= tl.load(mean_ptr + row, mask=inside, other=0.0)
        rstd = tl.load(rstd_ptr + row, mask=inside, other=0.0)
        xhat *= rstd
        g = dy * weight  # zero outside, because dy is
        grad_weight += _add_rows(dy * xhat, ACROSS)
        if HAS_BIAS:
            grad_bias += _add_rows(dy, ACROSS)
        dx = g
        if CENTRED:  # both sums cross the warps together
            sum_gx, sum_g = tl.split(tl.sum(tl.join(g * xhat, g), axis=1))
            dx -= sum_g[:, None] * share
        else:
            sum_gx = tl.sum(g * xhat, axis=1)
        dx = tl.fma(-xhat, sum_gx[:, None] * share, dx) * rstd
        if HAS_TOTAL:
            dx += tl.load(grad_total_ptr + row * n + col, mask=live, other=0.0).to(tl.float32)
        tl.store(grad_x_ptr + row * n + col, dx, mask=live)
        row += tl.num_programs(0) * ROWS
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
def shortest(n):
    """The least power of two that holds a row, but no tile of a few bytes."""
    return max(triton.next_power_of_2(n), 16)


def of_forward(n, tile):
    """The options of a forward that keeps whole rows of n elements, in as few of the tile's blocks as hold them."""
    columns = min(tile.options["BLOCK"], shortest(n))
    return {**tile.options, "BLOCKS": triton.cdiv(n, columns), "BLOCK": columns}


def of_backward(n, dtype, tile, lanes):
    """The options of a backward that keeps whole rows, if warps have so many lanes. A lane loads 16 bytes of a row."""
    block = shortest(n)
    across = block * dtype.itemsize >= tile.options["num_warps"] * lanes * 16
    return {**tile.options, "BLOCK": block, "ACROSS": across, "STAGES": tile.options["num_stages"]}


def begin_forward(norm):
    """A function that starts the forward's kernel. kernels/shared/row_norm.py lists its tensors."""
    device, dtype, rows, n, strides = norm.device, norm.dtype, norm.rows, norm.n, (norm.x_stride, norm.residual_stride)
    flags = {"HAS_RESIDUAL": norm.residual, "HAS_BIAS": norm.bias, "SAVE": norm.save, "CENTRED": norm.centred}
    if tile := tiles.find("row_norm_forward", device, dtype, n):
        return starter(
            forward_kernel, (triton.cdiv(rows, tile.options["ROWS"]),), device,
            rows, n, *strides, norm.eps, **flags, **of_forward(n, tile),
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
            HAS_BIAS=norm.bias, CENTRED=norm.centred, **exact, **of_backward(n, dtype, tile, tiles.lanes(device)),
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
