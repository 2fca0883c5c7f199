"""ffn on CUDA: launches csrc/cuda/ffn.cu for up to 16 rows, 8 with a weight stored by columns. With more rows its activation
runs between cuBLAS products.

cuBLAS adds a bias in its own epilogue, so only the activation runs between the products, in place. In the backward one
pass computes the inner activations and the gradient through the activation.
"""

import torch.nn.functional as F

from pyfused.activations import ACTIVATIONS
from pyfused.extensions import DTYPE_CODES, cuda
from pyfused.kernels.shared.layout import rows_of
from pyfused.kernels.shared.prepared import dense, maker, prepares_launch

from ..reference.ffn import linear_gradients
from ._launch import where
from .linear import few, layout_of


@prepares_launch
def forward(x, w_in, b_in, w_out, b_out, activation, residual, save):
    outer, (f, n), m, dtype, device = x.shape[:-1], w_in.shape, w_out.shape[0], x.dtype, x.device
    if not few(outer.numel(), w_in, w_out):
        return _prepare_library_forward(outer.numel() * f, activation, save, dtype, device)
    of_x, of_in, of_out = rows_of(x), layout_of(w_in), layout_of(w_out)
    of_residual = rows_of(residual)
    if of_x is None or of_in is None or of_out is None or of_residual is None or not dense(b_in, b_out):
        return None
    strides = of_x[2], *of_in, *of_out, of_residual[2]
    numbers, place = (of_x[0], n, f, m, *strides, ACTIVATIONS[activation].code, DTYPE_CODES[dtype]), where(device)
    new_inner, new_y, kernel = (
        maker((*outer, f), dtype, None, device),
        maker((*outer, m), dtype, None, device),
        cuda().ffn_forward,
    )

    def launch(x, w_in, b_in, w_out, b_out, _activation, residual, _save=False):
        y, inner, pre = new_y(), new_inner(), new_inner() if save else None
        kernel(x, w_in, b_in, w_out, b_out, residual, inner, pre, y, *numbers, *place())
        return y, pre

    return launch


def _prepare_library_forward(size, activation, save, dtype, device):
    activate = prepare_activation(size, activation, dtype, device)

    def launch(x, w_in, b_in, w_out, b_out, _activation, residual, _save=False):
        pre = F.linear(x, w_in, b_in).contiguous()
        inner = pre.new_empty(pre.shape) if save else pre
        activate(pre, None, inner, None)
        found = F.linear(inner, w_out, b_out)
        found = found if residual is None else found.add_(residual)
        return found, pre if save else None

    return launch


def prepare_activation(size, activation, dtype, device):
    """A function of contiguous (pre, grad_inner, inner, grad_pre) with `size` elements each. It sets inner = activation(pre)
    and grad_pre = grad_inner activation'(pre). An output may be its own input."""
    numbers, place = (size, ACTIVATIONS[activation].code, DTYPE_CODES[dtype]), where(device)
    kernel = cuda().ffn_activation
    return lambda *tensors: kernel(*tensors, *numbers, *place())


@prepares_launch
def backward(grad_y, x, w_in, w_out, pre, activation, *wants):
    if not pre.is_contiguous():
        return None
    activate = prepare_activation(pre.numel(), activation, pre.dtype, pre.device)
    new_inner = maker(pre.shape, pre.dtype, None, pre.device)

    def launch(grad_y, x, w_in, w_out, pre, _activation, *wants):
        grad_pre, inner = (grad_y @ w_out).contiguous(), new_inner()
        activate(pre, grad_pre, inner, grad_pre)
        return linear_gradients(grad_y, x, w_in, inner, grad_pre, wants)

    return launch
