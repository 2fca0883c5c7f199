"""linear on CUDA: launches csrc/cuda/linear.cu for up to 16 rows. cuBLAS multiplies more rows."""

import torch.nn.functional as F

from pyfused.extensions import DTYPE_CODES, cuda
from pyfused.kernels.shared.layout import rows_of
from pyfused.kernels.shared.prepared import dense, maker, prepares_launch

from ._launch import pointers, where

FEW_ROWS = 16  # kFewRows of few_rows.cuh


def few(rows, *weights):
    """Whether the streaming kernels take these products. They count a weight's rows and columns in 32 bits."""
    return rows <= FEW_ROWS and all(max(w.shape) < 2**30 for w in weights)


def unsupported_forward(x, weight, bias, residual, scale=None, dynamic=False):
    return None if scale is None else "has no product with integer weights"


@prepares_launch
def forward(x, weight, bias, residual):
    outer, (m, n), device = x.shape[:-1], weight.shape, x.device
    if not few(outer.numel(), weight):
        return _by_library
    of_x, of_weight = rows_of(x), rows_of(weight)
    of_residual = rows_of(residual)
    if of_x is None or of_weight is None or of_residual is None or not dense(bias):
        return None
    strides = of_x[2], of_weight[2], of_residual[2]
    numbers, place = (of_x[0], m, n, *strides, 0, False, DTYPE_CODES[x.dtype]), where(device)
    new, kernel = maker((*outer, m), x.dtype, None, device), cuda().linear_forward

    def launch(x, weight, bias, residual):
        y = new()
        kernel(*pointers(x, weight, bias, residual, y, None), *numbers, *place())
        return (y,)

    return launch


def _by_library(x, weight, bias, residual):
    found = F.linear(x, weight, bias)
    found = found if residual is None else found.add_(residual)
    return (found,)
