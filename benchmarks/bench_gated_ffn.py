"""gated_ffn beside torch's three linears, gelu and product, at the sizes of T5 1.1. Few rows are bound by reading the weights,
many rows by the matrix rate."""

import torch.nn.functional as F

import pyfused

from .bench_ffn import feed_forward_cases

CPU = tuple((rows, 768, 2048) for rows in (1, 4, 16, 128, 512))
GPU = (*CPU, (1, 2048, 5120), (8192, 768, 2048), (4096, 2048, 5120))


def cases(setup):
    return feed_forward_cases(setup, CPU, GPU, fused, plain, inputs_of)


def fused(x, w_gate, w_up, w_out, residual):
    return pyfused.gated_ffn(x, w_gate, w_up, w_out, activation="gelu_tanh", residual=residual)


def plain(x, w_gate, w_up, w_out, residual):
    return F.linear(F.gelu(F.linear(x, w_gate), approximate="tanh") * F.linear(x, w_up), w_out) + residual


def inputs_of(setup, rows, n, f, dtype):
    w_gate, w_up = ((setup.randn(f, n) / n**0.5).to(dtype) for _ in range(2))
    x, residual = (setup.randn(rows, n, dtype=dtype) for _ in range(2))
    return x, w_gate, w_up, (setup.randn(n, f) / f**0.5).to(dtype), residual
