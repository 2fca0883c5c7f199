"""What does a call cost the host? Every operator on an input so small that its kernel takes next to nothing, without
gradients, beside PyTorch's own function; where that is several functions, beside their sum.

At most 8 us a call is the promise; on a processor that others share, the undisturbed time of many rounds tells. On a
GPU the host's time is hidden behind the device's: no cases.
"""

import torch
import torch.nn.functional as F

import pyfused
from pyfused.bench import Case

from .peers import in_double

D = 8


def cases(device):
    if device != "cpu":
        return
    x, residual = torch.randn(1, 1, D), torch.randn(1, 1, D)
    w, b = torch.randn(D, D), torch.randn(D)
    query, key, value = (torch.randn(1, 2, 1, D) for _ in range(3))
    mask, table, buckets = torch.ones(1, 1, dtype=torch.bool), torch.randn(8, 2), torch.zeros(1, 1, dtype=torch.int64)
    bias, relative = torch.randn(1, 2, 1, 1), pyfused.RelativeBias(table, True, 16)
    attend, sdpa = pyfused.attention, F.scaled_dot_product_attention

    def in_pytorch(table):
        return F.embedding(buckets, table).permute(2, 0, 1)[None]

    calls = {
        "layer_norm": (lambda: pyfused.layer_norm(x, b, b), lambda x=x, b=b: F.layer_norm(x, (D,), b, b)),
        "layer_norm residual": (
            lambda: pyfused.layer_norm(x, b, b, residual=residual),
            lambda x=x, b=b, residual=residual: F.layer_norm(x + residual, (D,), b, b),
        ),
        "rms_norm": (lambda: pyfused.rms_norm(x, b), lambda x=x, b=b: F.rms_norm(x, (D,), b, 1e-6)),
        "rms_norm residual": (
            lambda: pyfused.rms_norm(x, b, residual=residual),
            lambda x=x, b=b, residual=residual: F.rms_norm(x + residual, (D,), b, 1e-6),
        ),
        "linear": (lambda: pyfused.linear(x, w, b), lambda x=x, w=w, b=b: F.linear(x, w, b)),
        "linear residual": (
            lambda: pyfused.linear(x, w, b, residual=residual),
            lambda x=x, w=w, b=b, residual=residual: F.linear(x, w, b) + residual,
        ),
        "ffn residual": (
            lambda: pyfused.ffn(x, w, b, w, b, activation="gelu", residual=residual),
            lambda x=x, w=w, b=b, residual=residual: F.linear(F.gelu(F.linear(x, w, b)), w, b) + residual,
        ),
        "gated_ffn residual": (
            lambda: pyfused.gated_ffn(x, w, w, w, activation="silu", residual=residual),
            lambda x=x, w=w, residual=residual: F.linear(F.silu(F.linear(x, w)) * F.linear(x, w), w) + residual,
        ),
        "attention": (lambda: attend(query, key, value), lambda q=query, k=key, v=value: sdpa(q, k, v)),
        "attention causal": (
            lambda: attend(query, key, value, is_causal=True),
            lambda q=query, k=key, v=value: sdpa(q, k, v, is_causal=True),
        ),
        "attention padding_mask": (
            lambda: attend(query, key, value, padding_mask=mask),
            lambda q=query, k=key, v=value: sdpa(q, k, v, attn_mask=mask[:, None, None]),
        ),
        "attention attn_bias": (
            lambda: attend(query, key, value, attn_bias=bias),
            lambda q=query, k=key, v=value, bias=bias: sdpa(q, k, v, attn_mask=bias),
        ),
        "attention relative_bias": (
            lambda: attend(query, key, value, relative_bias=relative),
            lambda q=query, k=key, v=value, table=table: sdpa(q, k, v, attn_mask=in_pytorch(table)),
        ),
        "relative_bias": (
            lambda: pyfused.relative_bias(table, 1, 1, bidirectional=True, max_distance=16),
            lambda table=table: in_pytorch(table),
        ),
        "fourier_mix": (lambda: pyfused.fourier_mix(x), lambda x=x: torch.fft.fft2(x).real),
    }
    with torch.no_grad():
        for name, (own, plain) in calls.items():
            yield Case(name, {"pyfused": own, "torch": plain}, in_double(plain), rounds=20000, seconds=4.0)
