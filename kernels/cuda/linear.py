"""linear on CUDA: launches csrc/cuda/linear.cu for up to 16 rows, 8 if the weight is stored by columns. cuBLAS multiplies more
rows."""

import torch.nn.functional as F

from pyfused.extensions import DTYPE_CODES, cuda
from pyfused.kernels.shared.layout import is_by_columns, rows_of
from pyfused.kernels.shared.prepared import dense, maker, prepares_launch

from ._launch import where

FEW_ROWS = 16  # kFewRows of few_rows.cuh
FEW_ROWS_BY_COLUMNS = 8  # kFewRowsByColumns of few_rows_columns.cuh


def few(rows, *weights):
    """Whether the streaming kernels take these products. They count a weight's rows and columns in 32 bits."""
    most = FEW_ROWS_BY_COLUMNS if any(map(is_by_columns, weights)) else FEW_ROWS
    return rows <= most and all(max(w.shape) < 2**30 for w in weights)


def layout_of(weight):
    """(elements from row to row of memory, whether memory holds the weight transposed). None for what kernels do not take."""
    by_columns = is_by_columns(weight)
    found = rows_of(weight.t() if by_columns else weight)
    return found and (found[2], by_columns)


def unsupported_forward(x, weight, bias, residual, scale=None, dynamic=False):
    return None if scale is None else "has no product with integer weights"


@prepares_launch
def forward(x, weight, bias, residual):
    outer, (m, n), device = x.shape[:-1], weight.shape, x.device
    if not few(outer.numel(), weight):
        return _by_library
    of_x, of_weight = rows_of(x), layout_of(weight)
    of_residual = rows_of(residual)
    if of_x is None or of_weight is None or of_residual is None or not dense(bias):
        return None
    strides = of_x[2], *of_weight, of_residual[2]
    numbers, place = (of_x[0], m, n, *strides, 0, False, DTYPE_CODES[x.dtype]), where(device)
    new, kernel = maker((*outer, m), x.dtype, None, device), cuda().linear_forward

    def launch(x, weight, bias, residual):
        y = new()
        kernel(x, weight, bias, residual, y, None, *numbers, *place())
        return (y,)

    return launch


def _by_library(x, weight, bias, residual):
    found = F.linear(x, weight, bias)
    found = found if residual is None else found.add_(residual)
    return (found,)
