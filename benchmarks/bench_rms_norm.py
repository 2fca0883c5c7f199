"""rms_norm (+residual) beside torch's and the formula of Hugging Face's T5: bound by memory."""

import torch
import torch.nn.functional as F

import pyfused
from pyfused.bench import Case

from .peers import beside, in_double


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

            def plain(x=x, w=w):
                return F.rms_norm(x, w.shape, w, 1e-6)

            def plain_sum(x=x, w=w, r=r):
                return F.rms_norm(x + r, w.shape, w, 1e-6)

            with torch.no_grad():
                providers = beside(
                    device,
                    lambda: pyfused.rms_norm(x, w, residual=r),
                    plain_sum,
                    compiled=dtype == torch.bfloat16,
                )
                providers["t5"] = lambda: t5s_formula(x + r, w)
                yield Case(f"{name} residual", providers, in_double(plain_sum), bytes=4 * size)
                providers = beside(device, lambda: pyfused.rms_norm(x, w), plain)
                providers["t5"] = lambda: t5s_formula(x, w)
                yield Case(name, providers, in_double(plain), bytes=2 * size)
            yield backward(rows, n, dtype, device, name, size)


def backward(rows, n, dtype, device, name, size):
    x, w, g = (torch.randn(s, device=device, dtype=dtype) for s in [(rows, n), (n,), (rows, n)])
    inputs = [t.requires_grad_() for t in (x, w)]
    own, other = pyfused.rms_norm(*inputs), F.rms_norm(x, (n,), w, 1e-6)

    def whole(x=x, w=w, g=g):
        return torch.autograd.grad(F.rms_norm(x, w.shape, w, 1e-6), (x, w), g)

    return Case(
        f"{name} backward",
        {
            "pyfused": lambda: torch.autograd.grad(own, inputs, g, retain_graph=True),
            "torch": lambda: torch.autograd.grad(other, inputs, g, retain_graph=True),
        },
        in_double(whole),
        bytes=3 * size,
    )
