"""The cases of `pyfused bench` under pytest-benchmark, which saves and compares runs: `pytest benchmarks --benchmark-autosave`.

A group is a case; its rows are pyfused and plain PyTorch. If benchmarks are disabled, as under xdist and in `make test`, sizes
are small and each case runs once, to check its outputs. The published ratios come from `pyfused bench`, which interleaves the
two.
"""

import pytest
import torch

from pyfused.bench import Setup, Values
from pyfused.bench.measure import right_providers
from pyfused.bench.run import cases, names
from pyfused.evidence import name_of

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"


def pytest_generate_tests(metafunc):
    once = metafunc.config.getoption("benchmark_disable") or hasattr(metafunc.config, "workerinput")
    rows = [(name, case) for name in names() for case in cases(name, Setup(DEVICE, small=once))]
    ids = [f"{name}-{case.name}-{name_of(case.dtype)}" for name, case in rows]
    metafunc.parametrize("provider", ["pyfused", "plain"] if not once else ["pyfused"])
    metafunc.parametrize("row", rows, ids=ids)


def test_speed(benchmark, row, provider):
    name, case = row
    torch.manual_seed(0)
    calls = case.make()
    if isinstance(calls, Values):
        assert all(value > 0 for value in calls.values.values())
        pytest.skip("measures no time of a call") if benchmark.enabled else benchmark(lambda: None)
        return
    with torch.set_grad_enabled(calls.trains):
        providers, left_out = right_providers(calls, {})
        assert not left_out
        benchmark.group = f"{name} {case.name} {name_of(case.dtype)}"
        call = providers["pyfused" if provider == "pyfused" else calls.baseline]

        def run():
            out = call()
            if DEVICE == "cuda":
                torch.cuda.synchronize()
            return out

        benchmark(run)
