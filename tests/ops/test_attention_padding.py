"""Does attention ignore padding? NaN and infinities behind the masks change no bit, forward or backward, on any backend."""

import pytest
import torch
from attention_cases import Case, make

import pyfused

CASES = [
    Case((2, 2, 2, 20, 37, 16), padding="random", bias="full"),
    Case((2, 4, 2, 17, 17, 8), is_causal=True, padding="left", dropout_p=0.3),
    Case((3, 2, 2, 9, 33, 13), padding="all", bias="head"),
    Case((2, 2, 1, 9, 4, 8), is_causal=True),  # the first queries see no key
    Case((2, 4, 2, 3, 37, 8), is_causal=True, padding="random"),
    Case((2, 4, 1, 1, 70, 40), padding="right"),
    Case((2, 2, 1, 70, 90, 64), is_causal=True, padding="left", seldom=True),
    Case((2, 2, 2, 70, 140, 80), padding="random", bias="full", seldom=True),
    Case((2, 4, 2, 2, 777, 64), padding="left", seldom=True),
    Case((1, 2, 2, 33, 90, 256), padding="right", seldom=True),
]


def masked_places(case, options, device):
    """Two (B, 1, S, 1) masks: queries that see no key, and keys at padding."""
    b, _, _, sq, sk, _ = case.sizes
    real = options.get("padding_mask", torch.ones(b, sk, dtype=torch.bool, device=device))
    seen = real[:, None].expand(b, sq, sk)
    seen = seen.tril(sk - sq) if case.is_causal else seen
    return ~seen.any(-1)[:, None, :, None], ~real[:, None, :, None]


def filled(case, inputs, options, junk):
    """The inputs with junk wherever padding and causality hide everything; and the masks of these places."""
    blind, padding = masked_places(case, options, inputs["query"].device)
    inputs = dict(inputs, query=inputs["query"].masked_fill(blind, junk))
    inputs |= {name: inputs[name].masked_fill(padding, junk) for name in ("key", "value")}
    if case.bias == "full":
        inputs["attn_bias"] = inputs["attn_bias"].masked_fill(padding.transpose(-1, -2), junk)
    return inputs, blind, padding


@pytest.mark.interpreted(dtype=torch.float32)
@pytest.mark.parametrize("case", CASES, ids=str)
@pytest.mark.parametrize("table", [False, True], ids=["", "table"])
def test_forward(each_backend, dtype, device, case, table):
    inputs, options = make(case, dtype, device)
    if table:
        options["relative_bias"] = pyfused.RelativeBias(torch.randn(8, case.sizes[1], device=device), True, 12)
    found = []
    for junk in (0.0, torch.nan, torch.inf, -torch.inf):
        torch.manual_seed(7)
        found.append(pyfused.attention(**filled(case, inputs, options, junk)[0], **options))
    assert found[0].isfinite().all()
    for out in found[1:]:
        assert torch.equal(out, found[0])


@pytest.mark.interpreted(dtype=torch.float32, table=False)
@pytest.mark.parametrize("case", CASES, ids=str)
@pytest.mark.parametrize("table", [False, True], ids=["", "table"])
def test_backward(each_backend, dtype, device, case, table):
    """Gradients at these places are exactly zero; the others do not change when zeros stand there."""
    inputs, options = make(case, dtype, device)
    upstream = torch.randn_like(inputs["query"])
    distances = torch.randn(8, case.sizes[1], device=device, requires_grad=True)
    if table:
        options["relative_bias"] = pyfused.RelativeBias(distances, True, 12)
    found = []
    for junk in (0.0, torch.nan, torch.inf):
        torch.manual_seed(7)
        given, blind, padding = filled(case, inputs, options, junk)
        leaves = {name: t.requires_grad_() for name, t in given.items()}
        out = pyfused.attention(**leaves, **options)
        wanted = [*leaves.values(), *([distances] if table else [])]
        found.append(torch.autograd.grad(out, wanted, upstream.masked_fill(blind, junk)))
        assert not found[-1][0].masked_select(blind).any()
        assert not any(grad.masked_select(padding).any() for grad in found[-1][1:3])
    for grads in found[1:]:
        for one, other in zip(grads, found[0], strict=True):
            assert one.isfinite().all()
            assert torch.equal(one, other)


@pytest.mark.interpreted(dtype=torch.float32)
def test_packed_neighbours(each_backend, dtype, device):
    """NaN in one sequence reaches no other."""
    starts = torch.tensor([0, 5, 9, 9, 30, 31], device=device)
    tensors = [torch.randn(1, 4, 31, 8, device=device).to(dtype) for _ in range(3)]
    spoilt = [t.clone() for t in tensors]
    for t in spoilt:
        t[:, :, 5:9] = torch.nan
    clean, found = (pyfused.attention(*given, is_causal=True, cu_seqlens=starts) for given in (tensors, spoilt))
    others = torch.cat([torch.arange(5), torch.arange(9, 31)]).to(device)
    assert torch.equal(found[:, :, others], clean[:, :, others])
    assert found[:, :, 5:9].isnan().all()


@pytest.mark.interpreted(dtype=torch.float32)
def test_backward_of_packed_neighbours(each_backend, dtype, device):
    if each_backend == "cuda":
        pytest.skip("csrc/cuda has no backward")
    starts = torch.tensor([0, 5, 9, 9, 30, 31], device=device)
    tensors = [torch.randn(1, 4, 31, 8, device=device).to(dtype) for _ in range(4)]
    spoilt = [t.clone() for t in tensors]
    for t in spoilt:
        t[:, :, 5:9] = torch.nan
    others = torch.cat([torch.arange(5), torch.arange(9, 31)]).to(device)
    grads = []
    for *given, upstream in (tensors, spoilt):
        given = [t.requires_grad_() for t in given]
        grads.append(torch.autograd.grad(pyfused.attention(*given, cu_seqlens=starts), given, upstream))
    for clean, found in zip(*grads, strict=True):
        assert torch.equal(found[:, :, others], clean[:, :, others])


def test_second_order(device):
    """The same in plain PyTorch, which runs the backward under create_graph=True."""
    case = Case((2, 2, 1, 7, 9, 8), is_causal=True, padding="left")
    inputs, options = make(case, torch.float64, device)
    found = []
    for junk in (0.0, torch.nan):
        given, blind, _ = filled(case, inputs, options, junk)
        leaves = [t.requires_grad_() for t in given.values()]
        out = pyfused.attention(*leaves, **options)
        upstream = torch.ones_like(out).masked_fill(blind, junk)
        grads = torch.autograd.grad(out.sin(), leaves, upstream, create_graph=True)
        found.append(torch.autograd.grad(sum(g.square().sum() for g in grads), leaves))
    for one, other in zip(*found, strict=True):
        assert torch.equal(one, other)
