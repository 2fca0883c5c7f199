"""Is ffn right on every backend? Values, gradients, activations on a grid and at extremes, errors, registration."""

import itertools

import draws
import pytest
import torch
import torch.nn.functional as F
from opchecks import check_registered, opcheck

import pyfused
from pyfused import dispatch
from pyfused.activations import ACTIVATIONS
from pyfused.testing import assert_close

PLAIN = {
    "relu": F.relu,
    "silu": F.silu,
    "tanh": torch.tanh,
    "gelu": F.gelu,
    "gelu_tanh": lambda x: F.gelu(x, approximate="tanh"),
    "quick_gelu": lambda x: x * torch.sigmoid(1.702 * x),
}
# (N, F, M), each with every number of rows, with biases and residual in turn.
SIZES = [(1, 5, 1), (5, 1, 7), (96, 131, 40)]
ROWS = [1, 2, 7, 16, 17, 129]
# Sizes worth tiling, with all options on; Triton's interpreter is too slow for more.
LARGE = [(2, 768, 1000, 96), (16, 96, 768, 1000), (17, 1000, 96, 768), (200, 64, 96, 64)]


def plain(x, w_in, b_in, w_out, b_out, activation, residual, linear=F.linear):
    y = linear(PLAIN[activation](linear(x, w_in, b_in)), w_out, b_out)
    return y if residual is None else y + residual


def of_tensors(function, activation, **options):
    """The function, of its tensors alone, the residual last."""
    return lambda *t: function(*t[:-1], activation=activation, residual=t[-1], **options)


def judge_draws(function, plain, activation, chained, inputs):
    """Judges outputs and gradients, of up to 20 draws of inputs(): plain PyTorch's error in one output says little.

    chained: a GPU kernel runs on the CPU. There plain PyTorch's float32 products add up blocks; a GPU's do not.
    inputs: returns tensors, then the gradient of the output.
    """
    ways = [of_tensors(plain, activation)]
    ways += [of_tensors(plain, activation, linear=draws.chained_linear)] if chained else []

    def once():
        *tensors, cotangent = inputs()
        found = draws.with_gradients(of_tensors(function, activation), ways, tensors, [cotangent])
        what = f"{activation}, {[None if t is None else tuple(t.shape) for t in tensors]}"
        return {f"{what}: {name}": judged for name, judged in found.items()}

    draws.check(once)


def check(activation, dtype, device, lead, n, f, m, biases, with_residual, chained=False):
    def make(*shape, scale=1.0):
        return (torch.randn(shape, device=device) * scale).to(dtype)

    def inputs():
        first = make(*lead, n), make(f, n, scale=n**-0.5), make(f) if biases[0] else None
        second = make(m, f, scale=f**-0.5), make(m) if biases[1] else None
        return *first, *second, make(*lead, m) if with_residual else None, make(*lead, m)

    judge_draws(pyfused.ffn, plain, activation, chained, inputs)


@pytest.mark.parametrize("activation", ACTIVATIONS)
def test_forward_and_backward(each_backend, dtype, device, activation):
    """The activation follows a finished product, so every size runs with one activation and few sizes with the others.
    test_activation_on_a_dense_grid checks the activations' values."""
    interpreted = each_backend == "triton" and device == "cpu"
    options = list(itertools.product([(True, True), (False, True), (True, False), (False, False)], [True, False]))
    for i, (rows, size) in enumerate(itertools.product(ROWS, SIZES)):
        if interpreted and i % 4 != 0:
            continue
        if activation != "gelu_tanh" and (rows, size) not in ((7, SIZES[2]), (17, SIZES[0])):
            continue
        for biases, with_residual in (options[i % 8], options[(i + 3) % 8]):  # 36 cases: each option with most sizes
            check(activation, dtype, device, (rows,), *size, biases, with_residual)
    check(activation, dtype, device, (2, 3), 10, 20, 10, (True, True), True)
    check(activation, dtype, device, (), 10, 20, 10, (True, True), True)


@pytest.mark.parametrize("rows, n, f, m", LARGE)
def test_large_sizes(each_backend, dtype, device, rows, n, f, m):
    chained = device == "cpu" and dtype == torch.float32 and each_backend in ("triton", "cuda")
    check("gelu_tanh", dtype, device, (rows,), n, f, m, (True, True), True, chained=chained)


@pytest.mark.cpu_kernels
def test_threads_share_many_rows(each_backend, dtype):
    shapes = [(301, 72), (200, 72), (200,), (56, 200), (56,)]
    tensors = [(torch.randn(s) * s[-1] ** -0.5).to(dtype) for s in shapes]
    truth = plain(*(t.double() for t in tensors), "gelu", None)
    for threads in (1, 2, 3):
        torch.set_num_threads(threads)
        actual = pyfused.ffn(*tensors, activation="gelu")
        assert_close(actual, plain(*tensors, "gelu", None), truth, f"{threads} threads")


def scalar(x, activation):
    """activation(x) elementwise, through an ffn with one feature and weights of one."""
    one = torch.ones(1, 1, dtype=x.dtype, device=x.device)
    return pyfused.ffn(x[:, None], one, None, one, None, activation=activation)[:, 0]


@pytest.mark.parametrize("activation", ACTIVATIONS)
def test_activation_on_a_dense_grid(each_backend, dtype, device, activation):
    """Judges chunk by chunk, so that small values next to large ones are judged at their own scale."""
    points, chunks = (2000, 20) if each_backend in ("triton", "cuda") and device == "cpu" else (50000, 40)
    fine = torch.logspace(-6, 0, points // 10)
    # Far to the left gelu's formulas cancel even in float64, so one scale serves the whole tail.
    grids = [
        (torch.linspace(-5.5, 15, points), chunks),
        (fine, chunks),
        (-fine, chunks),
        (torch.linspace(-15, -5.5, points), 1),
    ]
    for grid, chunks in grids:
        grid = grid.to(dtype).to(device)

        def run(function, x):
            x = x.clone().requires_grad_()
            y = function(x)
            return y.detach(), torch.autograd.grad(y, x, torch.ones_like(y))[0]

        actual = run(lambda x: scalar(x, activation), grid)
        expected, truth = run(PLAIN[activation], grid), run(PLAIN[activation], grid.double())
        for a, p, t in zip(actual, expected, truth):
            for i, parts in enumerate(zip(a.chunk(chunks), p.chunk(chunks), t.chunk(chunks))):
                assert_close(*parts, f"{activation}, chunk {i}")


@pytest.mark.parametrize("activation", ACTIVATIONS)
@pytest.mark.parametrize("rows", [1, 40], ids=["few", "many"])
def test_large_and_tiny_inputs(each_backend, dtype, device, activation, rows):
    for value in (1e4, -1e4, 100.0, -100.0, 80.0, -80.0, 0.0, -0.0, 6e-5):
        x = torch.full((rows,), value, dtype=dtype, device=device)
        results = scalar(x, activation), PLAIN[activation](x), PLAIN[activation](x.double())
        assert_close(*results, f"{activation}({value})")


def check_limits(activation, dtype, device, rows):
    """Far out, a value is x, zero or a sign, and a derivative is one or zero. torch's own answer at infinity differs between
    processors."""
    far = torch.tensor([800.0, 2e4, 1e13, 1e30, 3e38, float("inf")], device=device).to(dtype)
    x = torch.cat([far, -far, far.new_tensor([float("nan")])]).repeat(-(-rows // 13))
    signs = torch.cat([torch.ones_like(far), -torch.ones_like(far), x[12:13]]).repeat(-(-rows // 13))
    values, slopes = (signs, 0 * signs) if activation == "tanh" else (x.clamp(min=0), signs.clamp(min=0))
    if activation == "relu":
        slopes = slopes.nan_to_num(1.0)  # torch's rule
    for part, value, slope in zip(x.split(rows), values.split(rows), slopes.split(rows)):
        part = part.clone().requires_grad_()
        y = scalar(part, activation)
        torch.testing.assert_close(y, value, rtol=0, atol=0, equal_nan=True)
        gradient = torch.autograd.grad(y, part, torch.ones_like(y))[0]
        torch.testing.assert_close(gradient, slope, rtol=0, atol=0, equal_nan=True)


@pytest.mark.parametrize("activation", ACTIVATIONS)
@pytest.mark.parametrize("rows", [5, 39], ids=["few", "many"])
def test_far_inputs_give_the_limits(each_backend, dtype, device, activation, rows):
    if each_backend == "reference" and device == "cuda":
        pytest.skip("torch's own answers")
    check_limits(activation, dtype, device, rows)


@pytest.mark.parametrize("activation", ACTIVATIONS)
def test_far_inputs_give_the_limits_in_float64(device, activation):
    check_limits(activation, torch.float64, device, 39)


def test_alias_and_no_grad(each_backend, device):
    x, w_in, w_out = (torch.randn(s, device=device) for s in [(5, 12), (20, 12), (12, 20)])
    named = pyfused.ffn(x, w_in, None, w_out, None, activation="gelu_tanh")
    assert torch.equal(named, pyfused.ffn(x, w_in, None, w_out, None, activation="gelu_new"))
    w_in.requires_grad_()
    assert torch.equal(named, pyfused.ffn(x, w_in, None, w_out, None, activation="gelu_tanh").detach())


def test_strides(each_backend, device):
    base, residuals = torch.randn(4, 6, 80, device=device), torch.randn(4, 6, 50, device=device)
    w_in, w_out = torch.randn(60, 90, device=device)[:, :40], torch.randn(60, 24, device=device).t()
    for x in (base[..., :40], base[..., 1::2], base[:1, :, 20:60].expand(4, 6, 40)):
        for residual in (None, residuals[..., 3:27]):
            actual = pyfused.ffn(x, w_in, None, w_out, None, activation="silu", residual=residual)
            tensors = (x, w_in, None, w_out, None)
            wide = [t if t is None else t.double() for t in (*tensors, residual)]
            truth = plain(*wide[:5], "silu", wide[5])
            assert_close(actual, plain(*tensors, "silu", residual), truth)


def check_frozen(name, backend, device, shapes, saved, subsets):
    """Every subset of the inputs gets the same gradients; the backward's flags save the unneeded products. `saved`: which
    inputs the backward reads."""
    tensors = [torch.randn(s, device=device) for s in shapes]

    def gradients(*wanting):
        leaves = [t.clone().requires_grad_(i in wanting) for i, t in enumerate(tensors)]
        y = of_tensors(getattr(pyfused, name), "gelu")(*leaves)
        return dict(zip(wanting, torch.autograd.grad(y.sin().sum(), [leaves[i] for i in wanting]), strict=True))

    everything = gradients(*range(len(shapes)))
    for wanting in subsets:
        for i, gradient in gradients(*wanting).items():
            assert torch.equal(gradient, everything[i])
    backward = dispatch.kernel(backend.partition(":")[0], name).backward
    inner = [torch.ones(3, 10, device=device)] * (1 if name == "ffn" else 2)
    count = len(shapes) - 1
    for i in range(count):
        wants = [j == i for j in range(count)]
        found = backward(torch.ones(3, 6, device=device), *(tensors[j] for j in saved), *inner, "gelu", *wants)
        assert [gradient is not None for gradient in found] == wants


def check_x_beside_frozen(name, device, shapes, keeps):
    """As in torch, x is kept for the gradients of the weights that it meets, and else may be overwritten. Gradients of
    gradients are right all the same. keeps: the inputs whose gradient reads x."""
    call = of_tensors(getattr(pyfused, name), "gelu")
    tensors = [torch.randn(s, device=device) for s in shapes]
    for wanting in ({0}, {len(shapes) - 2}, set(range(len(shapes))) - keeps):
        leaves = [t.clone().requires_grad_(i in wanting) for i, t in enumerate(tensors)]
        wanted = [leaves[i] for i in sorted(wanting)]
        expected = torch.autograd.grad(call(*leaves).sin().sum(), wanted)
        x = leaves[0].clone()
        y = call(x, *leaves[1:])
        x.zero_()
        assert all(map(torch.equal, torch.autograd.grad(y.sin().sum(), wanted), expected))

        def chosen(*given, wanting=wanting):
            rest = iter(given)
            return call(*(next(rest) if i in wanting else t.double() for i, t in enumerate(tensors)))

        with dispatch.backend("reference"):
            wide = [t.detach().double().requires_grad_() for t in wanted]
            assert torch.autograd.gradgradcheck(chosen, wide, fast_mode=True)
    for i in keeps:
        leaves = [t.clone().requires_grad_(j == i) for j, t in enumerate(tensors)]
        y = call(*leaves)
        leaves[0].zero_()
        with pytest.raises(RuntimeError, match="modified by an inplace operation"):
            y.sum().backward()


@pytest.mark.parametrize("rows", [(3,), ()], ids=["matrix", "vector"])
def test_beside_a_frozen_weight_x_is_not_kept(each_backend, device, rows):
    check_x_beside_frozen("ffn", device, [(*rows, 8), (10, 8), (10,), (6, 10), (6,), (*rows, 6)], {1})


def test_frozen_weights_cost_no_product(each_backend, device):
    shapes = [(3, 8), (10, 8), (10,), (6, 10), (6,), (3, 6)]
    check_frozen("ffn", each_backend, device, shapes, (0, 1, 3), ((0,), (1, 2), (3,), (4,), (5,), (0, 1, 3)))


@pytest.mark.parametrize("full", [True, False])
def test_opcheck(each_backend, device, full):
    x, w_in, b_in, w_out, b_out, residual = (
        torch.randn(s, device=device, requires_grad=True) for s in [(3, 8), (10, 8), (10,), (6, 10), (6,), (3, 6)]
    )
    if not full:
        b_in = b_out = residual = None
    check_registered("ffn", (x, w_in, b_in, w_out, b_out, "gelu", residual, True), save=7)
    grad_y, pre = torch.randn(3, 6, device=device), torch.randn(3, 10, device=device)
    arguments = (grad_y, x.detach(), w_in.detach(), w_out.detach(), pre, "gelu")
    opcheck(torch.ops.pyfused.ffn_backward, (*arguments, True, True, full, True, full))
    opcheck(torch.ops.pyfused.ffn_backward, (*arguments, full, *[not full] * 4))


@pytest.mark.parametrize("rows", [0, 1, 3, 8, 9, 17, 139])
def test_weights_stored_transposed(each_backend, dtype, device, rows):
    """As in Hugging Face's Conv1D: one weight alone, and both. 128 rows, and 9 more, are blocks of both products."""
    n, f, m = 40, 140, 24
    x, b_in, b_out = (torch.randn(s, device=device).to(dtype) for s in ((rows, n), (f,), (m,)))
    stored_in, stored_out = (torch.randn(s, device=device).mul(s[0] ** -0.5).to(dtype) for s in ((n, f), (f, m)))
    for w_in, w_out in (stored_in.t(), stored_out.t()), (stored_in.t(), stored_out.t().contiguous()):
        inputs = x, w_in, b_in, w_out, b_out
        y = pyfused.ffn(*inputs, activation="gelu_tanh")
        truth = plain(*(t.double() for t in inputs), "gelu_tanh", None)
        assert_close(y, plain(*inputs, "gelu_tanh", None), truth)


@pytest.mark.parametrize(
    "change, error, message",
    [
        ({"x": [1.0]}, TypeError, "x is a list"),
        ({"x": torch.ones(())}, ValueError, r"x has shape \(\)"),
        ({"x": torch.ones(2, 8, dtype=torch.int64)}, TypeError, "x is int64"),
        ({"w_in": torch.ones(16, 7)}, ValueError, r"w_in has shape \(16, 7\)"),
        ({"w_out": torch.ones(8, 8)}, ValueError, r"w_out has shape \(8, 8\)"),
        ({"w_out": torch.ones(8, 16, dtype=torch.bfloat16)}, TypeError, "w_out is bfloat16"),
        ({"b_in": torch.ones(8)}, ValueError, "b_in has shape"),
        ({"b_out": torch.ones(16)}, ValueError, "b_out has shape"),
        ({"residual": torch.ones(8)}, ValueError, "residual has shape"),
        ({"activation": "swish"}, ValueError, "activation='swish'"),
    ],
)
def test_bad_input_names_the_argument(change, error, message):
    arguments = {"x": torch.ones(2, 8), "w_in": torch.ones(16, 8), "w_out": torch.ones(8, 16)}
    with pytest.raises(error, match=message):
        pyfused.ffn(**{**arguments, "b_in": None, "b_out": None, "activation": "relu", **change})
