"""linear on CUDA: launches csrc/cuda/linear.cu for up to 16 rows; more rows are a product of cuBLAS's."""

import torch
import torch.nn.functional as F

from pyfused._extensions import DTYPE_CODES, cuda
from pyfused.kernels.layout import as_rows

from ._launch import pointer, where

FEW_ROWS = 16  # kFewRows of few_rows.cuh


def few(rows, *weights):
    """Whether the streaming kernels take these products: they count a weight's rows and columns in 32 bits."""
    return rows <= FEW_ROWS and all(max(w.shape) < 2**30 for w in weights)


def forward(x, weight, bias, residual):
    shape = (*x.shape[:-1], weight.shape[0])
    if not few(x.shape[:-1].numel(), weight):
        y = F.linear(x, weight, bias)
        return (y if residual is None else y.add_(residual),)
    x, x_stride = as_rows(x)
    weight, weight_stride = as_rows(weight)
    bias = None if bias is None else bias.contiguous()
    residual, residual_stride = (None, 0) if residual is None else as_rows(residual)
    y = torch.empty(shape, dtype=x.dtype, device=x.device)
    sizes = x.shape[0], *weight.shape
    strides = x_stride, weight_stride, residual_stride
    pointers = map(pointer, (x, weight, bias, residual, y, None))
    cuda().linear_forward(*pointers, *sizes, *strides, 0, False, DTYPE_CODES[x.dtype], *where(x.device))
    return (y,)
