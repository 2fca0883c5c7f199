"""linear in plain PyTorch: the definition of truth."""

import torch.nn.functional as F

from pyfused.kernels.shared import int8
from pyfused.weight_format import dequantized, wide


def forward(x, weight, bias, residual, scale=None, dynamic=False):
    if scale is not None:
        return (_of_integers(x, weight, bias, residual, scale, dynamic),)
    y = F.linear(x, weight, bias)
    return (y if residual is None else y + residual,)


def remark_forward(x, weight, bias, residual, scale=None, dynamic=False):
    reason = int8.in_float(x, weight, x.device.type) if dynamic else None
    return reason and f"dynamic=True keeps x in floating point: {reason}"


def _of_integers(x, weight, bias, residual, scale, dynamic):
    """Half precision is widened, so that neither the weights nor the sums are rounded to it. Not on a GPU: a product in float32
    takes many times as long there."""
    reason = int8.in_float(x, weight, x.device.type) if dynamic else ""
    if reason is None:
        y = int8.product(x, weight, scale)
    else:
        int8.say_once(reason)
        dtype = x.dtype if x.is_cuda else wide(x.dtype)
        y = F.linear(x.to(dtype), dequantized(weight, scale, dtype))
    y = y if bias is None else y + bias
    return (y if residual is None else y + residual).to(x.dtype)
