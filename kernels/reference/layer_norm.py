"""layer_norm in plain PyTorch: the definition of truth (Ba et al. 2016, arXiv:1607.06450)."""

import torch


def forward(x, weight, bias, eps, residual, save):
    """(y, total, mean, rstd) of total = x + residual; statistics in float32, or float64 for float64 input."""
    total = None if residual is None else (x + residual).contiguous()
    t = x if residual is None else total
    wide = t.double() if t.dtype == torch.float64 else t.float()
    # The statistics of one row keep a dimension: the derivative in forward mode of a 0-d float32 tensor plus a number is
    # float64 in torch.
    mean = wide.mean(-1, keepdim=True)
    rstd = torch.rsqrt((wide - mean).square().mean(-1, keepdim=True) + eps)
    y = (wide - mean) * rstd * weight
    if bias is not None:
        y = y + bias
    return y.to(x.dtype).contiguous(), total, mean[..., 0] if save else None, rstd[..., 0] if save else None


def backward(grad_y, grad_total, x, weight, mean, rstd, has_bias):
    """(grad_x, grad_weight, grad_bias). `x` is forward's x + residual; grad_total is that sum's own gradient or None."""
    wide = mean.dtype
    xhat = (x.to(wide) - mean[..., None]) * rstd[..., None]
    dy = grad_y.to(wide)
    g = dy * weight.to(wide)
    grad_x = (g - g.mean(-1, keepdim=True) - xhat * (g * xhat).mean(-1, keepdim=True)) * rstd[..., None]
    if grad_total is not None:
        grad_x = grad_x + grad_total
    rows = tuple(range(x.dim() - 1))
    grad_weight = (dy * xhat).sum(rows) if rows else dy * xhat
    grad_bias = (dy.sum(rows) if rows else dy) if has_bias else None
    return grad_x.to(x.dtype), grad_weight.to(x.dtype), None if grad_bias is None else grad_bias.to(x.dtype)
