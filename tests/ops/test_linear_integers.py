"""Is linear right with integer weights of each format? Values, gradients, strides, autocast, threads, compiled.

What one format has alone is in test_linear_int4.py and test_linear_int8.py.
"""

import itertools

import integer_cases
import pytest
import torch
import torch.nn.functional as F
from draws import chained_linear, check, with_gradients
from integer_cases import double, plain, quantised

import pyfused
from pyfused import dispatch, evidence
from pyfused.testing import assert_close
from pyfused.weight_format import FORMATS, dequantized

# (rows, K, N): the gemv ends at 16 rows. int8: 513 rows are several blocks of the gemm. int4: K of an odd and an even number
# of groups, and of more than a panel of the gemm.
SHAPES = {
    "int8": [
        *itertools.product([1, 2, 3, 4, 5, 6, 7, 8, 9, 16, 17, 33, 129], [(1, 5), (5, 1), (96, 768), (131, 97)]),
        *itertools.product([1, 2, 7, 16, 17, 129], [(768, 1000), (1000, 96), (800, 51)]),
        (513, (40, 50)),
        (0, (8, 8)),
        (3, (16, 0)),
        (3, (0, 4)),
    ],
    "int4": [
        *itertools.product([1, 2, 3, 4, 5, 7, 16, 17, 33], [(32, 5), (64, 1), (96, 97), (160, 24)]),
        *itertools.product([1, 6, 129], [(800, 51), (1056, 100)]),
        (0, (32, 8)),
        (3, (0, 4)),
        (3, (32, 0)),
    ],
}
# For Triton's interpreter: one row, few and many, with tiles that end inside and outside, one part of K and several.
INTERPRETED = [
    (rows, sizes)
    for rows, sizes in SHAPES["int8"]
    if (rows in (1, 7, 17, 33) and sizes in ((131, 97), (5, 1))) or (rows, sizes) == (2, (800, 51))
]

of_each_format = pytest.mark.parametrize("form", FORMATS)
on_each_backend = pytest.mark.parametrize(
    "form, each_backend",
    [(form, backend) for form in FORMATS for backend in integer_cases.BACKENDS[form]],
    indirect=["each_backend"],
)


def make(dtype, device, *shape):
    return torch.randn(shape, device=device).to(dtype)


def plainly(each_backend, *given):
    """plain(), in the interpreter beside the sums of a GPU, each one chain of multiply-adds."""
    ways = [F.linear, chained_linear] if each_backend == "triton" and given[0].is_cpu else [F.linear]
    return [plain(*given, linear=way) for way in ways]


@on_each_backend
def test_forward(form, each_backend, dtype, device):
    """Bias and residual take turns, so that each combination meets each number of rows. The few cases of the interpreter have
    both."""
    interpreted = each_backend == "triton" and device == "cpu"
    for i, (rows, (k, n)) in enumerate(INTERPRETED if interpreted else SHAPES[form]):

        def once(rows=rows, k=k, n=n, turn=0 if interpreted else i + i // 4):
            x, (weight, scale) = make(dtype, device, rows, k), quantised(form, device, n, k)
            bias = make(dtype, device, n) if turn % 2 == 0 else None
            residual = make(dtype, device, rows, n) if turn // 2 % 2 == 0 else None
            y = pyfused.linear(x, weight, bias, residual=residual, scale=scale)
            assert y.dtype == dtype
            assert y.is_contiguous()
            given = x, weight, scale, bias, residual
            return {f"rows {rows}, K {k}, N {n}": (y, plainly(each_backend, *given), plain(*double(*given)))}

        check(once, 50)


@of_each_format
def test_float64_is_exact(form, device):
    x, (weight, scale) = make(torch.float64, device, 20, 320), quantised(form, device, 40, 320)
    torch.testing.assert_close(pyfused.linear(x, weight, scale=scale), plain(x, weight, scale), rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("by_library", [False, True], ids=["kernel", "library"])
@of_each_format
def test_both_ways_on_the_cpu(form, dtype, by_library):
    """Widened part by part the library's product is the same."""
    one, many = (33, 131) if form == "int8" else (32, 160)
    for rows, k, n in [(1, one, 70), (40, many, 97), (20, 2048, 300)]:
        x, (weight, scale), bias = make(dtype, "cpu", rows, k), quantised(form, "cpu", n, k), make(dtype, "cpu", n)
        residual = make(dtype, "cpu", rows, n)
        dispatch.forget()
        with evidence.one_way(by_library):
            y = pyfused.linear(x, weight, bias, residual=residual, scale=scale)
        dispatch.forget()
        given = x, weight, scale, bias, residual
        assert_close(y, plain(*given), plain(*double(*given)))


@pytest.mark.parametrize("leading", [(3,), (2, 5), (), (2, 0)], ids=str)
@on_each_backend
def test_gradients(form, each_backend, dtype, device, leading):
    """Of x, bias and residual; weight and scale have none."""
    k, n = {(3,): 32, (2, 5): 33 if form == "int8" else 64}.get(leading, 96), 21

    def once():
        weight, scale = quantised(form, device, n, k)
        inputs = [make(dtype, device, *s) for s in ((*leading, k), (n,), (*leading, n))]
        return with_gradients(
            lambda x, b, r: pyfused.linear(x, weight, b, residual=r, scale=scale),
            lambda x, b, r: plain(x, weight, scale, b, r),
            inputs,
            [make(dtype, device, *leading, n)],
        )

    check(once)


@of_each_format
def test_second_derivatives_and_transforms(form, device):
    weight, scale = quantised(form, device, 6, 32)
    x = torch.randn(20, 32, dtype=torch.float64, device=device, requires_grad=True)
    few = x[:2].detach().requires_grad_()
    assert torch.autograd.gradcheck(lambda x: pyfused.linear(x, weight, scale=scale), few)
    assert torch.autograd.gradgradcheck(lambda x: pyfused.linear(x, weight, scale=scale).sin(), few)
    columns = dequantized(weight, scale, torch.float64).sum(0)
    for dynamic in (False, True) if form == "int8" else (False,):
        gradient = torch.func.grad(lambda x, d=dynamic: pyfused.linear(x, weight, scale=scale, dynamic=d).sum())
        torch.testing.assert_close(gradient(x.detach()), columns.expand_as(x))


def views(form, weight, scale):
    """Parts of a quantised matrix (50, 128), with steps and from places within."""
    if form == "int8":
        rows_and_columns = (
            (slice(0, 50), slice(0, 40)),
            (slice(0, 40), slice(20, 60)),
            (slice(0, 50, 2), slice(0, 80, 2)),
        )
        return [(weight[rows, columns], scale[rows]) for rows, columns in rows_and_columns]
    rows_and_groups = (slice(0, 50), slice(0, 2)), (slice(0, 50, 2), slice(1, 4)), (slice(3, 4), slice(0, 4))
    return [(weight[rows, g.start * 16 : g.stop * 16], scale[rows, g]) for rows, g in rows_and_groups]


@on_each_backend
def test_strides(form, each_backend, dtype, device):
    def once():
        base, wide = make(dtype, device, 4, 6, 256), make(dtype, device, 4, 6, 100)
        found = {}
        for i, (weight, scale) in enumerate(views(form, *quantised(form, device, 50, 128))):
            n, k = weight.shape[0], weight.shape[1] * (1 if form == "int8" else 2)
            inputs = (
                base[..., :k],
                base[..., : 2 * k : 2],
                base.transpose(0, 1)[..., 7 : k + 7],
                base[:1, :1, :k].expand(4, 6, k),
            )
            for j, x in enumerate(inputs):
                residual = wide[..., :n] if x.shape[0] == 4 else wide.transpose(0, 1)[..., 1 : n + 1]
                for given in ((x, weight, scale), (x, weight, scale, None, residual)):
                    y = pyfused.linear(x, weight, residual=given[-1] if len(given) == 5 else None, scale=scale)
                    found[f"weight {i}, x {j}, {len(given)}"] = y, plain(*given), plain(*double(*given))
        return found

    check(once)


@pytest.mark.parametrize("rows", [1, 5, 16, 40])
@on_each_backend
def test_infinity_and_nan_stay_in_their_row(form, each_backend, dtype, device, rows):
    k = 70 if form == "int8" else 96
    x, (weight, scale) = make(dtype, device, rows, k), quantised(form, device, 30, k)
    x[0, k - 1], x[-1, 3] = float("nan"), float("inf")
    weight[:, 3] = 5
    y, expected = pyfused.linear(x, weight, scale=scale), plain(x, weight, scale)
    assert torch.equal(y.isnan(), expected.isnan())
    assert torch.equal(y.isposinf(), expected.isposinf())


@of_each_format
def test_autocast(form, device):
    x, (weight, scale), bias = (
        torch.randn(5, 64, device=device),
        quantised(form, device, 12, 64),
        torch.randn(12, device=device),
    )
    residual = torch.randn(5, 12, device=device)
    with torch.autocast(device, torch.bfloat16):
        y, total = (pyfused.linear(x, weight, bias, residual=r, scale=scale) for r in (None, residual))
    assert y.dtype == torch.bfloat16
    given = x.bfloat16(), weight, scale, bias.bfloat16()
    assert_close(y, plain(*given), plain(*double(*given)))
    assert total.dtype == torch.float32
    assert torch.equal(total, y + residual)


@pytest.mark.cpu_kernels
@on_each_backend
def test_threads_agree(form, each_backend, dtype):
    x, (weight, scale), bias = make(dtype, "cpu", 400, 480), quantised(form, "cpu", 700, 480), make(dtype, "cpu", 700)
    for rows in (1, 5, 33, 131, 400):
        given = x[:rows], weight, scale, bias
        expected = plain(*given), plain(*double(*given))
        for threads in (1, 2, 3):
            torch.set_num_threads(threads)
            assert_close(pyfused.linear(x[:rows], weight, bias, scale=scale), *expected, f"{threads} threads")


@of_each_format
def test_compiled_and_exported(form, device):
    class Layer(torch.nn.Module):
        def __init__(self):
            super().__init__()
            weight, scale = quantised(form, device, 12, 64)
            self.register_buffer("weight", weight)
            self.register_buffer("scale", scale)

        def forward(self, x):
            return pyfused.linear(x, self.weight, scale=self.scale).relu()

    layer = Layer()
    compiled = torch.compile(layer, fullgraph=True, backend="aot_eager")
    for rows in (3, 20):
        x = torch.randn(rows, 64, device=device, requires_grad=True)
        y, expected = compiled(x), layer(x)
        assert torch.equal(y, expected)
        torch.testing.assert_close(*[torch.autograd.grad(t.sum(), x)[0] for t in (y, expected)])
    with torch.no_grad():
        exported = torch.export.export(layer, (x.detach(),)).module()
        assert torch.equal(exported(x), layer(x))
