"""Do float32 products in Triton add in short chains, as cuBLAS does where a product has few rows?"""

import pytest
import torch

from pyfused import tiles
from pyfused.testing import assert_close, available

triton = pytest.importorskip("triton")

from pyfused.kernels.triton import attention  # noqa: E402
from pyfused.kernels.triton._product import prepare_product  # noqa: E402
from pyfused.kernels.triton.gated_ffn import prepare_stream  # noqa: E402

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
pytestmark = pytest.mark.skipif("triton" not in available(DEVICE), reason="Triton cannot run here")

# The interpreter adds as a GPU does (pyfused/testing/triton_interpreter.py). A GPU's tiles, where one program has a whole sum
STREAM = {"BLOCK_N": 16, "BLOCK_K": 32, "num_warps": 4, "num_stages": 3, "PER_PROCESSOR": 1, "LEAST_K": 1 << 16}
LINEAR = {"BLOCK_M": 64, "BLOCK_N": 64, "BLOCK_K": 32, "GROUP": 8, "num_warps": 4, "num_stages": 2}
DECODE = {"BLOCK_M": 16, "BLOCK_N": 32, "num_warps": 8, "num_stages": 1, "PER_PROCESSOR": 1, "LEAST_KEYS": 1 << 16}


def in_parts(a, b):
    """a b^T from sums of 64 terms."""
    return sum(x @ y.transpose(-1, -2) for x, y in zip(a.split(64, -1), b.split(64, -1)))


@pytest.mark.parametrize("rows", [8, 20])
def test_products(rows):
    x, w = torch.randn(rows, 3072, device=DEVICE), torch.randn(64, 3072, device=DEVICE)
    with tiles.trying("ffn_stream", STREAM), tiles.trying("ffn_linear", LINEAR):
        y, _ = prepare_product((rows,), 3072, w, False, "none", None, False)(x, w, None, None)
    assert_close(y, in_parts(x, w), x.double() @ w.double().t())


def test_gated_products():
    x, *weights = torch.randn(8 + 64 + 64, 3072, device=DEVICE).split([8, 64, 64])
    with tiles.trying("gated_ffn_stream", STREAM):
        *both, _ = prepare_stream((8,), 3072, *weights, "relu", True, False)(x, *weights)
    for y, w in zip(both, weights):
        assert_close(y, in_parts(x, w), x.double() @ w.double().t())


def test_attention_of_one_query():
    """All keys are alike, so the output is the values' mean."""
    query, key = torch.zeros(1, 8, 1, 64, device=DEVICE), torch.randn(1, 8, 3072, 64, device=DEVICE)
    value = torch.randn(1, 8, 3072, 64, device=DEVICE)
    with tiles.trying("attention_decode", DECODE):
        out, _ = attention.forward(query, key, value, False, None, None, 1.0, 0.0, None, False)
    weights = torch.full((1, 8, 1, 3072), 1 / 3072, device=DEVICE)
    assert_close(out, in_parts(weights, value.transpose(2, 3)), value.double().mean(2, keepdim=True))
