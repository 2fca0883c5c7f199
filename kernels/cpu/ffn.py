"""ffn on the CPU: launches csrc/cpu/ffn.cpp. Where library products are faster, only its activation runs between them."""

import torch
import torch.nn.functional as F

from pyfused.activations import ACTIVATIONS
from pyfused.extensions import DTYPE_CODES, cpu
from pyfused.kernels.shared.layout import rows_of
from pyfused.kernels.shared.prepared import dense, maker, prepares_launch
from pyfused.kernels.shared.product import product

from ..reference.ffn import linear_gradients
from . import dot
from .linear import by_columns, library_is_faster


def _measured_as(save):
    """The operator whose evidence counts. ffn's is of calls that keep nothing: then nothing of the inner size is in memory."""
    return "linear" if save else "ffn"


def left_to_library_forward(x, w_in, b_in, w_out, b_out, activation, residual, save):
    return library_is_faster(_measured_as(save), x.shape[:-1].numel(), w_in, w_out)


def remark_forward(x, w_in, b_in, w_out, b_out, activation, residual, save):
    return dot.remark(dot.of_floats(_measured_as(save), x.shape[:-1].numel(), w_in, w_out))


@prepares_launch
def forward(x, w_in, b_in, w_out, b_out, activation, residual, save):
    rows = x.shape[:-1].numel()
    transposed = by_columns(w_in, w_out)
    if left_to_library_forward(x, w_in, b_in, w_out, b_out, activation, residual, save):
        return lambda x, w_in, b_in, w_out, b_out, _activation, residual, _save=False: _library_forward(
            x, w_in, b_in, w_out, b_out, activation, residual, save
        )
    of_x, of_in, of_out = rows_of(x), *(rows_of(w.t() if transposed else w) for w in (w_in, w_out))
    of_residual = rows_of(residual)
    if of_x is None or of_in is None or of_out is None or of_residual is None or not dense(b_in, b_out):
        return None
    (_, n, x_stride), (f, m), strides = of_x, (w_in.shape[0], w_out.shape[0]), (of_in[2], of_out[2], of_residual[2])
    outer, dtype = x.shape[:-1], x.dtype
    numbers = rows, n, f, m, x_stride, *strides, transposed, ACTIVATIONS[activation].code
    kernels = dot.chosen(dot.of_floats(_measured_as(save), rows, w_in, w_out)) or cpu()
    code, kernel = DTYPE_CODES[dtype], kernels.ffn_forward
    new_y = maker((*outer, m), dtype)
    new_pre = maker((*outer, f), dtype) if save else None

    def launch(x, w_in, b_in, w_out, b_out, _activation, residual, _save=False):
        y, pre = new_y(), new_pre() if save else None
        kernel(x, w_in, b_in, w_out, b_out, residual, pre, y, *numbers, code)
        return y, pre

    return launch


def _library_forward(x, w_in, b_in, w_out, b_out, activation, residual, save):
    pre = F.linear(x.reshape(-1, x.shape[-1]), w_in, b_in)
    inner = torch.empty_like(pre) if save else pre
    activate(pre, None, inner, None, activation)
    inner, pre = (t.view(*x.shape[:-1], w_in.shape[0]) for t in (inner, pre))
    y = F.linear(inner, w_out, b_out)
    return y if residual is None else y.add_(residual), pre if save else None


def activate(pre, grad_inner, inner, grad_pre, activation):
    """inner = activation(pre), grad_pre = grad_inner activation'(pre). Contiguous; an output may be its own input."""
    cpu().ffn_activation(
        pre, grad_inner, inner, grad_pre, pre.numel(), ACTIVATIONS[activation].code, DTYPE_CODES[pre.dtype]
    )


def backward(grad_y, x, w_in, w_out, pre, activation, *wants):
    pre = pre.contiguous()
    grad_pre = product(grad_y.reshape(-1, grad_y.shape[-1]), w_out).view(pre.shape)
    inner = torch.empty_like(pre)
    activate(pre, grad_pre, inner, grad_pre, activation)
    return linear_gradients(grad_y, x, w_in, inner, grad_pre, wants, product)
