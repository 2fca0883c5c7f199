"""What has linear with int4 weights alone? Every nibble, registration, errors. (The rest: test_linear_integers.py.)"""

import pytest
import torch
from integer_cases import BACKENDS, double, plain, quantised
from opchecks import check_registered

import pyfused
from pyfused import dispatch
from pyfused.testing import assert_close, available, running
from pyfused.weight_format import INT4, dequantized


@pytest.fixture(params=BACKENDS["int4"])
def each_backend(request):
    with running(request.param):
        yield request.param


def test_every_value_alone(each_backend, device):
    """x picks one value at a time, so each must come out exactly: all nibbles, in both halves, times their own scales."""
    weight = torch.arange(-128, 128, device=device).to(torch.int8).view(16, 16).repeat(1, 3)
    scale = torch.tensor([1.0, -0.5, 3.0], device=device).expand(16, 3).bfloat16().contiguous()
    for rows in (1, 96):
        x = torch.eye(96, device=device)[-rows:]
        y = pyfused.linear(x, weight, scale=scale)
        assert torch.equal(y.t(), dequantized(weight, scale, torch.float32)[:, -rows:])


def test_launches_of_the_two_formats_are_not_mixed_up(device):
    """Both are int8 in memory, with weights of the same shape."""
    int4, scale4 = quantised("int4", device, 12, 64)
    int8, scale8 = quantised("int8", device, 12, 32)
    for _ in range(2):
        for k, weight, scale in ((64, int4, scale4), (32, int8, scale8)):
            given = torch.randn(3, k, device=device), weight, scale
            assert_close(pyfused.linear(given[0], weight, scale=scale), plain(*given), plain(*double(*given)))


@pytest.mark.parametrize("backend, full", [("reference", True), (BACKENDS["int4"][-1], False)])
def test_opcheck(device, backend, full):
    x, bias, residual = (torch.randn(s, device=device, requires_grad=True) for s in [(20, 32), (6,), (20, 6)])
    weight, scale = quantised("int4", device, 6, 32)
    with running(backend):
        check_registered("linear", (x, weight, bias if full else None, residual if full else None, scale, False))


def test_meta():
    x, weight, scale = torch.ones(3, 64, device="meta"), *(t.to("meta") for t in quantised("int4", "cpu", 12, 64))
    assert torch.ops.pyfused.linear(x, weight, None, None, scale).shape == (3, 12)


def test_other_backends_say_so(device):
    """Forced, they leave it to the reference."""
    weight, scale = quantised("int4", device, 12, 64)
    x = torch.randn(3, 64, device=device)
    reasons = {"triton": "takes int8 weights alone; int4 is widened", "cuda": "has no product with integer weights"}
    for backend in reasons.keys() & set(available(device)):
        with dispatch.backend(backend):
            assert reasons[backend] in str(pyfused.explain("linear", x, weight, scale=scale))
            torch.testing.assert_close(pyfused.linear(x, weight, scale=scale), plain(x, weight, scale))


W, S = torch.ones(4, 32, dtype=torch.int8), torch.ones(4, 2, dtype=torch.bfloat16)


@pytest.mark.parametrize(
    "change, error, message",
    [
        ({"scale": None}, ValueError, r"weight has shape \(4, 32\); it takes \(N, K\) with x's K = 64"),
        ({"scale": S.half()}, TypeError, "scale is float16; beside an int4 weight it takes bfloat16"),
        ({"scale": S[:, :1]}, ValueError, r"scale has shape \(4, 1\); it takes \(N, K / 32\) = \(4, 2\)"),
        ({"scale": S.to("meta")}, ValueError, "scale is on meta"),
        ({"weight": W[:, :31]}, ValueError, r"weight has shape \(4, 31\); it takes \(N, K / 2\) with x's K = 64"),
        ({"weight": W[:, :24], "x": torch.ones(2, 48)}, ValueError, "weight is int4 and K = 48 is no multiple of 32"),
        ({"dynamic": True}, ValueError, "dynamic is True beside an int4 weight; it is for int8 weights"),
        ({"bias": torch.ones(4, dtype=torch.float16)}, TypeError, "bias is float16"),
    ],
)
def test_bad_input_names_the_argument(change, error, message):
    with pytest.raises(error, match=message):
        pyfused.linear(**{"x": torch.ones(2, 64), "weight": W, "scale": S, **change})


def test_the_least_cost_counts_two_values_a_byte():
    x, (weight, scale) = torch.ones(3, 64), quantised("int4", "cpu", 12, 64)
    cost = pyfused.ops.cost.COSTS["linear"](x, weight, None, None, scale)
    assert cost.flops == 2 * 3 * 12 * 64
    assert cost.bytes == x.nbytes + weight.nbytes + scale.nbytes + 3 * 12 * 4
    assert INT4.nbytes(12, 64) == weight.nbytes + scale.nbytes
