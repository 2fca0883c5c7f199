"""Is layer_norm right on every backend? Values, gradients, strides, errors, registration."""

import contextlib

import pytest
import torch
import torch.nn.functional as F
from draws import with_gradients
from opchecks import check_registered, opcheck

import pyfused
from pyfused.testing import assert_close

SHAPES = [(1, 1), (7, 5), (2, 3, 96), (2, 127, 768), (3, 1000), (3, 1300), (2, 4097), (0, 8)]


def make(shape, dtype, device, scale=1.0):
    return (torch.randn(shape, device=device) * scale + 0.5).to(dtype)


def plain(x, weight, bias, eps, residual=None):
    total = x if residual is None else x + residual
    return F.layer_norm(total, weight.shape, weight, bias, eps), total


def check(x, weight, bias, residual):
    """Judges results and gradients."""

    def theirs(x, weight, bias, residual):
        y, total = plain(x, weight, bias, 1e-5, residual)
        return y if residual is None else (y, total)

    cotangents = [torch.randn_like(x) for _ in range(2)]
    found = with_gradients(
        lambda x, w, b, r: pyfused.layer_norm(x, w, b, residual=r), theirs, (x, weight, bias, residual), cotangents
    )
    for what, tensors in found.items():
        assert_close(*tensors, what)


@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("with_bias", [True, False], ids=["bias", "nobias"])
@pytest.mark.parametrize("with_residual", [True, False], ids=["residual", "alone"])
def test_forward_and_backward(each_backend, dtype, device, shape, with_bias, with_residual):
    if each_backend == "triton" and device == "cpu" and len(shape) == 3:
        shape = (shape[0], min(shape[1], 5), shape[2])  # the interpreter takes 20 ms a row
    n = shape[-1]
    x, weight = make(shape, dtype, device), make((n,), dtype, device)
    bias = make((n,), dtype, device) if with_bias else None
    residual = make(shape, dtype, device) if with_residual else None
    check(x, weight, bias, residual)


def test_rows_too_long_for_one_tile(each_backend, device):
    """Such rows exceed a Triton program's registers: tests a row's blocks and the backward's column sums."""
    check(*(make(s, torch.float32, device) for s in [(3, 16400), (16400,), (16400,), (3, 16400)]))


def test_no_grad_matches_grad(each_backend, device):
    x, w = torch.randn(5, 33, device=device), torch.randn(33, device=device, requires_grad=True)
    with torch.no_grad():
        alone = pyfused.layer_norm(x, w)
    assert torch.equal(alone, pyfused.layer_norm(x, w).detach())


def test_strided_rows(each_backend, device):
    base = torch.randn(4, 6, 80, device=device)
    w, b = torch.randn(40, device=device), torch.randn(40, device=device)
    for x in (base[:, 2, :40], base[:, :, 40:], base.transpose(0, 1)[..., :40], base[..., ::2]):
        assert_close(
            pyfused.layer_norm(x, w, b), plain(x, w, b, 1e-5)[0], plain(x.double(), w.double(), b.double(), 1e-5)[0]
        )


def test_large_offset_keeps_variance(each_backend, device):
    """The mean is far from zero: a one-pass sum of squares in float32 would lose the variance."""
    x = torch.randn(4, 768, device=device) + 3000
    w, b = torch.ones(768, device=device), torch.zeros(768, device=device)
    assert_close(
        pyfused.layer_norm(x, w, b), plain(x, w, b, 1e-5)[0], plain(x.double(), w.double(), b.double(), 1e-5)[0]
    )


def test_gradcheck_reference():
    x, w, b, r = (torch.randn(s, dtype=torch.float64, requires_grad=True) for s in [(3, 6), (6,), (6,), (3, 6)])
    assert torch.autograd.gradcheck(lambda *t: pyfused.layer_norm(t[0], t[1], t[2], residual=t[3]), (x, w, b, r))


@pytest.mark.parametrize("residual", [True, False])
def test_opcheck(each_backend, device, residual):
    x = torch.randn(3, 16, device=device, requires_grad=True)
    w, b = (torch.randn(16, device=device, requires_grad=True) for _ in range(2))
    r = torch.randn(3, 16, device=device, requires_grad=True) if residual else None
    check_registered("layer_norm", (x, w, b, 1e-5, r, True), save=5, summed=residual)
    g = torch.randn(3, 16, device=device)
    stats = torch.randn(3, device=device), torch.rand(3, device=device)
    args = (g, g if residual else None, x.detach(), w.detach(), *stats, True)
    opcheck(torch.ops.pyfused.layer_norm_backward, args)


@pytest.mark.parametrize(
    "change, error, message",
    [
        ({"x": [1.0]}, TypeError, "x is a list"),
        ({"x": torch.ones(2, 8, dtype=torch.int64)}, TypeError, "x is int64"),
        ({"weight": torch.ones(7)}, ValueError, r"weight has shape \(7,\)"),
        ({"weight": torch.ones(8, dtype=torch.float16)}, TypeError, "weight is float16"),
        ({"bias": torch.ones(1, 8)}, ValueError, "bias has shape"),
        ({"residual": torch.ones(8)}, ValueError, "residual has shape"),
        ({"x": torch.ones(())}, ValueError, r"x has shape \(\)"),
    ],
)
def test_bad_input_names_the_argument(change, error, message):
    arguments = {"x": torch.ones(2, 8), "weight": torch.ones(8), **change}
    with pytest.raises(error, match=message):
        pyfused.layer_norm(**arguments)


@pytest.mark.parametrize("name", ["layer_norm", "rms_norm"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("trains", [False, True])
def test_results_are_contiguous_whatever_the_strides(name, dtype, trains):
    """Compiled programs rely on the registered operator's strides, on the reference, the kernels and the library alike."""
    x = torch.randn(33, 16, dtype=dtype).t().requires_grad_(trains)
    residual, weight = torch.randn(16, 33, dtype=dtype), torch.randn(33, dtype=dtype)

    def norm(x, residual):
        y, total = getattr(pyfused, name)(x, weight, residual=residual)
        return y, total, y.sin() + total

    for backend in (None, "reference"):
        with pyfused.backend(backend) if backend else contextlib.nullcontext():
            y, total, _ = norm(x, residual)
        assert y.is_contiguous()
        assert total.is_contiguous()
    for found, expected in zip(torch.compile(norm)(x, residual), norm(x, residual)):
        torch.testing.assert_close(found, expected)
