"""gated_ffn beside torch's three linears, gelu and product, at the sizes of T5 1.1. Few rows are bound by reading the weights,
many rows by the matrix rate."""

from functools import partial

import torch.nn.functional as F

import pyfused
from pyfused.bench import Calls, Case, training
from pyfused.bench.peers import backends, compiled

from .bench_ffn import COMPILED

CPU = tuple((rows, 768, 2048) for rows in (1, 4, 16, 128, 512))
GPU = (*CPU, (1, 2048, 5120), (8192, 768, 2048), (4096, 2048, 5120))


def cases(setup):
    for dtype in setup.dtypes:
        for rows, n, f in setup.pick(CPU, GPU, [(3, 24, 40)]):
            yield Case(f"{rows}x{n}x{f}", dtype, partial(forward, setup, rows, n, f, dtype))
        for rows, n, f in setup.pick([(128, 768, 2048)], [(8192, 768, 2048)], [(3, 24, 40)]):
            yield Case(f"train {rows}x{n}x{f}", dtype, partial(train, setup, rows, n, f, dtype))


def fused(x, w_gate, w_up, w_out, residual):
    return pyfused.gated_ffn(x, w_gate, w_up, w_out, activation="gelu_tanh", residual=residual)


def plain(x, w_gate, w_up, w_out, residual):
    return F.linear(F.gelu(F.linear(x, w_gate), approximate="tanh") * F.linear(x, w_up), w_out) + residual


def inputs_of(setup, rows, n, f, dtype):
    w_gate, w_up = ((setup.randn(f, n) / n**0.5).to(dtype) for _ in range(2))
    x, residual = (setup.randn(rows, n, dtype=dtype) for _ in range(2))
    return x, w_gate, w_up, (setup.randn(n, f) / f**0.5).to(dtype), residual


def forward(setup, rows, n, f, dtype):
    peers = {**backends(fused), **(compiled(plain) if rows in COMPILED else {})}
    return Calls(fused, plain, inputs_of(setup, rows, n, f, dtype), peers=peers)


def train(setup, rows, n, f, dtype):
    leaves = (t.requires_grad_() for t in inputs_of(setup, rows, n, f, dtype))
    grad, own = setup.randn(rows, n, dtype=dtype), training(fused)
    return Calls(own, training(plain), (*leaves, grad), peers=backends(own), trains=True)
