"""Is linear right with int8 weights? Values, gradients, strides, rows in int8 too, errors, registration."""

import itertools

import pytest
import torch
import torch.nn.functional as F
from draws import chained_linear, check
from opchecks import check_registered

import pyfused
from pyfused import dispatch, evidence, notices
from pyfused.kernels.shared import int8
from pyfused.testing import assert_close, available, running

BACKENDS = [name for name in available("cuda" if torch.cuda.is_available() else "cpu") if name != "cuda"]
# (rows, K, N): the gemv ends at 16 rows, 513 rows are several blocks of the gemm.
SHAPES = [
    *itertools.product([1, 2, 3, 4, 5, 6, 7, 8, 9, 16, 17, 33, 129], [(1, 5), (5, 1), (96, 768), (131, 97)]),
    *itertools.product([1, 2, 7, 16, 17, 129], [(768, 1000), (1000, 96), (800, 51)]),
    (513, (40, 50)),
    (0, (8, 8)),
    (3, (16, 0)),
    (3, (0, 4)),
]
# For Triton's interpreter: one row, few and many, with tiles that end inside and outside, one part of K and several.
INTERPRETED = [
    (r, s) for r, s in SHAPES if (r in (1, 7, 17, 33) and s in ((131, 97), (5, 1))) or (r, s) == (2, (800, 51))
]


@pytest.fixture(params=BACKENDS)
def each_backend(request):
    with running(request.param):
        yield request.param


def plain(x, weight, scale, bias=None, residual=None, linear=F.linear):
    """PyTorch with the weight that the integers stand for."""
    wide = torch.float64 if x.dtype == torch.float64 else torch.float32
    y = linear(x, (weight.to(wide) * scale.to(wide)[:, None]).to(x.dtype), bias)
    return y if residual is None else y + residual


def plainly(each_backend, *given):
    """plain(), in the interpreter beside the sums of a GPU, each one chain of multiply-adds."""
    ways = [F.linear, chained_linear] if each_backend == "triton" and given[0].is_cpu else [F.linear]
    return [plain(*given, linear=way) for way in ways]


def make(dtype, device, *shape):
    return torch.randn(shape, device=device).to(dtype)


def quantised(device, n, k):
    weight = torch.randint(-127, 128, (n, k), dtype=torch.int8, device=device)
    return weight, (torch.rand(n, device=device) + 0.5) / 73.0 / max(k, 1) ** 0.5


def double(*tensors):
    return [t.double() if t is not None and t.is_floating_point() else t for t in tensors]


@pytest.mark.interpreted(with_bias=True, with_residual=True)
@pytest.mark.parametrize("with_residual", [True, False], ids=["residual", "alone"])
@pytest.mark.parametrize("with_bias", [True, False], ids=["bias", "nobias"])
def test_forward(each_backend, dtype, device, with_bias, with_residual):
    for rows, (k, n) in INTERPRETED if each_backend == "triton" and device == "cpu" else SHAPES:

        def once(rows=rows, k=k, n=n):
            x, (weight, scale) = make(dtype, device, rows, k), quantised(device, n, k)
            bias = make(dtype, device, n) if with_bias else None
            residual = make(dtype, device, rows, n) if with_residual else None
            y = pyfused.linear(x, weight, bias, residual=residual, scale=scale)
            assert y.dtype == dtype
            assert y.is_contiguous()
            given = x, weight, scale, bias, residual
            return {f"rows {rows}, K {k}, N {n}": (y, plainly(each_backend, *given), plain(*double(*given)))}

        check(once, 50)


def test_float64_is_exact(device):
    x, (weight, scale) = make(torch.float64, device, 20, 300), quantised(device, 40, 300)
    torch.testing.assert_close(pyfused.linear(x, weight, scale=scale), plain(x, weight, scale), rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("by_library", [False, True], ids=["kernel", "library"])
def test_both_ways_on_the_cpu(dtype, device, by_library):
    """Widened part by part the library's product is the same."""
    for rows, k, n in [(1, 33, 70), (40, 131, 97), (20, 2048, 300)]:
        x, (weight, scale), bias = make(dtype, "cpu", rows, k), quantised("cpu", n, k), make(dtype, "cpu", n)
        residual = make(dtype, "cpu", rows, n)
        dispatch.forget()
        with evidence.one_way(by_library):
            y = pyfused.linear(x, weight, bias, residual=residual, scale=scale)
        dispatch.forget()
        given = x, weight, scale, bias, residual
        assert_close(y, plain(*given), plain(*double(*given)))


@pytest.mark.parametrize("shape", [(3, 16), (2, 5, 33), (40,), (2, 0, 7)], ids=str)
def test_gradients(each_backend, dtype, device, shape):
    """Of x, bias and residual; weight and scale have none."""
    k, n = shape[-1], 21
    out = (*shape[:-1], n)

    def once():
        weight, scale = quantised(device, n, k)
        inputs = [make(dtype, device, *s) for s in (shape, (n,), out)]
        cotangent = make(dtype, device, *out)

        def run(function, wide):
            leaves = [t.to(wide).requires_grad_() for t in inputs]
            y = function(*leaves)
            return [y, *torch.autograd.grad((y * cotangent.to(wide)).sum(), leaves)]

        def ours(x, b, r):
            return pyfused.linear(x, weight, b, residual=r, scale=scale)

        def theirs(x, b, r):
            return plain(x, weight, scale, b, r)

        actual = run(ours, dtype)
        assert {t.dtype for t in actual} == {dtype}
        return {f"output {i}": t for i, t in enumerate(zip(actual, run(theirs, dtype), run(theirs, torch.float64)))}

    check(once)


def test_second_derivatives_and_transforms(device):
    weight, scale = quantised(device, 6, 5)
    x = torch.randn(20, 5, dtype=torch.float64, device=device, requires_grad=True)
    assert torch.autograd.gradcheck(lambda x: pyfused.linear(x, weight, scale=scale), x)
    assert torch.autograd.gradgradcheck(lambda x: pyfused.linear(x, weight, scale=scale).sin(), x)
    column_sums = (weight.double() * scale.double()[:, None]).sum(0)
    for dynamic in (False, True):
        gradient = torch.func.grad(lambda x, d=dynamic: pyfused.linear(x, weight, scale=scale, dynamic=d).sum())
        torch.testing.assert_close(gradient(x.detach()), column_sums.expand_as(x))


def test_strides(each_backend, dtype, device):
    base, (weights, scales) = make(dtype, device, 4, 6, 80), quantised(device, 50, 90)
    wide = make(dtype, device, 4, 6, 100)
    for rows, columns in [
        (slice(0, 50), slice(0, 40)),
        (slice(0, 40), slice(20, 60)),
        (slice(0, 50, 2), slice(0, 80, 2)),
    ]:
        weight, scale = weights[rows, columns], scales[rows]
        n = weight.shape[0]
        for x in (base[..., :40], base[..., ::2], base.transpose(0, 1)[..., 7:47], base[:1, :1, :40].expand(4, 6, 40)):
            residual = wide[..., :n] if x.shape[0] == 4 else wide.transpose(0, 1)[..., 1 : n + 1]
            for r in (None, residual):
                given = x, weight, scale, None, r
                y = pyfused.linear(x, weight, residual=r, scale=scale)
                assert_close(y, plain(*given), plain(*double(*given)))


@pytest.mark.parametrize("rows", [1, 5, 16, 40])
def test_infinity_and_nan_stay_in_their_row(each_backend, dtype, device, rows):
    x, (weight, scale) = make(dtype, device, rows, 70), quantised(device, 30, 70)
    x[0, 69] = float("nan")
    x[-1, 3] = float("inf")
    weight[:, 3] = 5
    y, expected = pyfused.linear(x, weight, scale=scale), plain(x, weight, scale)
    assert torch.equal(y.isnan(), expected.isnan())
    assert torch.equal(y.isposinf(), expected.isposinf())


def test_autocast(device):
    x, (weight, scale), bias = (
        torch.randn(5, 33, device=device),
        quantised(device, 12, 33),
        torch.randn(12, device=device),
    )
    residual = torch.randn(5, 12, device=device)
    with torch.autocast(device, torch.bfloat16):
        y, total = (pyfused.linear(x, weight, bias, residual=r, scale=scale) for r in (None, residual))
    given = x.bfloat16(), weight, scale, bias.bfloat16()
    assert y.dtype == torch.bfloat16
    assert_close(y, plain(*given), plain(*double(*given)))
    assert total.dtype == torch.float32
    assert torch.equal(total, y + residual)


def test_repeated_calls_have_launches(device):
    """A second call with other values uses the kept launch, with gradients and without."""
    weight, scale = quantised(device, 12, 33)
    for wants in (False, True, True, False):
        x = torch.randn(5, 33, device=device, requires_grad=wants)
        y = pyfused.linear(x, weight, scale=scale)
        assert_close(y.detach(), plain(x, weight, scale).detach(), plain(*double(x, weight, scale)).detach())
        assert y.requires_grad == wants
    float_weight = torch.randn(12, 33, device=device)
    with pytest.raises(ValueError, match="dynamic is True beside a weight of float32"):
        pyfused.linear(x, float_weight, dynamic=True)
    pyfused.linear(x, float_weight)
    with pytest.raises(ValueError, match="dynamic is True"):
        pyfused.linear(x, float_weight, dynamic=True)


@pytest.mark.cpu_kernels
def test_two_threads_agree_with_one(each_backend, dtype, device):
    x, (weight, scale), bias = make(dtype, device, 33, 512), quantised(device, 700, 512), make(dtype, device, 700)
    for rows in (1, 5, 33):
        found = []
        for threads in (1, 2):
            torch.set_num_threads(threads)
            found.append(pyfused.linear(x[:rows], weight, bias, scale=scale))
        given = x[:rows], weight, scale, bias
        for y in found:
            assert_close(y, plain(*given), plain(*double(*given)))


# ---- rows in int8 too -------------------------------------------------------------------------------------------------


@pytest.fixture(params=[name for name in ("reference", "cpu", "triton") if name == "cpu" or name in BACKENDS])
def of_integers(request, monkeypatch):
    """Every backend with its integer products, on any processor."""
    monkeypatch.setattr(torch.cpu, "_is_vnni_supported", lambda: True)
    dispatch.forget()
    with dispatch.backend(request.param, strict=True):
        yield request.param
    dispatch.forget()


def test_rows_that_int8_holds_lose_nothing(of_integers, dtype):
    """x is a multiple of its own step, so rounding changes nothing, and the tolerance rule holds."""
    for rows, k, n in [(17, 5, 3), (40, 131, 97), (129, 768, 24)]:
        integers = torch.randint(-127, 128, (rows, k)).float()
        integers[:, 0] = 127.0
        x, (weight, scale), bias = (integers / 64.0).to(dtype), quantised("cpu", n, k), make(dtype, "cpu", n)
        residual = make(dtype, "cpu", rows, n)
        y = pyfused.linear(x, weight, bias, residual=residual, scale=scale, dynamic=True)
        given = x, weight, scale, bias, residual
        assert_close(y, plain(*given), plain(*double(*given)))


def test_rows_are_rounded_to_their_own_steps(of_integers, dtype):
    x, (weight, scale) = (
        make(dtype, "cpu", 40, 200) * torch.logspace(-3, 3, 40)[:, None].to(dtype),
        quantised("cpu", 30, 200),
    )
    x[7] = 0
    y = pyfused.linear(x, weight, scale=scale, dynamic=True)
    exact = plain(*double(x, weight, scale))
    step = x.double().abs().amax(1, keepdim=True) / 127
    most = step / 2 * (weight.double().abs() * scale.double()[:, None]).sum(1)
    slack = torch.finfo(dtype).eps * exact.abs() + 1e-6 * most
    assert ((y.double() - exact).abs() <= most + slack).all()
    assert not y[7].any()
    assert ((y.double() - exact).norm(dim=1) > 1e-4 * exact.norm(dim=1)).sum() > 30, "the rows were not rounded"


def test_the_library_gets_strides_that_it_can_read(device, monkeypatch):
    """On some processors it returns garbage for a weight of one column and for rows that overlap."""
    product = torch._int_mm

    def strict(a, b):
        (k, n), (row, column) = b.shape, b.stride()
        assert (row == 1 and column >= k and (column > 1 or n == 1)) or (column == 1 and row >= n)
        return product(a, b)

    monkeypatch.setattr(torch, "_int_mm", strict)
    stored = torch.randint(-127, 128, (40, 64), dtype=torch.int8, device=device)
    one_column, one_row = stored[:, 3:4], stored[0]
    for weight in (
        *(stored, stored[:, 8:24], stored[::2], stored[:, ::2], stored.t()),
        *(one_column, one_column.contiguous(), one_row.expand(24, 64), one_row.expand(1, 64), stored[:1, :1], stored[:0, :1]),
    ):
        n, k = weight.shape
        if device == "cuda" and (n % 8 or k % 8):
            continue
        x = torch.randint(-127, 128, (20, k), device=device).float()
        x[:, 0] = 127.0
        y = int8.product(x, weight, torch.ones(n, device=device))
        assert torch.equal(y, F.linear(x.double(), weight.double()).float()), (weight.shape, weight.stride())


def test_few_rows_stay_as_they_are(of_integers):
    weight, scale = quantised("cpu", 30, 64)
    x = torch.randn(16, 64)
    assert torch.equal(pyfused.linear(x, weight, scale=scale, dynamic=True), pyfused.linear(x, weight, scale=scale))


def test_dynamic_that_cannot_be_is_said(monkeypatch):
    """The result is that of the exact form, and a warning says why."""
    weight, scale = quantised("cpu", 30, 64)
    x = torch.randn(40, 64)
    monkeypatch.setattr(torch.cpu, "_is_vnni_supported", lambda: False)
    monkeypatch.setattr(notices, "_said", set())
    dispatch.forget()
    with dispatch.backend("cpu", strict=True):
        with pytest.warns(notices.FallbackWarning, match="no instructions for products of int8"):
            y = pyfused.linear(x, weight, scale=scale, dynamic=True)
        assert torch.equal(y, pyfused.linear(x, weight, scale=scale))
        assert "no instructions" in str(pyfused.explain("linear", x, weight, scale=scale, dynamic=True))
    dispatch.forget()
    few = pyfused.explain("linear", x[:16], weight, scale=scale, dynamic=True)
    assert "keeps x in floating point" in str(few)
    assert "multiples of 8" in int8.in_float(torch.randn(40, 60), torch.empty(30, 60, dtype=torch.int8), "cuda")
    assert int8.in_float(torch.randn(40, 64), torch.empty(32, 64, dtype=torch.int8), "cuda") is None


def test_explain_names_the_integer_product(of_integers):
    weight, scale = quantised("cpu", 30, 64)
    said = str(pyfused.explain("linear", torch.randn(40, 64), weight, scale=scale, dynamic=True))
    assert of_integers != "cpu" or "torch._int_mm" in said
    assert "keeps x in floating point" not in said


# ---- registration and errors ------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dynamic", [False, True])
@pytest.mark.parametrize("full", [True, False])
def test_opcheck(each_backend, device, full, dynamic):
    x, bias, residual = (torch.randn(s, device=device, requires_grad=True) for s in [(20, 8), (6,), (20, 6)])
    weight, scale = quantised(device, 6, 8)
    check_registered("linear", (x, weight, bias if full else None, residual if full else None, scale, dynamic))


def test_compiled(device):
    weight, scale = quantised(device, 12, 33)

    def run(x, dynamic):
        return pyfused.linear(x, weight, scale=scale, dynamic=dynamic).relu()

    compiled = torch.compile(run, fullgraph=True)
    for rows in (3, 20):
        x = torch.randn(rows, 33, device=device, requires_grad=True)
        y = compiled(x, False)
        assert torch.equal(y, run(x, False))
        found, expected = (torch.autograd.grad(f(x, False).sum(), x)[0] for f in (compiled, run))
        torch.testing.assert_close(found, expected)


W, S = torch.ones(4, 8, dtype=torch.int8), torch.ones(4)


@pytest.mark.parametrize(
    "change, error, message",
    [
        ({"scale": None}, ValueError, "scale is None; beside an int8 weight it takes float32"),
        ({"scale": None, "dynamic": True}, ValueError, "scale is None"),
        ({"scale": [1.0]}, TypeError, "scale is a list"),
        ({"scale": torch.ones(5)}, ValueError, r"scale has shape \(5,\)"),
        ({"scale": torch.ones(4, 1)}, ValueError, r"scale has shape \(4, 1\)"),
        ({"scale": torch.ones(4, dtype=torch.float64)}, TypeError, "scale is float64"),
        ({"scale": torch.ones(4, device="meta")}, ValueError, "scale is on meta"),
        ({"weight": torch.ones(4, 8)}, ValueError, "scale is given beside a weight of float32"),
        ({"weight": torch.ones(4, 8), "scale": None, "dynamic": True}, ValueError, "dynamic is True beside"),
        ({"weight": W.to("meta")}, ValueError, "weight is on meta"),
        ({"weight": W[:, :7]}, ValueError, r"weight has shape \(4, 7\)"),
        ({"weight": W.to(torch.uint8)}, TypeError, "weight is uint8"),
        ({"dynamic": 1}, TypeError, "dynamic is 1; it takes True or False"),
        ({"x": W[:2]}, TypeError, "x is int8"),
        ({"bias": torch.ones(4, dtype=torch.float16)}, TypeError, "bias is float16"),
        ({"residual": torch.ones(4)}, ValueError, "residual has shape"),
    ],
)
def test_bad_input_names_the_argument(change, error, message):
    arguments = {"x": torch.ones(2, 8), "weight": W, "scale": S, **change}
    with pytest.raises(error, match=message):
        pyfused.linear(**arguments)


def test_sums_that_do_not_fit_into_int32_stay_in_floating_point():
    k = 140_000
    x, weight = torch.ones(17, k), torch.full((2, k), 127, dtype=torch.int8)
    for backend in ("reference", "cpu"):
        with running(backend, strict=False):
            y = pyfused.linear(x, weight, scale=torch.ones(2), dynamic=True)
        torch.testing.assert_close(y, torch.full((17, 2), 127.0 * k))
    assert pyfused.linear(torch.ones(20, 0), weight[:, :0], scale=torch.ones(2), dynamic=True).eq(0).all()
