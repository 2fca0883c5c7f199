"""Does `pyfused tune` write what dispatch reads, and keep nothing of a wrong kernel?"""

import collections
import json
import subprocess
import sys

import pytest
import torch
from evidence_cases import empty_cache, row

import pyfused
from pyfused import dispatch, evidence
from pyfused.tune import run
from pyfused.tune.run import tune

X, W = torch.randn(16, 8), torch.randn(8, 8)


@pytest.fixture(autouse=True)
def cache(tmp_path, monkeypatch):
    with empty_cache(tmp_path, monkeypatch) as write:
        yield write


class Clock:
    """Time that advances only with kernel calls: each read is a tick."""

    now = 0.0

    def __call__(self):
        self.now += 1e-3
        return self.now


def test_tune_writes_what_dispatch_reads(cache, tmp_path):
    found = tune(quick=True, operators=["linear", "fourier_mix"], threads=[1], clock=Clock())
    assert found["refused"] == []
    assert {line["operator"] for line in found["lines"]} == {"linear", "fourier_mix"}
    assert {line["dtype"] for line in found["lines"]} == {"float32", "float16", "bfloat16"}
    cache(row("rms_norm", shapes="plain", **{"1": 0.5}))
    evidence.write(evidence.own_file(), found)
    assert {line.operator for line in evidence.lines() if line.source.startswith(evidence.kind())} >= {"linear", "rms_norm"}
    assert f"{evidence.own_file().name}, {found['lines'][0]['date']}" in str(pyfused.explain("linear", X, W))


def test_a_disturbed_moment_does_not_decide(monkeypatch):
    """Of three measurements that lie apart the middle one counts."""
    found_so_far = collections.Counter()

    def speed(point, seconds, clock):
        call = point.tensors[0].shape, point.tensors[0].dtype
        found_so_far[call] += 1
        return {1: 2.0, 2: 0.5, 3: 2.5}[found_so_far[call]]

    monkeypatch.setattr(run, "_speed", speed)
    monkeypatch.setattr(run, "_SPECTRA", ((1, 2, 128), (1, 64, 64)))
    found = tune(operators=["fourier_mix"], threads=[1])
    assert {speed for line in found["lines"] for speed in line["speed"]["cpu"].values()} == {2.0}


def test_tune_keeps_nothing_of_a_wrong_kernel(monkeypatch):
    module = dispatch.kernel("cpu", "fourier_mix")
    monkeypatch.setattr(module, "forward", lambda x: (x * 0,))
    dispatch.forget()
    found = tune(quick=True, operators=["fourier_mix"], threads=[1], clock=Clock())
    assert found["lines"] == []
    assert len(found["refused"]) == 9


def test_tune_refuses_what_it_cannot_measure():
    with pytest.raises(ValueError, match="operators names 'conv'"):
        tune(operators=["conv"])


def test_the_commands():
    def run(*arguments):
        command = [sys.executable, "-m", "pyfused", *arguments]
        return subprocess.run(command, capture_output=True, text=True, check=True)

    tuned = run("tune", "fourier_mix", "--quick", "--threads", "1", "--json")
    assert json.loads(tuned.stdout)["kind"] == evidence.kind()
    assert "measuring: 1 thread, float32" in tuned.stderr
    assert str(evidence.own_file()) in run("evidence").stdout
    said = json.loads(run("evidence", "--json").stdout)
    assert said["files"][0] == {"path": str(evidence.own_file()), "exists": True}
    assert any(line["source"].startswith(evidence.kind()) for line in said["lines"])
