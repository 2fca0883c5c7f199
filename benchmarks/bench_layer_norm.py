"""layer_norm (+residual) beside torch. It is bound by memory: the lower bound is bytes / copy bandwidth."""

from functools import partial

import torch.nn.functional as F

import pyfused
from pyfused.bench import Calls, Case, training
from pyfused.bench.peers import backends, compiled, liger

CPU = (1, 768), (128, 768), (512, 768), (512, 1024), (512, 4096)
GPU = (4096, 768), (4096, 1024), (16384, 1024), (4096, 4096)


def cases(setup):
    for rows, n in setup.pick(CPU, GPU, [(3, 40)]):
        for dtype in setup.dtypes:
            name = f"{rows}x{n}"
            yield Case(f"{name} residual", dtype, partial(with_residual, setup, rows, n, dtype))
            yield Case(name, dtype, partial(forward, setup, rows, n, dtype))
            if rows > 1:
                yield Case(f"train {name}", dtype, partial(train, setup, rows, n, dtype))


def plain(x, weight, bias):
    return F.layer_norm(x, weight.shape, weight, bias)


def forward(setup, rows, n, dtype):
    inputs = setup.randn(rows, n, dtype=dtype), setup.randn(n, dtype=dtype), setup.randn(n, dtype=dtype)
    peers = {**compiled(plain), **backends(pyfused.layer_norm), **liger("layer_norm")}
    return Calls(pyfused.layer_norm, plain, inputs, peers=peers)


def with_residual(setup, rows, n, dtype):
    x, residual = (setup.randn(rows, n, dtype=dtype) for _ in range(2))
    weight, bias = (setup.randn(n, dtype=dtype) for _ in range(2))

    def fused(x, residual, weight, bias):
        return pyfused.layer_norm(x, weight, bias, residual=residual)

    def added(x, residual, weight, bias):
        return plain(x + residual, weight, bias)

    return Calls(fused, added, (x, residual, weight, bias), peers={**compiled(added), **backends(fused)})


def train(setup, rows, n, dtype):
    calls = forward(setup, rows, n, dtype)
    leaves = tuple(t.requires_grad_() for t in calls.inputs)
    fused, grad = training(pyfused.layer_norm), setup.randn(rows, n, dtype=dtype)
    return Calls(fused, training(plain), (*leaves, grad), peers=backends(fused), trains=True)
