"""relative_bias beside T5's own code in PyTorch: the buckets of all pairs, then an embedding lookup.

pyfused moves the (1, H, Sq, Sk) result once. PyTorch first moves several integer tensors of Sq x Sk.
"""

import math
from functools import partial

import torch
import torch.nn.functional as F

import pyfused
from pyfused.bench import Calls, Case, training
from pyfused.bench.peers import backends

SHAPES = (12, 128), (12, 512), (8, 2048)


def cases(setup):
    for dtype in setup.dtypes:
        for heads, length in setup.pick(SHAPES, SHAPES, [(2, 20)]):
            name = f"{heads}x{length}x{length}"
            yield Case(name, dtype, partial(forward, setup, heads, length, dtype))
            yield Case(f"train {name}", dtype, partial(train, setup, heads, length, dtype))


def in_pytorch(table, sq, sk):
    """The bidirectional bias with 32 buckets and a maximum distance of 128, step by step."""
    relative = torch.arange(sk, device=table.device)[None] - torch.arange(sq, device=table.device)[:, None]
    distance = relative.abs()
    far = 8 + (torch.log(distance.float() / 8) / math.log(16) * 8).long()
    bucket = torch.where(distance < 8, distance, far.clamp(max=15)) + 16 * (relative > 0)
    return F.embedding(bucket, table).permute(2, 0, 1)[None].contiguous()


def ways(length):
    def fused(table):
        return pyfused.relative_bias(table, length, length, bidirectional=True)

    return fused, lambda table: in_pytorch(table, length, length)


def forward(setup, heads, length, dtype):
    fused, plain = ways(length)
    return Calls(fused, plain, (setup.randn(32, heads, dtype=dtype),), peers=backends(fused))


def train(setup, heads, length, dtype):
    fused, plain = map(training, ways(length))
    inputs = setup.randn(32, heads, dtype=dtype).requires_grad_(), setup.randn(1, heads, length, length, dtype=dtype)
    return Calls(fused, plain, inputs, peers=backends(fused), trains=True)
