"""Does int4 hold what it should? Every byte, the layout in words, the least error, and 4.5 bits a weight."""

import pytest
import torch

from pyfused.weight_format import FORMATS, INT4, INT8, dequantized, format_of


def in_words(weight, scale, n, k):
    """The values of an int4 weight as weight_format.py's docstring says, one by one."""
    values = torch.zeros(n, k, dtype=torch.float64)
    for row in range(n):
        for i in range(k):
            group, place = divmod(i, 32)
            byte = int(weight[row, 16 * group + place % 16]) & 255
            nibble = byte >> 4 if place >= 16 else byte & 15
            values[row, i] = (nibble - 16 if nibble > 7 else nibble) * float(scale[row, group])
    return values


def test_every_byte_is_two_values():
    weight = torch.arange(256, dtype=torch.uint8).view(torch.int8).view(4, 64)
    scale = torch.tensor([[1.0, -2.0, 0.5, 3.0]]).expand(4, 4).bfloat16()
    expected = in_words(weight, scale, 4, 128)
    assert torch.equal(dequantized(weight, scale, torch.float64), expected)
    assert torch.equal(INT4.integers(weight).double() * scale.double().repeat_interleave(32, 1), expected)
    assert sorted(INT4.integers(weight).unique().tolist()) == list(range(-8, 8))


def test_what_it_represents_comes_back():
    """A matrix of multiples of its scales is stored without loss, whichever sign the largest value has."""
    integers = torch.randint(-7, 8, (6, 5, 32)).float()
    integers[..., 3] = torch.tensor([8.0, -8.0, 8.0, -8.0, 8.0])
    matrix = (integers * torch.tensor([1.0, 0.25, 2.0**-70, 3.0 * 2.0**70, 1.5])[:, None]).flatten(1)
    weight, scale = INT4.quantized(matrix)
    assert torch.equal(dequantized(weight, scale, torch.float32), matrix)
    assert torch.equal(dequantized(weight, scale, torch.float64), in_words(weight, scale, 6, 160))


def test_the_error_is_small():
    """No value is further off than half a step of the plainest scale, max|w| / 7, and the squared error is a good deal less."""
    for spread in (torch.randn(64, 96), torch.rand(64, 96), torch.randn(64, 96) ** 3):
        found = dequantized(*INT4.quantized(spread), torch.float32)
        groups = spread.unflatten(1, (-1, 32))
        step = groups.abs().amax(2, keepdim=True) / 7
        plain = ((groups / step).round() * step).flatten(1)
        assert ((found - spread).square().mean() / (plain - spread).square().mean()).sqrt() < 0.95
        assert (found - spread).abs().max() <= 1.15 * step.max()


def test_zeros_and_tiny_values():
    matrix = torch.zeros(3, 64)
    matrix[1, 40] = 1e-30
    matrix[2] = torch.linspace(-1e-35, 1e-35, 64)
    weight, scale = INT4.quantized(matrix)
    assert scale[0].eq(1).all()
    found = dequantized(weight, scale, torch.float32)
    assert not found[0].any()
    assert found[1, 40] == pytest.approx(1e-30, rel=0.01)
    assert ((found - matrix)[2].abs() <= 1.15e-35 / 7).all()


@pytest.mark.parametrize("name", FORMATS)
@pytest.mark.parametrize("n, k", [(3, 64), (70, 32), (5, 0), (0, 32)])
def test_shapes(name, n, k):
    form = FORMATS[name]
    weight, scale = form.quantized(torch.randn(n, k)) if k else form.unfilled(n, k, torch.device("cpu"))
    assert format_of(scale) is form
    assert (weight.shape, scale.shape) == (form.shape(n, k), form.scale_shape(n, k))
    assert (weight.dtype, scale.dtype) == (torch.int8, form.scale_dtype)
    assert weight.is_contiguous()
    assert scale.is_contiguous()
    assert form.columns(weight) == k
    assert form.integers(weight).shape == (n, k) == form.dequantized(weight, scale, torch.float32).shape
    assert form.nbytes(n, k) == weight.nbytes + scale.nbytes


def test_bits_of_a_weight():
    assert INT4.nbytes(768, 3072) * 8 == 4.5 * 768 * 3072
    assert INT4.misfit(48) == "K = 48 is no multiple of 32"
    assert not INT8.misfit(48)
    assert format_of(None) is None


def test_large_matrices_go_in_parts():
    matrix = torch.randn(700, 512)
    weight, scale = INT4.quantized(matrix)
    for rows in (slice(0, 1), slice(511, 514), slice(699, 700)):
        part = INT4.quantized(matrix[rows])
        assert torch.equal(weight[rows], part[0])
        assert torch.equal(scale[rows], part[1])
