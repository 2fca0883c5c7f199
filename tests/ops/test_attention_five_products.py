"""Is attention's backward in five products right, which adds up the queries' gradients by atomics? And does it run only if a
tile asks for it, and never where torch has to be deterministic? The cases are those of the backward in seven products."""

import functools

import pytest
import test_attention
import test_attention_packed as packed
import test_attention_relative_bias as biased
import torch
from draws import check
from test_attention import Case, drawn_seed, gradients, make

import pyfused
from pyfused import dispatch, tiles
from pyfused.testing import available, running

TILE = {"BLOCK_M": 16, "BLOCK_N": 32, "num_warps": 4, "num_stages": 1}
QKV = ("query", "key", "value")
DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
pytestmark = pytest.mark.skipif("triton" not in available(DEVICE), reason="Triton cannot run here")
SELDOM = [Case((2, 2, 2, 137, 129, 64), padding="right"), Case((1, 2, 2, 127, 137, 128), is_causal=True, padding="left")]
CASES = [case for case in test_attention.CASES if not case.seldom] + SELDOM


@pytest.fixture
def kernels(monkeypatch):
    """{kernel: how often it ran} of the backward. A tile asks for five products, and torch.empty still gives NaN."""
    module, found = dispatch.kernel("triton", "attention"), {"five": 0, "seven": 0}
    prepare = module.starter

    def starter(kernel, *rest, **options):
        start = prepare(kernel, *rest, **options)
        if "STATS_ONLY" not in options:
            return start

        def counted(*tensors):
            found["five" if options["STATS_ONLY"] else "seven"] += 1
            return start(*tensors)

        return counted

    monkeypatch.setattr(module, "starter", starter)
    monkeypatch.setattr(torch, "are_deterministic_algorithms_enabled", lambda: False)
    with tiles.trying("attention_grad_five", TILE), running("triton"):
        dispatch.forget()
        yield found
    dispatch.forget()


def judged(fused, plain, inputs, options):
    """gradients() of query, key and value; the other inputs have none. plain takes options and a seed too."""
    dtype = inputs["query"].dtype
    cotangent = torch.randn(inputs["query"].shape, device=DEVICE).to(dtype)
    plain = functools.partial(plain, options=options, seed=drawn_seed(options, DEVICE))
    others = {name: t for name, t in inputs.items() if name not in QKV}

    def with_others(function, leaves, **more):
        wide = {name: t.to(leaves["query"].dtype) for name, t in others.items()}
        return function({**leaves, **wide}, **more)

    own = {name: inputs[name] for name in QKV}
    return gradients(functools.partial(with_others, fused), functools.partial(with_others, plain), own, cotangent)


def in_turn(cases):
    """Each case in one half precision."""
    halves = torch.float16, torch.bfloat16
    return [pytest.param(case, halves[i % 2], id=str(case)) for i, case in enumerate(cases)]


@pytest.mark.parametrize("case, dtype", in_turn(CASES))
def test_gradients(kernels, case, dtype):
    def once():
        inputs, options = make(case, dtype, DEVICE)
        return judged(lambda t: pyfused.attention(**t, **options), test_attention.plain, inputs, options)

    check(once)
    assert kernels["five"]
    assert not kernels["seven"]


@pytest.mark.parametrize("case, dtype", in_turn([case for case in biased.CASES if not case.seldom]))
def test_with_relative_bias(kernels, case, dtype):
    case, table = case.attention, case.table

    def once():
        inputs, options = biased.make_biased(case, table, dtype, DEVICE)
        plain = functools.partial(biased.plain, table=table)
        return judged(lambda t: biased.fused(t, options, table), plain, inputs, options)

    check(once)
    assert kernels["five"]
    assert not kernels["seven"]


@pytest.mark.parametrize("case, dtype", in_turn([case for case in packed.CASES if not case.seldom]))
def test_packed_sequences(kernels, case, dtype):
    def once():
        inputs, options = packed.make(case, dtype, DEVICE)
        plain = functools.partial(packed.plain, case=case)
        return judged(lambda t: packed.fused(t, options, case), plain, inputs, options)

    check(once)
    assert kernels["five"]
    assert not kernels["seven"]


def test_sequences_of_one_token_have_zero_gradient(kernels):
    case = packed.Case((2, 1, 64), (1, 5, *[1] * 20))
    inputs, options = packed.make(case, torch.float16, DEVICE)
    leaves = {name: t.requires_grad_() for name, t in inputs.items()}
    out = packed.fused(leaves, options, case)
    (grad,) = torch.autograd.grad(out, [leaves["query"]], torch.randn_like(out))
    assert (grad[:, :, [0, *range(6, 26)]] == 0).all()
    assert (grad[:, :, 1:6] != 0).all()
    assert kernels["five"] == 1


@pytest.mark.parametrize("padding", ["left", ""])
def test_hidden_keys_beside_scores_far_below_zero(kernels, padding):
    """Where log-sum-exps are below -128, a hidden key, whose score is 0, has an infinite exponential."""

    def once():
        inputs, options = make(Case((2, 1, 1, 20, 45, 64), padding=padding), torch.bfloat16, DEVICE)
        inputs["query"], inputs["key"] = inputs["query"] / 8 + 6, inputs["key"] / 8 - 6
        return judged(lambda t: pyfused.attention(**t, **options), test_attention.plain, inputs, options)

    check(once)
    assert kernels["five"]


@pytest.mark.parametrize("junk", [torch.nan, torch.inf])
def test_padding_and_neighbours_do_not_matter(kernels, junk):
    """NaN behind the masks, and in another packed sequence, changes no gradient."""
    query, key, value, upstream = (torch.randn(1, 2, 31, 8, device=DEVICE).half() for _ in range(4))
    starts = torch.tensor([0, 5, 9, 9, 30, 31], device=DEVICE)
    hidden = torch.zeros(31, dtype=torch.bool, device=DEVICE)
    hidden[5:9] = True
    for options in ({"cu_seqlens": starts}, {"padding_mask": ~hidden[None]}):
        spoilt = (0, 1, 2, 3) if "cu_seqlens" in options else (1, 2)
        found = []
        for fill in (0.0, junk):
            given = [query, key, value, upstream]
            for i in spoilt:
                given[i] = given[i].masked_fill(hidden[:, None], fill)
            leaves = [t.requires_grad_() for t in given[:3]]
            grads = torch.autograd.grad(pyfused.attention(*leaves, **options), leaves, given[3])
            found.append([grad[:, :, ~hidden] if "cu_seqlens" in options else grad for grad in grads])
        for clean, other in zip(*found):
            assert torch.equal(clean, other)
            assert clean.isfinite().all()
    assert kernels == {"five": 4, "seven": 0}


def test_only_if_asked_for_and_allowed(kernels, monkeypatch):
    """A tile asks for it. Float32, gradients of biases, and deterministic algorithms take seven products all the same: also for
    a launch that was prepared before torch was told to be deterministic."""
    bias, table = (torch.randn(shape, device=DEVICE).half().requires_grad_() for shape in ((20, 20), (8, 1)))

    def ran(dtype=torch.float16, **options):
        before = dict(kernels)
        query = torch.randn(1, 1, 20, 8, device=DEVICE).to(dtype).requires_grad_()
        pyfused.attention(query, query, query, **options).sum().backward()
        return {name for name in kernels if kernels[name] > before[name]}

    assert ran() == {"five"}
    assert ran(attn_bias=bias.detach()) == {"five"}
    assert ran(attn_bias=bias) == {"seven"}
    assert ran(relative_bias=pyfused.RelativeBias(table.detach(), True, 12)) == {"five"}
    assert ran(relative_bias=pyfused.RelativeBias(table, True, 12)) == {"seven"}
    assert ran(torch.float32) == {"seven"}
    monkeypatch.setattr(torch, "are_deterministic_algorithms_enabled", lambda: True)
    assert ran() == {"seven"}


def test_no_shipped_file_asks_for_it():
    for architecture in tiles.ARCHITECTURES:
        assert not [row for row in tiles.rows(architecture) if row.kernel == "attention_grad_five"]
