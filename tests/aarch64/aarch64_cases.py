"""Are the parts right that tests/ops does not reach on ARM? Conversions between dtypes, integer weights, the reading of masks.

run.py runs this file. `make test` does not: it needs a cross compiler and an emulator.
"""

import itertools

import pytest
import torch
import torch.nn.functional as F
from draws import check

import pyfused
from pyfused import extensions
from pyfused.extensions import DTYPE_CODES
from pyfused.kernels.cpu.mask_structure import all_zero, structure
from pyfused.testing import running
from pyfused.weight_format import FORMATS, dequantized

HALVES = pytest.mark.parametrize("half", [torch.float16, torch.bfloat16], ids=["float16", "bfloat16"])


def kernels():
    return extensions.cpu()


def converted(x, dtype):
    y = torch.empty(x.shape, dtype=dtype)
    kernels().convert(x, y, x.numel(), DTYPE_CODES[x.dtype], DTYPE_CODES[dtype])
    return y


def same(found, expected):
    """Equal bits, but any NaN for a NaN."""
    nan = expected.isnan()
    return torch.equal(found.isnan(), nan) and torch.equal(
        found[~nan].view(torch.uint8), expected[~nan].view(torch.uint8)
    )


@HALVES
def test_every_number_widens_exactly(half):
    x = torch.arange(-(2**15), 2**15).to(torch.int16).view(half)
    assert same(converted(x, torch.float32), x.float())
    assert same(converted(x[:7], torch.float32), x[:7].float())


@HALVES
def test_narrowing_rounds_to_the_nearest_even(half):
    """Random bits, so infinities, NaN and subnormal numbers too, and the halfway points between neighbours."""
    bits = torch.randint(-(2**31), 2**31, (2**17,), dtype=torch.int64).to(torch.int32)
    numbers = torch.arange(-(2**15), 2**15).to(torch.int16).view(half).float()
    halfway = (numbers[:-1].double() + numbers[1:].double()).div(2).float()
    for x in (bits.view(torch.float32), halfway, torch.nextafter(halfway, torch.tensor(torch.inf)), halfway[:3]):
        assert same(converted(x, half), x.to(half))


def test_every_int8_widens_exactly():
    x, y = torch.arange(-128, 128).to(torch.int8), torch.empty(256)
    kernels().widen_int8(x, y, 256)
    assert torch.equal(y, x.float())


@pytest.mark.parametrize("scheme", [None, *FORMATS])
@pytest.mark.parametrize("dtype", DTYPE_CODES, ids=str)
def test_products(dtype, scheme):
    """Both kernels of gemm.h, every width of their tiles, and all remainders."""
    widths = [(32, 5), (64, 1), (160, 97), (416, 51)] if scheme == "int4" else [(1, 5), (5, 1), (131, 97), (420, 51)]

    def once():
        found = {}
        for rows, (k, n) in itertools.product([1, 2, 3, 4, 5, 6, 7, 9, 17, 37], widths):
            x, bias, weight, scale = torch.randn(rows, k).to(dtype), torch.randn(n).to(dtype), torch.randn(n, k), None
            weight = (weight * k**-0.5).to(dtype)
            plain, wide = F.linear(x, weight, bias), weight.double()
            if scheme:
                weight, scale = FORMATS[scheme].quantized(weight)
                plain = F.linear(x.float(), dequantized(weight, scale, torch.float32), bias.float()).to(dtype)
                wide = dequantized(weight, scale, torch.float64)
            y = pyfused.linear(x, weight, bias, scale=scale)
            found[f"rows {rows}, K {k}, N {n}"] = y, plain, F.linear(x.double(), wide, bias.double())
        return found

    with running("cpu:aarch64"):
        check(once)


def masks():
    """(mask, the end and padding that structure() documents)"""
    causal = torch.ones(5, 9, dtype=torch.bool).tril(4)[None, None]
    padded = causal.clone()
    padded[..., :2] = False
    static = torch.zeros(1, 1, 5, 16, dtype=torch.bool)
    static[..., :9] = causal
    keys = torch.tensor([[1, 1, 0, 1, 1, 0, 0], [1, 0, 0, 0, 0, 0, 0]], dtype=torch.bool)[:, None, None]
    other = torch.ones(1, 1, 4, 7, dtype=torch.bool)
    other[..., 2, 3] = False
    yield causal, (9, False)
    yield padded, (9, True)
    yield static, (9, False)
    yield keys.expand(2, 1, 3, 7), (0, True)
    yield other, None


@pytest.mark.parametrize("dtype", [torch.bool, torch.float16, torch.float32, torch.float64], ids=str)
def test_masks(dtype):
    for mask, expected in masks():
        hidden = {} if dtype == torch.bool else {"min": torch.finfo(dtype).min, "inf": -torch.inf}
        dense = [torch.zeros(mask.shape, dtype=dtype).masked_fill(~mask, value) for value in hidden.values()] or [mask]
        for one in dense:
            found = structure(one, all_see=True)
            assert found == expected
            assert not all_zero(one.contiguous())
            assert all_zero(torch.zeros_like(one))
            assert all_zero(torch.full_like(one, -0.0))
