"""rms_norm on CUDA: launches csrc/cuda/rms_norm.cu on the current stream of the tensors' device."""

import torch

from pyfused.extensions import DTYPE_CODES, cuda
from pyfused.kernels.shared.layout import rows_of
from pyfused.kernels.shared.prepared import dense, launched, maker

from ._launch import multiprocessors, pointers, where


@launched
def forward(x, weight, eps, residual, save):
    of_x, of_residual = rows_of(x), (0, 0, 0) if residual is None else rows_of(residual)
    if of_x is None or of_residual is None or not dense(weight):
        return None
    device, kernel = x.device, cuda().rms_norm_forward
    numbers, place = (*of_x, of_residual[2], eps, DTYPE_CODES[x.dtype]), where(device)
    new, new_statistic = maker(x.shape, x.dtype, None, device), maker(x.shape[:-1], torch.float32, None, device)

    def launch(x, weight, _eps, residual, _save, y=None, total=None):
        y = new() if y is None else y
        total = new() if total is None and residual is not None else total
        rstd = new_statistic() if save else None
        kernel(*pointers(x, residual, weight, y, total, rstd), *numbers, *place())
        return y, total, rstd

    return launch


@launched
def backward(grad_y, grad_total, x, weight, rstd):
    of_x, device = rows_of(x), x.device
    if of_x is None or not dense(grad_y, grad_total, weight):
        return None
    rows, n, _ = of_x
    parts = cuda().rms_norm_backward_parts(rows, n, multiprocessors(device))
    numbers, kernel, place = (parts, *of_x, DTYPE_CODES[x.dtype]), cuda().rms_norm_backward, where(device)
    new, new_of_weight = maker(x.shape, x.dtype, None, device), maker(weight.shape, weight.dtype, None, device)
    new_partial = maker((parts, n), torch.float32, None, device)

    def launch(grad_y, grad_total, x, weight, rstd):
        grads, partial = (new(), new_of_weight()), new_partial()
        kernel(*pointers(grad_y, grad_total, x, weight, rstd, *grads, partial), *numbers, *place())
        return grads

    return launch
