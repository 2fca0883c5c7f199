"""Are the gradients of gradients right? Every operator after a forward on every backend, called directly, as a registered
operator, and under dispatch modes, checkpointing, autocast and torch.compile."""

import functools
import itertools

import pytest
import torch
import torch.nn.functional as F
from attention_cases import drawn_seed
from attention_cases import plain as plain_attention
from conftest import DEVICE
from draws import check
from test_ffn import PLAIN
from torch.utils.checkpoint import checkpoint
from torch.utils.flop_counter import FlopCounterMode

import pyfused
from pyfused.testing import available, running

MASK = torch.tensor([[0, 0, 1, 1, 1, 1, 0], [1, 1, 0, 1, 1, 1, 1]], device=DEVICE) > 0
ENDS = (0, 3, 3, 4, 9)


def plain_rms_norm(x, weight, residual):
    total = x + residual
    return F.rms_norm(total, weight.shape, weight, 1e-6), total


def plain_layer_norm(x, weight, bias, residual):
    total = x + residual
    return F.layer_norm(total, weight.shape, weight, bias), total


def ffn(activation):
    def fused(x, w_in, b_in, w_out, b_out, residual):
        return pyfused.ffn(x, w_in, b_in, w_out, b_out, activation=activation, residual=residual)

    def plain(x, w_in, b_in, w_out, b_out, residual):
        return F.linear(PLAIN[activation](F.linear(x, w_in, b_in)), w_out, b_out) + residual

    return fused, plain, ((2, 5, 6), (8, 6), (8,), (7, 8), (7,), (2, 5, 7))


def gated_ffn(activation):
    def fused(x, w_gate, w_up, w_out, residual):
        return pyfused.gated_ffn(x, w_gate, w_up, w_out, activation=activation, residual=residual)

    def plain(x, w_gate, w_up, w_out, residual):
        return F.linear(PLAIN[activation](F.linear(x, w_gate)) * F.linear(x, w_up), w_out) + residual

    return fused, plain, ((2, 5, 6), (8, 6), (8, 6), (7, 8), (2, 5, 7))


def relative_bias(table):
    return pyfused.relative_bias(table, 7, 7, bidirectional=True, max_distance=5)


def plain_relative_bias(table):
    """With 8 buckets and distances up to 5: distances 0, 1, 2 and more, then the same on the query's other side."""
    distance = torch.arange(7, device=table.device) - torch.arange(7, device=table.device)[:, None]
    # Each side has 4 buckets, 2 of them exact; the next begins at 2 (5 / 2)^(1/2) = 3.2.
    far = 2 + (distance.abs() >= 4)
    return table[torch.where(distance.abs() < 2, distance.abs(), far) + 4 * (distance > 0)].permute(2, 0, 1)[None]


def attention(h, hkv, sq, sk, *, table=False, bias=False, **options):
    """Query, key, value, then T5's table or a dense bias of two batch entries."""

    def fused(query, key, value, *biases):
        torch.manual_seed(5)
        given = {"relative_bias": pyfused.RelativeBias(biases[0], True, 5)} if table else {}
        return pyfused.attention(query, key, value, attn_bias=biases[-1] if bias else None, **given, **options)

    def plain(query, key, value, *biases):
        torch.manual_seed(5)
        seed = drawn_seed({"dropout_p": 0.0, **options}, query.device.type)
        inputs = {"query": query, "key": key, "value": value}
        if table:
            inputs["attn_bias"] = plain_relative_bias(biases[0])
        if bias:
            inputs["attn_bias"] = biases[-1]
        return plain_attention(inputs, {"is_causal": False, "scale": None, **options}, seed)

    shapes = ((2, h, sq, 8), (2, hkv, sk, 8), (2, hkv, sk, 8))
    return fused, plain, shapes + ((8, h),) * table + ((1, h, sq, sk),) * bias


def packed_attention():
    def fused(query, key, value, table):
        ends = torch.tensor(ENDS, device=query.device)
        relative = pyfused.RelativeBias(table, True, 5)
        return pyfused.attention(query, key, value, is_causal=True, relative_bias=relative, cu_seqlens=ends)

    def plain(query, key, value, table):
        bias = plain_relative_bias(table)
        parts = []
        for start, end in itertools.pairwise(ENDS):
            one = {"query": query[:, :, start:end], "key": key[:, :, start:end], "value": value[:, :, start:end]}
            one["attn_bias"] = bias[..., : end - start, : end - start]
            parts.append(plain_attention(one, {"is_causal": True, "scale": None}))
        return torch.cat(parts, 2)

    return fused, plain, ((1, 4, 9, 8), (1, 2, 9, 8), (1, 2, 9, 8), (8, 4))


# Operator, the same in plain PyTorch, the inputs' shapes.
CASES = {
    "layer_norm": (pyfused.layer_norm, lambda x, w, b: F.layer_norm(x, w.shape, w, b), ((4, 5, 32), (32,), (32,))),
    "layer_norm-residual": (
        lambda x, w, b, r: pyfused.layer_norm(x, w, b, residual=r),
        plain_layer_norm,
        ((4, 32), (32,), (32,), (4, 32)),
    ),
    "rms_norm": (
        lambda x, w: pyfused.rms_norm(x, w, eps=1e-2),
        lambda x, w: F.rms_norm(x, w.shape, w, 1e-2),
        ((9, 32), (32,)),
    ),
    "rms_norm-residual": (
        lambda x, w, r: pyfused.rms_norm(x, w, residual=r),
        plain_rms_norm,
        ((4, 5, 32), (32,), (4, 5, 32)),
    ),
    "linear": (
        lambda x, w, b, r: pyfused.linear(x, w, b, residual=r),
        lambda x, w, b, r: F.linear(x, w, b) + r,
        ((4, 5, 6), (7, 6), (7,), (4, 5, 7)),
    ),
    "fourier_mix": (
        pyfused.fourier_mix,
        lambda x: torch.fft.fft2(x.to(torch.promote_types(x.dtype, torch.float32))).real.to(x.dtype),
        ((2, 5, 6),),
    ),
    "relative_bias": (relative_bias, plain_relative_bias, ((8, 3),)),
    **{f"ffn-{name}": ffn(name) for name in PLAIN},
    **{f"gated_ffn-{name}": gated_ffn(name) for name in PLAIN},
    "attention": attention(4, 2, 5, 7),
    "attention-masks": attention(2, 2, 7, 7, is_causal=True, padding_mask=MASK),
    "attention-few": attention(4, 1, 2, 7, is_causal=True, padding_mask=MASK, bias=True),
    "attention-bias": attention(2, 1, 10, 7, bias=True, is_causal=True),
    "attention-table": attention(4, 2, 7, 7, table=True, padding_mask=MASK),
    "attention-dropout": attention(4, 2, 10, 7, dropout_p=0.3, scale=0.4, padding_mask=MASK),
    "attention-packed": packed_attention(),
}


def tensors(shapes, dtype, device=DEVICE):
    return [(0.7 * torch.randn(shape, device=device)).to(dtype).requires_grad_() for shape in shapes]


def outputs_of(function, inputs):
    found = function(*inputs)
    return found if isinstance(found, tuple) else (found,)


def second_order(function, inputs, upstream, weights):
    """First gradients, then the gradients of their weighted sum by inputs and upstream gradients."""
    first = torch.autograd.grad(outputs_of(function, inputs), inputs, upstream, create_graph=True)
    second = torch.autograd.grad(first, (*inputs, *upstream), weights, allow_unused=True, materialize_grads=True)
    return [t.detach() for t in (*first, *second)]


def runs():
    """The backward is the same after every forward, so slow emulated backends run one dtype."""
    for backend in available(DEVICE):
        emulated = DEVICE == "cpu" and backend in ("triton", "cuda")
        for dtype in (torch.float32,) if emulated else (torch.float32, torch.float16, torch.bfloat16):
            yield pytest.param(backend, dtype, id=f"{backend}-{str(dtype).removeprefix('torch.')}")


@pytest.mark.parametrize("backend, dtype", list(runs()))
@pytest.mark.parametrize("name", CASES)
def test_as_plain_pytorch(name, backend, dtype):
    fused, plain, shapes = CASES[name]

    def wide(given):
        return [t.detach().double().requires_grad_() for t in given]

    def once():
        inputs = tensors(shapes, dtype)
        upstream = [torch.randn_like(o, requires_grad=True) for o in outputs_of(plain, inputs)]
        weights = [torch.randn_like(t) for t in inputs]
        with running(backend, strict=False):
            found = second_order(fused, inputs, upstream, weights)
        expected = second_order(plain, inputs, upstream, weights)
        truth = second_order(plain, wide(inputs), wide(upstream), [w.double() for w in weights])
        what = f"of {len(inputs)} and {len(inputs) + len(upstream)}"
        return {f"gradient {i} {what}": judged for i, judged in enumerate(zip(found, expected, truth, strict=True))}

    check(once)


@pytest.mark.parametrize("name", CASES)
def test_gradcheck_of_both_orders(name):
    fused, _, shapes = CASES[name]
    inputs = tensors(shapes, torch.float64)
    assert torch.autograd.gradcheck(fused, inputs, fast_mode=True)
    assert torch.autograd.gradgradcheck(fused, inputs, fast_mode=True)


@pytest.mark.parametrize("name", CASES)
def test_third_order(name):
    """Uses the mean of sines, whose third derivative is not zero, against plain torch in float64."""
    fused, plain, shapes = CASES[name]
    if name.startswith("layer_norm"):  # torch 2.13's layer_norm has a wrong third derivative
        plain = {3: composed_layer_norm, 4: lambda x, w, b, r: (composed_layer_norm(x + r, w, b), x + r)}[len(shapes)]
    inputs = tensors(shapes, torch.float64)

    def third(function):
        value = sum(o.sin().sum() for o in outputs_of(function, inputs))
        for _ in range(2):
            grads = torch.autograd.grad(value, inputs, create_graph=True)
            value = sum(g.sin().sum() for g in grads)
        return torch.autograd.grad(value, inputs)

    for found, expected in zip(third(fused), third(plain), strict=True):
        torch.testing.assert_close(found, expected)


def composed_layer_norm(x, weight, bias):
    centred = x - x.mean(-1, keepdim=True)
    return centred * (centred.square().mean(-1, keepdim=True) + 1e-5).rsqrt() * weight + bias


def norms(x, weight):
    return pyfused.layer_norm(x, weight)


def penalty(function, x, weight):
    """The gradient of a gradient penalty by the weight."""
    (g,) = torch.autograd.grad(function(x, weight).sin().sum(), x, create_graph=True)
    return torch.autograd.grad(g.square().sum(), weight)[0]


ROUTES = {
    "registered": lambda x, w: torch.ops.pyfused.layer_norm(x, w, None, 1e-5, None, True)[0],
    "checkpoint": lambda x, w: checkpoint(norms, x, w, use_reentrant=False),
    "detached bias": lambda x, w: pyfused.layer_norm(x, w, torch.zeros_like(w)),
    "autocast": lambda x, w: torch.autocast(DEVICE, torch.bfloat16)(norms)(x, w),
}


def check_penalty(route):
    def once():
        x, weight = tensors(((4, 32), (32,)), torch.float32)
        runs = (route, x, weight), (normed, x, weight), (normed, x.detach().double().requires_grad_(), weight.double())
        return {"penalty": [penalty(*run) for run in runs]}

    check(once)


def normed(x, weight):
    return F.layer_norm(x, weight.shape, weight)


@pytest.mark.parametrize("route", ROUTES)
def test_routes(route):
    check_penalty(ROUTES[route])


def test_under_a_dispatch_mode():
    """A dispatch mode sends the calls through torch's dispatcher, in the backward too."""
    with FlopCounterMode(display=False):
        check_penalty(norms)


def test_torch_compile_refuses():
    """torch refuses this for every compiled function with an error; no result is wrong."""
    x, weight = tensors(((4, 32), (32,)), torch.float32)
    with pytest.raises(RuntimeError, match="double backward"):
        penalty(torch.compile(norms, backend="aot_eager"), x, weight)


@pytest.mark.parametrize("name", ["layer_norm-residual", "ffn-gelu", "gated_ffn-silu", "attention-few"])
def test_of_each_input_alone(name):
    """Only one input needs a gradient."""
    fused, plain, shapes = CASES[name]

    def second(function, given, i):
        x = given[i].detach().requires_grad_()
        (first,) = torch.autograd.grad(
            sum(o.sin().sum() for o in outputs_of(function, [*given[:i], x, *given[i + 1 :]])), x, create_graph=True
        )
        return torch.autograd.grad(first.sin().sum(), x)[0]

    def once():
        given = [t.detach() for t in tensors(shapes, torch.float32)]
        runs = (fused, given), (plain, given), (plain, [t.double() for t in given])
        return {f"input {i}": [second(*run, i) for run in runs] for i in range(len(given))}

    check(once)


def test_of_the_sum_alone():
    """A loss of x + residual alone leaves the normalised output without a gradient."""
    x, weight, residual = tensors(((4, 32), (32,), (4, 32)), torch.float64)
    total = pyfused.layer_norm(x, weight, residual=residual)[1]
    (g,) = torch.autograd.grad(total.pow(3).sum(), x, create_graph=True)
    (found,) = torch.autograd.grad(g.sum(), residual)
    torch.testing.assert_close(found, 6 * (x + residual).detach())


def test_a_plain_backward_runs_the_kernels(monkeypatch):
    """Only create_graph=True computes the gradients in plain PyTorch."""
    from pyfused.kernels.reference import layer_norm

    x, weight = tensors(((4, 32), (32,)), torch.float32)
    monkeypatch.setattr(layer_norm, "backward", functools.partial(pytest.fail, "plain PyTorch"))
    for backend in available(DEVICE):
        if backend != "reference":
            with running(backend, strict=False):
                pyfused.layer_norm(x, weight).sum().backward()
