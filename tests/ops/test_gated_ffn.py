"""Is gated_ffn right on every backend? Values, gradients, float16 beyond its range, strides, errors, registration."""

import itertools

import draws
import pytest
import torch
import torch.nn.functional as F
from opchecks import check_registered, opcheck
from test_ffn import LARGE, PLAIN, ROWS, SIZES, check_frozen, check_x_beside_frozen, judge_draws, of_tensors

import pyfused
from pyfused.activations import ACTIVATIONS
from pyfused.testing import assert_close


def plain(x, w_gate, w_up, w_out, activation, residual, linear=F.linear):
    y = linear(PLAIN[activation](linear(x, w_gate)) * linear(x, w_up), w_out)
    return y if residual is None else y + residual


def check(activation, dtype, device, lead, n, f, m, with_residual, chained=False):
    def make(*shape, scale=1.0):
        return (torch.randn(shape, device=device) * scale).to(dtype)

    def inputs():
        first = make(*lead, n), make(f, n, scale=n**-0.5), make(f, n, scale=n**-0.5)
        return *first, make(m, f, scale=f**-0.5), make(*lead, m) if with_residual else None, make(*lead, m)

    judge_draws(pyfused.gated_ffn, plain, activation, chained, inputs)


@pytest.mark.parametrize("activation", ACTIVATIONS)
def test_forward_and_backward(each_backend, dtype, device, activation):
    """As in test_ffn, every size runs with one activation and few sizes with the others."""
    interpreted = each_backend == "triton" and device == "cpu"
    for i, (rows, size) in enumerate(itertools.product(ROWS, SIZES)):
        if interpreted and i % 4 != 0:
            continue
        if activation != "gelu_tanh" and (rows, size) not in ((7, SIZES[2]), (17, SIZES[0])):
            continue
        for with_residual in (True, False)[i % 8 // 4 :][:1] if interpreted else (True, False):
            check(activation, dtype, device, (rows,), *size, with_residual)
    check(activation, dtype, device, (2, 3), 10, 20, 10, True)
    check(activation, dtype, device, (), 10, 20, 10, True)


@pytest.mark.parametrize("rows, n, f, m", LARGE)
def test_large_sizes(each_backend, dtype, device, rows, n, f, m):
    chained = device == "cpu" and dtype == torch.float32 and each_backend in ("triton", "cuda")
    check("gelu_tanh", dtype, device, (rows,), n, f, m, True, chained)


@pytest.mark.cpu_kernels
def test_threads_share_many_rows(each_backend, dtype):
    tensors = [(torch.randn(s) * s[1] ** -0.5).to(dtype) for s in [(301, 72), (200, 72), (200, 72), (56, 200)]]
    truth = plain(*(t.double() for t in tensors), "gelu_tanh", None)
    for threads in (1, 2, 3):
        torch.set_num_threads(threads)
        actual = pyfused.gated_ffn(*tensors, activation="gelu_tanh")
        assert_close(actual, plain(*tensors, "gelu_tanh", None), truth, f"{threads} threads")


@pytest.mark.interpreted(dtype=torch.float32, rows=5)
@pytest.mark.parametrize("rows", [5, 13])
def test_many_features(each_backend, dtype, device, rows):
    """Enough features for a kernel to take wider tiles, and for Triton's to split no sum in float32."""
    shapes = [(rows, 64), (4232, 64), (4232, 64), (8, 4232)]
    tensors = [(torch.randn(s, device=device) * s[1] ** -0.5).to(dtype) for s in shapes]
    truth = plain(*(t.double() for t in tensors), "gelu_tanh", None)
    actual = pyfused.gated_ffn(*tensors, activation="gelu_tanh")
    assert_close(actual, plain(*tensors, "gelu_tanh", None), truth)


def plain_with_wide_product(x, w_gate, w_up, w_out, activation, residual):
    """Plain PyTorch as in Hugging Face's float16 T5: w_out and its product stay float32."""
    if x.dtype != torch.float16:
        return plain(x, w_gate, w_up, w_out, activation, residual)
    hidden = PLAIN[activation](F.linear(x, w_gate).float()) * F.linear(x, w_up).float()
    y = F.linear(hidden, w_out.float())
    return (y if residual is None else y + residual).half()


def flan_like(rows, device):
    """Inputs whose activation(gate) * up reaches 1e5 to 1e6, as in Flan-T5, with a w_out small enough for the result."""
    x = torch.randn(rows, 96, device=device)
    w_gate, w_up = (torch.randn(160, 96, device=device) * 96**-0.5 * 300 for _ in range(2))
    w_out, residual = torch.randn(64, 160, device=device) * 1e-3, torch.randn(rows, 64, device=device) * 100
    return [t.half() for t in (x, w_gate, w_up, w_out, residual)]


@pytest.mark.parametrize("activation", ["gelu_tanh", "silu", "relu"])
@pytest.mark.parametrize("rows", [1, 5, 16, 40])
def test_products_beyond_float16_stay_finite(each_backend, device, activation, rows):

    def once():
        inputs = flan_like(rows, device)
        gate, up = (F.linear(inputs[0], w) for w in inputs[1:3])
        assert gate.isfinite().all()
        assert up.isfinite().all()
        assert (PLAIN[activation](gate) * up).isinf().any()
        assert not plain(*inputs[:4], activation, inputs[4]).isfinite().all()
        cotangent = torch.randn(rows, 64, device=device).half() * 0.01
        ways = (of_tensors(function, activation) for function in (pyfused.gated_ffn, plain_with_wide_product))
        found = draws.with_gradients(*ways, inputs, [cotangent])
        assert all(actual.isfinite().all() for actual, _, _ in found.values())
        return found

    draws.check(once)


def test_small_rows_beside_large_ones(each_backend, device):
    """A row of ordinary float16 size keeps its digits next to a row whose product is 1e6."""

    def once():
        x, w_gate, w_up, w_out, _ = flan_like(6, device)
        x[::2] *= 0.02
        actual = pyfused.gated_ffn(x, w_gate, w_up, w_out, activation="gelu_tanh")
        expected, truth = (
            plain_with_wide_product(*(t.to(wide) for t in (x, w_gate, w_up, w_out)), "gelu_tanh", None)
            for wide in (torch.float16, torch.float64)
        )
        return {f"row {row}": judged for row, judged in enumerate(zip(actual, expected, truth))}

    draws.check(once)


@pytest.mark.parametrize("activation", ACTIVATIONS)
@pytest.mark.parametrize("rows", [2, 40])
def test_far_gates_give_the_limits(each_backend, dtype, device, activation, rows):
    """A gate beyond every dtype's range and an `up` of one give the activation's limits and no NaN."""
    far = 1e4 if dtype == torch.float16 else 1e30
    x = torch.tensor([[far], [-far]], device=device).to(dtype).repeat(rows // 2, 1).requires_grad_()
    w_gate, w_up, w_out = (torch.tensor([[w]], device=device).to(dtype) for w in (far, 1 / far, 1.0))
    y = pyfused.gated_ffn(x, w_gate, w_up, w_out, activation=activation)
    limits = {"tanh": (1.0, 1.0)}.get(activation, (float("inf"), 0.0))
    expected = torch.tensor(limits, device=device).to(dtype).repeat(rows // 2)[:, None]
    torch.testing.assert_close(y, expected, rtol=0.02, atol=0)  # 1 / far is rounded
    (gradient,) = torch.autograd.grad(y[1::2].sum(), x)
    if activation != "tanh":
        assert (gradient[1::2] == 0).all()


def test_overflow_and_nan_are_passed_on(each_backend, dtype, device):
    """A value that the output cannot hold becomes infinite; NaN stays in its own row."""
    x = torch.ones(3, 8, device=device).to(dtype)
    x[1, 2] = float("nan")
    w = torch.ones(4, 8, device=device).to(dtype)
    y = pyfused.gated_ffn(x, w, w, torch.ones(2, 4, device=device).to(dtype), activation="relu")
    assert y.isnan().all(-1).tolist() == [False, True, False]
    if dtype == torch.float16:
        big = torch.full((4, 8), 100.0, device=device).half()
        out = torch.full((2, 4), 1.0, device=device).half()
        assert pyfused.gated_ffn(x[:1], big, big, out, activation="relu").isinf().all()


def test_alias_and_no_grad(each_backend, device):
    x, w_gate, w_up, w_out = (torch.randn(s, device=device) for s in [(5, 12), (20, 12), (20, 12), (12, 20)])
    named = pyfused.gated_ffn(x, w_gate, w_up, w_out, activation="gelu_tanh")
    assert torch.equal(named, pyfused.gated_ffn(x, w_gate, w_up, w_out, activation="gelu_new"))
    w_up.requires_grad_()
    assert torch.equal(named, pyfused.gated_ffn(x, w_gate, w_up, w_out, activation="gelu_tanh").detach())


def test_strides(each_backend, device):
    base, residuals = torch.randn(4, 6, 80, device=device), torch.randn(4, 6, 50, device=device)
    w_gate, w_up = torch.randn(60, 90, device=device)[:, :40], torch.randn(60, 70, device=device)[:, 5:45]
    for w_out in (torch.randn(24, 60, device=device), torch.randn(60, 24, device=device).t()):
        for x in (base[..., :40], base[..., 1::2], base[:1, :, 20:60].expand(4, 6, 40)):
            for residual in (None, residuals[..., 3:27]):
                tensors = (x, w_gate, w_up, w_out)
                actual = pyfused.gated_ffn(*tensors, activation="silu", residual=residual)
                wide = [t if t is None else t.double() for t in (*tensors, residual)]
                assert_close(actual, plain(*tensors, "silu", residual), plain(*wide[:4], "silu", wide[4]))


def test_beside_frozen_weights_x_is_not_kept(each_backend, device):
    check_x_beside_frozen("gated_ffn", device, [(3, 8), (10, 8), (10, 8), (6, 10), (3, 6)], {1, 2})


def test_frozen_weights_cost_no_product(each_backend, device):
    shapes = [(3, 8), (10, 8), (10, 8), (6, 10), (3, 6)]
    check_frozen("gated_ffn", each_backend, device, shapes, range(4), ((0,), (1,), (2,), (3,), (4,), (0, 2)))


@pytest.mark.parametrize("with_residual", [True, False])
@pytest.mark.parametrize("kind", [torch.float32, torch.float16], ids=["float32", "float16"])
def test_opcheck(each_backend, device, kind, with_residual):
    shapes = [(3, 8), (10, 8), (10, 8), (6, 10), (3, 6)]
    tensors = [torch.randn(s, device=device).to(kind).requires_grad_() for s in shapes]
    x, w_gate, w_up, w_out, residual = tensors
    arguments = (x, w_gate, w_up, w_out, "gelu", residual if with_residual else None, True)
    check_registered("gated_ffn", arguments, save=6)
    gate, up = (torch.randn(3, 10, device=device).to(kind) for _ in range(2))
    grad_y = torch.randn(3, 6, device=device).to(kind)
    arguments = (grad_y, *(t.detach() for t in tensors[:4]), gate, up, "gelu")
    for wants in ([True] * 4, [with_residual, *[not with_residual] * 3]):
        opcheck(torch.ops.pyfused.gated_ffn_backward, (*arguments, *wants))


@pytest.mark.parametrize(
    "change, error, message",
    [
        ({"x": [1.0]}, TypeError, "x is a list"),
        ({"x": torch.ones(())}, ValueError, r"x has shape \(\)"),
        ({"x": torch.ones(2, 8, dtype=torch.int64)}, TypeError, "x is int64"),
        ({"w_gate": torch.ones(16, 7)}, ValueError, r"w_gate has shape \(16, 7\)"),
        ({"w_up": torch.ones(15, 8)}, ValueError, r"w_up has shape \(15, 8\)"),
        ({"w_out": torch.ones(8, 8)}, ValueError, r"w_out has shape \(8, 8\)"),
        ({"w_out": torch.ones(8, 16, dtype=torch.bfloat16)}, TypeError, "w_out is bfloat16"),
        ({"w_up": None}, TypeError, "w_up is a NoneType"),
        ({"residual": torch.ones(8)}, ValueError, "residual has shape"),
        ({"activation": "swish"}, ValueError, "activation='swish'"),
    ],
)
def test_bad_input_names_the_argument(change, error, message):
    arguments = {"x": torch.ones(2, 8), "w_gate": torch.ones(16, 8), "w_up": torch.ones(16, 8)}
    with pytest.raises(error, match=message):
        pyfused.gated_ffn(**{**arguments, "w_out": torch.ones(8, 16), "activation": "relu", **change})
