"""Does each item of the GPU script run end to end? Both of its calls, as a dry run without a GPU."""

import json
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from gpu_results import ROOT, ends, gpu, gpu_commands, gpu_publish, gpu_session, of, rows_of

NCU = """#!/bin/sh
echo '==PROF== Connected to process 7'
echo '"ID","Process ID","Kernel Name","Section Name","Metric Name","Metric Unit","Metric Value"'
echo '"0","7","forward_kernel","GPU Speed Of Light Throughput","Duration","us","12.5"'
echo '"0","7","forward_kernel","GPU Speed Of Light Throughput","SM Frequency","Ghz","1.7"'
echo '"0","7","forward_kernel","Launch Statistics","Registers Per Thread","register/thread","168"'
echo '"1","7","combine_kernel","GPU Speed Of Light Throughput","DRAM Throughput","%","91.2"'
while [ "${1#-}" != "$1" ]; do shift; done
exec "$@" >&2
"""
SANITIZER = """#!/bin/sh
echo "said $PYTORCH_NO_CUDA_MEMORY_CACHING $*"
shift 4
"$@" || exit $?
echo '========= ERROR SUMMARY: 0 errors'
"""


@pytest.fixture(scope="module")
def dry(tmp_path_factory):
    """The results folder of both calls, with stand-in tools that print their arguments and run the given command."""
    if torch.cuda.is_available():
        pytest.skip("this machine has a GPU")
    folder, tools = tmp_path_factory.mktemp("results"), tmp_path_factory.mktemp("tools")
    for name, text in (("ncu", NCU), ("compute-sanitizer", SANITIZER)):
        (tools / name).write_text(text)
        (tools / name).chmod(0o755)
    environment = {**os.environ, "PATH": f"{tools}{os.pathsep}{os.environ['PATH']}", "OMP_NUM_THREADS": "1"}
    script = [sys.executable, str(ROOT / "benchmarks" / "gpu.py"), "--dry", "--results", str(folder), "--budget", "900"]
    # `pyfused tune --device cuda` and `bench --device cuda` would only say that there is no GPU: see test_command_lines_...
    # and test_the_rows_of_other_commands. Of the second call racecheck differs in one word; the first has the others.
    first = [item.name for item in gpu.first(True, []) if not item.name.startswith(("tune ", "bench"))]
    for call, items in (("first", first), ("second", ["profile", "memcheck", "streams"])):
        command = [*script, "--call", call, "--only", *items]
        done = subprocess.run(command, env=environment, capture_output=True, text=True)
        assert "Traceback" not in done.stderr, done.stderr
    return folder


@pytest.fixture(scope="module")
def rows(dry):
    return rows_of(dry)


def test_every_item_ends_well(rows):
    found = ends(rows)
    assert set(found.values()) == {"ok"}, found
    assert len(found) == 15
    assert [row for row in rows if row.get("ok") is False] == []


def test_what_comes_back_is_few_small_files(dry):
    files = list(dry.rglob("*"))
    assert sorted(path.name for path in files) == ["log.txt", "results.jsonl", "table.txt"]
    assert all(path.stat().st_size < 16 << 20 for path in files)


def test_the_environment_row(rows):
    about, *checks, ceilings = of(rows, "environment")[:-1]
    assert about["versions"]["torch"] == torch.__version__
    assert about["kind"] == "cuda_dry_run"
    assert about["tools"]["ncu"]
    assert {name for row in checks for name in row.values() if isinstance(name, str) and name.isidentifier()} == {
        "_cpu", "_cuda", "triton", "cuda", "cudnn", "gluon",
    }  # fmt: skip
    assert ceilings == {"ceilings": {"copy_gb_per_s": 1.0}}


def test_the_rows_of_correctness(rows):
    """Every operator on every backend in every dtype, within the tolerance; Triton has neither linear nor decode, cuDNN has no
    bias by distance, and the kernel for Hopper no float32."""
    found = [row for row in rows if row["item"].startswith("correct") and "status" not in row]
    assert {(row["operator"], row["backend"], row["dtype"]) for row in found} == {
        (operator, backend, dtype)
        for backend, operators in (
            ("triton", gpu.OPERATORS), ("cuda", gpu.CUDA_OPERATORS), ("cudnn", gpu.CUDNN_OPERATORS),
            ("gluon", gpu.GLUON_OPERATORS),
        )
        for operator in operators
        for dtype in ("float32", "float16", "bfloat16")
    }
    assert {(row["operator"], row["backend"]) for row in found if row["ok"] is None} == {
        ("linear", "triton"),
        ("decode", "triton"),
        ("attention", "cudnn"),
        ("attention", "gluon"),
    }
    assert [row["dtype"] for row in found if row["ok"] is None and row["backend"] == "gluon"] == ["float32"]
    for row in found:
        assert row["case"]
        assert row["seconds"] >= 0
        assert row["ok"] is None or (row["ok"] and 0 < row["ratio"] <= 1 and row["worst"])


def test_the_rows_of_decode(rows):
    found = of(rows, "decode")[:-1]
    models = "gpt2", "gpt2 by columns", "t5"
    assert [(row["model"], row["rows"]) for row in found] == [(model, n) for model in models for n in (1, 2)]
    assert all(row["ok"] and row["us_called"] > 0 and row["gb_per_s"] > 0 for row in found)


def test_the_rows_of_generation(rows):
    found = of(rows, "generate gpt2,t5")[:-1]
    assert [(row["model"], row["backend"]) for row in found] == [
        (model, backend) for model in ("gpt2", "t5") for backend in ("default", "cuda", "triton")
    ]
    for row in found:
        assert row["ok"]
        assert row["same_again"]
        assert row["as_reference"] == 2
        assert isinstance(row["us_per_token"], float)  # the difference of two times, here of single calls
        assert row["ms_first_token"] > 0


def test_the_rows_of_transformers(rows):
    found = of(rows, "transformers gpt2,t5")[:-1]
    assert [(row["model"], row["how"]) for row in found] == [
        (model, how) for model in ("gpt2", "t5") for how in ("eager", "fused", "fused, cuda", "static cache, compiled")
    ]
    assert all(isinstance(row["us_per_token"], float) for row in found)


def test_the_rows_of_peers(rows):
    """Times pyfused's backends and FlexAttention; a CPU lacks SDPA's named backends, and their rows say so."""
    found = of(rows, "peers")[:-1]
    assert {row["case"] for row in found} == {
        f"1x1x16x64 {way}".strip()
        for way in ("", "T5 bias", "causal", "backward", "backward T5 bias", "backward causal")
    }
    ours = {"pyfused", "pyfused triton", "pyfused cuda", "pyfused cudnn", "pyfused gluon"}
    providers = ours | {"sdpa flash", "sdpa cudnn", "sdpa efficient", "flex"}
    for case in {row["case"] for row in found}:
        mine = {row["provider"]: row for row in found if row["case"] == case}
        assert set(mine) == providers
        if "T5 bias" in case:
            assert "a bias by distance" in mine["pyfused cudnn"]["missing"]
        for name in ours - ({"pyfused cudnn"} if "T5 bias" in case else set()):
            assert mine[name]["seconds"] > 0
            assert mine[name]["tflops"] > 0
            assert mine[name]["of_allowed"] <= 1
        assert "RuntimeError" in mine["sdpa cudnn"]["missing"]
    assert {row["case"] for row in of(rows, "flex compile")[:-1]} == {"64", "64 T5 bias", "64 causal"}


def test_the_rows_of_the_hosts_time(rows):
    found = of(rows, "host")[:-1]
    assert {row["operator"] for row in found} == set(gpu.OPERATORS)
    assert all(row["us"] > 0 for row in found)
    assert {row["backend"] for row in found if row["operator"] == "attention"} == {
        "default",
        "triton",
        "cuda",
        "reference",
    }


def test_the_rows_of_other_commands(monkeypatch):
    """A command's saved rows count even if it fails afterwards."""
    asked = []

    def run(content, code):
        def stand_in(command, **options):
            file = command[command.index("--save" if "tune" in command else "--json") + 1]
            Path(file).write_text(json.dumps(content))
            asked.append((command[3:], options["timeout"]))
            return subprocess.CompletedProcess(command, code)

        monkeypatch.setattr(gpu_commands.subprocess, "run", stand_in)

    monkeypatch.setenv("PYFUSED_GPU_SECONDS", "1e6")
    line, tile = {"operator": "ffn", "dtype": "float16", "speed": {}}, {"kernel": "ffn", "dtype": "half"}
    run({"lines": [line], "tiles": [tile], "refused": ["float16, ffn: cuda"]}, 0)
    assert list(gpu_commands.tune(0, "linear,ffn")) == [
        {"operator": "ffn", "dtype": "float16", "line": line},
        {"kernel": "ffn", "dtype": "half", "tile": tile},
        {"refused": "float16, ffn: cuda", "ok": False},
    ]
    command, seconds = asked[0]
    assert command[-2:] == ["linear", "ffn"]
    assert 0 < seconds - float(command[command.index("--limit") + 1]) < 10
    run({"rows": [1, 2]}, 3)
    rows = gpu_commands.bench(0, "attention")
    assert next(rows) == {"cases": 2, "bench": {"rows": [1, 2]}}
    with pytest.raises(RuntimeError, match="exit status 3"):
        next(rows)


def test_the_rows_of_the_profiler(rows):
    first, second = of(rows, "profile")[:-1]
    assert first == {
        "kernel": "forward_kernel",
        "metrics": {"Duration": "12.5 us", "Registers Per Thread": "168 register/thread"},
    }
    assert second == {"kernel": "combine_kernel", "metrics": {"DRAM Throughput": "91.2 %"}}


def test_the_sanitizers_see_each_tensor_by_itself(dry, rows):
    """torch's caching allocator would show them one large allocation, in which no access is out of bounds."""
    log = (dry / "log.txt").read_text()
    assert f"said 1 --tool memcheck --error-exitcode 9 {sys.executable} {gpu.CUDA_CALLS} rms_norm 37" in log
    assert "6 calls ran on cpu; left to other backends: none" in of(rows, "memcheck rms_norm 37")[-1]["said"]
    for tool in ("memcheck", "racecheck"):
        items = gpu.sanitizer(tool, dry=False)
        assert [item.name for item in items] == [f"{tool} {name}" for name in gpu.CUDA_OPERATORS]
        assert all(item.command[1:3] == ("--tool", tool) for item in items)
        assert all(item.environment["PYTORCH_NO_CUDA_MEMORY_CACHING"] == "1" for item in items)


def test_the_table_has_items_figures_and_correctness(dry):
    table = (dry / "table.txt").read_text()  # the second call's
    assert re.search(r"^profile +ok", table, re.MULTILINE)
    first = gpu_session.table([row for row in rows_of(dry) if row["item"].startswith(("correct", "generate"))])
    for cases in (33, 24, 2):  # CUDA's, Triton's and Gluon's
        assert f"{cases} of {cases} right, worst 0." in first
    assert "2 of 2 right" in first  # the kernel for Hopper
    assert re.search(r"model=t5 .*us_per_token=", first)


def test_a_dry_run_can_be_published(dry, tmp_path):
    made, items = gpu_publish.publish([dry], tmp_path)
    checked = json.loads(made.read_text())["checked"]
    assert checked["attention"] == {"cuda": 3, "gluon": 2, "triton": 3}
    assert "linear" in checked
    assert "generate gpt2,t5" in json.loads(items.read_text())["items"]
