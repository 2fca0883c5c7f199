"""Does rms_norm take large values and NaN as it should? test_layer_norm.py has all that both norms have."""

import torch
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


def test_only_the_sum_has_a_gradient(each_backend, device):
    """If a loss uses only x + residual, its gradient passes through and the weight's gradient is zero."""
    x, w = torch.randn(2, 8, device=device, requires_grad=True), torch.ones(8, device=device, requires_grad=True)
    total = pyfused.rms_norm(x, w, residual=torch.ones_like(x))[1]
    grads = torch.autograd.grad(total.sum(), (x, w))
    assert torch.equal(grads[0], torch.ones_like(x))
    assert torch.equal(grads[1], torch.zeros_like(w))
