"""Is an activation between two layers that of plain PyTorch, for values, gradients and whoever watches?"""

import pytest
import torch

import pyfused
from pyfused.activations import ACTIVATIONS
from pyfused.ops.activation import activated
from pyfused.testing import assert_close


def plain(x, activation, up):
    if up is None:
        return ACTIVATIONS[activation].function(x)
    wide = torch.float32 if x.dtype == torch.float16 else x.dtype
    return ACTIVATIONS[activation].function(x.to(wide)) * up.to(wide)


@pytest.mark.parametrize("activation", ACTIVATIONS)
@pytest.mark.parametrize("gated", [False, True], ids=["plain", "gated"])
@pytest.mark.parametrize("shape", [(3, 5, 67), (0, 4), ()], ids=str)
def test_values(dtype, activation, gated, shape):
    x = (torch.randn(shape) * 4).to(dtype)
    up = torch.randn(shape).to(dtype) if gated else None
    kept = x.clone()
    actual, expected = activated(x, activation, up), plain(x, activation, up)
    assert actual.dtype == expected.dtype
    assert torch.equal(x, kept)
    if x.numel():
        assert_close(actual, expected, plain(x.double(), activation, None if up is None else up.double()))
    with pyfused.backend("reference"):
        assert torch.equal(activated(x, activation, up), expected)


def test_strides_and_broadcasting():
    x, up = torch.randn(6, 8).t(), torch.randn(6)
    truth = plain(x.double(), "silu", up.double())
    assert_close(activated(x, "silu", up), plain(x, "silu", up), truth)


def test_a_product_that_float16_cannot_hold():
    x = torch.full((4,), 300.0, dtype=torch.float16)
    assert activated(x, "gelu_tanh", x).tolist() == [90000.0] * 4


def test_gradients_and_transforms():
    x, up = torch.randn(5, requires_grad=True), torch.randn(5)
    actual = torch.autograd.grad(activated(x, "gelu_tanh", up).sum(), x)[0]
    assert torch.equal(actual, torch.autograd.grad(plain(x, "gelu_tanh", up).sum(), x)[0])
    x = x.detach()
    one_by_one = torch.func.vmap(lambda v: activated(v, "gelu"))(x)
    assert torch.equal(one_by_one, plain(x, "gelu", None))
    tangent = torch.func.jvp(lambda v: activated(v, "tanh"), (x,), (torch.ones(5),))[1]
    torch.testing.assert_close(tangent, 1 - x.tanh() ** 2)
