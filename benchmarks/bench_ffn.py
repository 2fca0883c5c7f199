"""ffn beside torch's linear, gelu, linear: bound by the weights' bytes for few rows, by the matrix rate for many."""

import torch
import torch.nn.functional as F

import pyfused
from pyfused.bench import Case

from .peers import beside, in_double


def cases(device):
    shapes = [(rows, 768, 3072) for rows in (1, 4, 16, 128, 512)]
    if device == "cuda":
        shapes += [(1, 2048, 8192), (8192, 768, 3072), (4096, 2048, 8192)]
    for dtype in (torch.float32, torch.bfloat16):
        for rows, n, f in shapes:
            x, r = (torch.randn(rows, n, device=device).to(dtype) for _ in range(2))
            w_in, b_in = (torch.randn(f, n, device=device) / n**0.5).to(dtype), torch.randn(f, device=device).to(dtype)
            w_out, b_out = (
                (torch.randn(n, f, device=device) / f**0.5).to(dtype),
                torch.randn(n, device=device).to(dtype),
            )

            def plain(x=x, r=r, w_in=w_in, b_in=b_in, w_out=w_out, b_out=b_out):
                return F.linear(F.gelu(F.linear(x, w_in, b_in), approximate="tanh"), w_out, b_out) + r

            def fused(x=x, r=r, w_in=w_in, b_in=b_in, w_out=w_out, b_out=b_out):
                return pyfused.ffn(x, w_in, b_in, w_out, b_out, activation="gelu_tanh", residual=r)

            with torch.no_grad():
                yield Case(
                    f"{rows}x{n}x{f} {str(dtype).removeprefix('torch.')}",
                    beside(device, fused, plain, compiled=dtype == torch.bfloat16 and rows in (1, 8192)),
                    in_double(plain),
                    bytes=2 * n * f * x.element_size() if rows <= 16 else 0,
                    flops=4 * rows * n * f if rows > 16 else 0,
                )
