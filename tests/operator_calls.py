"""Which small calls reach every path of every operator's kernels? Tests repeat them with another thread order, stream or CUDA
graph and compare the results bit for bit."""

from collections.abc import Callable

import decode_cases
import torch

import pyfused

CALLS: dict[str, Callable[["Numbers"], Callable[[], tuple[torch.Tensor, ...]]]] = {}


class Numbers:
    """Random tensors of one device and dtype, the same on every device."""

    def __init__(self, device, dtype):
        self.device, self.dtype = device, dtype
        self.generator = torch.Generator().manual_seed(7)

    def __call__(self, *shape, scale=1.0):
        return (torch.randn(shape, generator=self.generator) * scale).to(self.dtype).to(self.device)

    def mask(self, *shape):
        return (torch.rand(shape, generator=self.generator) > 0.3).to(self.device)


def calls(name):
    """Registers a function of Numbers under a name. It makes the inputs and returns a call, whose result tests compare."""

    def register(function):
        CALLS[name] = function
        return function

    return register


def prepared(name, device, dtype):
    return CALLS[name](Numbers(device, dtype))


def with_gradients(call, inputs, upstream):
    def run():
        outputs = call()
        outputs = outputs if isinstance(outputs, tuple) else (outputs,)
        grads = torch.autograd.grad(outputs, inputs, upstream[: len(outputs)])
        return (*(o.detach() for o in outputs), *grads)

    return run


def norm_shapes(operator, long):
    """long: the long row that comes with a residual. Both operators run the same kernels, so the other one has the rest."""
    for n in (768, 37, 1032, 9000, 4097):
        for residual in (False, True) if n < 4000 else (n == long,):
            calls(f"{operator} {n}{' residual' if residual else ''}")(
                lambda new, n=n, residual=residual: norm(new, operator, n, residual)
            )


def norm(new, operator, n, residual):
    x, weight, bias = (t.requires_grad_() for t in (new(5, n), new(n), new(n)))
    inputs = [x, weight]
    options = {"residual": new(5, n)} if residual else {}
    if operator == "layer_norm":
        options["bias"] = bias
        inputs.append(bias)
    return with_gradients(lambda: getattr(pyfused, operator)(x, weight, **options), inputs, [new(5, n), new(5, n)])


norm_shapes("layer_norm", 9000)
norm_shapes("rms_norm", 4097)


def linear_like(rows, n, m):
    tag = f"{rows}x{n}x{m}"
    scale = n**-0.5

    @calls(f"linear {tag}")
    def _(new):
        x, weight, bias, residual = new(rows, n), new(m, n, scale=scale), new(m), new(rows, m)
        return lambda: (pyfused.linear(x, weight, bias, residual=residual),)

    @calls(f"ffn {tag}")
    def _(new):
        x, w_in, b_in, w_out, b_out = new(rows, n), new(m, n, scale=scale), new(m), new(n, m, scale=scale), new(n)
        residual = new(rows, n)
        return lambda: (pyfused.ffn(x, w_in, b_in, w_out, b_out, activation="gelu", residual=residual),)

    @calls(f"gated_ffn {tag}")
    def _(new):
        x, w_gate, w_up = new(rows, n), new(m, n, scale=scale), new(m, n, scale=scale)
        w_out, residual = new(n, m, scale=scale), new(rows, n)
        return lambda: (pyfused.gated_ffn(x, w_gate, w_up, w_out, activation="gelu_tanh", residual=residual),)


for size in [(1, 128, 96), (4, 264, 40), (16, 128, 96), (3, 37, 51), (40, 64, 72)]:
    linear_like(*size)


def by_columns(rows, n, m):
    """Weights stored transposed."""

    @calls(f"ffn by columns {rows}x{n}x{m}")
    def _(new):
        x, w_in, b_in, w_out, b_out = new(rows, n), new(n, m, scale=n**-0.5), new(m), new(m, n, scale=m**-0.5), new(n)
        return lambda: (pyfused.ffn(x, w_in.t(), b_in, w_out.t(), b_out, activation="gelu", residual=x),)


for size in [(1, 136, 616), (4, 72, 48), (8, 128, 96), (3, 37, 51)]:
    by_columns(*size)


def attention(b, h, hkv, sq, sk, d, **options):
    tag = "".join(f" {name}" for name in options)

    @calls(f"attention {b}x{h}/{hkv}x{sq}/{sk}x{d}{tag}")
    def _(new):
        def heads(heads, length):  # in memory (B, S, H, D), as from a projection
            return new(b, length, heads, d).transpose(1, 2)

        given = {}
        if options.get("causal"):
            given["is_causal"] = True
        if options.get("mask"):
            given["padding_mask"] = new.mask(b, sk)
        if options.get("bias"):
            given["attn_bias"] = new(1, h, sq, sk)
        if options.get("relative"):
            given["relative_bias"] = pyfused.RelativeBias(new(32, h), True, 20)
        if options.get("dropout"):
            given["dropout_p"] = 0.2
        query, key, value = heads(h, sq), heads(hkv, sk), heads(hkv, sk)
        return lambda: (pyfused.attention(query, key, value, **given),)


attention(2, 4, 4, 1, 300, 64, causal=True, mask=True)
attention(1, 8, 2, 2, 137, 64, causal=True)
attention(2, 2, 2, 3, 70, 40, bias=True)
attention(1, 4, 4, 1, 700, 128, mask=True)
attention(2, 3, 3, 70, 70, 64, causal=True)
attention(1, 4, 2, 129, 137, 64, mask=True)
attention(1, 2, 2, 40, 40, 128, bias=True)
attention(2, 2, 2, 33, 50, 80, causal=True, mask=True)
attention(1, 2, 2, 20, 20, 37, causal=True)
attention(1, 2, 2, 70, 70, 64, relative=True, mask=True)
attention(1, 4, 4, 1, 90, 64, relative=True)
attention(1, 2, 2, 40, 40, 64, dropout=True)


def packed_attention(h, hkv, lengths, d, **options):
    tag = "".join(f" {name}" for name in options)

    @calls(f"attention {h}/{hkv}x{'+'.join(map(str, lengths))}x{d}{tag}")
    def _(new):
        query, key, value = (new(1, sum(lengths), heads, d).transpose(1, 2) for heads in (h, hkv, hkv))
        given = {"cu_seqlens": torch.tensor([0, *lengths], device=query.device).cumsum(0), "max_seqlen": max(lengths)}
        given["is_causal"] = "causal" in options
        if options.get("relative"):
            given["relative_bias"] = pyfused.RelativeBias(new(32, h), True, 20)
        if options.get("dropout"):
            given["dropout_p"] = 0.2
        return lambda: (pyfused.attention(query, key, value, **given),)


packed_attention(2, 1, (70, 0, 1, 129, 40), 64, causal=True)
packed_attention(2, 2, (3, 0, 1, 9) * 9, 37, causal=True)
packed_attention(2, 2, (70, 33), 64, relative=True)
packed_attention(2, 1, (65, 2), 80)
packed_attention(1, 1, (40, 3, 20), 128, relative=True, dropout=True)


@calls("relative_bias")
def _(new):
    table = new(32, 4).requires_grad_()
    options = {"bidirectional": True, "max_distance": 30}
    return with_gradients(lambda: pyfused.relative_bias(table, 40, 50, **options), [table], [new(1, 4, 40, 50)])


def fourier_mix(*shape):
    @calls(f"fourier_mix {'x'.join(map(str, shape))}")
    def _(new):
        x = new(*shape, scale=0.1).requires_grad_()
        return with_gradients(lambda: pyfused.fourier_mix(x), [x], [new(*shape)])


for size in [(2, 40, 96), (3, 31, 20), (1, 7, 274)]:
    fourier_mix(*size)


def decode(name):
    (rows, keys), options = decode_cases.CASES[name]

    @calls(f"decode {name}")
    def _(new):
        plan, step = decode_cases.made(new, rows, keys, **options)

        def run():
            logits, chosen = pyfused.ops.MODULES["decode"].run(plan, step)
            return logits, chosen, *decode_cases.written(step)

        return run


for name in decode_cases.CASES:
    decode(name)
