"""Are the products right that use a processor's instructions for dot products? They run with the instructions' documented
arithmetic (tests/dot_emulation.py); the real forms' machine code is looked at."""

import itertools
import math
import subprocess
import sys
from fractions import Fraction

import dot_emulation
import pytest
import test_ffn
import test_gated_ffn
import torch
import torch.nn.functional as F
from draws import check
from test_ffn import judge_draws

import pyfused
from pyfused.kernels.shared import int8
from pyfused.testing import assert_close, running

WIDTH = dot_emulation.WIDTH
SETS = ["avx512_bf16", "avx512_amx"]
# Few rows (a gemv up to 16), and many: one vector of rows, two, several panels, two blocks of 128. K ends inside a group,
# inside a vector, and after one block; N inside a group of six rows of W and inside a block of 48.
SHAPES = [
    *itertools.product([1, 2, 3, 4, 5, 6, 7, 16, 17, 33], [(1, 5), (5, 1), (131, 97), (64, 48)]),
    *itertools.product([3, 40], [(771, 50), (1000, 7)]),
    (129, (70, 51)),
    (261, (33, 50)),
]


@pytest.fixture(params=SETS)
def bfloat16(request):
    """A processor with AVX512_BF16, or AMX too, whose products are forced."""
    with dot_emulation.processor(request.param) as kernels, running(f"cpu:{request.param}"):
        yield kernels


def make(*shape, dtype=torch.bfloat16, scale=1.0):
    return (torch.randn(shape) * scale).to(dtype)


def double(*tensors):
    return [t if t is None or t.dtype == torch.int8 else t.double() for t in tensors]


def plain(x, weight, bias=None, residual=None):
    y = F.linear(x, weight, bias)
    return y if residual is None else y + residual


# ---- one instruction ---------------------------------------------------------------------------------------------------


def rounded(exact):
    """A fraction as float32: to the nearest, ties to even. What is smaller than normal numbers is zero."""
    if abs(exact) < Fraction(2) ** -126:
        return 0.0
    step = Fraction(2) ** (math.frexp(float(exact))[1] - 24)
    return float(round(exact / step) * step)


def test_pairs_follow_the_documented_arithmetic():
    """Two fused multiply-adds, first of the odd elements, each rounded to the nearest even; denormal numbers are zero."""
    for power in (0, -60, -126):
        sums, x, w = torch.randn(WIDTH) * 2.0**power, torch.randn(2 * WIDTH), torch.randn(2 * WIDTH)
        x, w = (x * 2.0**power).bfloat16(), w.bfloat16()
        x[4], w[7], sums[3] = 2.0**-130, 2.0**-130, 2.0**-140
        expected = []
        for i in range(WIDTH):
            total, *factors = [
                [v if abs(v) >= 2.0**-126 else 0.0 for v in part.tolist()] for part in (sums[i : i + 1], x, w)
            ]
            for at in (2 * i + 1, 2 * i):
                total = [rounded(Fraction(total[0]) + Fraction(factors[0][at]) * Fraction(factors[1][at]))]
            expected += total
        dot_emulation.function("pairs")(sums, x, w)
        assert torch.equal(sums, torch.tensor(expected))


def test_pairs_of_infinity_and_nan():
    sums, x, w = torch.zeros(WIDTH), torch.ones(2 * WIDTH).bfloat16(), torch.ones(2 * WIDTH).bfloat16()
    x[0], x[2], w[2], x[5], sums[3], x[7] = torch.inf, torch.inf, 0, torch.nan, torch.inf, -torch.inf
    dot_emulation.function("pairs")(sums, x, w)
    assert sums[0] == torch.inf
    assert sums[1:4].isnan().all()
    assert (sums[4:] == 2).all()


def test_quads_follow_the_documented_arithmetic():
    """Bytes of x without sign, those of w with a sign; sums wrap around at 32 bits and nothing saturates."""
    x = torch.randint(0, 256, (4 * WIDTH,)).to(torch.uint8)
    w = torch.randint(-128, 128, (4 * WIDTH,)).to(torch.int8)
    x[:4], w[:4] = 255, -128
    sums = torch.randint(-(2**31), 2**31, (WIDTH,)).to(torch.int32)
    sums[0], sums[1] = -(2**31), 2**31 - 1
    expected = sums.long() + (x.long() * w.long()).view(WIDTH, 4).sum(1)
    dot_emulation.function("quads")(sums, x, w)
    assert torch.equal(sums, ((expected + 2**31) % 2**32 - 2**31).to(torch.int32))


def test_tiles_of_pairs_follow_the_documented_arithmetic():
    """A chain of fused multiply-adds for the even elements along K, one for the odd ones, from zero; the sum is added last."""
    for power in (0, -60, -126):
        sums, w, x = torch.randn(16, 16) * 2.0**power, torch.randn(16, 32), torch.randn(16, 32)
        w, x = (w * 2.0**power).bfloat16(), x.bfloat16()
        w[2, 4], x[3, 7], sums[1, 3] = 2.0**-130, 2.0**-130, 2.0**-140
        first, *factors = [torch.where(t.float().abs() >= 2.0**-126, t.float(), 0.0).tolist() for t in (sums, w, x)]
        expected = torch.empty(16, 16)
        for m, n in itertools.product(range(16), repeat=2):
            chains = [0.0, 0.0]
            for k, q in itertools.product(range(16), range(2)):
                product = Fraction(factors[0][m][2 * k + q]) * Fraction(factors[1][k][2 * n + q])
                chains[q] = rounded(Fraction(chains[q]) + product)
            both = rounded(Fraction(chains[0]) + Fraction(chains[1]))
            expected[m, n] = rounded(Fraction(first[m][n]) + Fraction(both))
        dot_emulation.function("tile_pairs", tiles=True)(sums, w, x)
        assert torch.equal(sums, expected)


def test_tiles_of_quads_follow_the_documented_arithmetic():
    w = torch.randint(-128, 128, (16, 64)).to(torch.int8)
    x = torch.randint(0, 256, (16, 64)).to(torch.uint8)
    w[0], x[:, :4] = -128, 255
    sums = torch.randint(-(2**31), 2**31, (16, 16)).to(torch.int32)
    sums[0] = -(2**31)
    by_group = x.long().view(16, 16, 4).transpose(1, 2).reshape(64, 16)  # (K, row of x)
    expected = sums.long() + w.long() @ by_group
    dot_emulation.function("tile_quads", tiles=True)(sums, w, x)
    assert torch.equal(sums, ((expected + 2**31) % 2**32 - 2**31).to(torch.int32))


# ---- products of bfloat16 ----------------------------------------------------------------------------------------------


def test_linear(bfloat16):
    for i, (rows, (k, n)) in enumerate(SHAPES):
        with_bias, with_residual = i % 2 == 0, i // 2 % 2 == 0

        def once(rows=rows, k=k, n=n, with_bias=with_bias, with_residual=with_residual):
            given = make(rows, k), make(n, k, scale=k**-0.5), make(n) if with_bias else None
            residual = make(rows, n) if with_residual else None
            y = pyfused.linear(*given, residual=residual)
            assert y.dtype == torch.bfloat16
            what = f"rows {rows}, K {k}, N {n}, bias {with_bias}, residual {with_residual}"
            return {what: (y, plain(*given, residual), plain(*double(*given, residual)))}

        check(once, 50)
    assert set(bfloat16.ran) == {"linear_forward"}


def test_strided_rows(bfloat16):
    base, weights, wide = make(4, 6, 80), make(50, 90), make(4, 6, 100)
    for weight in (weights[:, :41], weights[:41, 21:62], weights[:50:2, 3:44]):
        for x in (base[..., :41], base[..., 39:], base.transpose(0, 1)[..., 7:48]):
            residual = wide[..., : weight.shape[0]] if x.shape[0] == 4 else None
            y = pyfused.linear(x, weight, residual=residual)
            assert_close(y, plain(x, weight, None, residual), plain(*double(x, weight, None, residual)))
    assert bfloat16.ran


@pytest.mark.parametrize("rows", [5, 16, 40])
def test_infinity_and_nan_stay_in_their_row(bfloat16, rows):
    """At the end of an odd K too, where a group is filled with zeros."""
    x, weight = make(rows, 71), make(30, 71)
    x[0, 70], x[-1, 3], weight[7, 70] = torch.nan, torch.inf, -torch.inf
    y, expected = pyfused.linear(x, weight), plain(x, weight)
    for same in (torch.isnan, torch.isposinf, torch.isneginf):
        assert torch.equal(same(y), same(expected))


@pytest.mark.parametrize("rows", [3, 37])
@pytest.mark.parametrize("activation", ["gelu_tanh", "relu"])
def test_feed_forwards(bfloat16, rows, activation):
    """Values, and gradients by what the forward keeps."""

    def of_ffn():
        x, residual, cotangent = (make(rows, 45) for _ in range(3))
        w_in, w_out = make(77, 45, scale=45**-0.5), make(45, 77, scale=77**-0.5)
        return x, w_in, make(77), w_out, make(45), residual, cotangent

    def of_gated_ffn():
        x, w_in, _, w_out, _, *rest = of_ffn()
        return x, make(77, 45, scale=45**-0.5), w_in, w_out, *rest

    judge_draws(pyfused.ffn, test_ffn.plain, activation, False, of_ffn)
    judge_draws(pyfused.gated_ffn, test_gated_ffn.plain, activation, False, of_gated_ffn)
    assert set(bfloat16.ran) == {"ffn_forward", "gated_ffn_forward"}


def test_two_threads_agree_with_one(bfloat16):
    """They share outputs; of many rows each takes some for its own."""
    x, weight, bias = make(600, 300), make(500, 300), make(500)
    for rows, outputs in ((5, 500), (33, 500), (600, 50)):
        found = []
        for threads in (1, 2):
            torch.set_num_threads(threads)
            found.append(pyfused.linear(x[:rows], weight[:outputs], bias[:outputs]))
        assert torch.equal(*found)


def test_no_thread_keeps_its_tiles():
    """A kernel begins and ends their use on each thread that runs products."""

    def used():
        counts = torch.zeros(2, dtype=torch.int64)
        dot_emulation.function("tiles_used", tiles=True)(counts, 0, 0)
        return counts.tolist()

    before = used()
    torch.set_num_threads(2)
    with dot_emulation.processor("avx512_amx"), running("cpu:avx512_amx"):
        pyfused.linear(make(33, 300), make(500, 300))
        pyfused.gated_ffn(make(33, 300), make(500, 300), make(500, 300), make(300, 500), activation="silu")
    began, ended = used()
    assert began == ended >= before[0] + 6


GUARDED = """
import ctypes, itertools, mmap, torch, dot_emulation
kept, kernels = [], ("linear_forward", "linear_dynamic_forward")

def guarded(values, at_end):
    size, page = values.numel() * values.element_size(), mmap.PAGESIZE
    pages = -(-size // page)
    memory = mmap.mmap(-1, (pages + 2) * page)
    begin = ctypes.addressof(ctypes.c_char.from_buffer(memory))
    for edge in (begin, begin + (pages + 1) * page):
        assert ctypes.CDLL(None).mprotect(ctypes.c_void_p(edge), ctypes.c_size_t(page), 0) == 0
    offset = page + (pages * page - size if at_end else 0)
    copy = torch.frombuffer(memory, dtype=values.dtype, count=values.numel(), offset=offset)
    kept.append(memory)
    return copy.copy_(values.flatten())

floats, integers = ([dot_emulation.function(name, tiles) for tiles in (False, True)] for name in kernels)
shapes = itertools.product([3, 9, 17, 33, 40], [(5, 3), (37, 16), (64, 32), (96, 50), (771, 33), (1000, 64)], [0, 5])
for (rows, (k, n), gap), at_end in itertools.product(shapes, (False, True)):
    x, bias, residual = (torch.randn(size).bfloat16() for size in (rows * k, n, rows * n))
    weight = torch.ones((n - 1) * (k + gap) + k)
    scale = guarded(torch.ones(n), at_end)
    x, bias, residual, y = (guarded(t, at_end) for t in (x, bias, residual, residual))
    of_floats, of_integers = (guarded(weight.to(t), at_end) for t in (torch.bfloat16, torch.int8))
    strides = k, k + gap, n
    print(rows, k, n, gap, at_end, flush=True)
    for linear, dynamic in zip(floats, integers):
        linear(x, of_floats, 0, bias, residual, y, rows, n, k, *strides, False, 0, 2)
        dynamic(x, of_integers, scale, bias, residual, y, rows, n, k, *strides, 2)
print("alive")
"""


def test_nothing_is_read_outside_the_tensors():
    """Each tensor lies against a page that nobody may touch."""
    folders = [str(dot_emulation.ROOT / folder) for folder in ("tests", "tests/cuda_on_cpu")]
    script = f"import sys; sys.path[:0] = {folders}\n{GUARDED}"
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True)
    assert done.returncode == 0, (done.returncode, done.stdout.splitlines()[-1:], done.stderr[-2000:])
    assert done.stdout.endswith("alive\n")


# ---- rows in int8 ------------------------------------------------------------------------------------------------------


@pytest.fixture(params=SETS)
def integers(request):
    """A processor with integer products, which are forced."""
    with dot_emulation.processor(request.param) as kernels, running(f"cpu:{request.param}"):
        yield kernels


def quantised(n, k):
    weight = torch.randint(-128, 128, (n, k)).to(torch.int8)
    return weight, (torch.rand(n) + 0.5) / 73.0 / k**0.5


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
def test_integers_are_those_of_plain_torch(integers, dtype):
    """The same integers and sums as torch._int_mm's, so float32 results differ by a rounding or two."""
    for rows, k, n in [(17, 5, 3), (40, 131, 97), (33, 64, 48), (129, 70, 50), (18, 1603, 51)]:
        x = make(rows, k, dtype=dtype) * torch.logspace(-3, 3, rows)[:, None].to(dtype)
        x[7] = 0
        (weight, scale), bias, residual = quantised(n, k), make(n, dtype=dtype), make(rows, n, dtype=dtype)
        y = pyfused.linear(x, weight, bias, residual=residual, scale=scale, dynamic=True)
        expected = (int8.product(x, weight, scale) + bias + residual).to(dtype)
        steps = 1 if dtype == torch.float32 else 0.51
        torch.testing.assert_close(y, expected, rtol=4 * torch.finfo(dtype).eps * steps, atol=1e-5)
    assert set(integers.ran) == {"linear_dynamic_forward"}


def test_rows_that_int8_holds_lose_nothing(integers):
    for rows, k, n in [(17, 6, 3), (40, 131, 97)]:
        x = torch.randint(-127, 128, (rows, k)).float()
        x[:, 0] = 127.0
        x, (weight, scale) = x / 64.0, quantised(n, k)
        y = pyfused.linear(x, weight, scale=scale, dynamic=True)
        wide = weight.double() * scale.double()[:, None]
        assert_close(y, F.linear(x, wide.float()), F.linear(x.double(), wide))


def test_sums_that_leave_32_bits_on_the_way(integers):
    """The offset of 128 makes them leave, and its removal brings them back."""
    k = 70_000
    x, weight, scale = torch.ones(17, k), torch.full((3, k), 127, dtype=torch.int8), torch.ones(3)
    y = pyfused.linear(x, weight, scale=scale, dynamic=True)
    torch.testing.assert_close(y, torch.full((17, 3), 127.0 * k))


def test_rows_that_are_not_finite_give_nan(integers):
    x, (weight, scale) = torch.randn(20, 37), quantised(11, 37)
    x[3, 36], x[4, 0] = torch.nan, torch.inf
    y = pyfused.linear(x, weight, scale=scale, dynamic=True)
    bad = torch.zeros(20, dtype=torch.bool)
    bad[[3, 4]] = True
    assert y[bad].isnan().all()
    assert y[~bad].isfinite().all()
