"""rms_norm (+residual) beside torch's and the formula of Hugging Face's T5: bound by memory."""

import torch
import torch.nn.functional as F

import pyfused
from pyfused.bench import Case

from .peers import beside


def t5s_formula(x, w):
    """T5LayerNorm's forward."""
    variance = x.float().pow(2).mean(-1, keepdim=True)
    return w * (x * torch.rsqrt(variance + 1e-6)).to(w.dtype)


def cases(device):
    shapes = [(1, 768), (128, 768), (512, 768), (512, 1024), (512, 4096)]
    if device == "cuda":
        shapes = [(4096, 768), (4096, 1024), (16384, 1024), (4096, 4096)]
    for rows, n in shapes:
        for dtype in (torch.float32, torch.bfloat16):
            x, r = (torch.randn(rows, n, device=device).to(dtype) for _ in range(2))
            w = torch.randn(n, device=device).to(dtype)
            size = rows * n * x.element_size()
            name = f"{rows}x{n} {str(dtype).removeprefix('torch.')}"
            with torch.no_grad():
                providers = beside(
                    device,
                    lambda: pyfused.rms_norm(x, w, residual=r),
                    lambda: F.rms_norm(x + r, (n,), w, 1e-6),
                    compiled=dtype == torch.bfloat16,
                )
                providers["t5"] = lambda: t5s_formula(x + r, w)
                yield Case(f"{name} residual", providers, bytes=4 * size, tolerance=2e-2)
                providers = beside(device, lambda: pyfused.rms_norm(x, w), lambda: F.rms_norm(x, (n,), w, 1e-6))
                providers["t5"] = lambda: t5s_formula(x, w)
                yield Case(name, providers, bytes=2 * size, tolerance=2e-2)
            yield backward(rows, n, dtype, device, name, size)


def backward(rows, n, dtype, device, name, size):
    x, w, g = (torch.randn(s, device=device, dtype=dtype) for s in [(rows, n), (n,), (rows, n)])
    inputs = [t.requires_grad_() for t in (x, w)]
    own, other = pyfused.rms_norm(*inputs), F.rms_norm(x, (n,), w, 1e-6)
    return Case(
        f"{name} backward",
        {
            "pyfused": lambda: torch.autograd.grad(own, inputs, g, retain_graph=True),
            "torch": lambda: torch.autograd.grad(other, inputs, g, retain_graph=True),
        },
        bytes=3 * size,
        tolerance=3e-2,
    )
