"""gated_ffn in Triton: y = (activation(x w_gate^T) * (x w_up^T)) w_out^T (+ residual); x (R, N), w_gate, w_up (F, N).

Two ways, both with float32 accumulation (float32 inputs multiply in float32, not TF32):

1. R <= 16 rows, decoding: bound by the weights, 2 F (2 N + M) bytes in 16 bits, each read once. A program streams the
   same few rows of w_gate and w_up, so that the activation and the product are in its epilogue; where those are too few
   programs to fill the chip, K is split over programs too, and the partial sums are added in a fixed order. The second
   product is ffn's. Flan-T5 base, one row, bf16: 9.4 MB, 3.1 us at 3.0 TB/s and 3 to 4 launches. Not yet measured.
2. More rows: the library's products (cuBLAS), as in ffn, around one kernel that reads gate and up and writes the hidden
   features: 6 R F bytes in 16 bits, where plain PyTorch's activation and product move 10. Not yet measured.

float16, where activation(gate) * up may not fit: the hidden features of a row are divided by a power of two that brings
the largest below 2^15, and is 1 unless they need it; the second product leaves float32 sums, which are multiplied by it
again before the residual is added. Numbers far below a row's largest lose digits only from its 2^-29th on.

Backward: library products around one kernel that reads gate, up and the gradient of the hidden features and gives the
hidden features, in float32 for float16 inputs, and the gradients of gate and up. w_out's gradient is then a float32
product too: float16 training is right, bfloat16 training is what is fast.
"""

import torch
import triton
import triton.language as tl

from pyfused import tiles
from pyfused.kernels.layout import as_rows
from pyfused.kernels.reference.gated_ffn import linear_gradients
from pyfused.kernels.triton._activation import activate, activate_with_slope
from pyfused.kernels.triton._launch import launch
from pyfused.kernels.triton.ffn import FEW_ROWS, linear, share, stream_rows


# ---- kernels --------------------------------------------------------------------------------------------------------
@triton.jit
def _finish(
    gate, up, at, live, gate_ptr, up_ptr, hidden_ptr,
    ACTIVATION: tl.constexpr, FACTORS: tl.constexpr, HIDDEN: tl.constexpr,
):  # fmt: skip
    """Stores gate and up with FACTORS, activation(gate) * up with HIDDEN."""
    if FACTORS:
        tl.store(gate_ptr + at, gate, mask=live)
        tl.store(up_ptr + at, up, mask=live)
    if HIDDEN:
        tl.store(hidden_ptr + at, activate(gate, ACTIVATION) * up, mask=live)


@triton.jit
def stream_kernel(
    x_ptr, w_gate_ptr, w_up_ptr, gate_ptr, up_ptr, hidden_ptr, partial_ptr,
    rows, n, k, share, x_stride, w_gate_stride_n, w_gate_stride_k, w_up_stride_n, w_up_stride_k,
    ACTIVATION: tl.constexpr, FACTORS: tl.constexpr, HIDDEN: tl.constexpr, SPLIT: tl.constexpr,
    PRECISION: tl.constexpr, ROWS: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr,
):  # fmt: skip
    """gate and up (rows, n), rows <= ROWS; with SPLIT, the part of both from `share` values of k, in float32."""
    part = tl.program_id(1)
    col = tl.program_id(0) * BLOCK_N + tl.arange(0, BLOCK_N)
    row = tl.arange(0, ROWS)
    deep = tl.arange(0, BLOCK_K)
    end = tl.minimum(part * share + share, k)
    w_gate_ptr += (col % n).to(tl.int64)[:, None] * w_gate_stride_n
    w_up_ptr += (col % n).to(tl.int64)[:, None] * w_up_stride_n
    if ROWS == 1:  # no matrix unit has a use: products stay apart until the end
        gates = tl.zeros((BLOCK_N, BLOCK_K), tl.float32)
        ups = tl.zeros((BLOCK_N, BLOCK_K), tl.float32)
        for start in range(part * share, end, BLOCK_K):
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
        x_ptr += tl.minimum(row, rows - 1).to(tl.int64)[:, None] * x_stride
        gate = tl.zeros((ROWS, BLOCK_N), tl.float32)
        up = tl.zeros((ROWS, BLOCK_N), tl.float32)
        for start in range(part * share, end, BLOCK_K):
            at = start + deep
            live = at[None, :] < end
            x = tl.load(x_ptr + at[None, :], mask=live, other=0.0)
            w_gate = tl.load(w_gate_ptr + at.to(tl.int64)[None, :] * w_gate_stride_k, mask=live, other=0.0)
            w_up = tl.load(w_up_ptr + at.to(tl.int64)[None, :] * w_up_stride_k, mask=live, other=0.0)
            gate = tl.dot(x, tl.trans(w_gate), gate, input_precision=PRECISION)
            up = tl.dot(x, tl.trans(w_up), up, input_precision=PRECISION)
    live = (row < rows)[:, None] & (col < n)[None, :]
    if SPLIT:
        at = (part.to(tl.int64) * 2 * rows + row[:, None]) * n + col[None, :]
        tl.store(partial_ptr + at, gate, mask=live)
        tl.store(partial_ptr + at + rows * n, up, mask=live)
    else:
        at = row.to(tl.int64)[:, None] * n + col[None, :]
        _finish(gate, up, at, live, gate_ptr, up_ptr, hidden_ptr, ACTIVATION, FACTORS, HIDDEN)


@triton.jit
def combine_kernel(
    partial_ptr, gate_ptr, up_ptr, hidden_ptr, parts, rows, n,
    ACTIVATION: tl.constexpr, FACTORS: tl.constexpr, HIDDEN: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """Adds the parts (parts, 2, rows, n) of one row in order, then the epilogue."""
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
    """hidden * scale = activation(gate) * up, a row a program; scale is a power of two, 1 or more."""
    row = tl.program_id(0).to(tl.int64)
    col = tl.arange(0, BLOCK)
    largest = tl.zeros((BLOCK,), tl.float32)
    for start in range(0, n, BLOCK):
        at = row * n + start + col
        gate = tl.load(gate_ptr + at, mask=start + col < n, other=0.0).to(tl.float32)
        up = tl.load(up_ptr + at, mask=start + col < n, other=0.0).to(tl.float32)
        largest = tl.maximum(largest, tl.abs(activate(gate, ACTIVATION) * up))
    # The largest is below 2^(exponent - 126): what brings that to 2^15 is 2^(exponent - 141).
    exponent = tl.max(largest, axis=0).to(tl.int32, bitcast=True) >> 23
    surplus = tl.maximum(exponent - 141, 0)
    down = ((127 - surplus) << 23).to(tl.float32, bitcast=True)
    tl.store(scale_ptr + row, ((127 + surplus) << 23).to(tl.float32, bitcast=True))
    for start in range(0, n, BLOCK):  # again, from the L2
        at = row * n + start + col
        gate = tl.load(gate_ptr + at, mask=start + col < n, other=0.0).to(tl.float32)
        up = tl.load(up_ptr + at, mask=start + col < n, other=0.0).to(tl.float32)
        tl.store(hidden_ptr + at, activate(gate, ACTIVATION) * up * down, mask=start + col < n)


@triton.jit
def unscale_kernel(
    sums_ptr, scale_ptr, residual_ptr, y_ptr, n, residual_stride, HAS_RESIDUAL: tl.constexpr, BLOCK: tl.constexpr
):  # fmt: skip
    """y = sums * scale (+ residual), a block of a row a program: grid (rows * blocks), as only its first axis takes more than
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
    """a @ b, of float16 matrices in float32: from the tensor cores on a GPU."""
    if a.dtype != torch.float16:
        return a @ b
    return torch.mm(a, b, out_dtype=torch.float32) if a.is_cuda else a.float() @ b.float()


def _stream(x, x_stride, w_gate, w_up, activation, factors, hidden):
    """Fills `factors`, (gate, up), and `hidden`, each (rows, F) or None, for rows <= FEW_ROWS."""
    (rows, k), n = x.shape, w_gate.shape[0]
    if rows == 0 or n == 0:
        return
    if k == 0:  # a sum of nothing; an empty tensor has no memory to read from
        x, k, x_stride = x.new_zeros((rows, 1)), 1, 1
        w_gate = w_up = x.new_zeros((n, 1))
    gate, up = factors or (hidden, hidden)
    outputs = (gate, up, gate if hidden is None else hidden)
    flags = {"ACTIVATION": activation, "FACTORS": factors is not None, "HIDDEN": hidden is not None}
    precision = "ieee" if x.dtype == torch.float32 else "tf32"  # of no effect on 16-bit inputs
    tile = tiles.find("gated_ffn_stream", x.device, x.dtype, rows)
    each = share(n, k, tile)
    parts = triton.cdiv(k, each)
    partial = torch.empty((parts, 2, rows, n), dtype=torch.float32, device=x.device) if parts > 1 else outputs[2]
    launch(
        stream_kernel, (triton.cdiv(n, tile.options["BLOCK_N"]), parts),
        x, w_gate, w_up, *outputs, partial, rows, n, k, each, x_stride,
        w_gate.stride(0), w_gate.stride(1), w_up.stride(0), w_up.stride(1),
        **flags, SPLIT=parts > 1, PRECISION=precision, ROWS=stream_rows(rows), **tile.options,
    )  # fmt: skip
    if parts > 1:
        combine = tiles.find("gated_ffn_combine", x.device).options
        launch(
            combine_kernel, (triton.cdiv(n, combine["BLOCK"]), rows),
            partial, *outputs, parts, rows, n, **flags, **combine,
        )  # fmt: skip


def _scaled(gate, up, activation):
    """(hidden, scale) of float16 factors (rows, F): hidden * scale[:, None] = activation(gate) * up."""
    rows, f = gate.shape
    hidden, scale = torch.empty_like(gate), torch.ones(rows, dtype=torch.float32, device=gate.device)
    if gate.numel():
        tile = tiles.find("gated_ffn_gate_scaled", gate.device, size=f).options
        launch(gate_scaled_kernel, (rows,), gate, up, hidden, scale, f, ACTIVATION=activation, **tile)
    return hidden, scale


def _unscaled(sums, scale, residual, residual_stride):
    """sums * scale + residual in float16."""
    rows, m = sums.shape
    y = torch.empty(sums.shape, dtype=torch.float16, device=sums.device)
    if y.numel():
        tile = tiles.find("gated_ffn_unscale", sums.device).options
        launch(
            unscale_kernel, (triton.cdiv(m, tile["BLOCK"]) * rows,),
            sums, scale, y if residual is None else residual, y, m, residual_stride,
            HAS_RESIDUAL=residual is not None, **tile,
        )  # fmt: skip
    return y


def forward(x, w_gate, w_up, w_out, activation, residual, save):
    x_rows, x_stride = as_rows(x)
    rows, f = x_rows.shape[0], w_gate.shape[0]
    residual_rows, residual_stride = (None, 0) if residual is None else as_rows(residual)
    few, half = rows <= FEW_ROWS, x.dtype == torch.float16
    gate = up = hidden = None
    if few:
        if save or half:
            gate, up = (torch.empty((rows, f), dtype=x.dtype, device=x.device) for _ in range(2))
        if not half:
            hidden = torch.empty((rows, f), dtype=x.dtype, device=x.device)
        _stream(x_rows, x_stride, w_gate, w_up, activation, None if gate is None else (gate, up), hidden)
    else:
        gate, up = x_rows @ w_gate.t(), x_rows @ w_up.t()
        if not half:
            hidden = torch.empty_like(gate) if save else gate
            if gate.numel():
                tile = tiles.find("gated_ffn_gate", x.device).options
                launch(
                    gate_kernel,
                    (triton.cdiv(gate.numel(), tile["BLOCK"]),),
                    gate,
                    up,
                    hidden,
                    gate.numel(),
                    ACTIVATION=activation,
                    **tile,
                )
    if half:
        hidden, scale = _scaled(gate, up, activation)
        sums = (
            linear(hidden, f, w_out, None, "none", None, 0, False, torch.float32)[0]
            if few
            else _wide_product(hidden, w_out.t())
        )
        y = _unscaled(sums, scale, residual_rows, residual_stride)
    elif few:
        y = linear(hidden, f, w_out, None, "none", residual_rows, residual_stride, False)[0]
    else:
        y = hidden @ w_out.t()
        y = y if residual is None else y.add_(residual_rows)
    kept = (t.view(*x.shape[:-1], f) if save else None for t in (gate, up))
    return y.view(*x.shape[:-1], w_out.shape[0]), *kept


def backward(grad_y, x, w_gate, w_up, w_out, gate, up, activation):
    gate, up = gate.contiguous(), up.contiguous()
    wide = torch.float32 if x.dtype == torch.float16 else x.dtype
    grad_hidden = _wide_product(grad_y.reshape(-1, grad_y.shape[-1]), w_out)
    hidden = torch.empty(gate.shape, dtype=wide, device=x.device)
    grad_gate, grad_up = torch.empty_like(gate), torch.empty_like(up)
    size = gate.numel()
    if size:
        tile = tiles.find("gated_ffn_gradients", x.device).options
        launch(
            gradients_kernel,
            (triton.cdiv(size, tile["BLOCK"]),),
            gate,
            up,
            grad_hidden,
            hidden,
            grad_gate,
            grad_up,
            size,
            ACTIVATION=activation,
            **tile,
        )
    return linear_gradients(grad_y, x, w_gate, w_up, hidden, grad_gate, grad_up)
