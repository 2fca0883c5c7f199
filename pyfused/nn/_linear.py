"""Stand-in for pyfused.ops.linear."""

import torch.nn.functional as F


def linear(x, weight, bias=None, *, residual=None):
    y = F.linear(x, weight, bias)
    return y if residual is None else y + residual
