"""How does gated_ffn multiply many rows in Triton, where its own product beats the library's two? (bfloat16, float32)

hidden = activation(x w_gate^T) * (x w_up^T). A program reads a tile of x once for both products, whose sums stay in registers
until the epilogue. It saves the pass of gated_ffn's gate_kernel, 6 R F bytes in 16 bits, and two launches.

A library's product is faster by itself: published numbers give Triton's 80 to 90% of cuBLAS's speed on an H100. The saved bytes
do not depend on the length of the sums; that loss does. So the tiles (pyfused.tiles) serve sums of up to so many terms, and the
rest goes to the library. So do calls with fewer tiles than the chip has places for programs.

Programs are persistent: each takes every so-many-th tile, in groups of rows whose weights stay in the L2. On Hopper both
products are wgmma on two warpgroups, 128 registers of sums a thread. T5-base, 4096 rows, bf16: 26 GFLOP, 32 us at 798 TFLOP/s;
a step of 64 takes 1024 clocks, an epilogue 3800: predicted 41 us, where the library's products and a pass take 56. An
H100 timed it together with the second product: docs/performance/index.md.

The backward has no such kernel: docs/performance/h100_predicted.md says what it would take.
"""

import math

import triton
import triton.language as tl

from pyfused import tiles
from pyfused.kernels.shared.prepared import maker
from pyfused.kernels.triton._activation import activate
from pyfused.kernels.triton._dot import add_product
from pyfused.kernels.triton._launch import starter


# ---- kernels --------------------------------------------------------------------------------------------------------
@triton.jit
def _place(tile, high, wide, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, GROUP: tl.constexpr):
    """The rows and columns of a tile. GROUP tiles of rows go through the columns together."""
    first = tile // (GROUP * wide) * GROUP
    group = tl.minimum(high - first, GROUP)
    within = tile % (GROUP * wide)
    row = (first + within % group) * BLOCK_M + tl.arange(0, BLOCK_M)
    col = within // group * BLOCK_N + tl.arange(0, BLOCK_N)
    return row, col


@triton.jit(do_not_specialize=["rows"])
def gated_product_kernel(
    x_ptr, w_gate_ptr, w_up_ptr, gate_ptr, up_ptr, hidden_ptr,
    rows, n, k, x_stride, w_gate_stride_n, w_gate_stride_k, w_up_stride_n, w_up_stride_k,
    ACTIVATION: tl.constexpr, FACTORS: tl.constexpr, EVEN_K: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr, GROUP: tl.constexpr,
):  # fmt: skip
    """hidden (rows, n); with FACTORS gate and up too. x (rows, k), w_gate and w_up (n, k)."""
    high, wide = tl.cdiv(rows, BLOCK_M), tl.cdiv(n, BLOCK_N)
    deep = tl.arange(0, BLOCK_K)
    for tile in tl.range(tl.program_id(0), high * wide, tl.num_programs(0)):
        row, col = _place(tile, high, wide, BLOCK_M, BLOCK_N, GROUP)
        # Rows past the end wrap round, so the loop needs no mask for them. They are not stored.
        x_at = x_ptr + (row % rows).to(tl.int64)[:, None] * x_stride + deep[None, :]
        down, along = deep.to(tl.int64)[:, None], (col % n).to(tl.int64)[None, :]
        w_gate_at = w_gate_ptr + along * w_gate_stride_n + down * w_gate_stride_k
        w_up_at = w_up_ptr + along * w_up_stride_n + down * w_up_stride_k
        gate = tl.zeros((BLOCK_M, BLOCK_N), tl.float32)
        up = tl.zeros((BLOCK_M, BLOCK_N), tl.float32)
        for start in range(0, k, BLOCK_K):
            if EVEN_K:
                x, w_gate, w_up = tl.load(x_at), tl.load(w_gate_at), tl.load(w_up_at)
            else:
                x = tl.load(x_at, mask=deep[None, :] < k - start, other=0.0)
                w_gate = tl.load(w_gate_at, mask=deep[:, None] < k - start, other=0.0)
                w_up = tl.load(w_up_at, mask=deep[:, None] < k - start, other=0.0)
            gate = add_product(gate, x, w_gate)
            up = add_product(up, x, w_up)
            x_at += BLOCK_K
            w_gate_at += BLOCK_K * w_gate_stride_k
            w_up_at += BLOCK_K * w_up_stride_k
        at = row.to(tl.int64)[:, None] * n + col[None, :]
        live = (row < rows)[:, None] & (col < n)[None, :]
        if FACTORS:
            tl.store(gate_ptr + at, gate, mask=live)
            tl.store(up_ptr + at, up, mask=live)
        tl.store(hidden_ptr + at, activate(gate, ACTIVATION) * up, mask=live)


# ---- launchers ------------------------------------------------------------------------------------------------------
def prepare_gated_product(outer, x_stride, w_gate, w_up, activation, factors):
    """A function of (x, w_gate, w_up) that returns (gate, up, hidden), each (*outer, F), or None: the library should multiply.
    gate and up are None without `factors`."""
    (n, k), rows, dtype, device = w_gate.shape, math.prod(outer), w_gate.dtype, w_gate.device
    tile = tiles.find("gated_ffn_product", device, dtype, k)
    if tile is None:
        return None
    options = tile.options
    if triton.cdiv(rows, options["BLOCK_M"]) * triton.cdiv(n, options["BLOCK_N"]) < tile.programs:
        return None
    start = starter(
        gated_product_kernel, (tile.programs,), device, rows, n, k, x_stride, *w_gate.stride(), *w_up.stride(),
        ACTIVATION=activation, FACTORS=factors, EVEN_K=k % options["BLOCK_K"] == 0, **options,
    )  # fmt: skip
    new = maker((*outer, n), dtype, None, device)

    def run(x, w_gate, w_up):
        gate, up = (new(), new()) if factors else (None, None)
        hidden = new()
        start(x, w_gate, w_up, gate, up, hidden)
        return gate, up, hidden

    return run
