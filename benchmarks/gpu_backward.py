"""How fast is attention's backward in five products, with atomics, beside the one in seven, which is repeatable?"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from gpu_device import DRY, Row, error_row, medians
from gpu_peers import attention_shapes, heads

import pyfused
from pyfused import dispatch, tiles
from pyfused.arguments import AttentionForward
from pyfused.ops.attention import bind
from pyfused.testing import judge

# (BLOCK_M, BLOCK_N, warps, stages) for five products, by head size. None of them spills registers in these calls on Hopper.
# With a causal mask, padding and T5's bias together only the last one of D = 128 has room.
TILES = {64: ((64, 128, 8, 2), (64, 64, 4, 2), (32, 128, 8, 2)), 128: ((32, 128, 8, 2), (32, 64, 8, 2))}
KERNEL = "attention_grad_five"


def five(numbers: tuple[int, ...]) -> Any:
    """Inside the block a backward without gradients of biases takes five products, with this tile."""
    return tiles.trying(KERNEL, dict(zip(tiles.KERNELS[KERNEL], (16, 32, 4, 1) if DRY else numbers)))


def backward(start: int) -> Iterator[Row]:
    """The same call in seven products and in five: milliseconds, TFLOP/s (of five products), the three gradients by
    the tolerance rule, and whether a second run gave the same bits for the queries."""
    kernel: Any = dispatch.kernel("triton", "attention")
    for b, h, s, d in attention_shapes():
        q, k, v = heads(b, h, s, d)
        grad_out = heads(b, h, s, d)[0]
        table = torch.randn(32, h, device=q.device, dtype=torch.bfloat16)
        variants: dict[str, Row] = {"": {}, "causal": {"is_causal": True}}
        variants |= {"T5 bias": {"relative_bias": pyfused.RelativeBias(table, True)}}
        for name, options in variants.items():
            with torch.no_grad():
                call = bind(q, k, v, **options)._replace(save=True)
                out, lse = kernel.forward(*call)
                args = call.backward(grad_out, out, lse, False, False)
            flops = 10 * b * h * s * s * d * (0.5 if name == "causal" else 1)
            title, launches = f"{b}x{h}x{s}x{d} {name}".strip(), {"seven": kernel.backward.prepare(*args)}
            for numbers in TILES[d]:
                with five(numbers):
                    launches["five {}x{}, {} warps, {} stages".format(*numbers)] = kernel.backward.prepare(*args)
            rows: dict[str, Row] = {}
            judges = [_gradients(call, grad_out, dtype) for dtype in (torch.bfloat16, torch.float64)]
            for way, launch in list(launches.items()):
                try:
                    first, again = launch(*args)[:3], launch(*args)[0]
                    ratio = max(judge(own[:1, :4], *others).ratio for own, *others in zip(first, *judges))
                    rows[way] = {"ok": ratio <= 1, "of_allowed": ratio, "repeatable": torch.equal(first[0], again)}
                except Exception as error:
                    yield {"case": title, "way": way, **error_row(error)}
                    del launches[way]
            for way, seconds in medians({way: lambda launch=launch: launch(*args) for way, launch in launches.items()}).items():
                yield {"case": title, "way": way, "ms": seconds * 1e3, "tflops": flops / seconds / 1e12, **rows[way]}


def _gradients(call: AttentionForward, grad_out: torch.Tensor, dtype: torch.dtype) -> tuple[torch.Tensor, ...]:
    """In plain PyTorch, for four heads of the first batch entry."""
    q, k, v = (t[:1, :4].to(dtype).requires_grad_() for t in (call.query, call.key, call.value))
    scores = q @ k.transpose(-1, -2) * call.scale
    if call.bias_table is not None:
        bias = pyfused.relative_bias(call.bias_table[:, : q.shape[1]].contiguous(), *scores.shape[-2:], bidirectional=True)
        scores = scores + bias.to(dtype)
    if call.is_causal:
        scores = scores.masked_fill(torch.ones(scores.shape[-2:], device=q.device, dtype=torch.bool).triu(1), -torch.inf)
    p = (scores - scores.logsumexp(-1, keepdim=True)).exp()
    return torch.autograd.grad(p @ v, (q, k, v), grad_out[:1, :4].to(dtype))
