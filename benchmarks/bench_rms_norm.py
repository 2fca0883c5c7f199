"""rms_norm (+residual) beside torch's. It is bound by memory: the lower bound is bytes / copy bandwidth."""

from functools import partial

import torch.nn.functional as F

import pyfused
from pyfused.bench import Calls, Case, training
from pyfused.bench.peers import backends, compiled, liger

from .bench_layer_norm import CPU, GPU


def cases(setup):
    for rows, n in setup.pick(CPU, GPU, [(3, 40)]):
        for dtype in setup.dtypes:
            name = f"{rows}x{n}"
            yield Case(f"{name} residual", dtype, partial(with_residual, setup, rows, n, dtype))
            yield Case(name, dtype, partial(forward, setup, rows, n, dtype))
            if rows > 1:
                yield Case(f"train {name}", dtype, partial(train, setup, rows, n, dtype))


def plain(x, weight):
    return F.rms_norm(x, weight.shape, weight, 1e-6)


def forward(setup, rows, n, dtype):
    inputs = setup.randn(rows, n, dtype=dtype), setup.randn(n, dtype=dtype)
    peers = {**compiled(plain), **backends(pyfused.rms_norm), **liger("rms_norm")}
    return Calls(pyfused.rms_norm, plain, inputs, peers=peers)


def with_residual(setup, rows, n, dtype):
    inputs = setup.randn(rows, n, dtype=dtype), setup.randn(rows, n, dtype=dtype), setup.randn(n, dtype=dtype)

    def fused(x, residual, weight):
        return pyfused.rms_norm(x, weight, residual=residual)

    def added(x, residual, weight):
        return plain(x + residual, weight)

    return Calls(fused, added, inputs, peers={**compiled(added), **backends(fused)})


def train(setup, rows, n, dtype):
    x, weight = (t.requires_grad_() for t in forward(setup, rows, n, dtype).inputs)
    fused, grad = training(pyfused.rms_norm), setup.randn(rows, n, dtype=dtype)
    return Calls(fused, training(plain), (x, weight, grad), peers=backends(fused), trains=True)
