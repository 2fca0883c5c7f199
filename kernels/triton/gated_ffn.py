"""gated_ffn in Triton: y = (activation(x w_gate^T) * (x w_up^T)) w_out^T (+ residual); x (R, N), w_gate, w_up (F, N).

Three ways, all with float32 accumulation (float32 inputs multiply in float32, not TF32):

1. R <= 16 rows, decoding: bound by the weights, 2 F (2 N + M) bytes in 16 bits, each read once. A program streams the
   same few rows of w_gate and w_up, so its epilogue does the activation and the product. Streams and splits are ffn's, and
   so is the second product. Flan-T5 base, one row, bf16: 9.4 MB, 3.1 us at 3.0 TB/s and 2 launches.
2. More rows: one kernel for both products and the activation (_gated_product.py), where the tiles' evidence has a row for
   N, then the library's product.
3. Else the library's products (cuBLAS), as in ffn. Between them one kernel reads gate and up and writes the hidden
   features: 6 R F bytes in 16 bits. Plain PyTorch's activation and product move 10 R F.

An H100 measured all three: docs/performance/index.md.

In float16 activation(gate) * up may not fit. Each row of hidden features is divided by a power of two that brings its
largest below 2^15; it is 1 if the row fits. The second product gives float32 sums. They are multiplied by that power before
the residual is added. Only numbers below 2^-29 of a row's largest lose digits.

Backward: library products around one kernel. It reads gate, up and the gradient of the hidden features. It writes the hidden
features (float32 for float16 inputs) and the gradients of gate and up. w_out's gradient is then a float32 product too:
float16 training is right, bfloat16 training is fast.
"""

import math

import torch
import triton
import triton.language as tl

from pyfused import tiles
from pyfused.kernels.reference.gated_ffn import linear_gradients
from pyfused.kernels.shared.layout import rows_of
from pyfused.kernels.shared.prepared import dense, maker, prepares_launch
from pyfused.kernels.triton._activation import activate, activate_with_slope
from pyfused.kernels.triton._dot import add_product
from pyfused.kernels.triton._gated_product import prepare_gated_product
from pyfused.kernels.triton._launch import starter
from pyfused.kernels.triton._product import FEW_ROWS, prepare_product, share, stream_options


# ---- kernels --------------------------------------------------------------------------------------------------------
@triton.jit
def _finish(
    gate, up, at, live, gate_ptr, up_ptr, hidden_ptr,
    ACTIVATION: tl.constexpr, FACTORS: tl.constexpr, HIDDEN: tl.constexpr,
):  # fmt: skip
    """With FACTORS stores gate and up. With HIDDEN stores activation(gate) * up."""
    if FACTORS:
        tl.store(gate_ptr + at, gate, mask=live)
        tl.store(up_ptr + at, up, mask=live)
    if HIDDEN:
        tl.store(hidden_ptr + at, activate(gate, ACTIVATION) * up, mask=live)


@triton.jit(do_not_specialize=["rows"])
def stream_kernel(
    x_ptr, w_gate_ptr, w_up_ptr, gate_ptr, up_ptr, hidden_ptr, partial_ptr,
    rows, n, k, share, x_stride, w_gate_stride_n, w_gate_stride_k, w_up_stride_n, w_up_stride_k,
    ACTIVATION: tl.constexpr, FACTORS: tl.constexpr, HIDDEN: tl.constexpr, SPLIT: tl.constexpr,
    ROWS: tl.constexpr, PIECES: tl.constexpr, STAGES: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr,
):  # fmt: skip
    """gate and up (rows, n), rows <= ROWS. With SPLIT, float32 partial sums over `share` values of k. PIECES as in ffn."""
    part = tl.program_id(1)
    col = tl.program_id(0) * BLOCK_N + tl.arange(0, BLOCK_N)
    row = tl.arange(0, ROWS)
    deep = tl.arange(0, BLOCK_K)
    end = tl.minimum(part * share + share, k)
    w_gate_ptr += (col % n).to(tl.int64)[:, None] * w_gate_stride_n
    w_up_ptr += (col % n).to(tl.int64)[:, None] * w_up_stride_n
    if ROWS == 1:  # a matrix unit has no use here; the products are summed at the end
        gates = tl.zeros((BLOCK_N, BLOCK_K), tl.float32)
        ups = tl.zeros((BLOCK_N, BLOCK_K), tl.float32)
        for start in tl.range(part * share, end, BLOCK_K, num_stages=STAGES):
            at = start + deep
            live = at[None, :] < end
            x = tl.load(x_ptr + at, mask=at < end, other=0.0).to(tl.float32)
            w_gate = tl.load(w_gate_ptr + at.to(tl.int64)[None, :] * w_gate_stride_k, mask=live, other=0.0)
            w_up = tl.load(w_up_ptr + at.to(tl.int64)[None, :] * w_up_stride_k, mask=live, other=0.0)
            gates += x[None, :] * w_gate.to(tl.float32)
            ups += x[None, :] * w_up.to(tl.float32)
        gate = tl.sum(gates, axis=1)[None, :]
        up = tl.sum(ups, axis=1)[None, :]
    else:
        x_ptr += tl.minimum(row, rows - 1).to(tl.int64)[None, :, None] * x_stride
        piece = tl.arange(0, PIECES)[:, None, None] * BLOCK_K + deep[None, None, :]
        gates = tl.zeros((PIECES, ROWS, BLOCK_N), tl.float32)
        ups = tl.zeros((PIECES, ROWS, BLOCK_N), tl.float32)
        for start in range(part * share, end, PIECES * BLOCK_K):
            at = start + piece
            x = tl.load(x_ptr + at, mask=at < end, other=0.0)
            w_gate = tl.load(w_gate_ptr[None] + at.to(tl.int64) * w_gate_stride_k, mask=at < end, other=0.0)
            w_up = tl.load(w_up_ptr[None] + at.to(tl.int64) * w_up_stride_k, mask=at < end, other=0.0)
            gates = add_product(gates, x, tl.trans(w_gate, 0, 2, 1))
            ups = add_product(ups, x, tl.trans(w_up, 0, 2, 1))
        gate, up = tl.sum(gates, axis=0), tl.sum(ups, axis=0)
    live = (row < rows)[:, None] & (col < n)[None, :]
    if SPLIT:
        at = (part.to(tl.int64) * 2 * rows + row[:, None]) * n + col[None, :]
        tl.store(partial_ptr + at, gate, mask=live)
        tl.store(partial_ptr + at + rows * n, up, mask=live)
    else:
        at = row.to(tl.int64)[:, None] * n + col[None, :]
        _finish(gate, up, at, live, gate_ptr, up_ptr, hidden_ptr, ACTIVATION, FACTORS, HIDDEN)


@triton.jit(do_not_specialize=["rows"])
def combine_kernel(
    partial_ptr, gate_ptr, up_ptr, hidden_ptr, parts, rows, n,
    ACTIVATION: tl.constexpr, FACTORS: tl.constexpr, HIDDEN: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """Adds the parts (parts, 2, rows, n) of one row in order, then runs the epilogue."""
    row = tl.program_id(1).to(tl.int64)
    col = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    live = col < n
    gate = tl.zeros((BLOCK,), tl.float32)
    up = tl.zeros((BLOCK,), tl.float32)
    for part in range(parts):
        at = partial_ptr + (part * 2 * rows + row) * n + col
        gate += tl.load(at, mask=live, other=0.0)
        up += tl.load(at + rows * n, mask=live, other=0.0)
    _finish(gate, up, row * n + col, live, gate_ptr, up_ptr, hidden_ptr, ACTIVATION, FACTORS, HIDDEN)


@triton.jit
def gate_kernel(gate_ptr, up_ptr, hidden_ptr, size, ACTIVATION: tl.constexpr, BLOCK: tl.constexpr):
    """hidden = activation(gate) * up."""
    at = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    gate = tl.load(gate_ptr + at, mask=at < size, other=0.0).to(tl.float32)
    up = tl.load(up_ptr + at, mask=at < size, other=0.0).to(tl.float32)
    tl.store(hidden_ptr + at, activate(gate, ACTIVATION) * up, mask=at < size)


@triton.jit
def gate_scaled_kernel(
    gate_ptr, up_ptr, hidden_ptr, scale_ptr, n, ACTIVATION: tl.constexpr, BLOCK: tl.constexpr
):  # fmt: skip
    """hidden * scale = activation(gate) * up, one row per program. scale is a power of two, 1 or more."""
    row = tl.program_id(0).to(tl.int64)
    col = tl.arange(0, BLOCK)
    largest = tl.zeros((BLOCK,), tl.float32)
    for start in range(0, n, BLOCK):
        at = row * n + start + col
        gate = tl.load(gate_ptr + at, mask=start + col < n, other=0.0).to(tl.float32)
        up = tl.load(up_ptr + at, mask=start + col < n, other=0.0).to(tl.float32)
        largest = tl.maximum(largest, tl.abs(activate(gate, ACTIVATION) * up))
    # The largest is below 2^(exponent - 126). Dividing by 2^(exponent - 141) brings it below 2^15.
    exponent = tl.max(largest, axis=0).to(tl.int32, bitcast=True) >> 23
    surplus = tl.maximum(exponent - 141, 0)
    down = ((127 - surplus) << 23).to(tl.float32, bitcast=True)
    tl.store(scale_ptr + row, ((127 + surplus) << 23).to(tl.float32, bitcast=True))
    for start in range(0, n, BLOCK):  # the second read comes from the L2
        at = row * n + start + col
        gate = tl.load(gate_ptr + at, mask=start + col < n, other=0.0).to(tl.float32)
        up = tl.load(up_ptr + at, mask=start + col < n, other=0.0).to(tl.float32)
        tl.store(hidden_ptr + at, activate(gate, ACTIVATION) * up * down, mask=start + col < n)


@triton.jit
def unscale_kernel(
    sums_ptr, scale_ptr, residual_ptr, y_ptr, n, residual_stride, HAS_RESIDUAL: tl.constexpr, BLOCK: tl.constexpr
):  # fmt: skip
    """y = sums * scale (+ residual), one block of a row per program. Grid (rows * blocks): only the first axis takes more than
    65,535."""
    blocks = tl.cdiv(n, BLOCK)
    row = (tl.program_id(0) // blocks).to(tl.int64)
    col = tl.program_id(0) % blocks * BLOCK + tl.arange(0, BLOCK)
    y = tl.load(sums_ptr + row * n + col, mask=col < n, other=0.0) * tl.load(scale_ptr + row)
    if HAS_RESIDUAL:
        y += tl.load(residual_ptr + row * residual_stride + col, mask=col < n, other=0.0).to(tl.float32)
    tl.store(y_ptr + row * n + col, y, mask=col < n)


@triton.jit
def gradients_kernel(
    gate_ptr, up_ptr, grad_hidden_ptr, hidden_ptr, grad_gate_ptr, grad_up_ptr, size,
    ACTIVATION: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """hidden = activation(gate) * up, and the gradients of both factors."""
    at = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    live = at < size
    gate = tl.load(gate_ptr + at, mask=live, other=0.0).to(tl.float32)
    up = tl.load(up_ptr + at, mask=live, other=0.0).to(tl.float32)
    grad = tl.load(grad_hidden_ptr + at, mask=live, other=0.0).to(tl.float32)
    active, slope = activate_with_slope(gate, ACTIVATION)
    tl.store(hidden_ptr + at, active * up, mask=live)
    tl.store(grad_gate_ptr + at, grad * up * slope, mask=live)
    tl.store(grad_up_ptr + at, grad * active, mask=live)


# ---- launchers ------------------------------------------------------------------------------------------------------
def _wide_product(a, b):
    """a @ b. For float16 matrices the result is float32; a GPU uses its tensor cores."""
    if a.dtype != torch.float16:
        return a @ b
    return torch.mm(a, b, out_dtype=torch.float32) if a.is_cuda else a.float() @ b.float()


def prepare_stream(outer, x_stride, w_gate, w_up, activation, factors, hidden):
    """A function of (x, w_gate, w_up) for at most FEW_ROWS rows. It returns (gate, up, hidden), each (*outer, F). gate and up
    are None without `factors`, hidden is None without `hidden`."""
    (n, k), rows, dtype, device = w_gate.shape, math.prod(outer), w_gate.dtype, w_gate.device
    flags = {"ACTIVATION": activation, "FACTORS": factors, "HIDDEN": hidden}
    tile = tiles.find("gated_ffn_stream", device, dtype, rows)
    options = stream_options(rows, tile)
    each = share(n, k, tile, options)
    parts = triton.cdiv(k, each)
    stream = starter(
        stream_kernel, (triton.cdiv(n, tile.options["BLOCK_N"]), parts), device,
        rows, n, k, each, x_stride, *w_gate.stride(), *w_up.stride(),
        **flags, SPLIT=parts > 1, **options,
    )  # fmt: skip
    if parts > 1:
        block = tiles.find("gated_ffn_combine", device).options
        combine = starter(
            combine_kernel, (triton.cdiv(n, block["BLOCK"]), rows), device, parts, rows, n, **flags, **block
        )
        new_partial = maker((parts, 2, rows, n), torch.float32, None, device)
    new = maker((*outer, n), dtype, None, device)

    def run(x, w_gate, w_up):
        outputs = (new(), new()) if factors else (None, None)
        outputs += (new() if hidden else None,)
        if parts > 1:
            partial = new_partial()
            stream(x, w_gate, w_up, *outputs, partial)
            combine(partial, *outputs)
        else:
            stream(x, w_gate, w_up, *outputs, None)
        return outputs

    return run


def _prepare_scaled(outer, f, activation, device):
    """A function of float16 gate and up (*outer, F). It returns (hidden, scale) with hidden * scale[:, None] = activation(gate)
    * up."""
    rows, tile = math.prod(outer), tiles.find("gated_ffn_gate_scaled", device, size=f).options
    start = starter(gate_scaled_kernel, (rows,), device, f, ACTIVATION=activation, **tile)
    new_hidden, new_scale = maker((*outer, f), torch.float16, None, device), maker((rows,), torch.float32, None, device)

    def run(gate, up):
        hidden, scale = new_hidden(), new_scale()
        start(gate, up, hidden, scale)
        return hidden, scale

    return run


def _prepare_unscaled(outer, m, residual_stride, device):
    """A function of (sums, scale, residual) that returns sums (*outer, m) * scale + residual in float16."""
    tile = tiles.find("gated_ffn_unscale", device).options
    start = starter(
        unscale_kernel, (triton.cdiv(m, tile["BLOCK"]) * math.prod(outer),), device,
        m, residual_stride or 0, HAS_RESIDUAL=residual_stride is not None, **tile,
    )  # fmt: skip
    new = maker((*outer, m), torch.float16, None, device)

    def run(sums, scale, residual):
        y = new()
        start(sums, scale, residual, y)
        return y

    return run


@prepares_launch
def forward(x, w_gate, w_up, w_out, activation, residual, save):
    of_x, of_residual = rows_of(x), (0, 0, None) if residual is None else rows_of(residual)
    if of_x is None or of_residual is None:
        return None
    (rows, _, x_stride), residual_stride, device = of_x, of_residual[2], x.device
    outer, f, m = x.shape[:-1], w_gate.shape[0], w_out.shape[0]
    few, half = rows <= FEW_ROWS, x.dtype == torch.float16
    both = None  # one kernel for gate, up and hidden
    if half:
        scaled = _prepare_scaled(outer, f, activation, device)
        unscaled = _prepare_unscaled(outer, m, residual_stride, device)
    if few:
        stream = prepare_stream(outer, x_stride, w_gate, w_up, activation, save or half, not half)
        wide, stride = (torch.float32, None) if half else (None, residual_stride)
        last = prepare_product(outer, f, w_out, False, "none", stride, False, wide)
    elif not half:
        both = prepare_gated_product(outer, x_stride, w_gate, w_up, activation, save)
        size, tile = rows * f, tiles.find("gated_ffn_gate", device).options
        grid = (triton.cdiv(size, tile["BLOCK"]),)
        activated = starter(gate_kernel, grid, device, size, ACTIVATION=activation, **tile)
        new_hidden = maker((*outer, f), x.dtype, None, device)

    def launch(x, w_gate, w_up, w_out, _activation, residual, _save=False):
        if few:
            gate, up, hidden = stream(x, w_gate, w_up)
        elif both is not None:
            gate, up, hidden = both(x, w_gate, w_up)
        else:
            gate, up = (x @ w_gate.t()).contiguous(), (x @ w_up.t()).contiguous()
        if half:
            hidden, scale = scaled(gate, up)
            sums = last(hidden, w_out, None, None)[0] if few else _wide_product(hidden.view(rows, f), w_out.t())
            y = unscaled(sums, scale, residual)
        elif few:
            y = last(hidden, w_out, None, residual)[0]
        else:
            if both is None:
                hidden = new_hidden() if save else gate
                activated(gate, up, hidden)
            y = hidden @ w_out.t()
            y = y if residual is None else y.add_(residual)
        return (y, gate, up) if save else (y, None, None)

    return launch


@prepares_launch
def backward(grad_y, x, w_gate, w_up, w_out, gate, up, activation, *wants):
    if not dense(gate, up):
        return None
    size, dtype, device = gate.numel(), gate.dtype, gate.device
    tile = tiles.find("gated_ffn_gradients", device).options
    grid = (triton.cdiv(size, tile["BLOCK"]),)
    start = starter(gradients_kernel, grid, device, size, ACTIVATION=activation, **tile)
    new_hidden = maker(gate.shape, torch.float32 if dtype == torch.float16 else dtype, None, device)
    new_grad = maker(gate.shape, dtype, None, device)

    def launch(grad_y, x, w_gate, w_up, w_out, gate, up, _activation, *wants):
        grad_hidden = _wide_product(grad_y.reshape(-1, grad_y.shape[-1]), w_out)
        hidden, grad_gate, grad_up = new_hidden(), new_grad(), new_grad()
        start(gate, up, grad_hidden, hidden, grad_gate, grad_up)
        return linear_gradients(grad_y, x, w_gate, w_up, hidden, grad_gate, grad_up, wants)

    return launch
