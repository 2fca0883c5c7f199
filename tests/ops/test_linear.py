"""Is linear right on every backend that has it? Values, gradients, strides, errors, registration."""

import itertools

import pytest
import torch
import torch.nn.functional as F
from draws import check, with_gradients
from opchecks import check_registered

import pyfused
from pyfused.testing import assert_close, available, running

BACKENDS = [
    name
    for name in available("cuda" if torch.cuda.is_available() else "cpu")
    if name != "triton"  # which takes int8 weights alone
]
# (rows, K, N): every kernel and every edge of its tiles; gemv ends at 8 to 24 rows, 129 rows are two blocks.
SHAPES = [
    *itertools.product([1, 2, 3, 4, 5, 6, 7, 8, 9, 16, 17, 129], [(1, 5), (5, 1), (96, 768), (131, 97)]),
    *itertools.product([1, 2, 7, 16, 17, 129], [(768, 1000), (1000, 96), (800, 51)]),
    (513, (40, 50)),
    *itertools.product([5, 13], [(40, 2130), (264, 8460)]),  # on CUDA's tensor cores, 16 and 32 columns at a time
    (0, (8, 8)),
    (3, (16, 0)),
]


@pytest.fixture(params=BACKENDS)
def each_backend(request):
    with running(request.param):
        yield request.param


def plain(x, weight, bias=None, residual=None):
    y = F.linear(x, weight, bias)
    return y if residual is None else y + residual


def make(dtype, device, *shape, scale=1.0):
    return (torch.randn(shape, device=device) * scale).to(dtype)


def test_forward(each_backend, dtype, device):
    """Bias and residual take turns, so that each combination meets every kernel and every number of rows."""
    for i, (rows, (k, n)) in enumerate(SHAPES):
        turn = i + i // 4  # SHAPES has four or two (K, N) in turn
        with_bias, with_residual = turn % 2 == 0, turn // 2 % 2 == 0

        def once(rows=rows, k=k, n=n, with_bias=with_bias, with_residual=with_residual):
            x, weight = make(dtype, device, rows, k), make(dtype, device, n, k, scale=k**-0.5)
            bias = make(dtype, device, n) if with_bias else None
            residual = make(dtype, device, rows, n) if with_residual else None
            y = pyfused.linear(x, weight, bias, residual=residual)
            assert y.dtype == dtype
            assert y.is_contiguous()
            truth = plain(*(None if t is None else t.double() for t in (x, weight, bias, residual)))
            what = f"rows {rows}, K {k}, N {n}, bias {with_bias}, residual {with_residual}"
            return {what: (y, plain(x, weight, bias, residual), truth)}

        check(once, 50)


@pytest.mark.parametrize("shape", [(3, 16), (2, 5, 33), (40,), (2, 0, 7)], ids=str)
def test_gradients(each_backend, dtype, device, shape):
    k, n = shape[-1], 21
    out = (*shape[:-1], n)

    def once():
        inputs = [make(dtype, device, *s) for s in (shape, (n, k), (n,), out)]
        ours = lambda x, w, b, r: pyfused.linear(x, w, b, residual=r)  # noqa: E731
        return with_gradients(ours, plain, inputs, [make(dtype, device, *out)])

    check(once)


def test_only_wanted_gradients(each_backend, device):
    x, weight = make(torch.float32, device, 4, 8), make(torch.float32, device, 6, 8).requires_grad_()
    pyfused.linear(x, weight).sum().backward()
    assert x.grad is None
    assert_close(weight.grad, *(t.sum(0).expand(6, 8) for t in (x, x.double())))


def test_beside_a_frozen_weight_x_may_be_overwritten(each_backend, device):
    """As in torch, which keeps x for the weight's gradient alone."""
    x, weight = make(torch.float32, device, 4, 8).requires_grad_(), make(torch.float32, device, 6, 8)
    copy = x.clone()
    y = pyfused.linear(copy, weight)
    copy.zero_()
    y.sum().backward()
    assert_close(x.grad, *(w.sum(0).expand(4, 8) for w in (weight, weight.double())))


def test_strides(each_backend, dtype, device):
    base, weights = make(dtype, device, 4, 6, 80), make(dtype, device, 50, 90)
    wide = make(dtype, device, 4, 6, 100)
    for weight in (weights[:, :40], weights[:40, 20:60], weights[:50:2, 3:43], make(dtype, device, 40, 50).t()):
        n = weight.shape[0]
        views = base[..., :40], base[..., 40:], base[..., ::2], base.transpose(0, 1)[..., 7:47]
        for x in (*views, base[:1, :1, :40].expand(4, 6, 40)):
            residual = wide[..., :n] if x.shape[0] == 4 else wide.transpose(0, 1)[..., 1 : n + 1]
            for r in (None, residual):
                truth = plain(x.double(), weight.double(), None, None if r is None else r.double())
                assert_close(pyfused.linear(x, weight, residual=r), plain(x, weight, None, r), truth)


@pytest.mark.parametrize("rows", [1, 5, 16, 40])
@pytest.mark.parametrize("transposed", [False, True])
def test_infinity_and_nan_stay_in_their_row(each_backend, dtype, device, rows, transposed):
    x, weight = make(dtype, device, rows, 70), make(dtype, device, 30, 70)
    weight = weight.t().contiguous().t() if transposed else weight
    x[0, 69] = float("nan")
    x[-1, 3] = float("inf")
    weight[7, 5] = float("-inf")
    y, expected = pyfused.linear(x, weight), plain(x, weight)
    assert torch.equal(y.isnan(), expected.isnan())
    assert torch.equal(y.isposinf(), expected.isposinf())
    assert torch.equal(y.isneginf(), expected.isneginf())


@pytest.mark.cpu_kernels
def test_threads_agree(each_backend, dtype):
    """Threads share the outputs, or the rows where there are many."""
    x, by_rows, every_bias = make(dtype, "cpu", 400, 200), make(dtype, "cpu", 700, 200), make(dtype, "cpu", 700)
    by_columns = by_rows.t().contiguous().t()
    sizes = (1, 700), (5, 700), (33, 700), (131, 700), (400, 700), (400, 20)
    for every_weight, (rows, outputs) in itertools.product((by_rows, by_columns), sizes):
        weight, bias = every_weight[:outputs], every_bias[:outputs]
        expected = plain(x[:rows], weight, bias)
        truth = plain(x[:rows].double(), weight.double(), bias.double())
        for threads in (1, 2, 3):
            torch.set_num_threads(threads)
            assert_close(pyfused.linear(x[:rows], weight, bias), expected, truth, f"{threads} threads")


@pytest.mark.parametrize("full", [True, False])
def test_opcheck(each_backend, device, full):
    shapes = [(3, 8), (6, 8), (6,), (3, 6)]
    x, weight, bias, residual = (torch.randn(s, device=device, requires_grad=True) for s in shapes)
    arguments = (x, weight, bias if full else None, residual if full else None)
    check_registered("linear", arguments)


@pytest.mark.parametrize("rows", [0, 1, 2, 3, 7, 8, 9, 16, 17, 44, 131])
def test_stored_transposed(each_backend, dtype, device, rows):
    """As in Hugging Face's Conv1D, with more outputs and products than a kernel sums at a time."""
    for k, n, start in [(531, 577, 0), (5, 3, 2), (64, 128, 8), (531, 584, 0), (1541, 139, 3), (0, 40, 1)]:
        weight = make(dtype, device, k, n + start, scale=max(k, 1) ** -0.5)[:, start:].t()
        x, bias, residual = make(dtype, device, rows, k), make(dtype, device, n), make(dtype, device, rows, n)
        truth = plain(*(t.double() for t in (x, weight, bias, residual)))
        y = pyfused.linear(x, weight, bias, residual=residual)
        assert_close(y, plain(x, weight, bias, residual), truth, f"{k}x{n}")


def test_explain_names_the_reason_for_a_transposed_weight():
    transposed, neither = torch.randn(64, 32).t(), torch.randn(32, 128)[:, ::2]
    if "cpu:baseline" in BACKENDS:
        for rows, (weight, copies) in itertools.product((8, 9), ((transposed, False), (neither, True))):
            assert ("would be copied" in str(pyfused.explain("linear", torch.randn(rows, 64), weight))) == copies


@pytest.mark.parametrize(
    "change, error, message",
    [
        ({"x": [1.0]}, TypeError, "x is a list"),
        ({"x": torch.ones(())}, ValueError, r"x has shape \(\)"),
        ({"x": torch.ones(2, 8, dtype=torch.int64)}, TypeError, "x is int64"),
        ({"weight": torch.ones(4, 7)}, ValueError, r"weight has shape \(4, 7\)"),
        ({"weight": torch.ones(8)}, ValueError, r"weight has shape \(8,\)"),
        ({"weight": torch.ones(4, 8, dtype=torch.float16)}, TypeError, "weight is float16"),
        ({"weight": torch.ones(4, 8).to_sparse_csr()}, TypeError, "weight has the layout sparse_csr"),
        ({"bias": torch.ones(5)}, ValueError, "bias has shape"),
        ({"residual": torch.ones(4)}, ValueError, "residual has shape"),
        ({"residual": torch.ones(2, 4, device="meta")}, ValueError, "residual is on meta"),
    ],
)
def test_bad_input_names_the_argument(change, error, message):
    arguments = {"x": torch.ones(2, 8), "weight": torch.ones(4, 8), **change}
    with pytest.raises(error, match=message):
        pyfused.linear(**arguments)
