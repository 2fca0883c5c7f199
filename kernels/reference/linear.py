"""linear in plain PyTorch: the definition of truth."""

import torch.nn.functional as F


def forward(x, weight, bias, residual):
    y = F.linear(x, weight, bias)
    return (y if residual is None else y + residual,)
