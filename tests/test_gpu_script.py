"""Does the script that runs on a GPU keep its deadline and its results, and does each of its items run end to end?

Here, without a GPU: the session with small processes and a clock that runs ahead, then both calls as a dry run.
"""

import json
import os
import re
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch

import pyfused
from pyfused import cli, evidence

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT / "benchmarks"))

import gpu  # noqa: E402
import gpu_commands  # noqa: E402
import gpu_publish  # noqa: E402
import gpu_session  # noqa: E402
from gpu_session import Item, Session  # noqa: E402

no_gpu = pytest.mark.skipif(torch.cuda.is_available(), reason="is about a machine without a GPU")


def python(name, code, seconds=60.0, **options):
    options.setdefault("least", 5.0)
    return Item(name, (sys.executable, "-c", f"import os, sys, time\nstart = sys.argv[1:]\n{code}"), seconds, **options)


def rows_of(folder):
    return [json.loads(line) for line in (folder / "results.jsonl").read_text().splitlines()]


def of(rows, item):
    return [{k: v for k, v in row.items() if k not in ("item", "at")} for row in rows if row["item"] == item]


def ends(rows):
    return {row["item"]: row["status"] for row in rows if "status" in row}


def fast():
    """A clock of which 20 seconds take one. A limit of 100 is five: time for a process to start where others work."""
    return time.monotonic() * 20


# ---- the session --------------------------------------------------------------------------------------------------------


def test_an_item_that_hangs_is_ended_with_all_that_it_started(tmp_path, capsys):
    hangs = "import subprocess\nprint('{\"x\": 1}', flush=True)\nchild = subprocess.Popen(['sleep', '100'])\n"
    hangs += "print(f'{{\"child\": {child.pid}}}', flush=True)\ntime.sleep(100)"
    session = Session(tmp_path, 2000, clock=fast)
    assert session.run([python("hangs", hangs, 100, alone=True), python("next", "print('{\"y\": 2}')", 200)]) == 1
    rows = rows_of(tmp_path)
    assert ends(rows) == {"hangs": "timeout", "next": "ok"}
    first, second, end = of(rows, "hangs")
    assert first == {"x": 1}
    assert 100 <= end["seconds"] < 500  # of the 2000 it would sleep
    assert of(rows, "next")[0] == {"y": 2}
    for _ in range(50):
        if (
            not Path(f"/proc/{second['child']}").exists()
            or "State:\tZ" in Path(f"/proc/{second['child']}/status").read_text()
        ):
            break
        time.sleep(0.1)
    else:
        pytest.fail("the grandchild lives on")
    assert "hangs" in capsys.readouterr().out


def test_one_that_only_talks_is_ended_too(tmp_path):
    session = Session(tmp_path, 1000, clock=fast)
    session.run([python("talks", "while True: print('still here')", 20)])
    assert ends(rows_of(tmp_path)) == {"talks": "timeout"}
    assert (tmp_path / "log.txt").stat().st_size <= gpu_session.LOG_BYTES + 100


def test_a_crash_keeps_its_rows_and_its_last_words(tmp_path):
    code = "print('{\"x\": 1}', flush=True)\nraise RuntimeError('no such kernel')"
    assert Session(tmp_path, 100).run([python("crashes", code), python("next", "pass")]) == 1
    row, end = of(rows_of(tmp_path), "crashes")
    assert row == {"x": 1}
    assert (end["status"], end["rows"]) == ("failed", 1)
    assert "no such kernel" in end["said"]
    assert end["said"].endswith("exit status 1")
    assert ends(rows_of(tmp_path))["next"] == "ok"


CASES = """
for i in range(int(start[1]) if start else 0, 5):
    print(f'{{"begun": {i}, "case": "c{i}"}}', flush=True)
    if i == 1: os.abort()
    if i == 3: time.sleep(100)
    print(f'{{"case": "c{i}", "ok": true}}', flush=True)
"""


def test_a_case_that_ends_the_process_or_hangs_loses_no_other(tmp_path):
    """As an illegal access on a GPU does, behind which nothing works."""
    item = python("correct", CASES, 900, patience=100, resumes=True)
    assert Session(tmp_path, 1000, clock=fast).run([item]) == 1
    *rows, end = of(rows_of(tmp_path), "correct")
    assert {row["case"]: row["ok"] for row in rows} == {"c0": True, "c1": False, "c2": True, "c3": False, "c4": True}
    assert (end["status"], end["restarts"]) == ("failed", 2)
    assert "no line in 100 s" in rows[3]["error"]
    assert "exit status -6" in rows[1]["error"]


def test_a_case_that_only_ran_out_of_time_is_not_called_wrong(tmp_path):
    item = python("correct", CASES, 200, resumes=True)
    Session(tmp_path, 1000, clock=fast).run([item])
    *rows, end = of(rows_of(tmp_path), "correct")
    assert [row["case"] for row in rows] == ["c0", "c1", "c2"]
    assert end["status"] == "timeout"


def test_a_wrong_result_fails_its_item(tmp_path):
    assert Session(tmp_path, 100).run([python("judges", "print('{\"ok\": false}')")]) == 1
    assert ends(rows_of(tmp_path)) == {"judges": "failed"}


def test_want_of_time_skips_and_says_so(tmp_path):
    """Of 60 seconds the first takes what is left of them, not the 900 it may have."""
    session = Session(tmp_path, 60, clock=fast)
    assert session.run([python("first", "time.sleep(100)", 900, alone=True), python("second", "pass")]) == 1
    rows = rows_of(tmp_path)
    assert ends(rows) == {"first": "timeout", "second": "skipped"}
    assert of(rows, "second")[0]["said"] == "0 s were left, and it takes 5"
    assert 50 <= of(rows, "first")[-1]["seconds"] < 300


def test_skipped_alone_is_no_failure(tmp_path):
    assert Session(tmp_path, 1).run([python("any", "pass")]) == 0


def test_what_measures_time_runs_alone(tmp_path):
    code = "began = time.time()\ntime.sleep(0.3)\nprint(f'{{\"span\": [{began}, {time.time()}]}}')"
    items = [python("a", code), python("b", code), python("timed", code, alone=True), python("c", code)]
    assert Session(tmp_path, 100).run(items) == 0
    spans = {row["item"]: row["span"] for row in rows_of(tmp_path) if "span" in row}
    assert spans["timed"][0] > max(spans["a"][1], spans["b"][1])
    assert spans["timed"][1] < spans["c"][0]
    assert max(spans["a"][0], spans["b"][0]) < min(spans["a"][1], spans["b"][1])


def test_a_command_that_is_not_there_is_a_failed_row(tmp_path):
    assert Session(tmp_path, 100).run([Item("none", ("/no/such/tool",), 10)]) == 1
    assert "/no/such/tool" in of(rows_of(tmp_path), "none")[0]["said"]


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_signal_keeps_what_is_known_and_prints_the_table(tmp_path, number):
    program = f"""
import sys
sys.path[:0] = [{str(ROOT / "benchmarks")!r}]
import gpu
from gpu_session import Item
code = "print('{{\\"x\\": 1}}', flush=True)\\nimport time; time.sleep(100)"
items = [Item("long", (sys.executable, "-c", code), 90), Item("never", ("true",), 9, alone=True)]
gpu.CALLS["first"] = lambda dry, changed: items
sys.exit(gpu.main(["--call", "first", "--budget", "100", "--results", {str(tmp_path)!r}]))
"""
    process = subprocess.Popen([sys.executable, "-c", program], stdout=subprocess.PIPE, text=True)
    results = tmp_path / "results.jsonl"
    for _ in range(200):  # the row is there while the item still runs
        if results.exists() and results.read_text():
            break
        time.sleep(0.05)
    assert of(rows_of(tmp_path), "long") == [{"x": 1}]
    process.send_signal(number)
    printed, _ = process.communicate(timeout=20)
    assert process.returncode == 128 + number
    assert ends(rows_of(tmp_path)) == {"long": "stopped"}
    assert "long" in printed
    assert "stopped" in printed
    assert printed.strip() == (tmp_path / "table.txt").read_text().strip()


def test_the_names_are_those_of_the_operators():
    assert sorted(gpu.OPERATORS) == sorted(pyfused.ops.NAMES)
    assert all((ROOT / "csrc" / "cuda" / f"{name}.cu").exists() for name in gpu.CUDA_OPERATORS)


@pytest.mark.parametrize("call", gpu.CALLS)
def test_only_takes_items_by_the_beginning_of_their_names(call, monkeypatch, tmp_path):
    chosen = []
    monkeypatch.setattr(Session, "run", lambda self, items: chosen.extend(item.name for item in items) or 0)
    monkeypatch.setattr(gpu.signal, "signal", lambda *args: None)
    more = ["--changed", "ffn"] if call == "second" else []
    options = ["--results", str(tmp_path), "--only", "correct ffn", "generate", *more]
    assert gpu.main(["--call", call, *options]) == 0
    assert chosen == ["correct ffn cuda", "correct ffn triton", "generate gpt2", "generate t5"]


def test_items_come_in_order_of_value():
    items = gpu.first(False, ())
    names = [item.name for item in items]
    assert names[0] == "environment"
    assert names.index("correct attention cuda") < names.index("generate gpt2") < names.index("tune attention")
    assert all(item.seconds <= 90 for item in items)
    assert len({item.name for item in items}) == len(items)


# ---- the command lines of other parts -------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "command",
    [gpu_commands.tune_command(["attention"], 50, "f.json"), gpu_commands.bench_command(["attention"], 50, "f.json")],
    ids=lambda command: command[0],
)
def test_command_lines_are_those_that_pyfused_takes(command):
    arguments = cli._parser().parse_args(command)
    assert arguments.command == command[0]


# ---- what travels -----------------------------------------------------------------------------------------------------------


def test_extensions_of_this_python_are_taken_along(tmp_path):
    """Those of another Python, and a newer one that is there, stay."""
    suffix = gpu.sysconfig.get_config_var("EXT_SUFFIX")
    built, package = tmp_path / "built" / "pyfused", tmp_path / "package"
    built.mkdir(parents=True)
    package.mkdir()
    for name in (f"_cpu{suffix}", f"_cuda{suffix}", "_cuda.cpython-27-x86_64-linux-gnu.so"):
        (built / name).write_text("built")
        os.utime(built / name, (1000, 1000))
    (package / f"_cpu{suffix}").write_text("newer")
    assert gpu.place_extensions(tmp_path / "built", package) == [f"_cuda{suffix}"]
    assert (package / f"_cpu{suffix}").read_text() == "newer"
    assert sorted(p.name for p in package.iterdir()) == [f"_cpu{suffix}", f"_cuda{suffix}"]
    assert gpu.place_extensions(tmp_path / "nothing", package) == []


@pytest.mark.skipif(not shutil.which("make"), reason="needs make")
def test_make_builds_for_hopper_into_an_ignored_folder_and_installs_nothing_there():
    def commands(*arguments):
        return subprocess.run(["make", "-n", *arguments], cwd=ROOT, capture_output=True, text=True, check=True).stdout

    build = commands("gpu-build")
    assert "PYFUSED_BUILD_ARCHITECTURES=90a-real" in build
    assert "--build-lib build/gpu" in build
    assert "/build/" in (ROOT / ".gitignore").read_text()
    assert gpu.BUILT == ROOT / "build" / "gpu"
    run = commands("gpu", "BUDGET=390", "RESULTS=out", "CALL=second")
    assert "benchmarks/gpu.py --call second --budget 390 --results out" in run
    assert "pip" not in run


def test_what_travels_is_small_enough():
    """64 MiB: the files of the repository, and the extensions where they are built."""
    listed = subprocess.run(["git", "ls-files", "-z"], cwd=ROOT, capture_output=True, text=True)
    if listed.returncode:
        pytest.skip("not a checkout")
    files = [ROOT / name for name in listed.stdout.split("\0") if name and (ROOT / name).is_file()]
    built = [path for path in gpu.BUILT.rglob("*") if path.is_file()]
    assert sum(path.stat().st_size for path in (*files, *built)) < 48 << 20


# ---- both calls, end to end -----------------------------------------------------------------------------------------------

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
    """The folder of results of both calls, with tools that say what they are asked for and run what they are given."""
    if torch.cuda.is_available():
        pytest.skip("this machine has a GPU")
    folder, tools = tmp_path_factory.mktemp("results"), tmp_path_factory.mktemp("tools")
    for name, text in (("ncu", NCU), ("compute-sanitizer", SANITIZER)):
        (tools / name).write_text(text)
        (tools / name).chmod(0o755)
    environment = {**os.environ, "PATH": f"{tools}{os.pathsep}{os.environ['PATH']}", "OMP_NUM_THREADS": "1"}
    script = [sys.executable, str(ROOT / "benchmarks" / "gpu.py"), "--dry", "--results", str(folder), "--budget", "900"]
    second = ["bench", "profile", "memcheck", "streams"]  # racecheck differs in a word; the others are the first call's
    for call in (["first"], ["second", "--only", *second]):
        done = subprocess.run([*script, "--call", *call], env=environment, capture_output=True, text=True)
        assert "Traceback" not in done.stderr, done.stderr
    return folder


@pytest.fixture(scope="module")
def rows(dry):
    return rows_of(dry)


# `pyfused tune --device cuda` and `bench --device cuda`: see test_command_lines_... and test_the_rows_of_other_commands.
NEED_A_GPU = {"tune attention,layer_norm,rms_norm,linear,ffn,gated_ffn", "bench"}


def test_every_item_ends_well(rows):
    found = ends(rows)
    assert {name for name, status in found.items() if status != "ok"} == NEED_A_GPU, found
    assert len(found) == 14
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
    assert {name for row in checks for name in row.values() if name in ("_cpu", "_cuda", "triton", "cuda")} == {
        "_cpu", "_cuda", "triton", "cuda",
    }  # fmt: skip
    assert ceilings == {"ceilings": {"copy_gb_per_s": 1.0}}


def test_the_rows_of_correctness(rows):
    """Every operator on every backend in every dtype, within the tolerance; Triton has no linear."""
    found = [row for row in rows if row["item"].startswith("correct") and "status" not in row]
    assert {(row["operator"], row["backend"], row["dtype"]) for row in found} == {
        (operator, backend, dtype)
        for backend, operators in (("triton", gpu.OPERATORS), ("cuda", gpu.CUDA_OPERATORS))
        for operator in operators
        for dtype in ("float32", "float16", "bfloat16")
    }
    assert {(row["operator"], row["backend"]) for row in found if row["ok"] is None} == {("linear", "triton")}
    for row in found:
        assert row["case"]
        assert row["seconds"] >= 0
        assert row["ok"] is None or (row["ok"] and 0 < row["ratio"] <= 1 and row["worst"])


def test_the_rows_of_generation(rows):
    found = of(rows, "generate gpt2,t5")[:-1]
    assert [(row["model"], row["backend"]) for row in found] == [
        (model, backend) for model in ("gpt2", "t5") for backend in ("default", "cuda", "triton")
    ]
    for row in found:
        assert row["ok"]
        assert row["same_again"]
        assert row["as_reference"] == 2
        assert isinstance(row["us_per_token"], float)  # a difference of two times, which here are two single calls
        assert row["ms_first_token"] > 0


def test_the_rows_of_transformers(rows):
    found = of(rows, "transformers gpt2,t5")[:-1]
    assert [(row["model"], row["how"]) for row in found] == [
        (model, how) for model in ("gpt2", "t5") for how in ("eager", "static cache, compiled")
    ]
    assert all(isinstance(row["us_per_token"], float) for row in found)


def test_the_rows_of_peers(rows):
    """pyfused's backends and FlexAttention are timed; SDPA's by name are not there on a CPU, and say so."""
    found = of(rows, "peers")[:-1]
    assert {row["case"] for row in found} == {
        f"1x1x16x16 {way}".strip()
        for way in ("", "T5 bias", "causal", "backward", "backward T5 bias", "backward causal")
    }
    providers = {"pyfused", "pyfused triton", "pyfused cuda", "sdpa flash", "sdpa cudnn", "sdpa efficient", "flex"}
    for case in {row["case"] for row in found}:
        mine = {row["provider"]: row for row in found if row["case"] == case}
        assert set(mine) == providers
        for name in ("pyfused", "pyfused triton", "pyfused cuda"):
            assert mine[name]["seconds"] > 0
            assert mine[name]["tflops"] > 0
            assert mine[name]["of_allowed"] <= 1
        assert "RuntimeError" in mine["sdpa cudnn"]["missing"]
    assert {row["case"] for row in of(rows, "flex compile")[:-1]} == {"16", "16 T5 bias", "16 causal"}


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
    """What a command saved counts even where it fails behind that."""
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
    rows = gpu_commands.bench(0)
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
    """torch's allocator would give it one large allocation, inside which nothing is out of bounds."""
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
    assert "21 of 21 right, worst 0." in first
    assert re.search(r"model=t5 .*us_per_token=", first)


# ---- publishing -------------------------------------------------------------------------------------------------------------


def a_run(folder):
    """Results with two operators tuned: ffn's CUDA kernel is wrong in one case, rms_norm was judged in Triton alone."""

    def judged(item, operator, backend, *oks, status="ok"):
        rows = [{"item": item, "operator": operator, "backend": backend, "dtype": "float32", "ok": ok} for ok in oks]
        return [*rows, {"item": item, "status": status, "seconds": 1.0, "said": ""}]

    def tuned(operator):
        line = {"operator": operator, "function": "forward", "dtype": "bfloat16", "shapes": "large", "threads": 1}
        speed = {"reference": {"16": 1.1}, "triton": {"16": 2.0}, "cuda": {"16": 3.0}}
        line |= {"date": "2026-11-26", "torch": "2.11.0", "speed": speed}
        return {"item": "tune", "line": line}

    about = {
        "item": "environment",
        "device": "NVIDIA H100",
        "kind": "cuda_nvidia_h100",
        "versions": {"torch": "2.11.0"},
    }
    rows = [
        about,
        {"item": "environment", "ceilings": {"copy_gb_per_s": 3000.0}},
        {"item": "environment", "status": "ok"},
        *judged("correct ffn triton", "ffn", "triton", True, True, None),
        *judged("correct ffn cuda", "ffn", "cuda", True, False, status="failed"),
        *judged("correct rms_norm triton", "rms_norm", "triton", True),
        *judged("correct rms_norm cuda", "rms_norm", "cuda", True, status="timeout"),
        tuned("ffn"),
        tuned("rms_norm"),
        tuned("linear"),
        {"item": "tune", "status": "ok"},
        {
            "item": "tune",
            "tile": {"kernel": "attention_forward", "dtype": "half", "case": "", "tile": {"BLOCK_M": 128}},
        },
        {"item": "bench", "cases": 1, "bench": {"rows": [{"case": "16x768", "ratio": {"torch": 1.5}}]}},
        {"item": "bench", "status": "ok"},
        {"item": "generate gpt2", "model": "gpt2", "us_per_token": 230.0, "at": 100.0},
        {"item": "generate gpt2", "status": "ok"},
    ]
    folder.mkdir()
    (folder / "results.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return folder


def test_what_was_wrong_or_not_judged_gets_no_evidence(tmp_path):
    made, items, benchmarks = gpu_publish.publish([a_run(tmp_path / "run")], tmp_path)
    assert made == tmp_path / "pyfused" / "evidence" / "cuda_nvidia_h100.json"
    content = json.loads(made.read_text())
    assert content["kind"] == "cuda_nvidia_h100"
    assert content["checked"] == {"ffn": {"triton": 2}, "rms_norm": {"triton": 1}}
    assert [tile["kernel"] for tile in content["tiles"]] == ["attention_forward"]
    assert [line["operator"] for line in content["lines"]] == ["ffn", "rms_norm"]
    for line in content["lines"]:
        assert evidence.line_from(line, "a file").at(16) == {"reference": 1.1, "triton": 2.0}
    assert benchmarks == tmp_path / "benchmarks" / "results" / "cuda_nvidia_h100.json"
    assert json.loads(benchmarks.read_text()) == {"rows": [{"case": "16x768", "ratio": {"torch": 1.5}}]}
    found = json.loads(items.read_text())
    assert found["ceilings"] == {"copy_gb_per_s": 3000.0}
    assert found["items"]["generate gpt2"] == [{"model": "gpt2", "us_per_token": 230.0}]


def test_a_second_run_adds_to_the_first(tmp_path):
    """Once ffn's CUDA kernel is right, its line has both; what was not run again stays."""
    run = a_run(tmp_path / "run")
    gpu_publish.publish([run], tmp_path)
    text = (run / "results.jsonl").read_text()
    again = [line for line in text.splitlines() if not re.search("rms_norm|generate|bench|tile", line)]
    (run / "results.jsonl").write_text("\n".join(again).replace("false", "true").replace("failed", "ok") + "\n")
    made, items = gpu_publish.publish([run], tmp_path)
    content = json.loads(made.read_text())
    lines = {line["operator"]: sorted(line["speed"]) for line in content["lines"]}
    assert lines == {"ffn": ["cuda", "reference", "triton"], "rms_norm": ["reference", "triton"]}
    assert content["tiles"]
    assert "generate gpt2" in json.loads(items.read_text())["items"]


def test_runs_of_two_kinds_are_not_mixed(tmp_path):
    one = a_run(tmp_path / "one")
    (tmp_path / "two").mkdir()
    (tmp_path / "two" / "results.jsonl").write_text((one / "results.jsonl").read_text().replace("_h100", "_h200"))
    with pytest.raises(ValueError, match="cuda_nvidia_h200"):
        gpu_publish.publish([one, tmp_path / "two"], tmp_path)


@no_gpu
def test_a_dry_run_can_be_published(dry, tmp_path):
    made, items = gpu_publish.publish([dry], tmp_path)
    checked = json.loads(made.read_text())["checked"]
    assert checked["attention"] == {"cuda": 3, "triton": 3}
    assert "linear" in checked
    assert "generate gpt2,t5" in json.loads(items.read_text())["items"]
