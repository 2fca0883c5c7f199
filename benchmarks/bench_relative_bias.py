"""relative_bias beside what T5 does in PyTorch: buckets of all pairs, then an embedding of them.

Moves the (1, H, Sq, Sk) result once; PyTorch moves several integer tensors of Sq x Sk before it.
"""

import math

import torch
import torch.nn.functional as F

import pyfused
from pyfused.bench import Case

from .peers import in_double


def in_pytorch(table, sq, sk):
    """The bidirectional bias of 32 buckets and 128, step by step."""
    relative = torch.arange(sk, device=table.device)[None] - torch.arange(sq, device=table.device)[:, None]
    distance = relative.abs()
    far = 8 + (torch.log(distance.float() / 8) / math.log(16) * 8).long()
    bucket = torch.where(distance < 8, distance, far.clamp(max=15)) + 16 * (relative > 0)
    return F.embedding(bucket, table).permute(2, 0, 1)[None].contiguous()


def cases(device):
    for h, s in [(12, 128), (12, 512), (8, 2048)]:
        table = torch.randn(32, h, device=device)
        with torch.no_grad():
            yield Case(
                f"{h}x{s}x{s}",
                {
                    "pyfused": lambda: pyfused.relative_bias(table, s, s, bidirectional=True),
                    "torch": lambda: in_pytorch(table, s, s),
                },
                in_double(lambda table=table, s=s: in_pytorch(table, s, s)),
                bytes=4 * h * s * s,
            )
        leaf = table.clone().requires_grad_()
        grad = torch.randn(1, h, s, s, device=device)

        def train(call, s=s, leaf=leaf, grad=grad):
            return torch.autograd.grad(call(leaf, s), leaf, grad)

        def plain(s=s, leaf=leaf, grad=grad):
            return train(lambda t, n: in_pytorch(t, n, n), s, leaf, grad)

        yield Case(
            f"train {h}x{s}x{s}",
            {
                "pyfused": lambda: train(lambda t, n: pyfused.relative_bias(t, n, n, bidirectional=True)),
                "torch": plain,
            },
            in_double(plain),
            bytes=2 * 4 * h * s * s,
        )
