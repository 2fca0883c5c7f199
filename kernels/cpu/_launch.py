"""How do the CPU kernels of layer_norm and rms_norm start, and when do torch's norms replace them? kernels/shared/row_norm.py
launches the kernels."""

from pyfused import evidence
from pyfused.extensions import DTYPE_CODES, cpu


def begin_forward(norm):
    rows, n, x_stride, residual_stride, eps = norm.rows, norm.n, norm.x_stride, norm.residual_stride, norm.eps
    kernel, code = getattr(cpu(), f"{norm.operator}_forward"), DTYPE_CODES[norm.dtype]

    def start(x, residual, weight, bias, y, total, mean, rstd):  # all written out: *args costs 0.1 us
        kernel(x, residual, weight, bias, y, total, mean, rstd, rows, n, x_stride, residual_stride, eps, code)

    return start


def begin_backward(norm):
    numbers = norm.rows, norm.n, norm.x_stride, DTYPE_CODES[norm.dtype]
    kernel = getattr(cpu(), f"{norm.operator}_backward")
    return lambda *tensors: kernel(*tensors, *numbers)


def slower(operator, *args):
    """Why torch's norm runs instead of the kernel's forward, or None. Only the kernel saves the statistics for a backward."""
    return None if args[-1] else evidence.slower_call("cpu", operator, args)


def library_norm(norm):
    """A function of (parameters, x, residual). It returns (y, total) with y = norm(x + residual, *parameters) by torch."""

    def launch(parameters, x, residual):
        total = None if residual is None else (x + residual).contiguous()
        return norm(x if total is None else total, *parameters).contiguous(), total

    return launch
