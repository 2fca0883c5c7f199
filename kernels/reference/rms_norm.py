"""rms_norm in plain PyTorch: the definition of truth (Zhang and Sennrich 2019, arXiv:1910.07467)."""

import torch


def forward(x, weight, eps, residual, save):
    """(y, total, rstd) of total = x + residual; the mean of the squares in float32, or float64 for float64 input."""
    total = None if residual is None else (x + residual).contiguous()
    t = x if residual is None else total
    wide = t.double() if t.dtype == torch.float64 else t.float()
    # With a dimension for one row too: see layer_norm
    rstd = torch.rsqrt(wide.square().mean(-1, keepdim=True) + eps)
    y = wide * rstd * weight
    return y.to(x.dtype).contiguous(), total, rstd[..., 0] if save else None


def backward(grad_y, grad_total, x, weight, rstd):
    """(grad_x, grad_weight). `x` is forward's x + residual; grad_total is that sum's own gradient or None."""
    wide = rstd.dtype
    xhat = x.to(wide) * rstd[..., None]
    dy = grad_y.to(wide)
    g = dy * weight.to(wide)
    grad_x = (g - xhat * (g * xhat).mean(-1, keepdim=True)) * rstd[..., None]
    if grad_total is not None:
        grad_x = grad_x + grad_total
    rows = tuple(range(x.dim() - 1))
    grad_weight = (dy * xhat).sum(rows) if rows else dy * xhat
    return grad_x.to(x.dtype), grad_weight.to(x.dtype)
