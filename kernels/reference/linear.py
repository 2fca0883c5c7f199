"""linear in plain PyTorch: the definition of truth."""

import torch
import torch.nn.functional as F


def forward(x, weight, bias, residual):
    y = F.linear(x, weight, bias)
    return (y if residual is None else y + residual,)


def product(x, weight, bias, y=None):
    """x weight^T + bias; in y where one is given, contiguous and of the result's shape and dtype."""
    if y is None:
        return F.linear(x, weight, bias)
    count = x.shape[:-1].numel()
    rows, result = x.reshape(count, x.shape[-1]), y.view(count, y.shape[-1])
    if bias is None:
        torch.mm(rows, weight.t(), out=result)
    else:
        torch.addmm(bias, rows, weight.t(), out=result)
    return y


def _into(x, weight, bias, residual, y):
    product(x, weight, bias, y)
    if residual is not None:
        y.add_(residual)


forward.into = _into
