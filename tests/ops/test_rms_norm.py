"""Does rms_norm take large values, NaN and bad input as it should? test_layer_norm.py has its values and gradients."""

import pytest
import torch
from opchecks import check_registered, opcheck
from test_layer_norm import check_forward

import pyfused


def test_squares_beyond_float16(each_backend, device):
    """Squares of these values overflow or vanish in float16; the statistics are in float32."""
    for scale in (3e4, 1e-6):
        x = (torch.randn(4, 768, device=device) * scale).clamp(-6e4, 6e4).half()
        w = torch.ones(768, device=device).half()
        assert pyfused.rms_norm(x, w, eps=1e-20).isfinite().all()
        check_forward("rms_norm", x, w, eps=1e-20)


def test_nan_stays_in_its_row(each_backend, device):
    x, w = torch.ones(3, 50, device=device), torch.ones(50, device=device)
    x[1, 7] = float("nan")
    assert pyfused.rms_norm(x, w).isnan().all(-1).tolist() == [False, True, False]


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
