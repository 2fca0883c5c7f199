"""linear on the CPU: launches csrc/cpu/linear.cpp, or the library's product where that was measured to be faster."""

import torch.nn.functional as F

from pyfused import evidence
from pyfused.extensions import DTYPE_CODES, cpu
from pyfused.kernels.shared.layout import rows_of
from pyfused.kernels.shared.prepared import dense, maker, prepares_launch

MOST_ROWS_BY_COLUMNS = 8  # kMost of gemv_columns.h


def by_columns(rows, *weights):
    """Whether csrc/include/pyfused/gemv_columns.h takes these weights. All must be transposed views of matrices stored as
    (K, N), like the weights of Hugging Face's Conv1D."""
    return rows <= MOST_ROWS_BY_COLUMNS and all(w.stride()[1] != 1 and w.stride()[0] == 1 for w in weights)


def would_copy(*weights):
    if any(w.stride()[1] != 1 for w in weights):
        return "a weight whose last dimension is not contiguous would be copied"
    return None


def library_is_faster(rows, *weights):
    """Why the library (MKL or oneDNN) does these products. None if the kernels do."""
    reason = None if by_columns(rows, *weights) else would_copy(*weights)
    if reason:
        return reason
    shapes, size = evidence.product_shapes(rows, *weights)
    return evidence.slower("cpu", "linear", "forward", "cpu", weights[0].dtype, shapes, size)


def left_to_library_forward(x, weight, bias, residual):
    return library_is_faster(x.shape[:-1].numel(), weight)


@prepares_launch
def forward(x, weight, bias, residual):
    if left_to_library_forward(x, weight, bias, residual):
        return _library_forward
    of_x, of_residual = rows_of(x), rows_of(residual)
    transposed = by_columns(x.shape[:-1].numel(), weight)
    of_weight = rows_of(weight.t() if transposed else weight)
    if of_x is None or of_weight is None or of_residual is None or not dense(bias):
        return None
    (rows, k, x_stride), n, weight_stride, residual_stride = of_x, weight.shape[0], of_weight[2], of_residual[2]
    shape, dtype = (*x.shape[:-1], n), x.dtype
    numbers = rows, n, k, x_stride, weight_stride, residual_stride, transposed, DTYPE_CODES[dtype]
    kernel, new = cpu().linear_forward, maker(shape, dtype)

    def launch(x, weight, bias, residual):
        y = new()
        kernel(x, weight, bias, residual, y, *numbers)
        return (y,)

    return launch


def _library_forward(x, weight, bias, residual):
    y = F.linear(x, weight, bias)
    return (y if residual is None else y.add_(residual),)
