"""ffn beside torch's linear, gelu, linear. Few rows are bound by reading the weights, many rows by the matrix rate."""

from functools import partial

import torch.nn.functional as F

import pyfused
from pyfused.bench import Calls, Case, training
from pyfused.bench.peers import backends, compiled

CPU = tuple((rows, 768, 3072) for rows in (1, 4, 16, 128, 512))
GPU = (*CPU, (1, 2048, 8192), (8192, 768, 3072), (4096, 2048, 8192))
COMPILED = 1, 128, 8192  # numbers of rows that also run under torch.compile, which takes seconds to compile


def cases(setup):
    return feed_forward_cases(setup, CPU, GPU, fused, plain, inputs_of)


def fused(x, w_in, b_in, w_out, b_out, residual):
    return pyfused.ffn(x, w_in, b_in, w_out, b_out, activation="gelu_tanh", residual=residual)


def plain(x, w_in, b_in, w_out, b_out, residual):
    return F.linear(F.gelu(F.linear(x, w_in, b_in), approximate="tanh"), w_out, b_out) + residual


def inputs_of(setup, rows, n, f, dtype):
    w_in, w_out = (setup.randn(f, n) / n**0.5).to(dtype), (setup.randn(n, f) / f**0.5).to(dtype)
    x, residual = (setup.randn(rows, n, dtype=dtype) for _ in range(2))
    return x, w_in, setup.randn(f, dtype=dtype), w_out, setup.randn(n, dtype=dtype), residual


def feed_forward_cases(setup, cpu, gpu, fused, plain, inputs_of):
    """cpu, gpu: (rows, N, F) of each case. The N and F of training are those of the first."""
    _, n, f = cpu[0]
    for dtype in setup.dtypes:
        for shape in setup.pick(cpu, gpu, [(3, 24, 40)]):
            yield Case("{}x{}x{}".format(*shape), dtype, partial(forward, setup, fused, plain, inputs_of, shape, dtype))
        for shape in setup.pick([(128, n, f)], [(8192, n, f)], [(3, 24, 40)]):
            name = "train {}x{}x{}".format(*shape)
            yield Case(name, dtype, partial(train, setup, fused, plain, inputs_of, shape, dtype))


def forward(setup, fused, plain, inputs_of, shape, dtype):
    peers = {**backends(fused), **(compiled(plain) if shape[0] in COMPILED else {})}
    return Calls(fused, plain, inputs_of(setup, *shape, dtype), peers=peers)


def train(setup, fused, plain, inputs_of, shape, dtype):
    leaves = (t.requires_grad_() for t in inputs_of(setup, *shape, dtype))
    grad, own = setup.randn(*shape[:2], dtype=dtype), training(fused)
    return Calls(own, training(plain), (*leaves, grad), peers=backends(own), trains=True)
