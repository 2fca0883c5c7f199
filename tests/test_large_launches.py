"""Do launches and offsets fit for tensors as large as a GPU's memory? The tests allocate no such memory."""

import ast
import inspect
from pathlib import Path

import pytest
import torch
import triton
import triton.language as tl
from large_launches import Launches

from pyfused import dispatch, tiles
from pyfused.kernels.triton import (
    _gated_product,
    _product,
    _row_norm,
    attention,
    ffn,
    fourier_mix,
    gated_ffn,
    layer_norm,
    linear,
    relative_bias,
    rms_norm,
)
from pyfused.kernels.triton._launch import GRID_LIMITS, starter

MODULES = (_gated_product, _product, _row_norm, attention, ffn, gated_ffn, fourier_mix, linear, relative_bias)
SOURCES = Path(inspect.getfile(starter)).parent
pytestmark = pytest.mark.skipif(torch.cuda.is_available(), reason="looks at the interpreter")
HALF, BF16 = torch.float16, torch.bfloat16


def new(*shape, dtype=BF16):
    return torch.empty(shape, dtype=dtype, device="meta")


@triton.jit
def planted_kernel(x_ptr, y_ptr, n, beyond, BLOCK: tl.constexpr):
    at = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    for _ in range(0, n, BLOCK):
        tl.store(y_ptr + at + beyond, tl.load(x_ptr + at, mask=at < n), mask=at < n)


@pytest.fixture
def record(monkeypatch):
    """The launches of a call on a GPU of 132 multiprocessors; `run` checks the addresses of a few programs of each."""

    def recorded(call, run=True):
        launches = Launches(run)
        for module in MODULES:
            monkeypatch.setattr(module, "starter", launches.starter)
        monkeypatch.setattr(tiles, "files", lambda where, files=tiles.files: files("sm_90"))
        monkeypatch.setattr(tiles, "multiprocessors", lambda where: 132)
        dispatch.forget()
        call()
        assert launches.grids
        return launches

    yield recorded
    monkeypatch.undo()
    dispatch.forget()


def norm(module, rows, n, bias):
    x, weight = new(rows, n), new(n)
    stats = [new(rows, dtype=torch.float32)] * (2 if bias else 1)
    more = (new(n),) if bias else ()
    module.forward(x, weight, *more, 1e-5, x, True)
    module.backward(x, x, x, weight, *stats, *((True,) if bias else ()))


def heads(b, h, s, d, dtype=BF16):
    return new(b, s, h, d, dtype=dtype).transpose(1, 2)


def attend(b, h, hkv, sq, sk, d, dtype=BF16, gradients=True, mask=False, bias=False, relative=False, dropout=False):
    query, key = heads(b, h, sq, d, dtype), heads(b, hkv, sk, d, dtype)
    padding = new(b, sk, dtype=torch.bool) if mask else None
    attn_bias = new(b, h, sq, sk, dtype=dtype) if bias else None
    seed, p = (new(1, dtype=torch.int64), 0.1) if dropout else (None, 0.0)
    table = (new(32, h, dtype=dtype), True, 128) if relative else (None, True, 128)
    out, lse = attention.forward(query, key, key, True, padding, attn_bias, 0.1, p, seed, True, *table)
    if gradients:
        attention.backward(
            out, query, key, key, out, lse, True, padding, attn_bias, 0.1, p, seed, bias, *table, relative
        )


def packed(rows, sequences, h, d):
    query, cu_seqlens = heads(1, h, rows, d), new(sequences + 1, dtype=torch.int32)
    options = (None, True, 128)
    out, lse = attention.forward(query, query, query, True, None, None, 0.1, 0.0, None, True, *options, cu_seqlens, 0)
    attention.backward(
        out, query, query, query, out, lse, True, None, None, 0.1, 0.0, None, False, *options, False, cu_seqlens, 0
    )


def feed_forward(rows, n, f, dtype=BF16):
    x, w_in, w_out = new(rows, n, dtype=dtype), new(f, n, dtype=dtype), new(n, f, dtype=dtype)
    b_in, b_out = new(f, dtype=dtype), new(n, dtype=dtype)
    y, pre = ffn.forward(x, w_in, b_in, w_out, b_out, "gelu", x, True)
    ffn.backward(y, x, w_in, w_out, pre, "gelu", *[True] * 5)


def few(rows, product):
    """A product of few rows with a wide matrix."""
    n, k = 2**24, 256
    x, w = new(rows, k), new(n, k)
    if product is ffn:
        _product.prepare_product((rows,), k, w, True, "gelu", n, True)(x, w, new(n), new(rows, n))
    else:
        gated_ffn.prepare_stream((rows,), k, w, w, "silu", True, True)(x, w, w)


def split(rows, n, k):
    """A product of few rows with a matrix so narrow that several programs share each sum."""
    x, w = new(rows, k), new(n, k)
    _product.prepare_product((rows,), k, w, False, "gelu", None, True)(x, w, None, None)


def int8(rows, n, k, dynamic=False):
    x, weight, scale = new(rows, k), new(n, k, dtype=torch.int8), new(n, dtype=torch.float32)
    linear.forward(x, weight, new(n), new(rows, n), scale, dynamic)


def gated(rows, n, f, dtype=BF16):
    x, w_in, w_out = new(rows, n, dtype=dtype), new(f, n, dtype=dtype), new(n, f, dtype=dtype)
    y, gate, up = gated_ffn.forward(x, w_in, w_in, w_out, "silu", x, True)
    gated_ffn.backward(y, x, w_in, w_in, w_out, gate, up, "silu", *[True] * 4)


def distances(h, sq, sk):
    relative_bias.forward(new(32, h), sq, sk, True, 128, 0)
    relative_bias.backward(new(1, h, sq, sk), 32, True, 128, 0)


CALLS = {  # each has a tensor of more than 2^31 elements
    "layer_norm": lambda: norm(layer_norm, 2**20, 8192, True),
    "layer_norm short": lambda: norm(layer_norm, 2**24, 768, True),
    "layer_norm long": lambda: norm(layer_norm, 2**18, 20000, True),
    "rms_norm long": lambda: norm(rms_norm, 2**18, 20000, False),
    "attention": lambda: attend(4096, 64, 8, 256, 256, 64),
    "attention float32": lambda: attend(4096, 64, 64, 128, 128, 128, torch.float32),
    "attention mask bias dropout": lambda: attend(4096, 64, 64, 128, 128, 128, mask=True, bias=True, dropout=True),
    "attention relative": lambda: attend(4096, 64, 64, 128, 128, 128, relative=True),
    "attention few": lambda: attend(4096, 64, 8, 1, 2048, 64, gradients=False),
    "attention few blocks": lambda: attend(1, 2, 2, 200, 2**25, 64, gradients=False, mask=True),
    "attention chunks": lambda: attend(1, 16, 1, 1, 2**15, 64, gradients=False),
    "attention packed": lambda: packed(2**22, 4096, 12, 64),
    "ffn": lambda: feed_forward(2**20, 512, 4096),
    "ffn float32": lambda: feed_forward(2**20, 128, 4096, torch.float32),
    "ffn few": lambda: few(16, ffn),
    "ffn one": lambda: few(1, ffn),
    "ffn split": lambda: split(16, 64, 2**15),
    "linear int8": lambda: int8(2**20, 4096, 64),
    "linear int8 one": lambda: int8(1, 2**24, 256),
    "linear int8 dynamic": lambda: int8(2**24, 64, 256, True),
    "gated_ffn": lambda: gated(2**20, 512, 4096),
    "gated_ffn long sums": lambda: gated(2**19, 2304, 4096),
    "gated_ffn float16": lambda: gated(2**20, 2304, 4096, HALF),
    "gated_ffn few": lambda: few(16, gated_ffn),
    "gated_ffn one": lambda: few(1, gated_ffn),
    "gated_ffn split": lambda: gated(16, 2**13, 64),
    "fourier_mix": lambda: fourier_mix.forward(new(2**13, 512, 768)),
    "fourier_mix short": lambda: fourier_mix.forward(new(2**30, 2, 3)),
    "relative_bias": lambda: distances(64, 2**13, 2**13),
    # and as many programs as there may be
    "attention long": lambda: attend(8, 64, 64, 131072, 131072, 64),
    "attention few long": lambda: attend(4096, 64, 1, 1, 131072, 64, gradients=False),
    "attention bias long": lambda: attend(1, 2, 2, 131072, 131072, 64, bias=True),
    "attention packed long": lambda: packed(2**24, 2**20, 64, 64),
    "norm of one": lambda: norm(layer_norm, 2**30, 1, True),
    "gated_ffn rows": lambda: gated(2**22, 64, 64, HALF),
    "fourier_mix long": lambda: fourier_mix.forward(new(1, 1, 4194240)),
    "fourier_mix batch": lambda: fourier_mix.forward(new(2**20, 512, 64)),
    "relative_bias keys": lambda: distances(12, 1, 2**27),
    "relative_bias buckets": lambda: relative_bias.backward(new(1, 4, 64, 64), 2**17, True, 2**18, 0),
}


@pytest.mark.parametrize("name", CALLS)
def test_nothing_wraps_round_and_every_access_is_inside(record, name):
    launches = record(CALLS[name])
    assert not launches.faults, "\n".join(launches.faults[:5])
    assert [*triton.language.range(0, 5)] == [*range(5)]  # whole again for the tests that follow


def test_every_kernel_is_among_the_calls(record):
    launched = {name for call in CALLS.values() for name, _ in record(call, run=False).grids}
    modules = {path: ast.parse(path.read_text()) for path in SOURCES.glob("*.py")}
    kernels = {
        node.name
        for tree in modules.values()
        for node in ast.walk(tree)
        if isinstance(node, ast.FunctionDef) and node.name.endswith("kernel")
    }
    assert launched == kernels


def test_what_no_grid_takes_is_refused_by_name():
    class Kernel:
        @staticmethod
        def fn():
            pass

    Kernel.fn.__name__ = "some_kernel"
    for axis in range(3):
        grid = [1, 1, 1]
        grid[axis] = GRID_LIMITS[axis] + 1
        with pytest.raises(ValueError, match="some_kernel: a grid of"):
            starter(Kernel, tuple(grid), torch.device("cpu"))
    x = new(1, 2, 4194241)
    assert "longer than 4194240" in fourier_mix.unsupported_forward(x)
    assert "longer than 4194240" in fourier_mix.unsupported_forward(x.transpose(1, 2))
    assert fourier_mix.unsupported_forward(new(1, 2, 4194240)) is None


def test_what_is_looked_for_is_found():
    def faults(n, beyond=0):
        launches = Launches(run=True)
        grid, device = (triton.cdiv(n, 128),), torch.device("meta")
        launches.starter(planted_kernel, grid, device, n, beyond, BLOCK=128)(new(n), new(n))
        return launches.faults

    assert not faults(2**31 - 128)
    assert any("more than 32 bits" in fault for fault in faults(2**31 + 256))
    assert any("store at" in fault for fault in faults(2**20, beyond=1))


@pytest.mark.parametrize("path", sorted(SOURCES.glob("*.py")), ids=lambda path: path.name)
def test_kernels_start_through_one_function(path):
    """Only starter() contains kernel[grid](...)."""
    calls = [node for node in ast.walk(ast.parse(path.read_text())) if isinstance(node, ast.Call)]
    started = [node.lineno for node in calls if isinstance(node.func, ast.Subscript)]
    assert bool(started) == (path.name == "_launch.py")
