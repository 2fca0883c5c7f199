"""layer_norm (+residual) beside torch: bound by memory, so the floor is bytes over the copy bandwidth."""

import torch
import torch.nn.functional as F

import pyfused
from pyfused.bench import Case

from .peers import beside


def cases(device):
    shapes = [(1, 768), (128, 768), (512, 768), (512, 1024), (512, 4096)]
    if device == "cuda":
        shapes = [(4096, 768), (4096, 1024), (16384, 1024), (4096, 4096)]
    dtypes = [torch.float32, torch.bfloat16]
    for rows, n in shapes:
        for dtype in dtypes:
            x, r = (torch.randn(rows, n, device=device).to(dtype) for _ in range(2))
            w, b = (torch.randn(n, device=device).to(dtype) for _ in range(2))
            size = rows * n * x.element_size()
            name = f"{rows}x{n} {str(dtype).removeprefix('torch.')}"
            with torch.no_grad():
                yield Case(
                    f"{name} residual",
                    beside(
                        device,
                        lambda: pyfused.layer_norm(x, w, b, residual=r),
                        lambda: F.layer_norm(x + r, (n,), w, b),
                        compiled=dtype == torch.bfloat16,
                    ),
                    bytes=4 * size,
                    tolerance=2e-2,
                )
                yield Case(
                    name,
                    beside(device, lambda: pyfused.layer_norm(x, w, b), lambda: F.layer_norm(x, (n,), w, b)),
                    bytes=2 * size,
                    tolerance=2e-2,
                )
            if device == "cuda":
                yield backward(rows, n, dtype, device, name, size)


def backward(rows, n, dtype, device, name, size):
    x, w, b, g = (torch.randn(s, device=device, dtype=dtype) for s in [(rows, n), (n,), (n,), (rows, n)])
    inputs = [t.requires_grad_() for t in (x, w, b)]
    own, other = pyfused.layer_norm(*inputs), F.layer_norm(x, (n,), w, b)
    return Case(
        f"{name} backward",
        {
            "pyfused": lambda: torch.autograd.grad(own, inputs, g, retain_graph=True),
            "torch": lambda: torch.autograd.grad(other, inputs, g, retain_graph=True),
        },
        bytes=3 * size,
        tolerance=3e-2,
    )
