"""fourier_mix in Triton: y[s, n] = sum over a, b of x[a, b] cos(2 pi (s a / S + n b / N)) as two products with matrices of
cas(t) = cos(t) + sin(t), the kernel of the Hartley transform.

y depends only on the even part of x, e[a, b] = (x[a, b] + x[-a, -b]) / 2. Let v[a, n] be the sum over b of e[a, b] cas(2 pi
n b / N). Then w[-a, k] = v[a, k] and w[a, k] = v[a, -k], so rows 0 .. S / 2 of e give all of w, (B, S, N / 2 + 1) in float32.
Finally y[s, k] = y[-s, -k] = sum over a of cas(2 pi s a / S) w[a, k].

Work: (S N^2 + S^2 N) / 2 multiply-adds a sample, 0.5 GFLOP at 512 x 768. An FFT takes 9 MFLOP, but here no length is awkward.
No matrix is kept per length: entry (i, j) is looked up at (i j) mod the length in a table of one period, which stays in L1.
The products are float32 throughout. The tolerance rule allows 3e-7 of the largest value. Float32 sums meet it only when
compensated, and no tensor core's accumulator is known to meet it.
"""

import torch
import triton
import triton.language as tl

from pyfused import evidence, tiles
from pyfused.kernels.shared.prepared import maker, prepares_launch
from pyfused.kernels.shared.tables import kept_on_device

from ._launch import GRID_LIMITS, starter


# ---- kernels --------------------------------------------------------------------------------------------------------
@triton.jit
def _add(total, lost, term):
    """(total + term, its rounding error for the next addition) (Kahan 1965). Long plain sums miss torch.fft's error."""
    term = term - lost
    larger = total + term
    return larger, (larger - total) - term


@triton.jit
def _next(angle, step, length):
    """(angle + step) % length of two remainders."""
    angle += step
    return tl.where(angle >= length, angle - length, angle)


@triton.jit(do_not_specialize=["items", "S"])
def _features_kernel(
    x_ptr, cas_ptr, w_ptr, items, S, N, stride_batch, stride_row,
    ROWS: tl.constexpr, COLUMNS: tl.constexpr, INNER: tl.constexpr,
):  # fmt: skip
    """Grid (row tiles of all samples, tiles of N columns). Items are the rows 0 .. S / 2 of every sample."""
    item = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)
    n = tl.program_id(1) * COLUMNS + tl.arange(0, COLUMNS)
    batch, a = item // (S // 2 + 1), item % (S // 2 + 1)
    minus = tl.where(a == 0, 0, S - a)
    rows = x_ptr + batch * stride_batch + a.to(tl.int64) * stride_row
    mirrors = x_ptr + batch * stride_batch + minus.to(tl.int64) * stride_row
    angle = (tl.arange(0, INNER)[:, None] * n[None, :]) % N
    step = (INNER * n % N)[None, :]
    v = tl.zeros((ROWS, COLUMNS), tl.float32)
    lost = v
    for start in range(0, N, INNER):
        b = start + tl.arange(0, INNER)
        inside = (item < items)[:, None] & (b < N)[None, :]
        mirrored = tl.where(b == 0, 0, N - b)
        e = tl.load(rows[:, None] + b[None, :], mask=inside, other=0.0).to(tl.float32) * 0.5
        e += tl.load(mirrors[:, None] + mirrored[None, :], mask=inside, other=0.0).to(tl.float32) * 0.5
        v, lost = _add(v, lost, tl.dot(e, tl.load(cas_ptr + angle), input_precision="ieee"))
        angle = _next(angle, step, N)
    kept = N // 2 + 1
    minus_n = tl.where(n == 0, 0, N - n)
    w = w_ptr + batch * S * kept
    stored = (item < items)[:, None] & (n < kept)[None, :]
    tl.store((w + minus.to(tl.int64) * kept)[:, None] + n[None, :], v, mask=stored)
    # A row that is its own mirror is stored already. A second value, rounded differently, must not race with the first.
    stored = ((item < items) & (minus != a))[:, None] & (n < N)[None, :] & (minus_n < kept)[None, :]
    tl.store((w + a.to(tl.int64) * kept)[:, None] + minus_n[None, :], v, mask=stored)


@triton.jit(do_not_specialize=["S"])
def _sequence_kernel(
    w_ptr, cas_ptr, y_ptr, S, N, ROWS: tl.constexpr, COLUMNS: tl.constexpr, INNER: tl.constexpr
):  # fmt: skip
    """Grid (B * row tiles, tiles of N / 2 + 1 columns)."""
    tiles = tl.cdiv(S, ROWS)
    kept = N // 2 + 1
    batch = (tl.program_id(0) // tiles).to(tl.int64)
    s = (tl.program_id(0) % tiles) * ROWS + tl.arange(0, ROWS)
    k = tl.program_id(1) * COLUMNS + tl.arange(0, COLUMNS)
    w = w_ptr + batch * S * kept
    angle = (s[:, None] * tl.arange(0, INNER)[None, :]) % S
    step = (INNER * s % S)[:, None]
    y = tl.zeros((ROWS, COLUMNS), tl.float32)
    lost = y
    for start in range(0, S, INNER):
        a = start + tl.arange(0, INNER)
        inside = (a < S)[:, None] & (k < kept)[None, :]
        columns = tl.load(w + a[:, None] * kept + k[None, :], mask=inside, other=0.0)
        y, lost = _add(y, lost, tl.dot(tl.load(cas_ptr + angle), columns, input_precision="ieee"))
        angle = _next(angle, step, S)
    out = y_ptr + batch * S * N
    stored = (s < S)[:, None] & (k < kept)[None, :]
    y = y.to(y_ptr.dtype.element_ty)
    tl.store(out + s[:, None] * N + k[None, :], y, mask=stored)
    minus = tl.where(s == 0, 0, S - s)
    tl.store(out + minus[:, None] * N + (N - k)[None, :], y, mask=stored & (k > 0)[None, :] & (2 * k < N)[None, :])


# ---- launchers ------------------------------------------------------------------------------------------------------
@kept_on_device
def _cas(n):
    """cas(2 pi i / n), i < n, in float32 from float64."""
    angles = torch.arange(n, device="cpu").double() * (2 * torch.pi / n)
    return (angles.cos() + angles.sin()).float()


def _tiles(device):
    """The tiles of _features_kernel and _sequence_kernel."""
    return tuple(tiles.find(f"fourier_mix_{kernel}", device).options for kernel in ("features", "sequence"))


def unsupported_forward(x):
    if x.shape[1] * x.shape[2] >= 2**31:
        return "a sample of 2**31 elements or more, beyond 32-bit offsets"
    if max(x.shape[1:]) > (longest := GRID_LIMITS[1] * min(tile["COLUMNS"] for tile in _tiles(x.device))):
        return f"a transform longer than {longest}, beyond the tiles that a grid takes"
    return None


def declined_forward(x):
    if evidence.found("triton", "fourier_mix", "forward", (x,)):
        return None
    return "no evidence shows two dense products faster than torch.fft on this device"


@prepares_launch
def forward(x):
    if x.stride(2) != 1:
        return None
    (b, s, n), device = x.shape, x.device
    of_features, of_sequence = _tiles(device)
    kept = n // 2 + 1
    items = b * (s // 2 + 1)
    along_features = starter(
        _features_kernel, (triton.cdiv(items, of_features["ROWS"]), triton.cdiv(n, of_features["COLUMNS"])), device,
        items, s, n, x.stride(0), x.stride(1), **of_features,
    )  # fmt: skip
    along_sequence = starter(
        _sequence_kernel,
        (b * triton.cdiv(s, of_sequence["ROWS"]), triton.cdiv(kept, of_sequence["COLUMNS"])),
        device,
        s,
        n,
        **of_sequence,
    )
    cas_n, cas_s = _cas(n, device=device), _cas(s, device=device)
    new_y, new_w = maker(x.shape, x.dtype, None, device), maker((b, s, kept), torch.float32, None, device)

    def launch(x):
        y, w = new_y(), new_w()
        along_features(x, cas_n, w)
        along_sequence(w, cas_s, y)
        return (y,)

    return launch
