"""Which faults must the tolerance rule find? Each result is exact except for one fault, then rounded to the dtype."""

from collections.abc import Callable
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from attention_cases import plain
from tolerance_cases import BUCKETS, DTYPES, MOST, buckets, draw, normal, weight

from pyfused.testing import judge

FLOAT32 = DTYPES[:1]


@dataclass(frozen=True)
class Fault:
    """right and wrong: functions of the inputs by name. right is plain PyTorch; wrong gets them in float64."""

    inputs: dict
    right: Callable
    wrong: Callable
    dtypes: tuple = DTYPES


def faulty(fault, dtype, seed):
    """The rule's judgement of the faulty result."""
    inputs = draw(fault.inputs, dtype, seed)
    wide = {name: tensor.double() for name, tensor in inputs.items()}
    return judge(fault.wrong(**wide).to(dtype), fault.right(**inputs), fault.right(**wide))


def rounded(x, dtype):
    return x.to(dtype).double()


def tf32(x):
    """11 significant bits, as a TF32 tensor core reads its operands."""
    mantissa, exponent = torch.frexp(x)
    return torch.ldexp((mantissa * 2**11).round() / 2**11, exponent)


def bfloat16_sums(x, w, block=16):
    """x w^T whose running sum is rounded to bfloat16 after each block of products."""
    total = torch.zeros(x.shape[0], w.shape[0], dtype=torch.float64)
    for xs, ws in zip(x.split(block, -1), w.split(block, -1)):
        total = rounded(total + xs @ ws.t(), torch.bfloat16)
    return total


def half_sum(x):
    """The sum of each row, one element after another, rounded to bfloat16 each time."""
    total = torch.zeros(*x.shape[:-1], 1, dtype=torch.float64)
    for part in x.split(1, -1):
        total = rounded(total + part, torch.bfloat16)
    return total


def layer_norm_half_statistics(x, weight, bias):
    mean = half_sum(x) / x.shape[-1]
    variance = half_sum((x - mean).square()) / x.shape[-1]
    return (x - mean) * torch.rsqrt(variance + 1e-5) * weight + bias


def rms_norm_half_statistics(x, weight):
    return x * torch.rsqrt(half_sum(x.square()) / x.shape[-1] + 1e-5) * weight


def short_exp(x, degree):
    """exp by 2^floor(y) and a Taylor polynomial of this degree for the rest, |rest| <= 1/2."""
    y = x * 1.4426950408889634
    whole = y.round()
    rest, term, total = (y - whole) * 0.6931471805599453, 1.0, 1.0
    for n in range(1, degree + 1):
        term = term * rest / n
        total = total + term
    return torch.ldexp(total, whole.clamp(min=-1000).int())


def scores(query, key):
    return query @ key.transpose(-1, -2) * query.shape[-1] ** -0.5


def softmax_by(exponential, query, key, value):
    s = scores(query, key)
    p = exponential(s - s.amax(-1, keepdim=True))
    return p / p.sum(-1, keepdim=True) @ value


def looking_at(query, key, value, diagonal):
    """Causal attention whose last visible key is moved by `diagonal`."""
    s = scores(query, key)
    seen = torch.ones(s.shape[-2:], dtype=torch.bool).tril(diagonal)
    seen[:, 0] = True
    return torch.softmax(s.masked_fill(~seen, -torch.inf), -1) @ value


def without_rescale(query, key, value, block=16):
    """Online softmax, block by block of keys. A new maximum rescales the sum but, wrongly, not the output so far."""
    out, total = torch.zeros_like(query), torch.zeros(*query.shape[:-1], 1, dtype=torch.float64)
    most = torch.full_like(total, -torch.inf)
    for k, v in zip(key.split(block, -2), value.split(block, -2)):
        s = scores(query, k)
        before, most = most, torch.maximum(most, s.amax(-1, keepdim=True))
        p = (s - most).exp()
        out, total = out + p @ v, total * (before - most).exp() + p.sum(-1, keepdim=True)
    return out / total


def values_in_bfloat16_sums(query, key, value, block=16):
    p = torch.softmax(scores(query, key), -1)
    out = torch.zeros_like(query)
    for ps, v in zip(p.split(block, -1), value.split(block, -2)):
        out = rounded(out + ps @ v, torch.bfloat16)
    return out


def with_bias(query, key, value, table, shift=False):
    """T5's attention; with shift, one bucket's first distance counts to the bucket before."""
    bucket = buckets(query.shape[-2], key.shape[-2])
    if shift:
        last = bucket[0, BUCKETS // 2 :].max()
        first = (bucket[0] == last).nonzero()[0, 0] if (bucket[0] == last).any() else MOST
        i, j = torch.arange(bucket.shape[0])[:, None], torch.arange(bucket.shape[1])[None]
        bucket = torch.where(j - i == first, bucket - 1, bucket)
    tensors = {"query": query, "key": key, "value": value, "attn_bias": table[bucket].permute(2, 0, 1)[None]}
    return plain(tensors, {"is_causal": False, "scale": 0.5})


def attention(**options):
    return lambda **t: plain(t, {"is_causal": False, "scale": None, **options})


def polynomial(*degrees):
    return lambda **t: softmax_by(lambda x: short_exp(x, *degrees), **t)


LINEAR = {"x": normal(64, 768), "w": weight(96, 768)}
NORM = {"x": normal(64, 768, offset=2.0), "weight": normal(768, offset=1.0)}
QKV = {name: normal(2, 4, 129, 64) for name in ("query", "key", "value")}
T5 = {name: normal(2, 4, 60, 16) for name in ("query", "key", "value")} | {"table": normal(BUCKETS, 4)}
FFN = {"x": normal(64, 96), "w_in": weight(160, 96), "w_out": weight(96, 160)}

FAULTS = {
    "a product in TF32": Fault(LINEAR, lambda x, w: F.linear(x, w), lambda x, w: tf32(x) @ tf32(w).t(), FLOAT32),
    "a product with bfloat16 sums": Fault(LINEAR, lambda x, w: F.linear(x, w), bfloat16_sums),
    "scores in TF32": Fault(
        QKV, attention(), lambda query, key, value: torch.softmax(scores(tf32(query), tf32(key)), -1) @ value, FLOAT32
    ),
    "values with bfloat16 sums": Fault(QKV, attention(), values_in_bfloat16_sums, DTYPES[:2]),
    "layer_norm's statistics in half precision": Fault(
        NORM | {"bias": normal(768)}, lambda x, weight, bias: F.layer_norm(x, (768,), weight, bias), layer_norm_half_statistics
    ),
    "rms_norm's statistic in half precision": Fault(
        NORM, lambda x, weight: F.rms_norm(x, (768,), weight, 1e-5), rms_norm_half_statistics
    ),
    # The dtype's own rounding does not hide this polynomial's error, with one degree to spare.
    "a short polynomial for exp": Fault(QKV, attention(), polynomial(4), FLOAT32),
    "a shorter polynomial for exp": Fault(QKV, attention(), polynomial(1)),
    "gelu by tanh": Fault(
        FFN,
        lambda x, w_in, w_out: F.linear(F.gelu(F.linear(x, w_in)), w_out),
        lambda x, w_in, w_out: F.linear(F.gelu(F.linear(x, w_in), approximate="tanh"), w_out),
        FLOAT32,
    ),
    "one key too many": Fault(QKV, attention(is_causal=True), lambda **t: looking_at(**t, diagonal=1)),
    "one key too few": Fault(QKV, attention(is_causal=True), lambda **t: looking_at(**t, diagonal=-1)),
    "one padded key seen": Fault(
        QKV,
        lambda query, key, value: attention()(query=query, key=key[..., :-1, :], value=value[..., :-1, :]),
        lambda query, key, value: attention()(query=query, key=key, value=value),
    ),
    # Not in bfloat16: its rounding is as large, so one seed in a hundred hides it (0.88). All dtypes share a kernel's source.
    "one bucket off": Fault(T5, with_bias, lambda **t: with_bias(**t, shift=True), DTYPES[:2]),
    "a missing rescale": Fault(QKV, attention(), without_rescale),
}
