"""How much CPU time does a call take outside its kernel? Every operator on an input so small that the kernel takes almost no
time, without gradients, beside PyTorch's own function or functions.

pyfused promises at most 8 us a call. On a shared processor, look at the undisturbed time. On a GPU the CPU's time is hidden
behind the device's; benchmarks/gpu.py measures it.
"""

from functools import partial

import torch
import torch.nn.functional as F

import pyfused
from pyfused.bench import Calls, Case

D = 8


def cases(setup):
    if setup.device == "cpu":
        yield from (Case(name, torch.float32, partial(calls, name)) for name in rows())


def calls(name):
    return Calls(*rows()[name])


def rows():
    """Name -> pyfused's function, plain PyTorch's, and the inputs of both."""
    x, residual, b = torch.randn(1, 1, D), torch.randn(1, 1, D), torch.randn(D)
    w = torch.randn(D, D)
    heads = tuple(torch.randn(1, 2, 1, D) for _ in range(3))
    mask, table, buckets = torch.ones(1, 1, dtype=torch.bool), torch.randn(8, 2), torch.zeros(1, 1, dtype=torch.int64)
    bias, relative = torch.randn(1, 2, 1, 1), pyfused.RelativeBias(table, True, 16)
    attend, sdpa = pyfused.attention, F.scaled_dot_product_attention

    def in_pytorch(table):
        return F.embedding(buckets, table).permute(2, 0, 1)[None]

    return {
        "layer_norm": (pyfused.layer_norm, lambda x, w, b: F.layer_norm(x, (D,), w, b), (x, b, b)),
        "layer_norm residual": (
            lambda x, b, r: pyfused.layer_norm(x, b, b, residual=r),
            lambda x, b, r: F.layer_norm(x + r, (D,), b, b),
            (x, b, residual),
        ),
        "rms_norm": (pyfused.rms_norm, lambda x, w: F.rms_norm(x, (D,), w, 1e-6), (x, b)),
        "rms_norm residual": (
            lambda x, b, r: pyfused.rms_norm(x, b, residual=r),
            lambda x, b, r: F.rms_norm(x + r, (D,), b, 1e-6),
            (x, b, residual),
        ),
        "linear": (pyfused.linear, F.linear, (x, w, b)),
        "linear residual": (
            lambda x, w, b, r: pyfused.linear(x, w, b, residual=r),
            lambda x, w, b, r: F.linear(x, w, b) + r,
            (x, w, b, residual),
        ),
        "ffn residual": (
            lambda x, w, b, r: pyfused.ffn(x, w, b, w, b, activation="gelu", residual=r),
            lambda x, w, b, r: F.linear(F.gelu(F.linear(x, w, b)), w, b) + r,
            (x, w, b, residual),
        ),
        "gated_ffn residual": (
            lambda x, w, r: pyfused.gated_ffn(x, w, w, w, activation="silu", residual=r),
            lambda x, w, r: F.linear(F.silu(F.linear(x, w)) * F.linear(x, w), w) + r,
            (x, w, residual),
        ),
        "attention": (attend, sdpa, heads),
        "attention causal": (
            lambda q, k, v: attend(q, k, v, is_causal=True),
            lambda q, k, v: sdpa(q, k, v, is_causal=True),
            heads,
        ),
        "attention padding_mask": (
            lambda q, k, v: attend(q, k, v, padding_mask=mask),
            lambda q, k, v: sdpa(q, k, v, attn_mask=mask[:, None, None]),
            heads,
        ),
        "attention attn_bias": (
            lambda q, k, v, bias: attend(q, k, v, attn_bias=bias),
            lambda q, k, v, bias: sdpa(q, k, v, attn_mask=bias),
            (*heads, bias),
        ),
        "attention relative_bias": (
            lambda q, k, v, _: attend(q, k, v, relative_bias=relative),
            lambda q, k, v, table: sdpa(q, k, v, attn_mask=in_pytorch(table)),
            (*heads, table),
        ),
        "relative_bias": (
            lambda table: pyfused.relative_bias(table, 1, 1, bidirectional=True, max_distance=16),
            in_pytorch,
            (table,),
        ),
        "fourier_mix": (pyfused.fourier_mix, lambda x: torch.fft.fft2(x).real, (x,)),
    }
