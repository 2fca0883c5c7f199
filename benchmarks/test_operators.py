"""The operators' cases under pytest-benchmark, which keeps and compares runs: `pytest benchmarks --benchmark-autosave`.

Groups are cases, rows are providers. `python -m benchmarks` interleaves the providers and checks their outputs against each
other, so it is the one whose ratios are published.
"""

import importlib
from itertools import islice

import pytest
import torch

OPERATORS = ("layer_norm", "rms_norm", "attention", "ffn", "gated_ffn", "linear", "fourier_mix")
DEVICE = "cuda" if torch.cuda.is_available() else "cpu"


def cases_of(name):
    return importlib.import_module(f"benchmarks.bench_{name}").cases(DEVICE)


def pytest_generate_tests(metafunc):
    rows = [(n, i, case.name, p) for n in OPERATORS for i, case in enumerate(cases_of(n)) for p in case.providers]
    metafunc.parametrize("row", rows, ids=[f"{n}-{case}-{p}" for n, _, case, p in rows])


def test_speed(benchmark, row):
    name, index, case_name, provider = row
    torch.set_num_threads(1)
    benchmark.group = f"{name} {case_name}"
    case = next(islice(cases_of(name), index, None))  # its closures hold while the generator rests there

    def call():
        out = case.providers[provider]()
        if DEVICE == "cuda":
            torch.cuda.synchronize()
        return out

    out = benchmark(call)
    first = out[0] if isinstance(out, tuple) else out
    assert torch.isfinite(first).all()


@pytest.fixture(autouse=True)
def seeded():
    torch.manual_seed(0)
