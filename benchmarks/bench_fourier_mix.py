"""fourier_mix beside torch.fft: the sizes of FNet, short and long sequences, and lengths with large prime factors. torch.fft
has no half precision on a CPU, nor for these sizes on a GPU, so plain PyTorch computes in float32 and rounds."""

from functools import partial

import torch

import pyfused
from pyfused.bench import Calls, Case
from pyfused.bench.peers import backends

CPU = (2, 512, 768), (1, 128, 768), (1, 31, 768), (1, 512, 1024), (1, 1024, 1024), (1, 509, 768), (4, 64, 64)
GPU = (64, 512, 768), (8, 512, 768), (64, 512, 1024), (64, 509, 768), (16, 2048, 768)


def cases(setup):
    for shape in setup.pick(CPU, GPU, [(2, 12, 20)]):
        for dtype in setup.dtypes:
            yield Case("x".join(map(str, shape)), dtype, partial(forward, setup, shape, dtype))


def plain(x):
    return torch.fft.fft2(x if x.dtype == torch.float64 else x.float()).real.to(x.dtype)


def forward(setup, shape, dtype):
    # Small numbers: one result is the sum of all of them, and float16 ends at 65504.
    x = (setup.randn(*shape) / 8).to(dtype)
    return Calls(pyfused.fourier_mix, plain, (x,), peers=backends(pyfused.fourier_mix))
