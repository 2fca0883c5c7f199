"""Does the tolerance rule find faults and nothing else? Right kernels, planted faults, and the rule's edge cases."""

import draws
import pytest
import torch
from tolerance_cases import CASES, DTYPES, fused, plain_and_truth
from tolerance_faults import FAULTS, faulty

from pyfused.testing import assert_close, available, judge

BACKENDS = [name for name in available() if name.startswith("cpu:")]
SEEDS = 5  # tests/calibrate_tolerance.py runs a thousand


@pytest.mark.parametrize("name", CASES)
def test_right_kernels_pass(dtype, name):
    for seed in range(SEEDS):
        plain, truth = plain_and_truth(CASES[name], dtype, seed)
        for backend in BACKENDS:
            for what, actual in fused(CASES[name], dtype, seed, backend).items():
                assert_close(actual, plain[what], truth[what], f"{backend}, seed {seed}: {what}")


@pytest.mark.parametrize("name, dtype", [(name, dtype) for name, fault in FAULTS.items() for dtype in fault.dtypes], ids=str)
def test_planted_faults_are_found(name, dtype):
    for seed in range(2):
        assert not faulty(FAULTS[name], dtype, seed).ok


def noise(*shape, scale=1e-7):
    return torch.randn(shape, dtype=torch.float64) * scale


def test_more_than_half_again_of_the_rms_error_is_too_much():
    truth, plain, other = (torch.randn(10_000, dtype=torch.float64) for _ in range(3))
    found = [judge((truth + f * 1e-4 * other).float(), (truth + 1e-4 * plain).float(), truth) for f in (1.4, 1.7)]
    assert [j.ok for j in found] == [True, False]
    assert found[1].worst_ratio < 1
    assert found[1].rms_ratio == found[1].ratio > 1
    assert found[1].rms_error == pytest.approx(1.7e-4, rel=0.05)


def test_one_element_far_off_is_too_much():
    truth, plain = (torch.randn(10_000, dtype=torch.float64) for _ in range(2))
    actual = (truth + 1e-4 * plain).float()
    actual[17] += 8 * 1e-4 * plain.abs().max()
    found = judge(actual, (truth + 1e-4 * plain).float(), truth)
    assert found.rms_ratio < 1 < found.worst_ratio
    with pytest.raises(AssertionError, match=r"the sum: RMS error .* worst element off by .* allowed"):
        assert_close(actual, (truth + 1e-4 * plain).float(), truth, "the sum")


@pytest.mark.parametrize("count, factor", [(1, 100.0), (4, 10.0), (16, 3.0), (100, 1.9)])
def test_few_elements_may_differ_more_by_chance(count, factor):
    """Two random draws of one error distribution raise no alarm; with more and more numbers the same factor does."""
    for _ in range(200):
        truth = torch.randn(count, dtype=torch.float64)
        assert judge((truth + noise(count)).float(), (truth + noise(count)).float(), truth).ok
    truth = torch.randn(20_000, dtype=torch.float64)
    error = noise(20_000, scale=1e-3)
    assert not judge((truth + factor * error).float(), (truth + error).float(), truth).ok


def test_few_elements_of_plain_pytorch_may_be_exact_by_luck():
    for value in (1.0, 6.3, 0.02):
        truth = torch.tensor([value], dtype=torch.float32).double()
        beside = torch.nextafter(torch.nextafter(truth.float(), torch.tensor([9.0])), torch.tensor([9.0]))
        assert judge(beside, truth.float(), truth).ok
    many = torch.ones(10_000, dtype=torch.float64)
    assert not judge(many.float() + 2**-22, many.float(), many).ok


def test_a_few_large_errors_count_as_few():
    """If three elements cause all of plain PyTorch's error, its size is chance, however many other elements there are."""
    truth = torch.ones(10_000, dtype=torch.float64)
    plain, actual = truth.clone(), truth.clone()
    plain[:3] += 1e-4 * torch.tensor([1.0, -0.2, 0.5])
    actual[:3] += 1e-4 * torch.tensor([-2.0, 1.0, 0.1])
    assert judge(actual.float(), plain.float(), truth).ok


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_a_rounding_step_belongs_to_its_element(dtype):
    """A large element's rounding step does not hide a small element's error."""
    truth = torch.cat([torch.full((1000,), 1.5), torch.full((1000,), 1.5 * 2.0**-9)]).double()
    exact, step = truth.to(dtype), torch.finfo(dtype).eps
    assert judge(exact, exact, truth).ratio == 0
    off = exact.clone()
    off[-1] *= 1 + 2 * step
    assert 2.5 < judge(off, exact, truth).worst_ratio <= 3.0


def test_zeros_and_subnormals_have_the_smallest_step():
    zero, tiny = torch.zeros(8, dtype=torch.float64), torch.finfo(torch.float16).smallest_normal * 2.0**-10
    assert judge(zero.half(), zero.half(), zero).ratio == 0
    assert judge(torch.full((8,), tiny).half(), zero.half(), zero + tiny / 2).ok
    assert not judge(torch.full((8,), 4 * tiny).half(), zero.half(), zero).ok


NAN, INF = float("nan"), float("inf")


@pytest.mark.parametrize(
    "actual, plain, truth, ok",
    [
        (INF, INF, INF, True),
        (NAN, NAN, NAN, True),
        (NAN, INF, INF, False),
        (-INF, INF, INF, False),
        (1.0, NAN, NAN, False),
        (65504.0, INF, INF, False),
        (NAN, NAN, 1.0, False),  # plain PyTorch is no excuse
        (INF, INF, 1.0, False),
        (1.0, NAN, 1.0, True),  # right although plain PyTorch is wrong
        (1.1, NAN, 1.0, False),
        (INF, INF, 1e5, True),  # float16 cannot hold it
        (-INF, INF, 1e5, False),
        (NAN, INF, 1e5, False),
    ],
)
def test_what_is_not_finite(actual, plain, truth, ok):
    columns = [torch.tensor([1.0, value, -2.0], dtype=torch.float64) for value in (actual, plain, truth)]
    assert judge(columns[0].half(), columns[1].half(), columns[2]).ok == ok


def test_of_several_plain_results_the_worst_sets_the_scale():
    truth = torch.randn(10_000, dtype=torch.float64)
    better, worse, actual = ((truth + noise(10_000, scale=s)).float() for s in (1e-4, 4e-4, 4e-4))
    assert not judge(actual, better, truth).ok
    assert judge(actual, [better, worse], truth).ok


def test_empty_tensors_pass():
    assert judge(torch.empty(0, 3), torch.empty(0, 3), torch.empty(0, 3, dtype=torch.float64)).ok


def test_bad_input_is_refused():
    x = torch.ones(3)
    with pytest.raises(ValueError, match=r"plain \(2,\), truth \(3,\)"):
        judge(x, x[:2], x.double())
    with pytest.raises(TypeError, match=r"truth is torch\.float32"):
        judge(x, x, x)


@pytest.fixture(params=DTYPES, ids=str)
def dtype(request):
    return request.param


def test_draws_together_excuse_one_by_chance_and_no_fault():
    """The first draw's error alone would be a fault; together with the others it is not. If every draw has it, it is."""

    def drawn(*factors):
        factors = iter(factors)

        def once():
            truth, factor = torch.randn(300, dtype=torch.float64), next(factors)
            return {"it": ((truth + noise(300, scale=factor * 1e-3)).float(), (truth + noise(300, scale=1e-3)).float(), truth)}

        return once

    draws.check(drawn(3.0, 1.0, 1.0, 1.0, 1.0, 1.0, 1.0, 1.0))
    with pytest.raises(AssertionError, match="20 draws together"):
        draws.check(drawn(*[3.0] * 20))
