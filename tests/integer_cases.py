"""Which integer weights do the tests of linear multiply by, on which backends, and what is right? PyTorch with the weight that
the integers stand for."""

import torch
import torch.nn.functional as F

from pyfused.testing import available
from pyfused.weight_format import dequantized

LACKING = {"int8": ("cuda",), "int4": ("cuda", "triton")}
BACKENDS = {
    form: [name for name in available("cuda" if torch.cuda.is_available() else "cpu") if name not in lacking]
    for form, lacking in LACKING.items()
}


def quantised(form, device, n, k):
    """Stored weight and scale of a matrix (n, k). int4: any bytes, and scales of both signs."""
    spread = torch.rand(n, k // 32 if form == "int4" else 1, device=device) + 0.5
    if form == "int8":
        weight = torch.randint(-127, 128, (n, k), dtype=torch.int8, device=device)
        return weight, spread[:, 0] / 73.0 / max(k, 1) ** 0.5
    weight = torch.randint(-128, 128, (n, k // 2), dtype=torch.int8, device=device)
    sign = torch.randint(0, 2, spread.shape, device=device) * 2 - 1
    return weight, (spread * sign / 5.0 / max(k, 1) ** 0.5).bfloat16()


def plain(x, weight, scale, bias=None, residual=None, linear=F.linear):
    y = linear(x, dequantized(weight, scale, x.dtype), bias)
    return y if residual is None else y + residual


def double(*tensors):
    return [t.double() if t is not None and t.is_floating_point() else t for t in tensors]
