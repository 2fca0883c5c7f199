"""What do the launchers of CPU kernels share? A norm of torch's own in their place. See kernels/shared/prepared.py too."""

import torch


def library_norm(norm):
    """A function of (parameters, x, residual, y, total) that gives (y, total) by a norm of torch: norm(x + residual,
    *parameters)."""

    def launch(parameters, x, residual, y, total):
        if residual is not None:
            x = total = torch.add(x, residual, out=total).contiguous()
        normalised = norm(x, *parameters).contiguous()
        return normalised if y is None else y.copy_(normalised), total

    return launch
