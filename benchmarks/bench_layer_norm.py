"""layer_norm (+residual) beside torch: bound by memory, so the floor is bytes over the copy bandwidth."""

import torch
import torch.nn.functional as F

import pyfused
from pyfused.bench import Case


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
                    {
                        "pyfused": lambda: pyfused.layer_norm(x, w, b, residual=r),
                        "torch": lambda: F.layer_norm(x + r, (n,), w, b),
                    },
                    bytes=4 * size,
                    tolerance=2e-2,
                )
                yield Case(
                    name,
                    {"pyfused": lambda: pyfused.layer_norm(x, w, b), "torch": lambda: F.layer_norm(x, (n,), w, b)},
                    bytes=2 * size,
                    tolerance=2e-2,
                )
