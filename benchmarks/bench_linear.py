"""linear beside torch's. Few rows are bound by reading the weights, many rows by the matrix rate."""

from functools import partial

import torch.nn.functional as F

import pyfused
from pyfused.bench import Calls, Case
from pyfused.bench.peers import backends

ROWS = 1, 4, 16, 128
WEIGHTS = (768, 768), (768, 2304), (3072, 768), (768, 50257)  # in, out


def cases(setup):
    for dtype in setup.dtypes:
        for n, m in setup.pick(WEIGHTS, WEIGHTS, [(24, 40)]):
            for rows in setup.pick(ROWS, ROWS, [3]):
                yield Case(f"{rows}x{n} -> {m}", dtype, partial(forward, setup, rows, n, m, dtype))


def forward(setup, rows, n, m, dtype):
    inputs = setup.randn(rows, n, dtype=dtype), (setup.randn(m, n) / n**0.5).to(dtype), setup.randn(m, dtype=dtype)
    return Calls(pyfused.linear, F.linear, inputs, peers=backends(pyfused.linear))
