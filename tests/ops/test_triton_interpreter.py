"""Are the repairs of Triton's interpreter right, and does it still have the fault that they repair?"""

import numpy as np
import pytest
import torch

from pyfused import dispatch
from pyfused.testing.triton_interpreter import bfloat16_to_float32, float32_to_bfloat16, ordered_product

triton = pytest.importorskip("triton")
import triton.language as tl  # noqa: E402

SPECIAL = [float("inf"), -float("inf"), float("nan"), 1e-39, -1e-40, 3.4e38, 0.0, -0.0, 1 + 2**-8, 1 + 3 * 2**-8]


def test_conversions_are_torch_s():
    x = torch.cat([torch.randn(10000), torch.tensor(SPECIAL)])
    rounded = torch.from_numpy(float32_to_bfloat16(x.numpy()).view(np.int16)).view(torch.bfloat16)
    torch.testing.assert_close(rounded, x.bfloat16(), rtol=0, atol=0, equal_nan=True)
    bits = x.bfloat16().view(torch.int16).numpy().view(np.uint16)
    widened = torch.from_numpy(bfloat16_to_float32(bits))
    torch.testing.assert_close(widened, x.bfloat16().float(), rtol=0, atol=0, equal_nan=True)


def test_ordered_product_of_the_transposes_is_the_transpose():
    a, b, total = (np.random.default_rng(0).standard_normal(s, np.float32) for s in ((40, 24), (24, 56), (40, 56)))
    c = ordered_product(a, b, total)
    assert np.array_equal(c.T, ordered_product(b.T, a.T, total.T))
    np.testing.assert_allclose(c, total + a @ b, rtol=1e-4, atol=1e-5)


@triton.jit
def product(a_ptr, b_ptr, c_ptr, N: tl.constexpr):
    i, j = tl.arange(0, N)[:, None], tl.arange(0, N)[None, :]
    c = tl.dot(tl.load(a_ptr + i * N + j), tl.load(b_ptr + i * N + j))
    tl.store(c_ptr + i * N + j, c.to(c_ptr.dtype.element_ty))


@pytest.mark.skipif(not dispatch.interpreting(), reason="a GPU runs the kernels themselves")
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32], ids=str)
def test_dot(dtype):
    a, b = torch.randn(2, 32, 32).to(dtype)
    c = torch.empty(32, 32, dtype=dtype)
    product[(1,)](a, b, c, N=32)
    torch.testing.assert_close(c, (a.float() @ b.float()).to(dtype))


@triton.jit
def two_sums(a_ptr, b_ptr, sums_ptr, N: tl.constexpr):
    at = tl.arange(0, N)[None, :]
    a, b = tl.load(a_ptr + at), tl.load(b_ptr + at)
    both_a, both_b = tl.split(tl.sum(tl.join(a, b), axis=1))
    one = tl.arange(0, 1)
    tl.store(sums_ptr + one, both_a - tl.sum(a, axis=1))
    tl.store(sums_ptr + 1 + one, both_b - tl.sum(b, axis=1))


@pytest.mark.skipif(not dispatch.interpreting(), reason="a GPU runs the kernels themselves")
def test_two_sums_together_are_the_sums():
    a, b = torch.rand(2, 4096)
    differences = torch.ones(2)
    two_sums[(1,)](a, b, differences, N=4096)
    assert differences.tolist() == [0, 0]
