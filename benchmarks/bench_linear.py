"""linear beside torch's: bound by the weights' bytes for few rows, by the matrix rate for many."""

import torch
import torch.nn.functional as F

import pyfused
from pyfused.bench import Case

from .peers import beside, in_double


def cases(device):
    for dtype in (torch.float32, torch.bfloat16):
        for n, m in [(768, 2304), (768, 768), (3072, 768), (768, 50257)]:
            w, b = (torch.randn(m, n, device=device) / n**0.5).to(dtype), torch.randn(m, device=device).to(dtype)
            for rows in (1, 4, 16, 128):
                x = torch.randn(rows, n, device=device).to(dtype)

                def plain(x=x, w=w, b=b):
                    return F.linear(x, w, b)

                with torch.no_grad():
                    yield Case(
                        f"{rows}x{n} -> {m} {str(dtype).removeprefix('torch.')}",
                        beside(device, lambda: pyfused.linear(x, w, b), plain),
                        in_double(plain),
                        bytes=n * m * x.element_size() if rows <= 16 else 0,
                        flops=2 * rows * n * m if rows > 16 else 0,
                    )
