"""Is attention for Hopper right, and never run unless forced? Without a GPU an interpreter (tests/gluon_on_cpu.py) runs it,
with copies and products at every time at which they may happen."""

import importlib.util
import sys
from functools import partial
from pathlib import Path

import gluon_on_cpu
import pytest
import torch
import triton
from attention_cases import plain
from draws import check

import pyfused
from pyfused import dispatch, evidence, extensions
from pyfused.arguments import AttentionForward
from pyfused.evidence import storage
from pyfused.kernels.gluon import _attention_forward, attention
from pyfused.testing import assert_close

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
NAMES = ("query", "key", "value")


@pytest.fixture(autouse=True)
def hopper(monkeypatch):
    """Dispatch treats CPU tensors as GPU tensors."""
    if DEVICE == "cuda":
        if dispatch.missing("gluon"):
            pytest.skip(dispatch.missing("gluon"))
        yield
        return
    monkeypatch.setitem(dispatch.PREFERENCES, "cpu", dispatch.PREFERENCES["cuda"])
    with gluon_on_cpu.installed():
        yield
        monkeypatch.undo()


def drawn(sizes, dtype=torch.bfloat16):
    """(B, H, S, D) tensors stored as (B, S, H, D)."""
    b, h, hkv, sq, sk, d = sizes
    shapes = (b, sq, h, d), (b, sk, hkv, d), (b, sk, hkv, d)
    return [torch.randn(shape, device=DEVICE).to(dtype).transpose(1, 2) for shape in shapes]


# sizes (B, H, Hkv, Sq, Sk, D), causal, T5's bias: None, or whether it tells before from after
CASES = [
    ((2, 2, 1, 130, 300, 64), False, None),
    ((1, 1, 1, 1, 1, 64), False, None),
    ((1, 2, 2, 257, 257, 64), True, None),
    ((1, 1, 1, 300, 40, 64), True, None),  # rows without a key
    ((1, 1, 1, 100, 1025, 128), True, None),
    ((1, 2, 2, 700, 700, 64), False, True),  # far tiles on both sides
    ((1, 2, 1, 260, 900, 64), True, False),
    ((1, 1, 1, 129, 70, 64), False, True),
    ((2, 3, 3, 500, 500, 64), True, None),  # programs with several blocks, and a short first one
    ((1, 5, 1, 210, 130, 64), False, None),
]


def test_rows_whose_maxima_grow():
    """Exponentials may reach 2^8 before a row is scaled again."""

    def once():
        query, key, value = drawn((1, 2, 2, 200, 700, 64))
        key *= torch.linspace(0, 8, 700, device=DEVICE)[:, None].to(key.dtype)
        inputs, options = (query, key, value), {"is_causal": False, "scale": None}
        with pyfused.backend("gluon", strict=True):
            out = pyfused.attention(*inputs)
        truth = plain(dict(zip(NAMES, (t.double() for t in inputs))), options)
        return {"output": (out, plain(dict(zip(NAMES, inputs)), options), truth)}

    check(once)


@pytest.mark.parametrize("half", [torch.float16, torch.bfloat16], ids=["float16", "bfloat16"])
@pytest.mark.parametrize("sizes, causal, both", CASES)
def test_values_and_log_sum_exps(sizes, causal, both, half):
    h, (sq, sk) = sizes[1], sizes[3:5]

    def once():
        inputs = drawn(sizes, half)
        table = None if both is None else torch.randn(32, h, device=DEVICE).to(half)
        bias = None if both is None else pyfused.RelativeBias(table, both)
        options = {"is_causal": causal, "scale": None}
        with pyfused.backend("gluon", strict=True):
            out = pyfused.attention(*inputs, relative_bias=bias, **options)
        assert out.transpose(1, 2).is_contiguous()
        more, wide = {}, {}
        if both is not None:
            with pyfused.backend("reference"):
                dense = pyfused.relative_bias(table, sq, sk, bidirectional=both, query_offset=sk - sq)
            more, wide = {"attn_bias": dense}, {"attn_bias": dense.double()}
        truth = plain({**dict(zip(NAMES, (t.double() for t in inputs))), **wide}, options)
        return {"output": (out, plain({**dict(zip(NAMES, inputs)), **more}, options), truth)}

    check(once)


@pytest.mark.skipif(DEVICE == "cuda", reason="only the interpreter says who started a product")
def test_warpgroups_start_their_products_in_turn(monkeypatch):
    """Whatever happens first, one starts both of a step's products, then the next."""
    inputs, results = drawn((1, 1, 1, 192, 900, 64)), []
    for seed in range(6):
        monkeypatch.setattr(attention, "start", partial(gluon_on_cpu.run, seed=seed))
        with pyfused.backend("gluon", strict=True):
            results.append(pyfused.attention(*inputs))
        assert gluon_on_cpu._block.started == [0, 0, 1, 1, 2, 2] * (-(-900 // 128) - 1)
    assert all(torch.equal(out, results[0]) for out in results)


@pytest.mark.parametrize("rows, keys, d", [(128, 2048, 64), (64, 2048, 128), (32, 8192, 64)])
def test_no_program_has_much_more_than_its_share_under_a_causal_mask(rows, keys, d):
    """With 16 heads together, which the L2 allows, the busiest of 132 programs had 57% more at a head size of 128."""
    queries = {64: 192, 128: 128}[d]
    blocks = -(-keys // queries)
    together = attention._together(rows, blocks, queries, keys, 4 * keys * d, 132)
    loads = [0] * 132
    for number in range(rows * blocks):
        k, place = divmod(number, 132)
        back = number % (blocks * together) // together
        loads[place if k % 2 == 0 else 131 - place] += 1 + -(-(keys - back * queries) // 128)
    assert max(loads) < 1.06 * sum(loads) / 132


@pytest.mark.parametrize(
    "speed, size, runs", [(0.9, 64, False), (1.5, 64, True), (0.0, 64, False), (1.5, 80, False), (None, 64, False)]
)
def test_evidence_chooses(monkeypatch, speed, size, runs):
    """It runs where it was measured right and fastest, and takes the call; without evidence it runs nowhere."""
    shapes = f"many queries, D {64 if size == 64 else 128}"
    line = {"operator": "attention", "function": "forward", "dtype": "bfloat16", "shapes": shapes, "date": "2026-01-02"}
    found = () if speed is None else (storage.line_from(line | {"speed": {"gluon": {"64": speed}}}, "gpu.json"),)
    monkeypatch.setattr(evidence, "lines", lambda device: found)
    monkeypatch.setitem(dispatch.PREFERENCES, DEVICE, dispatch.PREFERENCES["cuda"])
    monkeypatch.setattr(attention, "_WORTH_STARTING", 0)
    monkeypatch.setattr(attention, "multiprocessors", lambda device: 1)
    dispatch.forget()
    said = pyfused.explain("attention", *drawn((1, 1, 1, 24, 24, size)))
    assert (said.backend == "gluon") == runs
    mine = next(v for v in said.verdicts if v.backend == "gluon")
    assert ("unproven on this device" in mine.reason) == (not speed)


@pytest.mark.parametrize("hip, capability, runs", [(None, (9, 0), True), (None, (10, 0), False), ("7.1", (9, 4), False)])
def test_it_is_for_hopper_alone(monkeypatch, hip, capability, runs):
    monkeypatch.setattr(extensions, "_emulated_gluon", False)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 1)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda index: capability)
    monkeypatch.setattr(torch.version, "hip", hip)
    assert (extensions.gluon_missing() == "") == runs


@pytest.mark.parametrize(
    "sizes, of_forward, of_backward",
    [
        ((1, 3, 3, 128, 400, 64), "so few scores", "so few scores"),
        ((1, 1, 1, 64, 1 << 21, 64), "fewer blocks", ""),
        ((1, 14, 2, 2048, 5000, 64), "", "fewer blocks"),
        ((8, 16, 16, 1024, 1024, 64), "", ""),
    ],
)
def test_it_leaves_calls_in_which_a_gpu_would_idle(monkeypatch, sizes, of_forward, of_backward):
    monkeypatch.setattr(attention, "multiprocessors", lambda device: 132)
    b, h, hkv, sq, sk, d = sizes
    query, key = torch.empty(b, h, sq, d, device="meta"), torch.empty(b, hkv, sk, d, device="meta")
    forward = AttentionForward(query, key, key, False, None, None, 1.0, 0.0, None, False)
    backward = forward.backward(query, query, query, False, False)
    said = attention.declined_forward(*forward) or "", attention.declined_backward(*backward) or ""
    assert [said[0].startswith(of_forward), said[1].startswith(of_backward)] == [True, True]
    assert list(map(bool, said)) == [bool(of_forward), bool(of_backward)]


@pytest.mark.parametrize("version, runs", [("3.6.0", True), ("3.6.1", True), ("3.7.0", False), ("3.60.0", False)])
def test_it_wants_the_release_of_triton_that_was_measured(monkeypatch, version, runs):
    """Gluon still changes from release to release."""
    monkeypatch.setattr(extensions, "_emulated_gluon", False)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 1)
    monkeypatch.setattr(extensions, "is_hopper", lambda index: True)
    monkeypatch.setattr(triton, "__version__", version)
    assert (extensions.gluon_missing() == "") == runs


@pytest.mark.parametrize(
    "sizes, options, reason",
    [
        ((1, 1, 1, 4, 4, 80), {}, "a head size other than"),
        ((1, 1, 1, 4, 4, 64), {"scale": -1.0}, "a scale that is not positive"),
        ((1, 1, 1, 4, 4, 64), {"dropout_p": 0.5}, "dropout"),
        ((1, 1, 1, 4, 4, 64), {"padding_mask": torch.ones(1, 4)}, "padding"),
        ((1, 1, 1, 4, 4, 64), {"attn_bias": torch.zeros(1, 1, 4, 4)}, "a dense bias"),
        ((1, 1, 1, 4, 4, 128), {"relative_bias": torch.zeros(32, 1)}, "spill"),
    ],
)
def test_it_says_what_it_lacks(sizes, options, reason):
    options = {name: o.to(DEVICE, torch.bfloat16) if isinstance(o, torch.Tensor) else o for name, o in options.items()}
    if "relative_bias" in options:
        options["relative_bias"] = pyfused.RelativeBias(options["relative_bias"], True)
    with pyfused.backend("gluon"):
        said = pyfused.explain("attention", *drawn(sizes), **options)
    assert said.backend != "gluon"
    assert reason in said.verdicts[0].reason


# A line of the kernel, and a wrong one.
FAULTS = {
    "a stage is free before its values were read": (
        "        acc, half = warpgroup_mma_wait(0, [product, half])\n    mbarrier.arrive(free.index(stage))\n",
        "        mbarrier.arrive(free.index(stage))\n        acc, half = warpgroup_mma_wait(0, [product, half])\n",
    ),
    "a product is used before it was waited for": ("warpgroup_mma_wait(1, [scores])", "warpgroup_mma_wait(2, [scores])"),
    "nobody waits for the values": (
        "use_acc=False, is_async=True)\n        mbarrier.wait(value_ready.index(before), (n - 1) // STAGES % 2)\n",
        "use_acc=False, is_async=True)\n",
    ),
    "the values' phase is another tile's": ("(n + count - 1) // STAGES % 2)", "(n + count + 2) // STAGES % 2)"),
    "the copies wait for the wrong phase": ("            mbarrier.wait(free.index(n % STAGES), n // STAGES % 2 ^ 1)\n",
                                            "            mbarrier.wait(free.index(n % STAGES), n // STAGES % 2)\n"),
    "stages are overwritten": ("            mbarrier.wait(free.index(n % STAGES), n // STAGES % 2 ^ 1)\n", ""),
    "one warpgroup's word is enough": ("mbarrier.init(free.index(i), CONSUMERS)", "mbarrier.init(free.index(i), 1)"),
    "queries are overwritten": ("                    mbarrier.wait(query_free.index(c), k % 2 ^ 1)\n", ""),
    "earlier rows are not rescaled": ("[acc, alpha]", "[acc, 0 * alpha + 1]"),
    "earlier sums are not rescaled": ("row_sum * gl.convert_layout(alpha", "row_sum + 0 * gl.convert_layout(alpha"),
    "nobody gives the turn away": (
        "        mbarrier.arrive(turns.index((WHICH + 1) % CONSUMERS))\n        s = warpgroup_mma_wait(1",
        "        s = warpgroup_mma_wait(1",
    ),
    "a diagonal of keys too many": ("i + shift - start)", "i + shift - start + 1)"),
    "hidden tiles are not counted": ("            mbarrier.arrive(free.index((n + i) % STAGES))\n", ""),
}  # fmt: skip


@pytest.mark.skipif(DEVICE == "cuda", reason="only the interpreter shows them each time")
@pytest.mark.parametrize("fault", FAULTS)
def test_the_interpreter_finds(fault, tmp_path, monkeypatch):
    right, wrong = FAULTS[fault]
    source = Path(_attention_forward.__file__).read_text()
    assert source.count(right) == 1
    name = "pyfused_faulty_attention"
    path = tmp_path / f"{name}.py"
    path.write_text(source.replace(right, wrong))
    spec = importlib.util.spec_from_file_location(name, path)
    module = importlib.util.module_from_spec(spec)
    monkeypatch.setitem(sys.modules, name, module)
    spec.loader.exec_module(module)
    monkeypatch.setattr(attention, "forward_kernel", module.forward_kernel)
    query, key, value = drawn((1, 4, 4, 450, 500, 64))
    inputs = query, key * torch.linspace(8, 0, 500)[:, None].to(key.dtype), value  # the rows' maxima grow from tile to tile
    truth = plain(dict(zip(NAMES, (t.double() for t in inputs))), {"is_causal": True, "scale": None})
    same = plain(dict(zip(NAMES, inputs)), {"is_causal": True, "scale": None})

    def try_orders():
        for seed in range(40):
            monkeypatch.setattr(attention, "start", partial(gluon_on_cpu.run, seed=seed))
            with pyfused.backend("gluon", strict=True):
                assert_close(pyfused.attention(*inputs, is_causal=True), same, truth)

    with pytest.raises(AssertionError):
        try_orders()
