"""Does the GPU script keep its deadline and its results, choose its items, and take its files along?

Runs without a GPU: the session starts small processes and uses a fast clock.
"""

import contextlib
import io
import os
import shutil
import signal
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
from gpu_results import ROOT, ends, gpu, gpu_commands, gpu_session, of, rows_of

import pyfused
from pyfused import cli

Item, Session = gpu_session.Item, gpu_session.Session


def python(name, code, seconds=60.0, **options):
    options.setdefault("least", 5.0)
    return Item(name, (sys.executable, "-c", f"import os, sys, time\nstart = sys.argv[1:]\n{code}"), seconds, **options)


def fast():
    """A clock 20 times as fast. A limit of 100 s is 5 s: time enough for a process to start on a busy machine."""
    return time.monotonic() * 20


HANGS = """
import subprocess
print('{"x": 1}', flush=True)
child = subprocess.Popen(['sleep', '100'])
print(f'{{"child": {child.pid}}}', flush=True)
time.sleep(100)
"""
CASES = """
for i in range(int(start[1]) if start else 0, 5):
    print(f'{{"begun": {i}, "case": "c{i}"}}', flush=True)
    if i == 1: os.abort()
    if i == 3: time.sleep(100)
    print(f'{{"case": "c{i}", "ok": true}}', flush=True)
"""
# Sessions that wait for a limit: budget, items. "side by side": one item hangs, the other runs out of time.
WAITING = {
    "hangs": (2000, [python("hangs", HANGS, 100, alone=True), python("next", "print('{\"y\": 2}')", 200)]),
    "side by side": (
        1000,
        [python("hangs", CASES, 900, patience=100, resumes=True), python("late", CASES, 200, resumes=True)],
    ),
    "short": (60, [python("first", "time.sleep(100)", 900, alone=True), python("second", "pass")]),
}


@pytest.fixture(scope="module")
def waited(tmp_path_factory):
    """The rows of each session in WAITING, and what they printed. All wait at the same time."""
    folders, said = {name: tmp_path_factory.mktemp("results") for name in WAITING}, io.StringIO()

    def run(name):
        budget, items = WAITING[name]
        assert Session(folders[name], budget, clock=fast).run(items) == 1
        return rows_of(folders[name])

    with contextlib.redirect_stdout(said), ThreadPoolExecutor(len(WAITING)) as pool:
        found = dict(zip(WAITING, pool.map(run, WAITING), strict=True))
    return found, said.getvalue()


def test_an_item_that_hangs_is_ended_with_all_that_it_started(waited):
    rows, said = waited[0]["hangs"], waited[1]
    assert ends(rows) == {"hangs": "timeout", "next": "ok"}
    first, second, end = of(rows, "hangs")
    assert first == {"x": 1}
    assert 100 <= end["seconds"] < 500  # it would sleep for 2000
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
    assert "hangs" in said
    assert "next" in said


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


def test_a_case_that_ends_the_process_or_hangs_loses_no_other(waited):
    """An illegal access on a GPU ends the process this way: nothing works after it."""
    *rows, end = of(waited[0]["side by side"], "hangs")
    assert {row["case"]: row["ok"] for row in rows} == {"c0": True, "c1": False, "c2": True, "c3": False, "c4": True}
    assert (end["status"], end["restarts"]) == ("failed", 2)
    assert "no line in 100 s" in rows[3]["error"]
    assert "exit status -6" in rows[1]["error"]


def test_a_case_that_only_ran_out_of_time_is_not_called_wrong(waited):
    *rows, end = of(waited[0]["side by side"], "late")
    assert [row["case"] for row in rows] == ["c0", "c1", "c2"]
    assert end["status"] == "timeout"


def test_a_wrong_result_fails_its_item(tmp_path):
    assert Session(tmp_path, 100).run([python("judges", "print('{\"ok\": false}')")]) == 1
    assert ends(rows_of(tmp_path)) == {"judges": "failed"}


def test_want_of_time_skips_and_says_so(waited):
    """The first item gets the rest of the 60 seconds, not its own 900."""
    rows = waited[0]["short"]
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
gpu.BUILT = gpu.ROOT / "nowhere"
from gpu_session import Item
code = "print('{{\\"x\\": 1}}', flush=True)\\nimport time; time.sleep(100)"
items = [Item("long", (sys.executable, "-c", code), 90), Item("never", ("true",), 9, alone=True)]
gpu.CALLS["first"] = lambda dry, changed: items
sys.exit(gpu.main(["--call", "first", "--budget", "100", "--results", {str(tmp_path)!r}]))
"""
    process = subprocess.Popen([sys.executable, "-c", program], stdout=subprocess.PIPE, text=True)
    results = tmp_path / "results.jsonl"
    for _ in range(200):  # the row appears while the item still runs
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


# ---- the items -------------------------------------------------------------------------------------------------------


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


@pytest.mark.parametrize(
    "command",
    [gpu_commands.tune_command(["attention"], 50, "f.json"), gpu_commands.bench_command("attention", 50, "f.json")],
    ids=lambda command: command[0],
)
def test_command_lines_are_those_that_pyfused_takes(command):
    arguments = cli._parser().parse_args(command)
    assert arguments.command == command[0]


# ---- what travels ----------------------------------------------------------------------------------------------------


def test_extensions_of_this_python_are_taken_along(tmp_path):
    """Extensions for another Python stay behind; a newer one already there is kept."""
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


AHEAD = """
import sys
sys.path[:0] = [{root!r}, {root!r} + "/tests", {root!r} + "/benchmarks", {root!r} + "/tests/cuda_on_cpu"]
import fake_gpu, gpu_ahead, os, pathlib
from pyfused import compile_ahead
fake_gpu.install()
launches = gpu_ahead.record(["relative_bias"])
with compile_ahead.Workers(1) as workers:
    (done,) = workers.compile(launches[:1])
built, there = pathlib.Path(os.environ["TRITON_CACHE_DIR"]), pathlib.Path({there!r})
gpu_ahead.pack(built, there / "kernels.tar.xz")
for path in built.rglob("*.*"):
    path.unlink()
count = gpu_ahead.place(there / "kernels.tar.xz", there)
os.environ["TRITON_CACHE_DIR"] = str(there)
print(len(launches), done.error, count, compile_ahead._is_on_disk(launches[0]))
"""


def test_kernels_compiled_ahead_are_found_elsewhere(tmp_path):
    environment = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"}
    environment |= {"TRITON_CACHE_DIR": str(tmp_path / "built"), "TRITON_STORE_BINARY_ONLY": "1"}
    (tmp_path / "there").mkdir()
    script = AHEAD.format(root=str(ROOT), there=str(tmp_path / "there"))
    done = subprocess.run([sys.executable, "-c", script], env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    launches, *rest = done.stdout.split()
    assert int(launches) > 30
    assert rest == ["1", "True"]


def test_what_travels_is_small_enough():
    """64 MiB: the files of the repository, and the extensions where they are built."""
    listed = subprocess.run(["git", "ls-files", "-z"], cwd=ROOT, capture_output=True, text=True)
    if listed.returncode:
        pytest.skip("not a checkout")
    files = [ROOT / name for name in listed.stdout.split("\0") if name and (ROOT / name).is_file()]
    built = [path for path in gpu.BUILT.rglob("*") if path.is_file()]
    assert sum(path.stat().st_size for path in (*files, *built)) < 60 << 20
