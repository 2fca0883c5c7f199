"""Are the norms right on every backend? Values, gradients, strides, errors, registration."""

import contextlib
import functools

import pytest
import torch
import torch.nn.functional as F
from draws import with_gradients
from opchecks import check_registered, opcheck

import pyfused
from pyfused import tiles
from pyfused.testing import assert_close, available

SHAPES = [(1, 1), (200, 1), (7, 5), (2, 3, 96), (2, 127, 768), (3, 1000), (3, 1300), (2, 4097), (0, 8)]


def make(shape, dtype, device, scale=1.0):
    return (torch.randn(shape, device=device) * scale + 0.5).to(dtype)


EPS = {"layer_norm": 1e-5, "rms_norm": 1e-6}
NORMS = pytest.mark.parametrize("name", EPS)  # both operators run the same kernels


def plain(name, x, weight, *bias, residual=None, eps=None):
    total = x if residual is None else x + residual
    return getattr(F, name)(total, weight.shape, weight, *bias, eps=eps or EPS[name]), total


def parameters_of(name, n, dtype, device):
    """The weight, and layer_norm's bias."""
    return [make((n,), dtype, device) for _ in range(2 if name == "layer_norm" else 1)]


def check(name, x, residual, *parameters):
    """Judges results and gradients."""

    def ours(x, residual, *parameters):
        return getattr(pyfused, name)(x, *parameters, residual=residual)

    def theirs(x, residual, *parameters):
        y, total = plain(name, x, *parameters, residual=residual)
        return y if residual is None else (y, total)

    cotangents = [torch.randn_like(x) for _ in range(2)]
    for what, tensors in with_gradients(ours, theirs, (x, residual, *parameters), cotangents).items():
        assert_close(*tensors, what)


def check_forward(name, x, *parameters, **options):
    wide = [t.double() for t in (x, *parameters)]
    y = getattr(pyfused, name)(x, *parameters, **options)
    assert_close(y, plain(name, x, *parameters, **options)[0], plain(name, *wide, **options)[0])


@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("name, with_bias", [("layer_norm", True), ("layer_norm", False), ("rms_norm", False)])
@pytest.mark.parametrize("with_residual", [True, False], ids=["residual", "alone"])
def test_forward_and_backward(each_backend, dtype, device, name, shape, with_bias, with_residual):
    if each_backend == "triton" and device == "cpu" and len(shape) == 3:
        shape = (shape[0], min(shape[1], 5), shape[2])  # the interpreter takes 20 ms a row
    x, residual = make(shape, dtype, device), make(shape, dtype, device) if with_residual else None
    if shape[-1] == 1:  # rms_norm's gradient cancels and its rest is divided by x: one tiny x would decide
        x += x.sign()
    check(name, x, residual, *parameters_of(name, shape[-1], dtype, device)[: 1 + with_bias])


@NORMS
def test_rows_too_long_for_one_tile(each_backend, device, name):
    """Such rows exceed a Triton program's registers: tests a row's blocks and the backward's column sums."""
    x, residual = (make((3, 16400), torch.float32, device) for _ in range(2))
    check(name, x, residual, *parameters_of(name, 16400, torch.float32, device))


@NORMS
@pytest.mark.parametrize("n", [60, 600, 1030])
def test_few_programs_take_turns(device, name, n):
    """Triton's programs walk the rows together, some at a time. In the last step some programs have none."""
    if "triton" not in available(device):
        pytest.skip("Triton cannot run here")
    x, residual = (make((23, n), torch.float32, device) for _ in range(2))
    tile = {"ROWS": 2, "num_warps": 4, "num_stages": 3, "PER_PROCESSOR": 5}
    with pyfused.backend("triton"), tiles.trying("row_norm_backward", tile):
        check(name, x, residual, *parameters_of(name, n, torch.float32, device))
        x.requires_grad_(), (w := make((n,), torch.float32, device).requires_grad_())
        norm = functools.partial(getattr(pyfused, name), x, w, *[w] * (name == "layer_norm"))
        first, second = (torch.autograd.grad(norm().square().sum(), [x, w]) for _ in range(2))
    assert all(torch.equal(a, b) for a, b in zip(first, second))


@NORMS
def test_no_grad_matches_grad(each_backend, device, name):
    norm, x, w = (
        getattr(pyfused, name),
        torch.randn(5, 33, device=device),
        torch.randn(33, device=device, requires_grad=True),
    )
    with torch.no_grad():
        alone = norm(x, w)
    assert torch.equal(alone, norm(x, w).detach())


@NORMS
def test_strided_rows(each_backend, device, name):
    base = torch.randn(4, 6, 80, device=device)
    parameters = parameters_of(name, 40, torch.float32, device)
    for x in (base[:, 2, :40], base[:, :, 40:], base.transpose(0, 1)[..., :40], base[..., ::2]):
        check_forward(name, x, *parameters)


def test_large_offset_keeps_variance(each_backend, device):
    """The mean is far from zero: a one-pass sum of squares in float32 would lose the variance."""
    x = torch.randn(4, 768, device=device) + 3000
    check_forward("layer_norm", x, torch.ones(768, device=device), torch.zeros(768, device=device))


@NORMS
@pytest.mark.parametrize("residual", [True, False])
def test_opcheck(each_backend, device, name, residual):
    x, r = (torch.randn(3, 16, device=device, requires_grad=True) for _ in range(2))
    parameters = [t.requires_grad_() for t in parameters_of(name, 16, torch.float32, device)]
    means = len(parameters) - 1  # rms_norm has neither bias nor mean
    check_registered(name, (x, *parameters, 1e-5, r if residual else None, True), save=4 + means, summed=residual)
    g, stats = torch.randn(3, 16, device=device), [torch.rand(3, device=device) for _ in range(1 + means)]
    backward = getattr(torch.ops.pyfused, f"{name}_backward")
    opcheck(backward, (g, g if residual else None, x.detach(), parameters[0].detach(), *stats, *[True] * means))


@NORMS
@pytest.mark.parametrize(
    "change, error, message",
    [
        ({"x": [1.0]}, TypeError, "x is a list"),
        ({"x": torch.ones(2, 8, dtype=torch.int64)}, TypeError, "x is int64"),
        ({"weight": torch.ones(7)}, ValueError, r"weight has shape \(7,\)"),
        ({"weight": torch.ones(8, dtype=torch.float16)}, TypeError, "weight is float16"),
        ({"bias": torch.ones(1, 8)}, ValueError, "bias has shape"),
        ({"residual": torch.ones(8)}, ValueError, "residual has shape"),
        ({"x": torch.ones(())}, ValueError, r"x has shape \(\)"),
        ({"x": torch.ones(2, 8).to_sparse()}, TypeError, "x has the layout sparse_coo; it takes a dense tensor"),
        ({"x": torch.nested.nested_tensor([torch.ones(2, 8)])}, TypeError, "x is a nested tensor"),
        ({"weight": torch.ones(8).to_mkldnn()}, TypeError, "weight has the layout _mkldnn"),
        ({"eps": "1e-5"}, TypeError, "eps is '1e-5'; it takes a number"),
    ],
)
def test_bad_input_names_the_argument(name, change, error, message):
    if name == "rms_norm" and "bias" in change:
        return  # it has none
    arguments = {"x": torch.ones(2, 8), "weight": torch.ones(8), **change}
    with pytest.raises(error, match=message):
        getattr(pyfused, name)(**arguments)


@NORMS
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("trains", [False, True])
def test_results_are_contiguous_whatever_the_strides(name, dtype, trains):
    """Compiled programs rely on the registered operator's strides, on the reference, the kernels and the library alike."""
    x = torch.randn(33, 16, dtype=dtype).t().requires_grad_(trains)
    residual, weight = torch.randn(16, 33, dtype=dtype), torch.randn(33, dtype=dtype)

    def norm(x, residual):
        y, total = getattr(pyfused, name)(x, weight, residual=residual)
        return y, total, y.sin() + total

    for backend in (None, "reference"):
        with pyfused.backend(backend) if backend else contextlib.nullcontext():
            y, total, _ = norm(x, residual)
        assert y.is_contiguous()
        assert total.is_contiguous()
    for found, expected in zip(torch.compile(norm)(x, residual), norm(x, residual)):
        torch.testing.assert_close(found, expected)
