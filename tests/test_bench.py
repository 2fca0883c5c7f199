"""Does a benchmark refuse a wrong answer, and no right one? By the tolerance rule, as everything is judged."""

import pytest
import torch
import torch.nn.functional as F

from benchmarks import bench_host_overhead
from pyfused.bench import Case, measure, render
from pyfused.bench.beside_transformers import same
from pyfused.bench.measure import check


def case(change=lambda y: y, dtype=torch.float32, plain=None, baseline=torch.float32):
    """A product by "pyfused" in one dtype, beside a baseline in another, on numbers that both hold."""
    x, w = (torch.randn(n, 96).to(dtype) for n in (33, 70))
    providers = {
        "pyfused": lambda: change(F.linear(x, w)),
        "torch": lambda: F.linear(x.to(baseline), w.to(baseline)),
    }
    exact = lambda: (F.linear(x.double(), w.double()),)  # noqa: E731
    return Case("product", providers, exact, plain and (lambda: F.linear(x, w)), rounds=1, seconds=0.0)


def test_a_right_answer_is_timed():
    row = measure(case())
    assert row["rounds"] == 1
    assert "x" in render([row])


FAULTS = {
    "a little off": lambda y: y * (1 + 1e-5),
    "in half precision": lambda y: y.bfloat16().float(),
    "not finite": lambda y: y.masked_fill(y == y.max(), torch.nan),
    "zeros": torch.zeros_like,
    "one element": lambda y: y + 1e-4 * (y == y.max()),
}


@pytest.mark.parametrize("fault", FAULTS)
def test_a_wrong_answer_is_refused(fault):
    with pytest.raises(AssertionError, match="product: pyfused"):
        measure(case(FAULTS[fault]))


def test_the_scale_is_of_pyfuseds_own_dtype():
    measure(case(dtype=torch.bfloat16, plain=True))
    with pytest.raises(AssertionError, match="product: pyfused"):
        measure(case(lambda y: y * 1.02, torch.bfloat16, plain=True))


def test_every_item_that_the_exact_result_has_is_judged():
    x = torch.randn(33, 70)
    good = Case("pair", {"pyfused": lambda: (x, x), "torch": lambda: (x, x)}, lambda: (x.double(), x.double()))
    check(good)
    good.providers["pyfused"] = lambda: (x, x + 1e-3)
    with pytest.raises(AssertionError, match="pair: pyfused"):
        check(good)


def test_small_calls_of_every_operator_are_right():
    """The benchmark's own cases, on tensors of a few numbers."""
    found = list(bench_host_overhead.cases("cpu"))
    assert len(found) == 15
    for one in found:
        check(one)


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
