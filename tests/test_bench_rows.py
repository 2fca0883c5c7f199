"""Does a benchmark row refuse a wrong answer, name the providers left out, and know an operator's cost?"""

import math

import pytest
import torch
import torch.nn.functional as F
from bench_cases import case, row_of

import pyfused
from pyfused.bench import Calls, Case, Setup, Values, cost_of, report, training
from pyfused.bench import run as engine
from pyfused.bench.benchmarks import bench_compile
from pyfused.bench.beside_transformers import same
from pyfused.bench.measure import _interval, measure, share


def test_a_right_answer_is_timed():
    row = row_of(case())
    assert row["rounds"] == 6
    assert row["seconds"].keys() == {"pyfused", "eager"}
    low, high = row["interval"]
    assert 0 < low <= row["ratio"]["eager"] <= high
    assert (row["flops"], row["bytes"]) == (2 * 33 * 96 * 70, 4 * (33 * 96 + 70 * 96 + 33 * 70))
    assert not row["left_out"]


def test_a_call_of_half_a_minute_is_timed_once(monkeypatch):
    monkeypatch.setattr("pyfused.bench.measure.VERY_SLOW", 0.0)
    row = row_of(case())
    assert row["rounds"] == 1
    assert row["seconds"].keys() == {"pyfused", "eager"}
    low, high = row["interval"]
    assert low == high == row["ratio"]["eager"] == row["seconds"]["eager"] / row["seconds"]["pyfused"]
    assert not row["spread"]
    limits = {"float32_gflop_per_s": 1.0, "read_gb_per_s": 1.0, "copy_gb_per_s": 1.0}
    assert " one " in report.line(row | {"noisy": False}, limits)


def test_a_compiled_model_is_timed(monkeypatch):
    """Traces only: inductor takes half a minute whatever the sizes, so the benchmark has no small case."""
    compile = torch.compile
    monkeypatch.setattr(torch, "compile", lambda model, **options: compile(model, backend="eager", **options))
    make = dict(bench_compile.models())["fnet tiny"]
    row = measure(Case("fnet tiny", torch.float32, lambda: bench_compile.backbone(Setup("cpu"), make)), "cpu", {}, 0.0)
    assert row["ratio"]["not compiled"] > 0
    assert row["flops"] > 0


FAULTS = {
    "a little off": lambda y: y * (1 + 1e-5),
    "in half precision": lambda y: y.bfloat16().float(),
    "not finite": lambda y: y.masked_fill(y == y.max(), torch.nan),
    "zeros": torch.zeros_like,
    "one element": lambda y: y + 1e-4 * (y == y.max()),
    "another shape": lambda y: y[:1],
}


@pytest.mark.parametrize("fault", FAULTS)
def test_a_wrong_answer_is_a_row_that_says_so(fault):
    row = row_of(case(FAULTS[fault]))
    assert "seconds" not in row
    assert row["error"]


def test_the_scale_is_of_pyfuseds_own_dtype():
    assert "seconds" in row_of(case(dtype=torch.bfloat16))
    assert "wrong" in row_of(case(lambda y: y * 1.02, torch.bfloat16))["error"]


@pytest.mark.parametrize("change", [lambda y: (), lambda y: y.double()], ids=["nothing", "float64"])
def test_what_is_missing_or_of_another_dtype_is_refused(change):
    assert "wrong" in row_of(case(change))["error"]


def test_every_item_of_a_tuple_is_judged():
    x = torch.randn(33, 70)
    good = Calls(lambda x: (x, x), lambda x: (x, x), (x,))
    assert "seconds" in row_of(Case("pair", torch.float32, lambda: good))
    good.pyfused = lambda x: (x, x + 1e-3)
    assert "error" in row_of(Case("pair", torch.float32, lambda: good))


def test_gradients_are_judged():
    x, w, grad = torch.randn(9, 96, requires_grad=True), torch.randn(70, 96, requires_grad=True), torch.randn(9, 70)
    for function, right in (
        (pyfused.linear, True),
        (lambda x, w: pyfused.linear(x, w.detach() * 1.0) + 0 * w.sum(), False),
    ):
        calls = Calls(training(function), training(F.linear), (x, w, grad), trains=True)
        assert ("seconds" in row_of(Case("train", torch.float32, lambda calls=calls: calls))) == right


def fails():
    raise RuntimeError("no such\nkernel")


def test_a_peer_that_fails_or_disagrees_is_left_out_by_name():
    peers = {
        "compile": lambda: lambda x, w: F.linear(x, w) * 1.1,
        "flex": fails,
        "liger": lambda: F.linear,
        "openvino": lambda: F.linear,
        "cuda": lambda: F.linear,
    }
    row = row_of(case(peers=peers), {"compile": "", "flex": "", "liger": "not installed", "openvino": ""})
    assert row["ratio"].keys() == {"eager", "openvino"}
    assert "its output is wrong" in row["left_out"]["compile"]
    assert row["left_out"]["flex"] == "RuntimeError: no such kernel"
    assert row["left_out"]["liger"] == "not installed"
    assert "cuda" not in row["left_out"]  # not asked for


def test_a_peer_of_lower_precision_may_be_a_tenth_off():
    def peer(factor):
        return {"ctranslate2-int8": lambda: lambda x, w: F.linear(x, w) * factor}

    for factor, kept in ((1.05, True), (1.2, False), (math.nan, False)):
        row = row_of(case(peers=peer(factor), loose=("ctranslate2-int8",)), {"ctranslate2-int8": ""})
        assert ("ctranslate2-int8" in row["ratio"]) == kept


def test_plain_pytorch_that_fails_is_said_and_pyfused_is_timed():
    def plain(x, w):
        raise NotImplementedError("no half precision")

    x, w = torch.randn(3, 8), torch.randn(5, 8)
    calls = Calls(F.linear, plain, (x, w), exact=lambda: F.linear(x.double(), w.double()), scale=F.linear)
    row = row_of(Case("product", torch.float32, lambda: calls))
    assert row["left_out"] == {"eager": "NotImplementedError: no half precision"}
    assert row["interval"] is None
    assert row["seconds"]["pyfused"] > 0


def test_an_interval_holds_the_median_as_often_as_it_says():
    generator = torch.Generator().manual_seed(3)
    held = 0
    for _ in range(400):
        low, high = _interval(torch.randn(61, generator=generator).exp().tolist())
        held += low <= 1.0 <= high
    assert 0.92 < held / 400 < 0.99
    assert _interval([2.0, 1.0, 3.0, 5.0, 4.0, 6.0]) == [1.0, 6.0]


def test_the_share_of_the_roofline():
    limits = {"read_gb_per_s": 10.0, "copy_gb_per_s": 8.0, "float32_gflop_per_s": 100.0, "bfloat16_gflop_per_s": 5.0}
    row = {"dtype": "bfloat16", "bytes": 1e9, "flops": 5e9, "seconds": {"pyfused": 0.2}}
    assert share(row, limits) == pytest.approx(0.5)  # 0.1 s for the bytes
    assert share(row | {"flops": 2e10}, limits) == pytest.approx(1.0)  # 0.2 s for the products, in float32
    assert share(row | {"bytes": 0, "flops": 0}, limits) is None


def test_values_have_a_unit():
    row = row_of(Case("memory", torch.float32, lambda: Values("MiB", {"pyfused": 10.0, "torch": 25.0})))
    assert row["ratio"] == {"torch": 2.5}
    text = report.line(row, {})
    assert "10 MiB" in text
    assert "torch 2.50 (25)" in text


@pytest.mark.parametrize("gap, right", [(0.0, True), (1e-7, True), (1e-2, False)])
def test_greedy_texts_may_part_at_a_tie_alone(gap, right):
    logits = torch.randn(50, dtype=torch.float64)
    logits[7], logits[9] = 5.0, 5.0 + gap
    asked = []

    def exact(written):
        asked.append(written)
        return logits

    shown = (logits + 1e-7 * torch.randn(50)).float()
    assert same([1, 2, 7, 4], [1, 2, 9, 3], lambda _: shown, exact) == right
    assert asked == [[1, 2]]
    assert same([1, 2], [1, 2], None, None)
    assert not same([1], [1, 2], None, None)


# ---- what an operator costs ------------------------------------------------------------------------------------------


def test_costs_of_attention():
    q, k = torch.randn(2, 4, 6, 8), torch.randn(2, 2, 10, 8)
    mask = torch.ones(2, 10, dtype=torch.bool)
    mask[0, 5:] = False
    whole = 4 * 4 * 8 * (2 * 6 * 10)
    with torch.no_grad():
        assert cost_of(lambda: pyfused.attention(q, k, k)).flops == whole
        assert cost_of(lambda: pyfused.attention(q, k, k, padding_mask=mask)).flops == whole * 15 // 20
        seen = sum(j <= i + 10 - 6 for i in range(6) for j in range(10))
        assert cost_of(lambda: pyfused.attention(q, k, k, is_causal=True)).flops == 4 * 4 * 8 * 2 * seen
        more = torch.randn(2, 4, 14, 8)
        seen = sum(j <= i + 10 - 14 for i in range(14) for j in range(10))
        assert cost_of(lambda: pyfused.attention(more, k, k, is_causal=True)).flops == 4 * 4 * 8 * 2 * seen
        assert cost_of(lambda: pyfused.attention(q, k, k)).bytes == 4 * (2 * q.numel() + 2 * k.numel())
        broadcast = cost_of(lambda: pyfused.attention(q, k, k, attn_bias=torch.zeros(1, 1, 1, 10))).bytes
        assert broadcast == 4 * (2 * q.numel() + 2 * k.numel() + 10)
        ends = torch.tensor([0, 3, 3, 10])
        packed = torch.randn(1, 4, 10, 8)
        assert cost_of(lambda: pyfused.attention(packed, packed, packed, cu_seqlens=ends)).flops == 4 * 4 * 8 * (9 + 49)


@pytest.mark.parametrize(
    "name", ["layer_norm", "rms_norm", "linear", "ffn", "gated_ffn", "fourier_mix", "relative_bias"]
)
def test_every_operator_declares_its_cost_forward_and_backward(name):
    one = next(c for c in engine.cases(name, Setup(small=True)) if "train" not in c.name)
    calls = one.make()
    with torch.no_grad():
        forward = cost_of(lambda: calls.pyfused(*calls.inputs))
    read = sum(t.numel() * t.element_size() for t in calls.inputs)
    assert forward.bytes > read
    leaves = [t.requires_grad_() for t in calls.inputs]
    both = cost_of(lambda: _backward(calls.pyfused(*leaves)))
    assert both.bytes > forward.bytes


def _backward(out):
    first = out[0] if isinstance(out, tuple) else out
    first.sum().backward()
