"""gated_ffn beside torch's three linears, gelu and product, at the sizes of T5 1.1: bound by the weights' bytes for few rows,
by the matrix rate for many."""

import torch
import torch.nn.functional as F

import pyfused
from pyfused.bench import Case

from .peers import beside, in_double


def cases(device):
    shapes = [(rows, 768, 2048) for rows in (1, 4, 16, 128, 512)]
    if device == "cuda":
        shapes += [(1, 2048, 5120), (8192, 768, 2048), (4096, 2048, 5120)]
    for dtype in (torch.float32, torch.bfloat16):
        for rows, n, f in shapes:
            x, r = (torch.randn(rows, n, device=device).to(dtype) for _ in range(2))
            w_gate, w_up = ((torch.randn(f, n, device=device) / n**0.5).to(dtype) for _ in range(2))
            w_out = (torch.randn(n, f, device=device) / f**0.5).to(dtype)

            def plain(x=x, r=r, w_gate=w_gate, w_up=w_up, w_out=w_out):
                hidden = F.gelu(F.linear(x, w_gate), approximate="tanh") * F.linear(x, w_up)
                return F.linear(hidden, w_out) + r

            def fused(x=x, r=r, w_gate=w_gate, w_up=w_up, w_out=w_out):
                return pyfused.gated_ffn(x, w_gate, w_up, w_out, activation="gelu_tanh", residual=r)

            with torch.no_grad():
                yield Case(
                    f"{rows}x{n}x{f} {str(dtype).removeprefix('torch.')}",
                    beside(device, fused, plain, compiled=dtype == torch.bfloat16 and rows in (1, 8192)),
                    in_double(plain),
                    bytes=3 * n * f * x.element_size() if rows <= 16 else 0,
                    flops=6 * rows * n * f if rows > 16 else 0,
                )
