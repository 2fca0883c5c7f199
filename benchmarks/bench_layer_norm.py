"""layer_norm (+residual) beside torch: bound by memory, so the floor is bytes over the copy bandwidth."""

import torch
import torch.nn.functional as F

import pyfused
from pyfused.bench import Case

from .peers import beside, in_double


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

            def plain(x=x, w=w, b=b):
                return F.layer_norm(x, w.shape, w, b)

            def plain_sum(x=x, w=w, b=b, r=r):
                return F.layer_norm(x + r, w.shape, w, b)

            with torch.no_grad():
                yield Case(
                    f"{name} residual",
                    beside(
                        device,
                        lambda: pyfused.layer_norm(x, w, b, residual=r),
                        plain_sum,
                        compiled=dtype == torch.bfloat16,
                    ),
                    in_double(plain_sum),
                    bytes=4 * size,
                )
                yield Case(
                    name,
                    beside(device, lambda: pyfused.layer_norm(x, w, b), plain),
                    in_double(plain),
                    bytes=2 * size,
                )
            if device == "cuda":
                yield backward(rows, n, dtype, device, name, size)


def backward(rows, n, dtype, device, name, size):
    x, w, b, g = (torch.randn(s, device=device, dtype=dtype) for s in [(rows, n), (n,), (n,), (rows, n)])
    inputs = [t.requires_grad_() for t in (x, w, b)]
    own, other = pyfused.layer_norm(*inputs), F.layer_norm(x, (n,), w, b)

    def whole(x=x, w=w, b=b, g=g):
        return torch.autograd.grad(F.layer_norm(x, w.shape, w, b), (x, w, b), g)

    return Case(
        f"{name} backward",
        {
            "pyfused": lambda: torch.autograd.grad(own, inputs, g, retain_graph=True),
            "torch": lambda: torch.autograd.grad(other, inputs, g, retain_graph=True),
        },
        in_double(whole),
        bytes=3 * size,
    )
