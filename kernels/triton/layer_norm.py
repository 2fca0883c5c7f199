"""layer_norm in Triton: y = (total - mean) * rstd * weight + bias, with the centred kernels of _row_norm.py."""

from pyfused.kernels.shared.prepared import launched

from . import _row_norm


@launched
def forward(x, weight, bias, eps, residual, save):
    run = _row_norm.prepare_forward(x, weight, bias, eps, residual, save, centred=True)
    if run is None:
        return None
    return lambda x, weight, bias, _eps, residual, _save, y=None, total=None: run(x, weight, bias, residual, y, total)


@launched
def backward(grad_y, grad_total, x, weight, mean, rstd, has_bias):
    run = _row_norm.prepare_backward(grad_y, grad_total, x, weight, has_bias, centred=True)
    return run and (lambda *args: run(*args[:6]))
