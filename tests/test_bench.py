"""Does a benchmark run keep its rows, mark noisy and slow ones, and take options from a shell?"""

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from bench_cases import case

from pyfused.bench import Calls, Case, Setup, report
from pyfused.bench import run as engine
from pyfused.bench.measure import measure
from pyfused.cli import main


@pytest.fixture
def two(monkeypatch):
    """Two benchmarks of made-up cases."""
    made = {"good": [case()], "mixed": [case(torch.zeros_like), case()]}
    monkeypatch.setattr(engine, "names", lambda: list(made))
    monkeypatch.setattr(engine, "cases", lambda name, setup: made[name])
    return made


def run(*names, **more):
    return engine.bench(names, Setup(small=True), seconds=0.0, peers=["eager"], **more)


def test_one_failing_case_ends_nothing(two):
    found = run()
    assert [(r["benchmark"], "error" in r) for r in found["rows"]] == [
        ("good", False),
        ("mixed", True),
        ("mixed", False),
    ]
    assert not found["interrupted"]
    assert found["left"] == 0
    text = report.table(found) + report.summary(found)
    assert "FAILED" in text
    assert "1 failed: mixed product float32" in text


def test_ctrl_c_keeps_what_is_done(two):
    def stop(found, now, left):
        if len(found["rows"]) == 1:
            raise KeyboardInterrupt

    found = run(each=stop)
    assert found["interrupted"]
    assert (len(found["rows"]), found["left"]) == (1, 2)
    assert "interrupted" in report.summary(found)


def test_a_limit_begins_no_more_rows(two, monkeypatch):
    times = iter([0.0, 0.0, 0.5, 1.5])
    monkeypatch.setattr(engine.time, "monotonic", lambda: next(times))
    found = run(limit=1.0)
    assert found["left"] == 1
    assert len(found["rows"]) == 2
    assert "1 not measured" in report.summary(found)


def test_noise_is_said(two, monkeypatch):
    readings = iter([1.0, 1.0, 1.5, 1.5, 0.6, 0.6, 2.0, 2.0, 1.0, 1.0] * 12)
    monkeypatch.setattr("pyfused.bench.measure._time_cpu", lambda call, repeats: next(readings))
    monkeypatch.setattr("pyfused.bench.measure._repeats", lambda call: 1)
    monkeypatch.setattr(
        engine, "ceilings", lambda *a: {"read_gb_per_s": 1, "copy_gb_per_s": 1, "float32_gflop_per_s": 1}
    )
    found = run("good")
    assert found["rows"][0]["noisy"]
    assert "noisy" in report.summary(found)


@pytest.mark.parametrize("slower, tries", [((2.0, 2.0, 2.0), 3), ((2.0, 1.0, 1.0), 2), ((1.0,), 1)])
def test_a_slow_row_is_measured_again_before_it_counts(two, monkeypatch, slower, tries):
    measured = []

    def clock(call, repeats):
        own = call.func is not F.linear
        return slower[len(measured) - 1] if own else 1.0

    def counted(*args):
        measured.append(args)
        return measure(*args)

    monkeypatch.setattr("pyfused.bench.measure._time_cpu", clock)
    monkeypatch.setattr("pyfused.bench.measure._repeats", lambda call: 1)
    monkeypatch.setattr(
        engine, "ceilings", lambda *a: {"read_gb_per_s": 1, "copy_gb_per_s": 1, "float32_gflop_per_s": 1}
    )
    monkeypatch.setattr(engine, "measure", counted)
    (row,) = run("good", check=True)["rows"]
    assert len(measured) == tries
    assert row["slow"] == (slower[-1] == 2.0)
    assert row["ratio"]["eager"] == pytest.approx(1 / slower[tries - 1])
    assert ("slow" in report.line(row, {"read_gb_per_s": 1, "copy_gb_per_s": 1, "float32_gflop_per_s": 1})) == row[
        "slow"
    ]


def test_what_cannot_be_compared_does_not_pass_the_check(two, capsys):
    def plain(x, w):
        raise NotImplementedError

    x, w = torch.randn(3, 8), torch.randn(5, 8)
    calls = Calls(F.linear, plain, (x, w), exact=lambda: F.linear(x.double(), w.double()), scale=F.linear)
    two["good"][:], two["mixed"][:] = [Case("product", torch.float32, lambda: calls)], []
    assert main(["bench", "--seconds", "0", "--peers", "eager"]) == 0
    assert main(["bench", "--seconds", "0", "--peers", "eager", "--check"]) == 1
    assert "1 could not be compared" in capsys.readouterr().out


def test_names_and_peers_are_checked():
    with pytest.raises(ValueError, match="NAMES has 'attentoin'; it takes attention"):
        engine.bench(["attentoin"])
    with pytest.raises(ValueError, match="--peers has 'torch'; it takes eager"):
        engine.bench(["attention"], peers=["torch"])


def test_threads_are_as_before(two):
    before = torch.get_num_threads()
    found = run("good", threads=before + 1)
    assert found["threads"] == before + 1
    assert torch.get_num_threads() == before


def test_every_operator_and_model_has_a_benchmark():
    from pyfused import ops

    assert {*ops.MODULES, "gpt2", "t5", "albert", "fnet"} <= set(engine.names())
    for name in ("gpt2", "t5", "albert", "fnet", "attention", "ffn"):
        named = {c.name.split()[0].rstrip(",") for c in engine.cases(name, Setup())}
        assert "train" in named


# ---- from a shell ----------------------------------------------------------------------------------------------------


def test_from_a_shell(capsys, tmp_path):
    path, picture = tmp_path / "run.json", tmp_path / "run.png"
    options = ["--seconds", "0", "--peers", "eager", "--dtype", "float32"]
    assert main(["bench", "host_overhead", *options, "--json", str(path), "--plot", str(picture)]) == 0
    out = capsys.readouterr().out
    assert "15 rows" in out
    assert "layer_norm residual" in out
    assert "ceilings: copy" in out
    found = json.loads(path.read_text())
    assert len(found["rows"]) == 15
    assert found["threads"] == 1
    assert picture.read_bytes()[:4] == b"\x89PNG"
    assert {*tmp_path.iterdir()} == {path, picture}
    assert main(["bench", "host_overhead", *options, "--json"]) == 0
    assert len(json.loads(capsys.readouterr().out)["rows"]) == 15


@pytest.mark.parametrize(
    "options, message",
    [
        (["nothing"], "NAMES has 'nothing'"),
        (["--threads", "0"], "--threads is 0"),
        (["--dtype", "int8"], "--dtype is 'int8'"),
        (["--json", "gpt2"], "--json is 'gpt2'; it takes a name that ends in .json"),
        (["--plot", "run.xyz"], "--plot is 'run.xyz'"),
        (["--plot", "/nowhere/run.png"], "--plot is '/nowhere/run.png', which cannot be written"),
        (["--json", "/nowhere/run.json"], "--json is '/nowhere/run.json', which cannot be written"),
        (["--seconds", "nan"], "--seconds is nan; it takes seconds"),
        (["--limit", "-5"], "--limit is -5.0; it takes seconds"),
        (["--peers", "tensorflow"], "--peers has 'tensorflow'"),
        (["--device", "cuda"], "no CUDA device here"),
    ],
)
def test_a_bad_option_is_one_line(options, message, capsys):
    assert main(["bench", *options]) == 2
    assert message in capsys.readouterr().err


def test_check_fails_where_pyfused_is_slower(two, monkeypatch, capsys):
    two["mixed"].pop(0)
    monkeypatch.setattr(engine, "is_slow", lambda row: row["benchmark"] == "mixed")
    assert main(["bench", "--seconds", "0", "--peers", "eager"]) == 0
    assert main(["bench", "--seconds", "0", "--peers", "eager", "--check"]) == 1
    assert "slower than plain PyTorch: mixed product float32" in capsys.readouterr().out


def test_a_killed_run_loses_nothing(tmp_path):
    path = tmp_path / "run.json"
    command = [sys.executable, "-m", "pyfused.cli", "bench", "host_overhead", "--seconds", "0.2", "--json", str(path)]
    started = subprocess.Popen(command, stdout=subprocess.DEVNULL, env=os.environ | {"OMP_NUM_THREADS": "1"})
    try:
        while not path.exists() or len(json.loads(path.read_text())["rows"]) < 2:
            assert started.poll() is None
            time.sleep(0.05)
    finally:
        started.send_signal(signal.SIGKILL)
        started.wait()
    assert len(json.loads(path.read_text())["rows"]) >= 2


def test_the_installed_benchmarks_need_no_source_tree():
    """tests/test_packaging.py builds the wheel, which holds part of benchmarks/."""
    folder = Path(engine.__file__).resolve().parents[2] / "benchmarks"
    for path in folder.glob("bench_*.py"):
        assert "parents[" not in path.read_text()
