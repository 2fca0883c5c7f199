"""layer_norm (+residual) beside torch. It is bound by memory: the lower bound is bytes / copy bandwidth."""

from functools import partial

import torch.nn.functional as F

import pyfused
from pyfused.bench import Calls, Case, training
from pyfused.bench.peers import backends, compiled, liger

CPU = (1, 768), (128, 768), (512, 768), (512, 1024), (512, 4096)
GPU = (4096, 768), (4096, 1024), (16384, 1024), (4096, 4096)


def cases(setup):
    return norm_cases(setup, pyfused.layer_norm, plain, 2)


def plain(x, weight, bias):
    return F.layer_norm(x, weight.shape, weight, bias)


def norm_cases(setup, norm, plain, vectors):
    """vectors: how many parameters of size N the norm has."""
    for shape in setup.pick(CPU, GPU, [(3, 40)]):
        for dtype in setup.dtypes:
            name, given = "{}x{}".format(*shape), (setup, norm, plain, vectors, shape, dtype)
            yield Case(f"{name} residual", dtype, partial(with_residual, *given))
            yield Case(name, dtype, partial(forward, *given))
            if shape[0] > 1:
                yield Case(f"train {name}", dtype, partial(train, *given))


def inputs_of(setup, vectors, shape, dtype):
    return setup.randn(*shape, dtype=dtype), *(setup.randn(shape[1], dtype=dtype) for _ in range(vectors))


def forward(setup, norm, plain, vectors, shape, dtype):
    peers = {**compiled(plain), **backends(norm), **liger(norm.__name__)}
    return Calls(norm, plain, inputs_of(setup, vectors, shape, dtype), peers=peers)


def with_residual(setup, norm, plain, vectors, shape, dtype):
    def fused(residual, x, *parameters):
        return norm(x, *parameters, residual=residual)

    def added(residual, x, *parameters):
        return plain(x + residual, *parameters)

    inputs = setup.randn(*shape, dtype=dtype), *inputs_of(setup, vectors, shape, dtype)
    return Calls(fused, added, inputs, peers={**compiled(added), **backends(fused)})


def train(setup, norm, plain, vectors, shape, dtype):
    leaves = (t.requires_grad_() for t in inputs_of(setup, vectors, shape, dtype))
    fused, grad = training(norm), setup.randn(*shape, dtype=dtype)
    return Calls(fused, training(plain), (*leaves, grad), peers=backends(fused), trains=True)
