"""Does torch.compile compile backbones, modules and operators whole, once for all sizes, with eager's results?"""

import copy

import pytest
import torch
from compiled_cases import FAMILIES, backbone, gradients, inputs, loss_of, results
from torch._dynamo.backends.common import aot_autograd
from torch._dynamo.testing import CompileCounterWithBackend

import pyfused
from pyfused import nn as fused
from pyfused.testing.tolerance import assert_close

# All sizes differ: torch treats sizes that are equal in the first call as one size.
SIZES = ((7, 11), (3, 17), (5, 29))


@pytest.fixture(autouse=True)
def fresh_compiler():
    """Clears earlier compilations, and makes numbers such as eps constants at once. With dynamic=True torch first traces them
    as unknowns, finds that the operators want constants, and compiles again: twice the time, the same program."""
    torch._dynamo.reset()
    with torch._dynamo.config.patch(specialize_float=True):
        yield
    torch._dynamo.reset()


def compiled(function, dynamic=True, backend="aot_eager"):
    """The function, compiled whole, and a counter of its compilations."""
    counter = CompileCounterWithBackend(backend)
    return torch.compile(function, fullgraph=True, dynamic=dynamic, backend=counter), counter


def assert_like_eager(actual, eager, truth, what):
    for i, (a, e, t) in enumerate(zip(actual, eager, truth, strict=True)):
        assert_close(a, e, t.double(), f"{what} {i}")


def check_backbone(name, call, model, exact, given):
    """Judges the compiled outputs and parameter gradients beside eager's, by the tolerance rule."""
    found, eager, truth = call(given), model(given), exact(given)
    assert_like_eager(results(found), results(eager), results(truth), f"{name}'s output")
    grads, of_eager, of_truth = gradients(model, found), gradients(model, eager), gradients(exact, truth)
    assert grads.keys() == of_eager.keys()
    for parameter, grad in grads.items():
        assert_close(grad, of_eager[parameter], of_truth[parameter], f"gradient of {name}'s {parameter}")


@pytest.mark.parametrize("name", FAMILIES)
def test_a_backbone_is_one_graph_for_all_sizes(name):
    model, exact = (backbone(name, dtype, num_layers=1).train() for dtype in (torch.float32, torch.float64))
    call, counter = compiled(model)
    for size in SIZES:
        check_backbone(name, call, model, exact, inputs(name, *size))
    assert counter.frame_count == 1


@pytest.mark.parametrize("name", ["gpt2", "t5"])
def test_how_often_a_model_is_compiled(name):
    """Without dynamic=True, torch.compile learns from the first change of batch and length that they vary. backend="eager":
    tracing alone decides this. What fixes a size in one of the other models, shows in their one graph for all sizes above."""
    model = backbone(name, num_layers=1).eval()
    with torch.no_grad(), torch._dynamo.config.patch(specialize_float=False):
        call, counter = compiled(model, None, "eager")
        counts = []
        for size in (*SIZES, (4, 17), (5, 13)):
            given = inputs(name, *size)
            for a, e in zip(results(call(given)), results(model(given)), strict=True):
                assert torch.equal(a, e)
            counts.append(counter.frame_count)
    assert counts == [1, 2, 2, 2, 2]


@pytest.mark.parametrize("name", ["gpt2", "t5"])
def test_decoding_with_a_cache_is_two_graphs(name):
    """One graph for the prompt and one for a token, whatever the cache holds already."""
    model = backbone(name, num_layers=1, **({"cross_attention": True} if name == "gpt2" else {})).eval()
    call, counter = compiled(model)
    mine, eager = model.new_cache(3, 40), model.new_cache(3, 40)
    given, memory = inputs(name, 3, 20), torch.randn(3, 6, 24)
    side = "decoder_" if name == "t5" else ""
    counts = []
    for start, end in ((0, 7), (7, 8), (8, 9), (9, 10), (10, 11), (11, 12)):
        step = {f"{side}token_ids": given[f"{side}token_ids"][:, start:end]}
        step[f"{side}padding_mask"] = given[f"{side}padding_mask"][:, :end]
        if start == 0 and name == "gpt2":
            step |= {"encoder_hidden_states": memory, "encoder_padding_mask": torch.rand(3, 6) > 0.3}
        elif start == 0:
            step |= {key: value for key, value in given.items() if key.startswith("encoder")}
        with torch.no_grad():
            found, expected = call({**step, "cache": mine}), model({**step, "cache": eager})
        for a, e in zip(results(found), results(expected), strict=True):
            assert torch.equal(a, e)
        assert mine.length == eager.length == end
        counts.append(counter.frame_count)
    assert counts == [1, 2, 2, 2, 2, 2]


@pytest.mark.parametrize("name", FAMILIES)
def test_everything_that_a_model_returns_comes_out_of_the_graph(name):
    model = backbone(name, num_layers=1).eval()
    given = inputs(name, 2, 9) | {"return_hidden_states": True}
    if name != "fnet":
        given["return_attentions"] = True

    def flat(found):
        values = vars(found) if isinstance(found, pyfused.models.gpt2.GPT2Output) else found
        return {key: v if isinstance(v, tuple) else (v,) for key, v in values.items() if v is not None}

    with torch.no_grad():
        found, expected = flat(compiled(model, None, "eager")[0](given)), flat(model(given))
    assert found.keys() == expected.keys()
    assert all(torch.equal(a, e) for key in expected for a, e in zip(found[key], expected[key], strict=True))


@pytest.mark.parametrize("name", ["t5", "fnet"])
def test_inductor_agrees_with_eager(name):
    """These two models call every operator. Whether an operator keeps what it declares to Inductor, strides and no change of
    its inputs, is tests/ops' test_opcheck."""
    model, exact = (backbone(name, dtype, num_layers=1).eval() for dtype in (torch.float32, torch.float64))
    call, counter = compiled(model, backend="inductor")
    with torch.no_grad():
        for size in SIZES[:2]:
            given = inputs(name, *size)
            assert_like_eager(results(call(given)), results(model(given)), results(exact(given)), name)
    assert counter.frame_count == 1


# Modules: how to make one and what to call it with, for a batch and a length.


def states(batch, length, width=24, seed=0):
    new = torch.Generator().manual_seed(100 * batch + length + seed)
    return torch.randn(batch, length, width, generator=new)


def masks(batch, length):
    return torch.rand(batch, length, generator=torch.Generator().manual_seed(batch + length)) > 0.3


def cross_attention(dtype):
    """Includes its projection of the encoder's states."""

    class Layer(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.attention = fused.CrossAttention(24, 4, dtype=dtype)

        def forward(self, x, memory, mask):
            return self.attention(x, self.attention.project(memory), fused.Visibility(padding_mask=mask))

    return Layer()


def visibly(module):
    """A self-attention module, causal and with a mask."""

    class Layer(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.attention = module

        def forward(self, x, mask):
            return self.attention(x, fused.Visibility(is_causal=True, padding_mask=mask))

    return Layer()


def alone(b, s):
    return (states(b, s),)


def with_residual(b, s):
    return states(b, s), states(b, s, seed=1)


def with_mask(b, s):
    return states(b, s), masks(b, s)


MODULES = {
    "LayerNorm": (lambda d: fused.LayerNorm(24, dtype=d), with_residual),
    "LayerNorm without weight": (lambda d: fused.LayerNorm(24, elementwise_affine=False), alone),
    "RMSNorm": (lambda d: fused.RMSNorm(24, dtype=d), with_residual),
    "RMSNorm of two dimensions": (lambda d: fused.RMSNorm((4, 6), dtype=d), lambda b, s: (states(b, s).view(b, s, 4, 6),)),
    "Linear": (lambda d: fused.Linear(24, 24, dtype=d), with_residual),
    "FeedForward": (lambda d: fused.FeedForward(24, 40, "gelu", dtype=d), with_residual),
    "GatedFeedForward": (lambda d: fused.GatedFeedForward(24, 40, dtype=d), with_residual),
    "FourierMixing": (lambda d: fused.FourierMixing(), alone),
    "ReversibleEmbedding": (lambda d: fused.ReversibleEmbedding(31, 24, dtype=d), lambda b, s: (states(b, s), True)),
    "SelfAttention": (lambda d: visibly(fused.SelfAttention(24, 4, dtype=d)), with_mask),
    "SelfAttention by default": (lambda d: fused.SelfAttention(24, 4, dtype=d), alone),
    "RelativeSelfAttention": (
        lambda d: visibly(fused.RelativeSelfAttention(24, 4, bidirectional=False, num_buckets=8, max_distance=20, dtype=d)),
        with_mask,
    ),
    "CrossAttention": (cross_attention, lambda b, s: (states(b, s), states(b, s + 3, seed=1), masks(b, s + 3))),
}  # fmt: skip


def with_gradients(call, given, parameters):
    """Outputs, and the gradients of the float inputs and the parameters."""
    given = [t.detach().requires_grad_() if isinstance(t, torch.Tensor) and t.is_floating_point() else t for t in given]
    out = call(*given)
    out = out if isinstance(out, tuple) else (out,)
    wanted = [t for t in given if isinstance(t, torch.Tensor) and t.requires_grad] + list(parameters)
    loss = sum(loss_of(o) for o in out)
    return [o.detach() for o in out], torch.autograd.grad(loss, wanted)


def doubles(given):
    return [t.double() if isinstance(t, torch.Tensor) and t.is_floating_point() else t for t in given]


def check_function(function, exact, make, parameters=(), exact_parameters=(), sizes=SIZES):
    call, counter = compiled(function)
    for size in sizes:
        given = make(*size)
        found = with_gradients(call, given, parameters)
        eager = with_gradients(function, given, parameters)
        truth = with_gradients(exact, doubles(given), exact_parameters)
        for part in range(2):
            assert_like_eager(found[part], eager[part], truth[part], ("output", "gradient")[part])
    assert counter.frame_count == 1


@pytest.mark.parametrize("name", MODULES)
def test_a_module_is_one_graph_for_all_sizes(name):
    make, arguments = MODULES[name]
    module = make(torch.float32)
    exact = copy.deepcopy(module).double()
    check_function(module, exact, arguments, list(module.parameters()), list(exact.parameters()))


def heads(b, s, count=4, seed=0):
    return states(b, s, count * 6, seed).view(b, s, count, 6).transpose(1, 2)


def attention_inputs(b, s):
    return heads(b, s), heads(b, s + 2, 2, seed=1), heads(b, s + 2, 2, seed=2)


def fixed(*shape, seed=5):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed)) / shape[-1] ** 0.5


OPERATORS = {
    "layer_norm": (
        lambda x, r, w: pyfused.layer_norm(x, w, w + 1, residual=r),
        lambda b, s: (states(b, s), states(b, s, seed=1), fixed(24)),
    ),
    "rms_norm": (lambda x, w: pyfused.rms_norm(x, w), lambda b, s: (states(b, s), fixed(24))),
    "linear": (
        lambda x, w, r: pyfused.linear(x, w, residual=r),
        lambda b, s: (states(b, s), fixed(10, 24), states(b, s, 10)),
    ),
    "ffn": (
        lambda x, w, v, c: pyfused.ffn(x, w, None, v, c, activation="gelu_new"),
        lambda b, s: (states(b, s), fixed(40, 24), fixed(24, 40), fixed(24)),
    ),
    "gated_ffn": (
        lambda x, w, u, v: pyfused.gated_ffn(x, w, u, v, activation="silu", residual=x),
        lambda b, s: (states(b, s), fixed(40, 24), fixed(40, 24, seed=6), fixed(24, 40)),
    ),
    "fourier_mix": (pyfused.fourier_mix, alone),
    "relative_bias": (
        lambda ids, table: pyfused.relative_bias(
            table, ids.shape[1], ids.shape[1] + 3, bidirectional=True, max_distance=20, query_offset=3
        ),
        lambda b, s: (torch.zeros(b, s, dtype=torch.int64), fixed(8, 4)),
    ),
    "attention, causal": (lambda q, k, v: pyfused.attention(q, k, v, is_causal=True), attention_inputs),
    "attention, masked": (
        lambda q, k, v, m: pyfused.attention(q, k, v, padding_mask=m),
        lambda b, s: (*attention_inputs(b, s), masks(b, s + 2)),
    ),
    "attention, dense bias": (
        lambda q, k, v, bias: pyfused.attention(q, k, v, attn_bias=bias),
        lambda b, s: (*attention_inputs(b, s), states(s, s + 2, 4).permute(2, 0, 1)[None].contiguous()),
    ),
    "attention, relative bias": (
        lambda q, k, v, t: pyfused.attention(q, k, v, relative_bias=pyfused.RelativeBias(t, False, 20)),
        lambda b, s: (*attention_inputs(b, s), fixed(8, 4)),
    ),
    "attention, packed": (
        lambda q, k, v, ends: pyfused.attention(q, k, v, cu_seqlens=ends, is_causal=True),
        lambda b, s: (heads(1, b * s), heads(1, b * s, seed=1), heads(1, b * s, seed=2), torch.arange(b + 1) * s),
    ),
}  # fmt: skip


@pytest.mark.parametrize("name", OPERATORS)
def test_an_operator_is_one_graph_for_all_sizes(name):
    function, arguments = OPERATORS[name]
    check_function(function, function, arguments)


def test_dropout_is_drawn_anew_in_every_call_of_a_graph():
    query, key, value = attention_inputs(2, 12)
    call, _ = compiled(lambda q, k, v: pyfused.attention(q, k, v, dropout_p=0.3))
    torch.manual_seed(11)
    first, second = call(query, key, value), call(query, key, value)
    torch.manual_seed(11)
    eager = [pyfused.attention(query, key, value, dropout_p=0.3) for _ in range(2)]
    assert torch.equal(first, eager[0])
    assert torch.equal(second, eager[1])
    assert not torch.equal(first, second)


@pytest.mark.parametrize("name", ["t5", "fnet"])
def test_a_trace_without_gradients_holds_the_forms_without_them(name):
    """The forms with gradients cost four times as much a call. A trace with gradients holds only those. Without masks, a trace
    serves all sizes too. These two models call every operator; tests/ops/test_traces.py has each by itself."""
    model = backbone(name, num_layers=1).eval()
    held = []

    def collect(graph, _):
        held.extend(str(n.target) for n in graph.graph.nodes if str(n.target).startswith("pyfused."))
        return graph.forward

    def traced(dynamic):
        return torch.compile(model, fullgraph=True, dynamic=dynamic, backend=aot_autograd(fw_compiler=collect))

    call, counts = traced(True), []
    with torch.no_grad():
        for size in SIZES:
            given = inputs(name, *size, masked=False)
            for a, e in zip(results(call(given)), results(model(given)), strict=True):
                assert torch.equal(a, e)
            counts.append(len(held))
    assert held
    assert len(set(counts)) == 1
    assert all("_inference" in operator for operator in held)
    torch._dynamo.reset()
    held.clear()
    traced(None)(inputs(name, 3, 11))
    assert held
    assert not any("_inference" in operator for operator in held)
