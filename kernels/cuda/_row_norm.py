"""How do the CUDA kernels of layer_norm and rms_norm start? On the current stream of the tensors' device.
kernels/shared/row_norm.py launches them."""

import torch

from pyfused.extensions import DTYPE_CODES, cuda
from pyfused.kernels.shared.prepared import maker

from ._launch import multiprocessors, where


def begin_forward(norm):
    numbers = norm.rows, norm.n, norm.x_stride, norm.residual_stride, norm.eps, DTYPE_CODES[norm.dtype]
    kernel, place = getattr(cuda(), f"{norm.operator}_forward"), where(norm.device)
    return lambda *tensors: kernel(*tensors, *numbers, *place())


def begin_backward(norm):
    kernel, place = getattr(cuda(), f"{norm.operator}_backward"), where(norm.device)
    parts = getattr(cuda(), f"{norm.operator}_backward_parts")(norm.rows, norm.n, multiprocessors(norm.device))
    numbers = parts, norm.rows, norm.n, norm.x_stride, DTYPE_CODES[norm.dtype]
    new_partial = maker((parts, 2 if norm.centred else 1, norm.n), torch.float32, None, norm.device)

    def start(*tensors):
        partial = new_partial()  # held until the kernel has started
        kernel(*tensors, partial, *numbers, *place())

    return start
