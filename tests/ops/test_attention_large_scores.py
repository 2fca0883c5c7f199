"""Is attention's gradient right where float32 rounds a row's log-sum-exp so much that its sum is lost?

Behind a large finite number, as transformers' masks hide keys, or with large scores of its own. In half precision on a GPU such
gradients are only bounded.
"""

import functools

import pytest
import torch
from attention_cases import drawn_seed, gradients, plain
from draws import check

import pyfused
from pyfused import RelativeBias
from pyfused.kernels.reference import relative_bias

GPU = "triton", "cuda"
LEAST = "least"  # of the dtype


def number(least, dtype):
    return torch.finfo(dtype).min if least == LEAST else max(least, torch.finfo(dtype).min)


def make(sq, sk, alike, dtype, device):
    """With keys alike, all scores of a row are equal to the last bit, in every precision."""
    inputs = {"query": torch.randn(2, 2, sq, 16, device=device).to(dtype)}
    inputs["key"], inputs["value"] = (torch.randn(2, 1, sk, 16, device=device).to(dtype) for _ in range(2))
    if alike:
        inputs["key"] = inputs["key"][:, :, :1].expand(-1, -1, sk, -1)
    return inputs


def found(fused, yardstick, inputs, alike):
    """The gradient of a query that sees keys alike is zero: only noise would be compared."""
    cotangent = torch.randn(inputs["query"].shape, device=inputs["query"].device).to(inputs["query"].dtype)
    compared = gradients(fused, lambda t, logarithm=False: yardstick(t), inputs, cotangent)
    if alike:
        del compared["gradient of query"]
    wide = {k: v.double() for k, v in inputs.items()}
    return compared | {"output": (fused(inputs), yardstick(inputs), yardstick(wide))}


def check_bounded(once):
    """No gradient is further off than none at all, but for its rounding."""
    for what, (actual, _, truth) in once().items():
        if what != "output":
            error, size = ((t.double() - other).square().mean().sqrt() for t, other in ((actual, truth), (truth, 0)))
            assert error <= 1.1 * size, what


@pytest.mark.interpreted(least=-1e9, alike=True)
@pytest.mark.parametrize("alike", [True, False], ids=["alike", ""])
@pytest.mark.parametrize("least", [LEAST, -1e9, -1e5, -65504, -1e4], ids=str)
def test_backward(each_backend, dtype, device, least, alike):
    """A third of the queries have every key behind the number, a third some keys, and a third none."""

    def once():
        inputs = make(21, 37, alike, dtype, device)
        bias = torch.zeros(2, 1, 21, 37, device=device)
        bias[:, :, ::3] = number(least, dtype)
        bias[:, :, 1::3, 5:20] = number(least, dtype)
        inputs["attn_bias"] = bias.to(dtype)
        options = {"is_causal": False, "scale": None}
        fused = lambda t: pyfused.attention(**t)  # noqa: E731
        return found(fused, functools.partial(plain, options=options), inputs, alike)

    if each_backend in GPU and dtype != torch.float32:
        check_bounded(once)
    else:
        check(once)


@pytest.mark.cpu_kernels
@pytest.mark.parametrize("options", [{}, {"is_causal": True, "padding_mask": True}, {"dropout_p": 0.3}], ids="-".join)
@pytest.mark.parametrize("sq", [3, 150])
def test_scores_that_are_large_themselves(each_backend, dtype, device, sq, options):
    """More than a block of queries and a tile of keys, and few queries, for which the forward has another form."""
    if sq == 3 and dtype == torch.float32:
        return  # plain PyTorch computes these gradients
    options = {"is_causal": False, "dropout_p": 0.0, "scale": 2e3 if dtype == torch.float16 else 1e4} | options
    if "padding_mask" in options:
        options["padding_mask"] = torch.arange(150, device=device) >= torch.tensor([[0], [70]], device=device)

    def once():
        inputs, number = make(sq, 150, True, dtype, device), int(torch.randint(2**31, ()))
        torch.manual_seed(number)
        seed = drawn_seed(options, device)

        def fused(t):
            torch.manual_seed(number)
            return pyfused.attention(**t, **options)

        return found(fused, functools.partial(plain, options=options, seed=seed), inputs, True)

    check(once)


@pytest.mark.cpu_kernels
def test_small_heads(each_backend, device):
    """A score of few products is more exact than its row's rounded log-sum-exp, which all keys of the row share."""
    options = {"is_causal": False, "scale": 6.0}  # scores of 17

    def once():
        inputs = {name: torch.randn(2, 4, 16, 8, device=device) for name in ("query", "key", "value")}
        return found(lambda t: pyfused.attention(**t, **options), functools.partial(plain, options=options), inputs, False)

    check(once)


@pytest.mark.interpreted(packed=True)
@pytest.mark.parametrize("packed", [True, False], ids=["packed", "batch"])
def test_a_table_of_large_numbers(each_backend, device, packed):
    """Buckets of -1e6: what the table adds to a row is alike for all its keys."""

    def once():
        inputs = make(40, 40, True, torch.float32, device)
        inputs["table"] = torch.full((8, 2), -1e6, device=device)
        if packed:
            inputs = {k: v if k == "table" else v[:1] for k, v in inputs.items()}

        def fused(t):
            cu_seqlens = torch.tensor([0, 11, 40], device=device) if packed else None
            t, relative = {k: v for k, v in t.items() if k != "table"}, RelativeBias(t["table"], True, 12)
            return pyfused.attention(**t, relative_bias=relative, cu_seqlens=cu_seqlens)

        def yardstick(t):
            bias = relative_bias.forward(t["table"], 40, 40, True, 12, 0)[0].expand(len(t["query"]), -1, -1, -1)
            first = torch.arange(40, device=device) < 11
            bias = bias.masked_fill(first[:, None] != first, -torch.inf) if packed else bias
            return plain(t | {"attn_bias": bias}, {"is_causal": False, "scale": None})

        return found(fused, yardstick, inputs, True)

    check(once)


def test_a_number_that_no_float_holds_in_base_two(each_backend, device):
    """On a GPU bfloat16's least number is -inf in the scores' base: such a query counts as one that sees no key."""
    inputs = make(20, 20, False, torch.bfloat16, device)
    bias = torch.full((1, 1, 20, 20), torch.finfo(torch.bfloat16).min, dtype=torch.bfloat16, device=device)
    out = pyfused.attention(**inputs, attn_bias=bias)
    mean = inputs["value"].float().mean(2, keepdim=True).bfloat16().expand(-1, 2, 20, -1)
    torch.testing.assert_close(out, torch.zeros_like(out) if each_backend in GPU else mean)
