"""What is the tolerance rule calibrated with? Small calls of every operator, beside plain PyTorch."""

from collections.abc import Callable
from dataclasses import dataclass

import attention_cases
import torch
import torch.nn.functional as F

import pyfused
from pyfused.kernels.reference import relative_bias
from pyfused.testing import running

DTYPES = (torch.float32, torch.float16, torch.bfloat16)
# Numbers of rows, features and tokens that fit no tile; small, because calibration runs a thousand seeds.
ROWS, WIDTH, INNER = 11, 45, 70
BUCKETS, MOST = 16, 20
DRAWS = 8


@dataclass(frozen=True)
class Case:
    """inputs: (shape, scale, offset) of each tensor; fused and plain: calls on a dict of tensors.

    gradients: replaces plain when gradients are compared, if they need another formula.
    """

    inputs: dict[str, tuple[tuple[int, ...], float, float]]
    fused: Callable
    plain: Callable
    gradients: Callable | None = None
    forward_only: bool = False


def normal(*shape, scale=1.0, offset=0.0):
    return shape, scale, offset


def weight(*shape):
    return normal(*shape, scale=shape[-1] ** -0.5)


def plain_norm(function):
    def call(x, residual, weight, bias=None):
        total = x + residual
        return function(total, weight, bias), total

    return lambda t: call(**t)


def plain_gated(x, w_gate, w_up, w_out, residual):
    return F.linear(F.gelu(F.linear(x, w_gate), approximate="tanh") * F.linear(x, w_up), w_out) + residual


def plain_linear(x, weight, bias):
    return F.linear(x, weight, bias)


def plain_ffn(x, w_in, b_in, w_out):
    return F.linear(F.gelu(F.linear(x, w_in, b_in)), w_out)


def padding(batch, length):
    """A mask; a third of the last sample is padding."""
    mask = torch.ones(batch, length, dtype=torch.bool)
    mask[-1, length - length // 3 :] = False
    return mask


def attention(queries, keys, d=13, h=2, hkv=1, b=2, bias=False, is_causal=False, padding_mask=None, forward_only=False):
    inputs = {"query": normal(b, h, queries, d), "key": normal(b, hkv, keys, d), "value": normal(b, hkv, keys, d)}
    if bias:
        inputs["attn_bias"] = normal(1, h, queries, keys)
    options = {"is_causal": is_causal, "scale": None, "dropout_p": 0.0}
    if padding_mask is not None:
        options["padding_mask"] = padding_mask
    return Case(
        inputs,
        lambda t: pyfused.attention(**t, **options),
        lambda t: attention_cases.plain(t, options),
        lambda t: attention_cases.plain(t, options, logarithm=True),
        forward_only,
    )


def t5_attention(tokens):
    def fused(query, key, value, table):
        relative = pyfused.RelativeBias(table, True, MOST)
        return pyfused.attention(query, key, value, relative_bias=relative, scale=0.5)

    def plain(query, key, value, table, logarithm=False):
        tensors = {"query": query, "key": key, "value": value, "attn_bias": bias_of(table, tokens)}
        return attention_cases.plain(tensors, {"is_causal": False, "scale": 0.5}, logarithm=logarithm)

    inputs = {name: normal(2, 2, tokens, 13) for name in ("query", "key", "value")} | {"table": normal(BUCKETS, 2)}
    return Case(inputs, lambda t: fused(**t), lambda t: plain(**t), lambda t: plain(**t, logarithm=True))


def buckets(queries, keys):
    return relative_bias.buckets(queries, keys, BUCKETS, True, MOST, keys - queries, "cpu")


def bias_of(table, tokens):
    return table[buckets(tokens, tokens)].permute(2, 0, 1)[None]


NORM = {"x": normal(ROWS, WIDTH, offset=2.0), "residual": normal(ROWS, WIDTH), "weight": normal(WIDTH, offset=1.0)}
LINEAR = {"x": normal(ROWS, WIDTH), "weight": weight(INNER, WIDTH), "bias": normal(INNER)}
FFN = {"x": normal(ROWS, WIDTH), "w_in": weight(INNER, WIDTH), "b_in": normal(INNER), "w_out": weight(WIDTH, INNER)}
GATED = {"x": normal(ROWS, WIDTH), "w_gate": weight(INNER, WIDTH), "w_up": weight(INNER, WIDTH)}
GATED |= {"w_out": weight(WIDTH, INNER), "residual": normal(ROWS, WIDTH)}
ONE_ROW = {"x": normal(1, WIDTH)}

CASES = {
    "layer_norm": Case(
        NORM | {"bias": normal(WIDTH)},
        lambda t: pyfused.layer_norm(**t, eps=1e-5),
        plain_norm(lambda x, w, b: F.layer_norm(x, w.shape, w, b, 1e-5)),
    ),
    "rms_norm": Case(
        NORM, lambda t: pyfused.rms_norm(**t, eps=1e-5), plain_norm(lambda x, w, b: F.rms_norm(x, w.shape, w, 1e-5))
    ),
    "linear": Case(LINEAR, lambda t: pyfused.linear(**t), lambda t: plain_linear(**t)),
    "linear, one row": Case(LINEAR | ONE_ROW, lambda t: pyfused.linear(**t), lambda t: plain_linear(**t)),
    "ffn": Case(FFN, lambda t: pyfused.ffn(**t, b_out=None, activation="gelu"), lambda t: plain_ffn(**t)),
    "gated_ffn": Case(GATED, lambda t: pyfused.gated_ffn(**t, activation="gelu_tanh"), lambda t: plain_gated(**t)),
    "gated_ffn, one row": Case(
        GATED | ONE_ROW | {"residual": normal(1, WIDTH)},
        lambda t: pyfused.gated_ffn(**t, activation="gelu_tanh"),
        lambda t: plain_gated(**t),
    ),
    "attention": attention(27, 27),
    "attention, causal": attention(27, 27, is_causal=True),
    "attention, padded": attention(19, 27, padding_mask=padding(2, 27)),
    "attention, biased": attention(20, 27, hkv=2, bias=True),
    # Plain PyTorch computes the gradients of fewer than 9 float32 queries (kernels/cpu/attention.py).
    "attention, one query": attention(1, 70, h=8, hkv=4, forward_only=True),
    "attention, T5": t5_attention(27),
    "relative_bias": Case(
        {"table": normal(BUCKETS, 2)},
        lambda t: pyfused.relative_bias(t["table"], 30, 30, bidirectional=True, max_distance=MOST),
        lambda t: bias_of(t["table"], 30),
    ),
    "fourier_mix": Case(
        {"x": normal(2, 27, 20, scale=0.1)},
        lambda t: pyfused.fourier_mix(t["x"]),
        lambda t: torch.fft.fft2(t["x"] if t["x"].dtype == torch.float64 else t["x"].float()).real.to(t["x"].dtype),
    ),
}


def draw(inputs, dtype, seed):
    generator = torch.Generator().manual_seed(seed)
    return {
        name: (torch.randn(shape, generator=generator) * scale + offset).to(dtype)
        for name, (shape, scale, offset) in inputs.items()
    }


def results(case, function, gradients, dtype, wide, seed):
    """Outputs of `function` and gradients of all inputs through `gradients`, by name, computed in `wide`."""
    leaves = {name: t.to(wide).requires_grad_(not case.forward_only) for name, t in draw(case.inputs, dtype, seed).items()}
    out = as_tuple(function(leaves))
    found = {f"output {i}": o.detach() for i, o in enumerate(out)}
    if case.forward_only:
        return found
    if gradients is not function:
        out = as_tuple(gradients(leaves))
    generator = torch.Generator().manual_seed(seed)
    cotangents = [torch.randn(o.shape, generator=generator).to(dtype).to(wide) for o in out]
    grads = torch.autograd.grad(out, list(leaves.values()), cotangents)
    return found | {f"gradient of {name}": grad for name, grad in zip(leaves, grads)}


def as_tuple(out):
    return out if isinstance(out, tuple) else (out,)


def plain_and_truth(case, dtype, seed):
    """({name: plain PyTorch's result}, {name: the truth}); each tensor holds DRAWS draws."""
    gradients = case.gradients or case.plain
    return [together(lambda s, w=w: results(case, case.plain, gradients, dtype, w, s), seed) for w in (dtype, torch.float64)]


def fused(case, dtype, seed, backend):
    with running(backend):
        return together(lambda s: results(case, case.fused, case.fused, dtype, dtype, s), seed)


def together(run, seed):
    """Joins several draws: errors of small tensors share causes, so one draw has few independent errors."""
    drawn = [run(DRAWS * seed + i) for i in range(DRAWS)]
    return {what: torch.stack([found[what] for found in drawn]) for what in drawn[0]}
