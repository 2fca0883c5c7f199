"""rms_norm in Triton: y = total * rstd * weight, with the kernels of _row_norm.py, not centred."""

from pyfused.kernels.shared.prepared import launched

from . import _row_norm


@launched
def forward(x, weight, eps, residual, save):
    run = _row_norm.prepare_forward(x, weight, None, eps, residual, save, centred=False)
    if run is None:
        return None

    def launch(x, weight, _eps, residual, _save, y=None, total=None):
        y, total, _, rstd = run(x, weight, None, residual, y, total)
        return y, total, rstd

    return launch


@launched
def backward(grad_y, grad_total, x, weight, rstd):
    run = _row_norm.prepare_backward(grad_y, grad_total, x, weight, False, centred=False)
    return run and (lambda grad_y, grad_total, x, weight, rstd: run(grad_y, grad_total, x, weight, None, rstd)[:2])
