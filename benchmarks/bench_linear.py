"""linear beside torch's. Few rows are bound by reading the weights, many rows by the matrix rate.

Integer weights: beside torch's product of the same values in floating point. int8 reads a quarter of float32's bytes,
int4 0.14 of them. So one row should take these shares of its time where memory sets the pace.
"""

from functools import partial

import torch
import torch.nn.functional as F

import pyfused
from pyfused.bench import Calls, Case
from pyfused.bench.peers import backends
from pyfused.weight_format import FORMATS

ROWS = 1, 4, 16, 128
FEW = 1, 4
WEIGHTS = (768, 768), (768, 2304), (3072, 768), (768, 50257)  # in, out


def cases(setup):
    for dtype in setup.dtypes:
        for n, m in setup.pick(WEIGHTS, WEIGHTS, [(24, 40)]):
            for rows in setup.pick(ROWS, ROWS, [3]):
                yield Case(f"{rows}x{n} -> {m}", dtype, partial(forward, setup, rows, n, m, dtype))
    if torch.float32 in setup.dtypes and setup.device == "cpu":
        for n, m in setup.pick(WEIGHTS, WEIGHTS, [(64, 40)]):
            for rows in setup.pick(FEW, FEW, [3]):
                for scheme in FORMATS:
                    yield Case(
                        f"{scheme} {rows}x{n} -> {m}", torch.float32, partial(integers, setup, rows, n, m, scheme)
                    )


def forward(setup, rows, n, m, dtype):
    inputs = setup.randn(rows, n, dtype=dtype), (setup.randn(m, n) / n**0.5).to(dtype), setup.randn(m, dtype=dtype)
    return Calls(pyfused.linear, F.linear, inputs, peers=backends(pyfused.linear))


def integers(setup, rows, n, m, scheme):
    x, bias, form = setup.randn(rows, n), setup.randn(m), FORMATS[scheme]
    weight, scale = form.quantized(setup.randn(m, n) / n**0.5)
    dense = form.dequantized(weight, scale, torch.float32)

    def exact():
        return F.linear(x.double(), form.dequantized(weight, scale, torch.float64), bias.double())

    def ours(x, dense, bias):
        return pyfused.linear(x, weight, bias, scale=scale)

    return Calls(ours, F.linear, (x, dense, bias), exact=exact)
