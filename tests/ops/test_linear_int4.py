"""Is linear right with int4 weights? Values, gradients, strides, threads, registration, errors."""

import itertools

import pytest
import torch
import torch.nn.functional as F
from draws import check
from opchecks import check_registered

import pyfused
from pyfused import dispatch, evidence
from pyfused.testing import assert_close, available, running
from pyfused.weight_format import INT4, dequantized

BACKENDS = [n for n in available("cuda" if torch.cuda.is_available() else "cpu") if n not in ("triton", "cuda")]
# (rows, K, N): the gemv ends at 16 rows. K of an odd and an even number of groups, and of more than a panel of the gemm.
SHAPES = [
    *itertools.product([1, 2, 3, 4, 5, 7, 16, 17, 33], [(32, 5), (64, 1), (96, 97), (160, 24)]),
    *itertools.product([1, 6, 129], [(800, 51), (1056, 100)]),
    (0, (32, 8)),
    (3, (0, 4)),
    (3, (32, 0)),
]


@pytest.fixture(params=BACKENDS)
def each_backend(request):
    with running(request.param):
        yield request.param


def make(dtype, device, *shape):
    return torch.randn(shape, device=device).to(dtype)


def quantised(device, n, k):
    """Any bytes, and scales of both signs."""
    weight = torch.randint(-128, 128, (n, k // 2), dtype=torch.int8, device=device)
    sign = torch.randint(0, 2, (n, k // 32), device=device) * 2 - 1
    return weight, ((torch.rand(n, k // 32, device=device) + 0.5) * sign / 5.0 / max(k, 1) ** 0.5).bfloat16()


def plain(x, weight, scale, bias=None, residual=None):
    """PyTorch with the weight that the integers stand for."""
    y = F.linear(x, dequantized(weight, scale, x.dtype), bias)
    return y if residual is None else y + residual


def double(*tensors):
    return [t.double() if t is not None and t.dtype.is_floating_point else t for t in tensors]


def test_forward(each_backend, dtype, device):
    """Bias and residual take turns, so that each combination meets every number of rows."""
    for i, (rows, (k, n)) in enumerate(SHAPES):

        def once(rows=rows, k=k, n=n, turn=i + i // 4):
            x, (weight, scale) = make(dtype, device, rows, k), quantised(device, n, k)
            bias = make(dtype, device, n) if turn % 2 == 0 else None
            residual = make(dtype, device, rows, n) if turn // 2 % 2 == 0 else None
            given = x, weight, scale, bias, residual
            y = pyfused.linear(x, weight, bias, residual=residual, scale=scale)
            assert y.dtype == dtype
            assert y.is_contiguous()
            return {f"rows {rows}, K {k}, N {n}": (y, plain(*given), plain(*double(*given)))}

        check(once, 50)


def test_every_value_alone(each_backend, device):
    """x picks one value at a time, so each must come out exactly: all nibbles, in both halves, times their own scales."""
    weight = torch.arange(-128, 128, device=device).to(torch.int8).view(16, 16).repeat(1, 3)
    scale = torch.tensor([1.0, -0.5, 3.0], device=device).expand(16, 3).bfloat16().contiguous()
    for rows in (1, 96):
        x = torch.eye(96, device=device)[-rows:]
        y = pyfused.linear(x, weight, scale=scale)
        assert torch.equal(y.t(), dequantized(weight, scale, torch.float32)[:, -rows:])


def test_float64_is_exact(device):
    x, (weight, scale) = make(torch.float64, device, 20, 320), quantised(device, 40, 320)
    torch.testing.assert_close(pyfused.linear(x, weight, scale=scale), plain(x, weight, scale), rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("by_library", [False, True], ids=["kernel", "library"])
def test_both_ways_on_the_cpu(dtype, device, by_library):
    """Widened part by part the library's product is the same."""
    for rows, k, n in [(1, 32, 70), (40, 160, 97), (20, 2048, 300)]:
        x, (weight, scale), bias = make(dtype, "cpu", rows, k), quantised("cpu", n, k), make(dtype, "cpu", n)
        residual = make(dtype, "cpu", rows, n)
        dispatch.forget()
        with evidence.one_way(by_library):
            y = pyfused.linear(x, weight, bias, residual=residual, scale=scale)
        dispatch.forget()
        given = x, weight, scale, bias, residual
        assert_close(y, plain(*given), plain(*double(*given)))


@pytest.mark.parametrize("shape", [(3, 32), (2, 5, 64), (96,), (2, 0, 32)], ids=str)
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

        actual = run(lambda x, b, r: pyfused.linear(x, weight, b, residual=r, scale=scale), dtype)
        expected = [run(lambda x, b, r: plain(x, weight, scale, b, r), wide) for wide in (dtype, torch.float64)]
        return {f"output {i}": t for i, t in enumerate(zip(actual, *expected))}

    check(once)


def test_transforms(device):
    weight, scale = quantised(device, 6, 32)
    x = torch.randn(20, 32, dtype=torch.float64, device=device, requires_grad=True)
    assert torch.autograd.gradcheck(lambda x: pyfused.linear(x[:2], weight, scale=scale), x)
    gradient = torch.func.grad(lambda x: pyfused.linear(x, weight, scale=scale).sum())
    columns = dequantized(weight, scale, torch.float64).sum(0)
    torch.testing.assert_close(gradient(x.detach()), columns.expand_as(x))


def test_strides(each_backend, dtype, device):
    base, (weights, scales) = make(dtype, device, 4, 6, 130), quantised(device, 50, 128)
    found, judged = [], []
    for rows, groups in [(slice(0, 50), slice(0, 2)), (slice(0, 50, 2), slice(1, 4)), (slice(3, 4), slice(0, 4))]:
        weight, scale = weights[rows, groups.start * 16 : groups.stop * 16], scales[rows, groups]
        k = weight.shape[1] * 2
        for x in (base[..., :k], base[..., 1 : k + 1].transpose(0, 1), base[:1, :1, :k].expand(4, 6, k)):
            y = pyfused.linear(x, weight, scale=scale)
            found.append((y, plain(x, weight, scale), plain(*double(x, weight, scale))))
    for one in zip(*found):
        judged.append(torch.cat([t.flatten() for t in one]))
    assert_close(*judged)


@pytest.mark.parametrize("rows", [1, 5, 40])
def test_infinity_and_nan_stay_in_their_row(each_backend, dtype, device, rows):
    x, (weight, scale) = make(dtype, device, rows, 96), quantised(device, 30, 96)
    x[0, 95], x[-1, 3] = float("nan"), float("inf")
    weight[:, 3] = 5
    y, expected = pyfused.linear(x, weight, scale=scale), plain(x, weight, scale)
    assert torch.equal(y.isnan(), expected.isnan())
    assert torch.equal(y.isposinf(), expected.isposinf())


@pytest.mark.cpu_kernels
def test_two_threads_agree_with_one(dtype):
    x, (weight, scale), bias = make(dtype, "cpu", 33, 512), quantised("cpu", 700, 512), make(dtype, "cpu", 700)
    for rows in (1, 5, 33):
        found = []
        for threads in (1, 2):
            torch.set_num_threads(threads)
            found.append(pyfused.linear(x[:rows], weight, bias, scale=scale))
        assert torch.equal(*found)


def test_autocast(device):
    x, (weight, scale), bias = (
        torch.randn(5, 64, device=device),
        quantised(device, 12, 64),
        torch.randn(12, device=device),
    )
    with torch.autocast(device, torch.bfloat16):
        y = pyfused.linear(x, weight, bias, scale=scale)
    assert y.dtype == torch.bfloat16
    given = x.bfloat16(), weight, scale, bias.bfloat16()
    assert_close(y, plain(*given), plain(*double(*given)))


def test_launches_of_the_two_formats_are_not_mixed_up(device):
    """Both are int8 in memory, with weights of the same shape."""
    int4, scale4 = quantised(device, 12, 64)
    int8, scale8 = torch.randint(-127, 128, (12, 32), dtype=torch.int8, device=device), torch.rand(12, device=device)
    for _ in range(2):
        for k, weight, scale in ((64, int4, scale4), (32, int8, scale8)):
            x = torch.randn(3, k, device=device)
            torch.testing.assert_close(pyfused.linear(x, weight, scale=scale), plain(x, weight, scale))


@pytest.mark.parametrize("backend, full", [("reference", True), (BACKENDS[-1], False)])
def test_opcheck(device, backend, full):
    x, bias, residual = (torch.randn(s, device=device, requires_grad=True) for s in [(20, 32), (6,), (20, 6)])
    weight, scale = quantised(device, 6, 32)
    with running(backend):
        check_registered("linear", (x, weight, bias if full else None, residual if full else None, scale, False))


def test_compiled_and_exported(device):
    class Layer(torch.nn.Module):
        def __init__(self):
            super().__init__()
            weight, scale = quantised(device, 12, 64)
            self.register_buffer("weight", weight)
            self.register_buffer("scale", scale)

        def forward(self, x):
            return pyfused.linear(x, self.weight, scale=self.scale).relu()

    layer = Layer()
    compiled = torch.compile(layer, fullgraph=True, backend="aot_eager")
    x = torch.randn(3, 64, device=device, requires_grad=True)
    y, expected = compiled(x), layer(x)
    assert torch.equal(y, expected)
    torch.testing.assert_close(*[torch.autograd.grad(t.sum(), x)[0] for t in (y, expected)])
    with torch.no_grad():
        exported = torch.export.export(layer, (x.detach(),)).module()
        assert torch.equal(exported(x), layer(x))


def test_meta():
    x, weight, scale = torch.ones(3, 64, device="meta"), *(t.to("meta") for t in quantised("cpu", 12, 64))
    assert torch.ops.pyfused.linear(x, weight, None, None, scale).shape == (3, 12)


def test_other_backends_say_so(device):
    """Forced, they leave it to the reference."""
    weight, scale = quantised(device, 12, 64)
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
    x, (weight, scale) = torch.ones(3, 64), quantised("cpu", 12, 64)
    cost = pyfused.ops.cost.COSTS["linear"](x, weight, None, None, scale)
    assert cost.flops == 2 * 3 * 12 * 64
    assert cost.bytes == x.nbytes + weight.nbytes + scale.nbytes + 3 * 12 * 4
    assert INT4.nbytes(12, 64) == weight.nbytes + scale.nbytes
