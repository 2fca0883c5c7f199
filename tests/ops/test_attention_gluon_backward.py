"""Is attention's backward for Hopper right, whatever happens first? Without a GPU an interpreter (tests/gluon_on_cpu.py) runs
it, with copies and products at every time at which they may happen."""

import contextlib
import importlib.util
import sys
from functools import partial
from pathlib import Path

import gluon_on_cpu
import pytest
import torch
from attention_cases import plain
from draws import check

import pyfused
from pyfused import dispatch, tiles
from pyfused.kernels.gluon import _attention_backward, _attention_grad_key_value, _attention_grad_query, attention
from pyfused.testing import assert_close

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
NAMES = ("query", "key", "value")
pytestmark = pytest.mark.interpreted  # the bias by distance is spread out by Triton


@pytest.fixture(autouse=True)
def hopper(monkeypatch):
    """Dispatch treats CPU tensors as GPU tensors. Two programs share the tiles, so each has several."""
    if DEVICE == "cuda":
        if dispatch.missing("gluon"):
            pytest.skip(dispatch.missing("gluon"))
        yield
        return
    monkeypatch.setitem(dispatch.PREFERENCES, "cpu", dispatch.PREFERENCES["cuda"])
    monkeypatch.setattr(tiles, "multiprocessors", lambda device: 2)
    new_stats = _attention_backward.new_stats
    monkeypatch.setattr(_attention_backward, "new_stats", lambda query: new_stats(query).fill_(torch.nan))
    with gluon_on_cpu.installed():
        yield
        monkeypatch.undo()


def drawn(sizes, dtype=torch.bfloat16):
    """Query, key, value and the cotangent: (B, H, S, D) tensors stored as (B, S, H, D)."""
    b, h, hkv, sq, sk, d = sizes
    shapes = (b, sq, h, d), (b, sk, hkv, d), (b, sk, hkv, d), (b, sq, h, d)
    return [torch.randn(shape, device=DEVICE).to(dtype).transpose(1, 2) for shape in shapes]


def gradients(inputs, cotangent, **options):
    leaves = [t.detach().requires_grad_() for t in inputs]
    with pyfused.backend("gluon", strict=True):
        out = pyfused.attention(*leaves, **options)
        return torch.autograd.grad(out, leaves, cotangent)


# sizes (B, H, Hkv, Sq, Sk, D), causal, T5's bias: None, or whether it tells before from after
CASES = [
    ((2, 2, 2, 130, 200, 64), False, None),
    ((1, 4, 2, 129, 257, 64), True, None),
    ((1, 1, 1, 1, 2, 64), False, None),
    ((1, 2, 2, 300, 300, 64), True, None),
    ((2, 1, 1, 7, 1025, 64), True, None),
    ((1, 2, 2, 700, 650, 64), False, True),  # far tiles on both sides
    ((1, 2, 1, 260, 900, 64), True, False),
]


@pytest.mark.parametrize("half", [torch.float16, torch.bfloat16], ids=["float16", "bfloat16"])
@pytest.mark.parametrize("sizes, causal, both", CASES)
def test_gradients(sizes, causal, both, half):
    h, (sq, sk) = sizes[1], sizes[3:5]

    def once():
        *inputs, cotangent = drawn(sizes, half)
        own, more, wide = {}, {}, {}
        if both is not None:
            table = torch.randn(32, h, device=DEVICE).to(half)
            own = {"relative_bias": pyfused.RelativeBias(table, both)}
            with pyfused.backend("reference"):
                dense = pyfused.relative_bias(table, sq, sk, bidirectional=both, query_offset=sk - sq)
            more, wide = {"attn_bias": dense}, {"attn_bias": dense.double()}
        found = gradients(inputs, cotangent, is_causal=causal, **own)
        others = []
        for cast, bias in ((lambda t: t, more), (torch.Tensor.double, wide)):
            leaves = [cast(t).detach().requires_grad_() for t in inputs]
            out = plain({**dict(zip(NAMES, leaves)), **bias}, {"is_causal": causal, "scale": None})
            others.append(torch.autograd.grad(out, leaves, cast(cotangent)))
        return dict(zip(NAMES, zip(found, *others, strict=True)))

    check(once)


@pytest.mark.parametrize("length, side", [(140, None), (420, 32)])
def test_with_the_gradient_of_the_table(length, side):
    """Triton's kernel for the queries sums it up, and writes what this backend's kernel for the keys reads, which has tiles of
    its own."""
    kernels = ("attention_grad_query", "attention_grad_key_value") if side else ()
    tile = {"BLOCK_M": side, "BLOCK_N": side, "num_warps": 4, "num_stages": 2}
    *inputs, cotangent = drawn((1, 2, 2, length, length, 64), torch.float16)
    table = torch.randn(32, 2, device=DEVICE).half()
    found = []
    for name, cast in (("gluon", lambda t: t), ("reference", lambda t: t), ("reference", torch.Tensor.double)):
        leaves = [cast(t).detach().requires_grad_() for t in (*inputs, table)]
        with pyfused.backend(name, strict=True), contextlib.ExitStack() as small:
            for kernel in kernels:
                small.enter_context(tiles.trying(kernel, tile))
            out = pyfused.attention(*leaves[:3], relative_bias=pyfused.RelativeBias(leaves[3], True))
            found.append(torch.autograd.grad(out, leaves, cast(cotangent)))
    for each in zip(*found, strict=True):
        assert_close(*each)


@pytest.mark.skipif(DEVICE == "cuda", reason="only the interpreter has an order to choose")
def test_the_order_of_events_changes_no_bit(monkeypatch):
    *inputs, cotangent = drawn((1, 2, 2, 257, 300, 64))
    found = []
    for seed in range(6):
        monkeypatch.setattr(attention, "start", partial(gluon_on_cpu.run, seed=seed))
        found.append(gradients(inputs, cotangent, is_causal=True))
    for other in found[1:]:
        assert all(map(torch.equal, found[0], other))


def test_a_cotangent_may_be_expanded():
    *inputs, _ = drawn((1, 2, 2, 40, 70, 64))
    cotangent = torch.randn(1, 2, 40, 1, device=DEVICE, dtype=torch.bfloat16).expand(1, 2, 40, 64)
    found = gradients(inputs, cotangent)
    assert all(map(torch.equal, found, gradients(inputs, cotangent.contiguous())))


@pytest.mark.parametrize(
    "sizes, options, reason",
    [
        ((1, 1, 1, 4, 4, 128), {}, "a head size other than 64"),
        ((1, 1, 1, 9, 4, 64), {"is_causal": True}, "more queries than keys"),
        ((1, 1, 1, 4, 1, 64), {}, "one key"),
    ],
)
def test_it_says_what_it_lacks(sizes, options, reason):
    from pyfused.ops.attention import bind

    *inputs, cotangent = drawn(sizes)
    call = bind(*inputs, **options)
    out, lse = torch.empty_like(inputs[0]), torch.empty(sizes[:1] + sizes[1:2] + sizes[3:4], device=DEVICE)
    assert reason in attention.unsupported_backward(*call.backward(cotangent, out, lse, False, False))


WAIT = "    grad_key, grad_value = warpgroup_mma_wait(0, [grad_key, grad_value])\n"
FREE = "    mbarrier.arrive(free.index(stage))\n"

# A line of a kernel, and a wrong one.
FAULTS = {
    _attention_grad_key_value: {
        "queries are free before they were read": (WAIT + FREE, FREE + WAIT),
        "scores are used before they came": ("warpgroup_mma_wait(2, [scores])", "warpgroup_mma_wait(3, [scores])"),
        "the second half's too": ("warpgroup_mma_wait(3, [more_scores])", "warpgroup_mma_wait(4, [more_scores])"),
        "nobody waits for the queries": ("    mbarrier.wait(ready.index(stage), n // STAGES % 2)\n", ""),
        "the copies wait for the wrong phase": ("n // STAGES % 2 ^ 1)", "n // STAGES % 2)"),
        "one warpgroup's word is enough": ("mbarrier.init(free.index(i), GROUPS)", "mbarrier.init(free.index(i), 1)"),
        "nobody frees the keys": ("        mbarrier.arrive(own_free.index(own))\n", "        pass\n"),
        "nobody waits for the keys": ("        mbarrier.wait(own_ready.index(own), item // _OWN % 2)\n", ""),
        "a diagonal of keys too many": ("i = (first_key - shift - start)", "i = (first_key - shift - start - 1)"),
        "a query past the end": ("< query_length - start - j % 8", "< query_length + 1 - start - j % 8"),
    },
    _attention_grad_query: {
        "keys are free before they were read": (
            "    p = gl.exp2(s * scale - (lse - far)[:, None])\n",
            "    p = gl.exp2(s * scale - (lse - far)[:, None])\n    mbarrier.arrive(free.index(stage))\n",
        ),
        "scores are used before they came": ("warpgroup_mma_wait(1, [scores])", "warpgroup_mma_wait(2, [scores])"),
        "dP is used before it came": ("warpgroup_mma_wait(0, [product])", "warpgroup_mma_wait(1, [product])"),
        "nobody frees the queries": ("        mbarrier.arrive(own_free)\n", "        pass\n"),
        "a diagonal of keys too many": ("i + (shift - start)", "i + (shift + 1 - start)"),
    },
}  # fmt: skip


@pytest.mark.skipif(DEVICE == "cuda", reason="only the interpreter shows them each time")
@pytest.mark.parametrize("module, fault", [(module, fault) for module, faults in FAULTS.items() for fault in faults])
def test_the_interpreter_finds(module, fault, tmp_path, monkeypatch):
    right, wrong = FAULTS[module][fault]
    source = Path(module.__file__).read_text()
    assert source.count(right) == 1
    name = "pyfused.kernels.gluon._faulty_backward"
    path = tmp_path / "_faulty_backward.py"
    path.write_text(source.replace(right, wrong))
    spec = importlib.util.spec_from_file_location(name, path)
    faulty = importlib.util.module_from_spec(spec)
    monkeypatch.setitem(sys.modules, name, faulty)
    spec.loader.exec_module(faulty)
    kernel = "grad_query_kernel" if module is _attention_grad_query else "grad_key_value_kernel"
    monkeypatch.setattr(_attention_backward, kernel, getattr(faulty, kernel))
    *inputs, cotangent = drawn((1, 2, 2, 300, 500, 64))
    leaves = [t.double().requires_grad_() for t in inputs]
    out = plain(dict(zip(NAMES, leaves)), {"is_causal": True, "scale": None})
    truth = torch.autograd.grad(out, leaves, cotangent.double())
    leaves = [t.detach().requires_grad_() for t in inputs]
    same = torch.autograd.grad(plain(dict(zip(NAMES, leaves)), {"is_causal": True, "scale": None}), leaves, cotangent)

    def try_orders():
        for seed in range(30):
            monkeypatch.setattr(attention, "start", partial(gluon_on_cpu.run, seed=seed))
            for found in zip(gradients(inputs, cotangent, is_causal=True), same, truth, strict=True):
                assert_close(*found)

    with pytest.raises(AssertionError):
        try_orders()
