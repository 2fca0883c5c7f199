"""Is rms_norm right on every backend? Values, gradients, strides, large values, errors, registration."""

import pytest
import torch
import torch.nn.functional as F
from draws import with_gradients
from opchecks import check_registered, opcheck

import pyfused
from pyfused.testing import assert_close

SHAPES = [(200, 1), (7, 5), (2, 3, 96), (2, 127, 768), (3, 1000), (3, 1300), (2, 4097), (0, 8)]


def make(shape, dtype, device, scale=1.0):
    return (torch.randn(shape, device=device) * scale + 0.5).to(dtype)


def plain(x, weight, eps=1e-6, residual=None):
    total = x if residual is None else x + residual
    return F.rms_norm(total, weight.shape, weight, eps), total


def check(x, weight, residual):
    """Judges results and gradients."""

    def theirs(x, weight, residual):
        y, total = plain(x, weight, residual=residual)
        return y if residual is None else (y, total)

    cotangents = [torch.randn_like(x) for _ in range(2)]
    found = with_gradients(
        lambda x, w, r: pyfused.rms_norm(x, w, residual=r), theirs, (x, weight, residual), cotangents
    )
    for what, tensors in found.items():
        assert_close(*tensors, what)


@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("with_residual", [True, False], ids=["residual", "alone"])
def test_forward_and_backward(each_backend, dtype, device, shape, with_residual):
    if each_backend == "triton" and device == "cpu" and len(shape) == 3:
        shape = (shape[0], min(shape[1], 5), shape[2])  # the interpreter takes 20 ms a row
    x, weight = make(shape, dtype, device), make(shape[-1:], dtype, device)
    if shape[-1] == 1:  # the gradient cancels and its rest is divided by x: one tiny x would decide
        x += x.sign()
    check(x, weight, make(shape, dtype, device) if with_residual else None)


def test_rows_too_long_for_one_tile(each_backend, device):
    """Such rows exceed a Triton program's registers: tests a row's blocks and the backward's column sums."""
    check(*(make(s, torch.float32, device) for s in [(3, 16400), (16400,), (3, 16400)]))


def test_no_grad_matches_grad(each_backend, device):
    x, w = torch.randn(5, 33, device=device), torch.randn(33, device=device, requires_grad=True)
    with torch.no_grad():
        alone = pyfused.rms_norm(x, w)
    assert torch.equal(alone, pyfused.rms_norm(x, w).detach())


def test_strided_rows(each_backend, device):
    base = torch.randn(4, 6, 80, device=device)
    w = torch.randn(40, device=device)
    for x in (base[:, 2, :40], base[:, :, 40:], base.transpose(0, 1)[..., :40], base[..., ::2]):
        assert_close(pyfused.rms_norm(x, w), plain(x, w)[0], plain(x.double(), w.double())[0])


def test_squares_beyond_float16(each_backend, device):
    """Squares of these values overflow or vanish in float16; the statistics are in float32."""
    for scale in (3e4, 1e-6):
        x = (torch.randn(4, 768, device=device) * scale).clamp(-6e4, 6e4).half()
        w = torch.ones(768, device=device).half()
        y = pyfused.rms_norm(x, w, eps=1e-20)
        assert y.isfinite().all()
        assert_close(y, plain(x, w, 1e-20)[0], plain(x.double(), w.double(), 1e-20)[0])


def test_nan_stays_in_its_row(each_backend, device):
    x, w = torch.ones(3, 50, device=device), torch.ones(50, device=device)
    x[1, 7] = float("nan")
    assert pyfused.rms_norm(x, w).isnan().all(-1).tolist() == [False, True, False]


def test_t5s_formula(each_backend, device):
    """Compares with the layer norm of Hugging Face's T5, written out in float32."""
    x, w = torch.randn(5, 64, device=device), torch.randn(64, device=device)

    def t5(x, w):
        return w * (x * torch.rsqrt(x.pow(2).mean(-1, keepdim=True) + 1e-6))

    assert_close(pyfused.rms_norm(x, w), t5(x, w), t5(x.double(), w.double()))


def test_gradcheck_reference():
    x, w, r = (torch.randn(s, dtype=torch.float64, requires_grad=True) for s in [(3, 6), (6,), (3, 6)])
    assert torch.autograd.gradcheck(lambda *t: pyfused.rms_norm(t[0], t[1], residual=t[2]), (x, w, r))
    assert torch.autograd.gradcheck(lambda *t: pyfused.rms_norm(t[0], t[1], eps=1e-2), (x[0], w))


@pytest.mark.parametrize("residual", [True, False])
def test_opcheck(each_backend, device, residual):
    x = torch.randn(3, 16, device=device, requires_grad=True)
    w = torch.randn(16, device=device, requires_grad=True)
    r = torch.randn(3, 16, device=device, requires_grad=True) if residual else None
    check_registered("rms_norm", (x, w, 1e-6, r, True), save=4, summed=residual)
    g = torch.randn(3, 16, device=device)
    args = (g, g if residual else None, x.detach(), w.detach(), torch.rand(3, device=device))
    opcheck(torch.ops.pyfused.rms_norm_backward, args)


def test_only_the_sum_has_a_gradient(each_backend, device):
    """If a loss uses only x + residual, its gradient passes through and the weight's gradient is zero."""
    x, w = torch.randn(2, 8, device=device, requires_grad=True), torch.ones(8, device=device, requires_grad=True)
    total = pyfused.rms_norm(x, w, residual=torch.ones_like(x))[1]
    grads = torch.autograd.grad(total.sum(), (x, w))
    assert torch.equal(grads[0], torch.ones_like(x))
    assert torch.equal(grads[1], torch.zeros_like(w))


@pytest.mark.parametrize(
    "change, error, message",
    [
        ({"x": [1.0]}, TypeError, "x is a list"),
        ({"x": torch.ones(2, 8, dtype=torch.int64)}, TypeError, "x is int64"),
        ({"weight": torch.ones(7)}, ValueError, r"weight has shape \(7,\)"),
        ({"weight": torch.ones(8, dtype=torch.float16)}, TypeError, "weight is float16"),
        ({"residual": torch.ones(8)}, ValueError, "residual has shape"),
        ({"x": torch.ones(())}, ValueError, r"x has shape \(\)"),
        ({"x": torch.tensor(1.0)}, ValueError, r"x has shape \(\)"),
    ],
)
def test_bad_input_names_the_argument(change, error, message):
    arguments = {"x": torch.ones(2, 8), "weight": torch.ones(8), **change}
    with pytest.raises(error, match=message):
        pyfused.rms_norm(**arguments)
