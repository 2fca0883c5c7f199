"""What has linear with int8 weights alone? Rows in int8 too, registration, errors. (The rest: test_linear_integers.py.)"""

import pytest
import torch
from integer_cases import BACKENDS, double, plain, quantised
from opchecks import check_registered

import pyfused
from pyfused import dispatch, extensions, notices
from pyfused.kernels.shared import int8
from pyfused.testing import assert_close, running


@pytest.fixture(params=BACKENDS["int8"])
def each_backend(request):
    with running(request.param):
        yield request.param


def test_repeated_calls_have_launches(device):
    """A second call with other values uses the kept launch, with gradients and without."""
    weight, scale = quantised("int8", device, 12, 33)
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


# ---- rows in int8 too -------------------------------------------------------------------------------------------------


@pytest.fixture(params=[name for name in ("reference", "cpu", "triton") if name == "cpu" or name in BACKENDS["int8"]])
def of_integers(request, monkeypatch):
    """Every backend with its integer products, on any processor; "cpu" has torch's (test_dot_products.py has pyfused's own)."""
    monkeypatch.setattr(int8, "library_multiplies", lambda: True)
    monkeypatch.setattr(extensions, "dot_products", lambda: None)
    dispatch.forget()
    with dispatch.backend(request.param, strict=True):
        yield request.param
    dispatch.forget()


def test_rows_that_int8_holds_lose_nothing(of_integers, dtype):
    """x is a multiple of its own step, so rounding changes nothing, and the tolerance rule holds."""
    for rows, k, n in [(17, 5, 3), (40, 131, 97), (129, 768, 24)]:
        integers = torch.randint(-127, 128, (rows, k)).float()
        integers[:, 0] = 127.0
        x, (weight, scale), bias = (integers / 64.0).to(dtype), quantised("int8", "cpu", n, k), torch.randn(n).to(dtype)
        residual = torch.randn(rows, n).to(dtype)
        y = pyfused.linear(x, weight, bias, residual=residual, scale=scale, dynamic=True)
        given = x, weight, scale, bias, residual
        assert_close(y, plain(*given), plain(*double(*given)))


def test_rows_are_rounded_to_their_own_steps(of_integers, dtype):
    x, (weight, scale) = (
        torch.randn(40, 200).to(dtype) * torch.logspace(-3, 3, 40)[:, None].to(dtype),
        quantised("int8", "cpu", 30, 200),
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
        assert torch.equal(y, (x.double() @ weight.double().t()).float()), (weight.shape, weight.stride())


@pytest.fixture
def saturating(monkeypatch):
    """torch's product as oneDNN does it without VNNI, or with ONEDNN_MAX_CPU_ISA=AVX2: pairs of products are added in int16."""

    def product(a, b):
        pairs = (a.int() + 128)[:, :, None] * b.int()[None]  # oneDNN shifts the rows to uint8
        pairs = torch.nn.functional.pad(pairs, (0, 0, 0, a.shape[1] % 2)).unflatten(1, (-1, 2)).sum(2)
        return pairs.clamp(-(2**15), 2**15 - 1).sum(1, dtype=torch.int32) - 128 * b.int().sum(0, dtype=torch.int32)

    monkeypatch.setattr(torch, "_int_mm", product)
    monkeypatch.setattr(torch.cpu, "_is_vnni_supported", lambda: True)
    monkeypatch.setattr(extensions, "dot_products", lambda: None)
    int8._is_exact.cache_clear()
    dispatch.forget()
    yield
    monkeypatch.undo()
    int8._is_exact.cache_clear()
    dispatch.forget()


def test_a_product_that_saturates_is_not_used(saturating):
    weight = torch.full((24, 64), 127, dtype=torch.int8)
    x, scale = torch.full((20, 64), 127.0), torch.ones(24)
    with dispatch.backend("reference"):
        assert (pyfused.linear(x, weight, scale=scale, dynamic=True) == 64 * 127**2).all()
    with dispatch.backend("cpu", strict=True):
        assert (pyfused.linear(x, weight, scale=scale, dynamic=True) == 64 * 127**2).all()
        assert "no instructions" in str(pyfused.explain("linear", x, weight, scale=scale, dynamic=True))


def test_few_rows_stay_as_they_are(of_integers):
    weight, scale = quantised("int8", "cpu", 30, 64)
    x = torch.randn(16, 64)
    assert torch.equal(pyfused.linear(x, weight, scale=scale, dynamic=True), pyfused.linear(x, weight, scale=scale))


def test_dynamic_that_cannot_be_is_said(monkeypatch):
    """The result is that of the exact form, and a warning says why."""
    weight, scale = quantised("int8", "cpu", 30, 64)
    x = torch.randn(40, 64)
    monkeypatch.setattr(torch.cpu, "_is_vnni_supported", lambda: False)
    monkeypatch.setattr(extensions, "dot_products", lambda: None)  # nor has pyfused instructions for it
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
    weight, scale = quantised("int8", "cpu", 30, 64)
    said = str(pyfused.explain("linear", torch.randn(40, 64), weight, scale=scale, dynamic=True))
    assert of_integers != "cpu" or "torch._int_mm" in said
    assert "keeps x in floating point" not in said


# ---- registration and errors ------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dynamic", [False, True])
@pytest.mark.parametrize("full", [True, False])
def test_opcheck(each_backend, device, full, dynamic):
    x, bias, residual = (torch.randn(s, device=device, requires_grad=True) for s in [(20, 8), (6,), (20, 6)])
    weight, scale = quantised("int8", device, 6, 8)
    check_registered("linear", (x, weight, bias if full else None, residual if full else None, scale, dynamic))


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
