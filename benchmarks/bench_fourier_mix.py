"""fourier_mix beside torch.fft in float32: the sizes of FNet, short and long sequences, and lengths with awkward factors."""

import torch

import pyfused
from pyfused.bench import Case

from .peers import beside


def cases(device):
    shapes = [(2, 512, 768), (1, 128, 768), (1, 31, 768), (1, 512, 1024), (1, 1024, 1024), (1, 509, 768), (4, 64, 64)]
    if device == "cuda":
        shapes = [(64, 512, 768), (8, 512, 768), (64, 512, 1024), (64, 509, 768), (16, 2048, 768)]
    for shape in shapes:
        for dtype in (torch.float32, torch.bfloat16):
            x = torch.randn(shape, device=device).to(dtype)
            name = f"{'x'.join(map(str, shape))} {str(dtype).removeprefix('torch.')}"
            with torch.no_grad():
                providers = beside(
                    device,
                    lambda: pyfused.fourier_mix(x),
                    lambda: torch.fft.fft2(x.float()).real.to(dtype),
                )
                yield Case(
                    name,
                    providers,
                    lambda: torch.fft.fft2(x.double()).real,
                    bytes=2 * x.numel() * x.element_size(),
                )
