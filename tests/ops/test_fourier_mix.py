"""Is fourier_mix right on every backend? Values, gradients, any length, strides, its symmetries, errors, registration."""

from typing import NamedTuple

import pytest
import torch
from opchecks import check_registered

import pyfused
from pyfused.testing import assert_close, available, running

# (B, S, N): FNet's own; 1; primes; powers and products of 2, 3, 5; sizes with a large factor (137, 257, 1021).
SHAPES = [(2, 512, 768), (1, 31, 768), (2, 1, 1), (3, 1, 768), (2, 127, 1), (3, 2, 5), (5, 7, 96), (1, 60, 1000)]
SHAPES += [(1, 129, 40), (1, 137, 64), (1, 45, 274), (2, 3, 1021), (1, 257, 12)]


class Large(NamedTuple):
    shape: tuple[int, int, int]
    seldom: bool = True  # matrix products take minutes in Triton's interpreter


def make(shape, dtype, device):
    return (torch.randn(shape, device=device) + 0.1).to(dtype)


def plain(x):
    """torch.fft in float32, as KerasHub computes it for every dtype: on the CPU torch.fft takes no half precision."""
    return torch.fft.fft2(x if x.dtype == torch.float64 else x.float()).real.to(x.dtype)


def check(x):
    assert_close(pyfused.fourier_mix(x), plain(x), plain(x.double()), str(tuple(x.shape)))


@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_forward(each_backend, dtype, device, shape):
    if each_backend == "triton" and device == "cpu" and shape[1] * shape[2] > 6000:
        # The interpreter takes milliseconds a tile and step. These are two and three tiles, and five steps.
        shape = (min(shape[0], 2), min(shape[1], 33), min(shape[2], 140))
    x = make(shape, dtype, device)
    y = pyfused.fourier_mix(x)
    assert y.dtype == dtype
    assert y.is_contiguous()
    assert_close(y, plain(x), plain(x.double()))


@pytest.mark.parametrize("case", [Large((1, 1024, 1024)), Large((1, 1025, 77)), Large((1, 2, 4097))], ids=str)
def test_large(each_backend, dtype, device, case):
    check(make(case.shape, dtype, device))


@pytest.mark.parametrize("s, n", [(128, 256), (256, 512)])
def test_usual_lengths(each_backend, dtype, device, s, n):
    """CUDA has kernels for such lengths alone. Rows that begin one element off take the general one."""
    if each_backend == "triton" and device == "cpu":
        s, n = s // 8, n // 8
    wider = make((1, s, n + 8), dtype, device)
    check(wider[..., :n])
    check(wider[..., 1 : n + 1])


@pytest.mark.parametrize("length", range(1, 34))
def test_every_short_length(each_backend, device, length):
    """Tests radices, remainders and the middle element of even lengths, in each of the two transforms."""
    check(make((1, length, 3), torch.float32, device))
    check(make((2, 6, length), torch.float32, device))


@pytest.mark.parametrize("shape", [(2, 12, 20), (1, 31, 7)], ids=str)
def test_backward_is_forward(each_backend, dtype, device, shape):
    x, upstream = make(shape, dtype, device).requires_grad_(), make(shape, dtype, device)
    (grad,) = torch.autograd.grad(pyfused.fourier_mix(x), x, upstream)
    assert torch.equal(grad, pyfused.fourier_mix(upstream))
    wide = x.detach().double().requires_grad_()
    (truth,) = torch.autograd.grad(plain(wide), wide, upstream.double())
    assert_close(grad, plain(upstream), truth)


def test_a_broadcast_gradient(each_backend, device):
    """The gradient of a sum over rows has strides of zero, and its transform lies in x[0] of each sample."""
    x = torch.randn(2, 6, 10, device=device, requires_grad=True)
    weights = torch.randn(2, 10, device=device)
    (pyfused.fourier_mix(x).sum(1) * weights).sum().backward()
    upstream = weights[:, None].expand(2, 6, 10)
    expected = plain(upstream.double())
    assert_close(x.grad, plain(upstream), expected)
    assert expected[:, 1:].abs().max() < 1e-12


def test_any_strides(each_backend, device):
    base = torch.randn(4, 12, 20, device=device)
    views = (base[::2], base[:, 2:9], base[:, ::2], base[..., 3:], base[..., ::2], base.transpose(1, 2))
    for x in (*views, base.transpose(0, 1), base[:1].expand(3, 12, 20), base[:, :1].expand(4, 5, 20)):
        check(x)


def test_input_is_left_alone(each_backend, device):
    x = torch.randn(2, 8, 12, device=device)
    before = x.clone()
    y = pyfused.fourier_mix(x)
    assert torch.equal(x, before)
    assert y.data_ptr() != x.data_ptr()


def test_one_by_one_is_the_identity(each_backend, dtype, device):
    x = make((3, 1, 1), dtype, device)
    assert torch.equal(pyfused.fourier_mix(x), x)


def test_twice_gives_the_even_part(each_backend, device):
    """Two applications give S N / 2 times (x plus its mirror image), for any S and N."""
    for s, n in [(9, 14), (8, 15)]:
        x = torch.randn(2, s, n, device=device)
        mirrored = torch.roll(x.double().flip(1, 2), (1, 1), (1, 2))
        expected = (x.double() + mirrored) * (s * n / 2)
        assert_close(pyfused.fourier_mix(pyfused.fourier_mix(x)), plain(plain(x)), expected)


def test_no_samples(each_backend, device):
    x = torch.empty(0, 4, 8, device=device, requires_grad=True)
    y = pyfused.fourier_mix(x)
    assert y.shape == (0, 4, 8)
    y.sum().backward()
    assert x.grad.shape == (0, 4, 8)


def test_samples_do_not_mix(each_backend, device):
    """NaN or infinity fills only its own sample, even if another sample shares a vector register with it."""
    for bad in ("nan", "inf"):
        x = torch.randn(5, 3, 6, device=device)
        alone = pyfused.fourier_mix(x)
        x[2, 1, 4] = float(bad)
        y = pyfused.fourier_mix(x)
        assert not y[2].isfinite().any()
        others = [0, 1, 3, 4]
        assert torch.equal(y[others], alone[others])


def test_wide_sums_in_half_precision(each_backend, device):
    """Partial sums may exceed float16, because they are float32; only results that exceed it become infinite."""
    x = torch.zeros(1, 64, 64, device=device, dtype=torch.float16)
    x[0, :, 0], x[0, :, 1] = 2000, -2000
    check(x)
    y = pyfused.fourier_mix(torch.full((1, 64, 64), 2000.0, device=device).half())
    assert y[0, 0, 0].isinf()
    assert y[0, 1:].abs().max() < 1000


@pytest.mark.cpu_kernels
def test_threads_change_nothing(each_backend):
    x = torch.randn(5, 129, 768)
    torch.set_num_threads(1)
    alone = pyfused.fourier_mix(x)
    torch.set_num_threads(3)
    assert torch.equal(pyfused.fourier_mix(x), alone)


def test_too_long_for_shared_memory(device):
    """9216 fits; 9217 does not, nor does a prime whose convolution is as long. explain() says so."""
    if "cuda" not in available(device):
        pytest.skip("needs the CUDA kernels")
    with running("cuda"):
        check(torch.randn(1, 1, 9216, device=device))
    for shape in [(1, 9217, 1), (1, 1, 4801)]:
        with pyfused.backend("cuda"):
            assert "shared memory" in str(pyfused.explain("fourier_mix", torch.empty(shape, device=device)))


def test_opcheck(each_backend, device):
    for x in (torch.randn(2, 3, 8, device=device), torch.randn(2, 8, 3, device=device).transpose(1, 2)):
        check_registered("fourier_mix", (x.requires_grad_(),))


@pytest.mark.parametrize(
    "x, error, message",
    [
        ([1.0], TypeError, "x is a list"),
        (torch.ones(1, 2, 2, dtype=torch.int64), TypeError, "x is int64"),
        (torch.ones(1, 2, 2, dtype=torch.complex64), TypeError, "x is complex64"),
        (torch.ones(2, 8), ValueError, r"x has shape \(2, 8\); it takes \(B, S, N\)"),
        (torch.ones(1, 2, 3, 4), ValueError, r"x has shape \(1, 2, 3, 4\)"),
        (torch.ones(1, 0, 8), ValueError, r"x has shape \(1, 0, 8\)"),
        (torch.ones(1, 8, 0), ValueError, r"x has shape \(1, 8, 0\)"),
    ],
    ids=str,
)
def test_bad_input_names_the_argument(x, error, message):
    with pytest.raises(error, match=message):
        pyfused.fourier_mix(x)
