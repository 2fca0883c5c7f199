"""linear on the CPU: launches csrc/cpu/linear.cpp or csrc/cpu/dot/linear_dynamic.cpp, or the library's product where that was
measured to be faster."""

import torch
import torch.nn.functional as F

from pyfused import evidence
from pyfused.extensions import DTYPE_CODES, cpu
from pyfused.kernels.shared import int8, product
from pyfused.kernels.shared.layout import is_by_columns, rows_of
from pyfused.kernels.shared.prepared import CPU, dense, maker, prepares_launch
from pyfused.weight_format import dequantized, format_of

from . import dot

_PART = 1 << 18  # values of an integer weight that are widened at a time: their float32 form stays in a cache


def by_columns(*weights):
    """Whether the kernels for weights by columns take these. All must be transposed views of matrices stored as (K, N), like
    the weights of Hugging Face's Conv1D."""
    return all(map(is_by_columns, weights))


def would_copy(*weights):
    if any(w.stride()[1] != 1 for w in weights):
        return "a weight whose last dimension is not contiguous would be copied"
    return None


def library_is_faster(operator, rows, *weights):
    """Why the library (MKL or oneDNN) does an operator's products. None if the kernels do."""
    if dot.chosen(dot.of_floats(operator, rows, *weights)):
        return None
    columns = by_columns(*weights)
    reason = None if columns else would_copy(*weights)
    if reason:
        return reason
    dtype = weights[0].dtype
    if dtype != torch.float32 and evidence.asked_for() is None and product.is_slow(dtype):
        return None  # whatever was measured where the library has instructions for it
    shapes, size = evidence.product_shapes(rows, *weights)
    # The libraries are good at many rows, whatever the layout: by columns the kernel has to be measured first.
    known = not columns or rows <= evidence.MOST_ROWS_BY_COLUMNS
    return evidence.slower("cpu", operator, "forward", "cpu", dtype, shapes, size, unmeasured=known)


def in_float(x, weight, scale):
    """Why the integer product of dynamic=True does not run; None if it does. Without integer instructions it takes 30 times as
    long as a product in float32, or loses sums."""
    reason = int8.in_float(x, weight, "cpu")
    if reason or int8.library_multiplies():
        return reason
    instructions = dot.of_integers(x, weight, scale)
    if instructions is None:
        return "PyTorch has no instructions for products of int8 here"
    return None if instructions.used else f"{instructions.name}: {instructions.reason}"


def left_to_library_forward(x, weight, bias, residual, scale=None, dynamic=False):
    rows = x.shape[:-1].numel()
    if scale is None:
        return library_is_faster("linear", rows, weight)
    if dynamic and in_float(x, weight, scale) is None:
        return None if dot.chosen(dot.of_integers(x, weight, scale)) else "dynamic=True asks for torch._int_mm"
    shapes, size = evidence.product_shapes(rows, weight, scale=scale)
    return evidence.slower("cpu", "linear", "forward", "cpu", x.dtype, shapes, size)


def remark_forward(x, weight, bias, residual, scale=None, dynamic=False):
    if scale is None:
        return dot.remark(dot.of_floats("linear", x.shape[:-1].numel(), weight))
    reason = in_float(x, weight, scale) if dynamic else None
    if reason:
        return f"dynamic=True keeps x in floating point: {reason}"
    return dot.remark(dot.of_integers(x, weight, scale)) if dynamic else None


@prepares_launch
def forward(x, weight, bias, residual, scale=None, dynamic=False):
    if dynamic and (reason := in_float(x, weight, scale)):
        int8.say_once(reason)
        dynamic = False
    if left_to_library_forward(x, weight, bias, residual, scale, dynamic):
        return _library_forward if scale is None else _integers_by_library
    of_x, of_residual = rows_of(x), rows_of(residual)
    transposed = scale is None and by_columns(weight)
    of_weight = rows_of(weight.t() if transposed else weight)
    if of_x is None or of_weight is None or of_residual is None or not dense(bias, scale):
        return None
    (rows, k, x_stride), n, weight_stride, residual_stride = of_x, weight.shape[0], of_weight[2], of_residual[2]
    shape, dtype = (*x.shape[:-1], n), x.dtype
    bits = 0 if scale is None else format_of(scale).bits
    more = () if dynamic else (transposed, bits)
    numbers = rows, n, k, x_stride, weight_stride, residual_stride, *more, DTYPE_CODES[dtype]
    kernel, new = _kernel(x, weight, scale, dynamic), maker(shape, dtype)

    def launch(x, weight, bias, residual, scale=None, dynamic=False):
        y = new()
        kernel(x, weight, scale, bias, residual, y, *numbers)
        return (y,)

    return launch


def _kernel(x, weight, scale, dynamic):
    if dynamic:
        return dot.chosen(dot.of_integers(x, weight, scale)).linear_dynamic_forward
    kernels = dot.chosen(dot.of_floats("linear", x.shape[:-1].numel(), weight)) if scale is None else None
    return (kernels or cpu()).linear_forward


def _integers_by_library(x, weight, bias, residual, scale, dynamic):
    if dynamic and in_float(x, weight, scale) is None:
        y = int8.product(x, weight, scale)
    else:
        y = _widened(x, weight, scale)
    y = y if bias is None else y.add_(bias)
    y = y if residual is None else y.add_(residual)
    return (y.to(x.dtype),)


def _widened(x, weight, scale):
    """The library's product with parts of the weight in float32, or in x's dtype where the processor multiplies that."""
    n, k = weight.shape[0], x.shape[-1]
    dtype = x.dtype if evidence.multiplies_itself(x.dtype) else torch.float32
    rows = x.reshape(-1, k).to(dtype)
    y = torch.empty(rows.shape[0], n, dtype=torch.float32, device=CPU)
    step = max(1, _PART // max(k, 1))
    for first in range(0, n, step):
        part = slice(first, first + step)
        y[:, part] = F.linear(rows, dequantized(weight[part], scale[part], dtype))
    return y.view(*x.shape[:-1], n)


def _library_forward(x, weight, bias, residual):
    y = F.linear(x, weight, bias)
    return (y if residual is None else y.add_(residual),)
