"""What must a GPU show in a few minutes? Items in order of value, each in a process of its own that ends at its limit.

    python benchmarks/gpu.py --call first|second [--budget SECONDS] [--results FOLDER] [--only ITEM ...] [--dry]
    python benchmarks/gpu.py --publish FOLDER ...     # results -> evidence -> README

An item prints JSON lines; each is appended to FOLDER/results.jsonl as soon as it is known, and behind them a line about the
item itself: its status, its seconds, its last words. FOLDER/log.txt has all else that was printed, FOLDER/table.txt the
table that comes last. Items that measure time run alone, the others side by side. What no time is left for is skipped, and
says so. --dry runs everything on a machine without a GPU, at tiny sizes: Triton in its interpreter, csrc/cuda on the host
shim. This file needs the standard library alone; the items are in gpu_items.py.
"""

from __future__ import annotations

import argparse
import json
import os
import queue
import shutil
import signal
import subprocess
import sys
import sysconfig
import threading
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, TextIO

ROOT = Path(__file__).resolve().parents[1]
PYTHON = sys.executable
BUILT = ROOT / "build" / "gpu"  # `make gpu-build` leaves the extensions there
OPERATORS = ("attention", "ffn", "fourier_mix", "gated_ffn", "layer_norm", "linear", "relative_bias", "rms_norm")
CUDA_OPERATORS = tuple(name for name in OPERATORS if name != "relative_bias")  # csrc/cuda leaves that one to Triton
CUDA_CALLS = ROOT / "tests" / "gpu" / "cuda_calls.py"
STREAMS = ROOT / "tests" / "gpu" / "test_streams_and_graphs.py"
SIDE_BY_SIDE = 8  # processes that share the GPU; each takes half a gigabyte of it, and two cores
LAST_WORDS = 6  # seconds kept for ending what runs, and for the table
LOG_BYTES = 8 << 20  # what comes back from a lent machine is limited


@dataclass(frozen=True)
class Item:
    """One process.

    Args:
        name: what results are kept under.
        command: what runs.
        seconds: ended after these. least: not begun with less.
        alone: it measures time, so nothing else runs beside it.
        patience: ended after so many seconds without a line.
        resumes: a case that ends the process is a wrong result, and the process begins again behind it, with --from N.
        environment: added to the process's.
    """

    name: str
    command: tuple[str, ...]
    seconds: float
    least: float = 12.0
    alone: bool = False
    patience: float = 1e9
    resumes: bool = False
    environment: dict[str, str] = field(default_factory=dict)


def own(name: str, *arguments: str, seconds: float, **options: Any) -> Item:
    """An item of gpu_items.py."""
    command = (PYTHON, str(Path(__file__).resolve()), "--item", name, *arguments)
    return Item(" ".join((name, *arguments)), command, seconds, **options)


def tune_command(operators: Sequence[str], seconds: float, file: str) -> list[str]:
    return ["tune", "--device", "cuda", "--limit", str(int(seconds)), "--save", file, *operators]


def bench_command(names: Sequence[str], seconds: float, file: str) -> list[str]:
    return ["bench", "--device", "cuda", *names, "--json", file, "--limit", str(int(seconds))]


def warm_command() -> list[str]:
    return ["warm"]


def correctness(operators: Sequence[str], dry: bool) -> list[Item]:
    """csrc/cuda first: nothing has to be compiled for it. A dry run takes all operators in one process."""
    lists = {"cuda": [o for o in operators if o in CUDA_OPERATORS], "triton": list(operators)}
    items = []
    for backend, names in lists.items():
        for group in [",".join(names)] if dry else names:
            items.append(own("correct", group, backend, seconds=90, patience=45, resumes=True))
    return items


def sanitizer(tool: str, dry: bool) -> list[Item]:
    """One process an operator. torch's own allocator hands out pieces of one large allocation, inside which nothing is out of
    bounds to the sanitizer."""
    environment = {"PYTORCH_NO_CUDA_MEMORY_CACHING": "1"}
    found = shutil.which("compute-sanitizer") or "compute-sanitizer"
    command = (found, "--tool", tool, "--error-exitcode", "9", PYTHON, str(CUDA_CALLS))
    names = ("rms_norm 37",) if dry else CUDA_OPERATORS
    return [Item(f"{tool} {name}", (*command, name), 90, 20, environment=environment) for name in names]


def first(dry: bool, changed: Sequence[str]) -> list[Item]:
    """Is it right, and how fast is what there is? For about 390 seconds."""
    return [
        own("environment", seconds=30, least=5, alone=True),
        Item("compile", (PYTHON, "-m", "pyfused", *warm_command()), 75),
        own("flex", "compile", seconds=75),
        *correctness(OPERATORS, dry),
        own("generate", "gpt2", seconds=50, alone=True),
        own("generate", "t5", seconds=50, alone=True),
        own("tune", "attention", seconds=60, alone=True),
        own("tune", "layer_norm", "rms_norm", seconds=30, alone=True),
        own("tune", "linear", "ffn", "gated_ffn", seconds=30, alone=True),
        own("peers", seconds=50, alone=True),
        own("host", seconds=20, alone=True),
        own("transformers", "gpt2", seconds=60, least=25, alone=True),
        own("transformers", "t5", seconds=60, least=25, alone=True),
    ]


def second(dry: bool, changed: Sequence[str]) -> list[Item]:
    """Is what changed right, what does the table say, and is every access in bounds? For about 280 seconds."""
    workers = [] if dry else ["-n", "8"]
    pytest = (PYTHON, "-m", "pytest", "-q", "-p", "no:cacheprovider", *workers)
    return [
        own("environment", seconds=30, least=5, alone=True),
        *correctness(changed, dry),
        own("bench", seconds=110, alone=True),
        own("profile", seconds=60, alone=True),
        *sanitizer("memcheck", dry),
        Item("streams and graphs", (*pytest, str(STREAMS)), 60, 20),
        *sanitizer("racecheck", dry),
        own("generate", "gpt2", seconds=50, alone=True),
        own("generate", "t5", seconds=50, alone=True),
        Item("tests", (*pytest, "-m", "gpu", "--maxfail=30", str(ROOT / "tests")), 1800, 300),
    ]


CALLS: dict[str, Callable[[bool, Sequence[str]], list[Item]]] = {"first": first, "second": second}


class Session:
    """One run of items, until the budget is spent.

    Args:
        results: the folder for what is found; results.jsonl grows by each run.
        budget: seconds from now.
        clock: seconds; a test's runs faster.
        dry: without a GPU.
    """

    def __init__(self, results: Path, budget: float, clock: Callable[[], float] = time.monotonic, dry: bool = False):
        results.mkdir(parents=True, exist_ok=True)
        self._clock, self._dry = clock, dry
        self._began = clock()
        self._deadline = self._began + max(budget - LAST_WORDS, 0)
        self.rows: list[dict[str, Any]] = []
        self._table = results / "table.txt"
        self._file: TextIO = open(results / "results.jsonl", "a")  # noqa: SIM115 - open as long as the session
        self._log: TextIO = open(results / "log.txt", "a")  # noqa: SIM115
        self._lock = threading.RLock()
        self._running: dict[threading.Thread, Item] = {}
        self._processes: set[subprocess.Popen[str]] = set()
        self._stopped = False

    def run(self, items: Sequence[Item]) -> int:
        """0 if every item ended well, else 1; what was skipped for want of time counts as neither."""
        try:
            for item in items:
                self._wait(0 if item.alone else (1 if self._dry else SIDE_BY_SIDE) - 1)
                left = self._deadline - self._clock()
                if left < item.least:
                    why = f"{max(left, 0):.0f} s were left, and it takes {item.least:.0f}"
                    self.add({"item": item.name, "status": "skipped", "seconds": 0.0, "said": why})
                    continue
                thread = threading.Thread(target=self._execute, args=(item,), daemon=True)
                self._running[thread] = item
                thread.start()
                if item.alone:
                    self._wait(0)
            self._wait(0)
        finally:
            self._stop()
        return int(any(row.get("status") in ("failed", "timeout", "stopped") for row in self.rows))

    def add(self, row: dict[str, Any]) -> None:
        """Appends a row to the file, now."""
        with self._lock:
            row["at"] = round(self._clock() - self._began, 1)
            self.rows.append(row)
            self._file.write(json.dumps(row) + "\n")
            self._file.flush()

    def _wait(self, most: int) -> None:
        """Until at most so many items run."""
        while len(self._running) > most:
            for thread in list(self._running):
                thread.join(0.02)
                if not thread.is_alive():
                    del self._running[thread]

    def _stop(self) -> None:
        """Ends what still runs, and prints the table."""
        with self._lock:
            self._stopped = True
            for process in self._processes:
                _end(process)
        for thread in self._running:
            thread.join(2)
        text = table(self.rows)
        self._table.write_text(text + "\n")
        print(text, flush=True)
        self._file.close()
        self._log.close()

    def _execute(self, item: Item) -> None:
        """Runs an item, again behind each case that ended its process, and adds the row about the item itself."""
        began = self._clock()
        end, command, rows_before = min(began + item.seconds, self._deadline), item.command, len(self.rows)
        faults = 0
        while True:
            status, case, said = self._process(item, command, end)
            if case is not None:
                number = case.pop("begun")
                self.add({"item": item.name, **case, "ok": False, "error": f"{status}: {said}"})
                faults += 1
                if item.resumes and status != "timeout" and not self._stopped and end - self._clock() > 5:
                    command = (*item.command, "--from", str(number + 1))
                    continue
            break
        with self._lock:
            mine = [r for r in self.rows[rows_before:] if r["item"] == item.name]
            if status in ("ok", "silent") and (status == "silent" or any(row.get("ok") is False for row in mine)):
                status = "failed"
            if self._stopped:
                status = "stopped"
            seconds = round(self._clock() - began, 1)
            row = {"item": item.name, "status": status, "seconds": seconds, "rows": len(mine), "said": said}
            self.add({**row, "restarts": faults} if faults else row)

    def _process(
        self, item: Item, command: Sequence[str], end: float
    ) -> tuple[str, dict[str, Any] | None, str]:
        """Runs one process until it ends, or `end`. Returns its status ("ok", "failed", "silent" or "timeout"), the row of a
        case that had begun and not ended, if any, and the last lines that were no rows."""
        environment = {**os.environ, "PYTHONPATH": str(ROOT), "PYTHONUNBUFFERED": "1", "HF_HUB_OFFLINE": "1"}
        environment["PYFUSED_GPU_SECONDS"] = str(round(max(end - self._clock(), 1), 1))
        if self._dry:
            environment |= {"PYFUSED_GPU_DRY": "1", "TRITON_INTERPRET": "1"}
        with self._lock:
            if self._stopped:
                return "failed", None, "the session ended"
            try:
                process = subprocess.Popen(
                    command, cwd=ROOT, env=environment | item.environment, stdout=subprocess.PIPE,
                    stderr=subprocess.STDOUT, text=True, errors="replace", start_new_session=True,
                )  # fmt: skip
            except OSError as error:
                return "failed", None, str(error)
            self._processes.add(process)
        lines: queue.Queue[str | None] = queue.Queue()
        threading.Thread(target=_read, args=(process.stdout, lines), daemon=True).start()
        case, last, heard, status = None, [], self._clock(), ""
        try:
            while not status:
                try:
                    line = lines.get(timeout=0.05)
                except queue.Empty:
                    now = self._clock()
                    status = "timeout" if now > end else "silent" if now - heard > item.patience else ""
                    if process.poll() is not None:  # what it started may still hold the pipe
                        _end(process)
                    continue
                if line is None:
                    break
                heard = self._clock()
                row = _row(line)
                if row is None:
                    last = [*last, line.rstrip()][-12:] if line.strip() else last
                    self._write(f"{item.name}: {line}")
                elif "begun" in row:
                    case = row
                else:
                    case = None
                    self.add({"item": item.name, **row})
        finally:
            _end(process)
            code = process.wait()
            with self._lock:
                self._processes.discard(process)
        status = status or ("ok" if code == 0 else "failed")
        words = {"failed": [f"exit status {code}"], "silent": [f"no line in {item.patience:.0f} s"]}.get(status, [])
        return status, None if status == "ok" else case, "\n".join([*last, *words])[-1500:]

    def _write(self, text: str) -> None:
        with self._lock:
            if not self._log.closed and self._log.tell() < LOG_BYTES:
                self._log.write(text)
                self._log.flush()


def _read(stream: TextIO, lines: queue.Queue[str | None]) -> None:
    for line in stream:
        lines.put(line)
    lines.put(None)


def _row(line: str) -> dict[str, Any] | None:
    """The row that a line holds, or None: it is something else that was printed."""
    try:
        row = json.loads(line) if line.startswith("{") else None
    except ValueError:
        return None
    return row if isinstance(row, dict) else None


def _end(process: subprocess.Popen[str]) -> None:
    """Ends a process and all that it started."""
    try:
        os.killpg(process.pid, signal.SIGKILL)
    except (ProcessLookupError, PermissionError):
        pass


# ---- the table ---------------------------------------------------------------------------------------------------------

_LONG = ("item", "at", "line", "row", "error", "said")  # too long for a table


def table(rows: Sequence[dict[str, Any]]) -> str:
    """Items with their status, what is wrong, then the figures; correctness in a line an item."""
    lines = []
    for row in rows:
        if "status" not in row:
            continue
        text = f"{row['item']:<40} {row['status']:<8} {row['seconds']:>6.1f} s"
        checked = [r for r in rows if r["item"] == row["item"] and "ratio" in r and "status" not in r]
        if checked:
            right = sum(bool(r["ok"]) for r in checked)
            worst = max((r["ratio"] for r in checked if r["ratio"] is not None), default=0.0)
            text += f"  {right} of {len(checked)} right, worst {worst:.2f} of what is allowed"
        if row["status"] != "ok" and row.get("said"):
            text += "  " + row["said"].splitlines()[-1][:160]
        lines.append(text)
    figures = [row for row in rows if "status" not in row]
    wrong = [row for row in figures if row.get("ok") is False]
    shown = [row for row in figures if row.get("ok") is not False and "ratio" not in row]
    for title, found in (("wrong", wrong), ("figures", shown)):
        lines += ["", f"{title}:"] if found else []
        for row in found:
            values = "  ".join(f"{k}={_short(v)}" for k, v in row.items() if k not in _LONG)
            error = str(row.get("error", "")).strip().splitlines()[-1:]
            lines.append("  ".join([row["item"], values, *(e[:200] for e in error)]))
    return "\n".join(lines)


def _short(value: Any) -> str:
    return f"{value:.4g}" if isinstance(value, float) else str(value)[:120]


# ---- the command line --------------------------------------------------------------------------------------------------


def place_extensions(built: Path = BUILT, package: Path = ROOT / "pyfused") -> list[str]:
    """Copies what `make gpu-build` made for this Python into the package, where that is newer. An extension of another
    Python has another name."""
    copied = []
    for source in sorted(built.rglob(f"*{sysconfig.get_config_var('EXT_SUFFIX')}")):
        target = package / source.name
        if not target.exists() or target.stat().st_mtime < source.stat().st_mtime:
            shutil.copy2(source, target)
            copied.append(source.name)
    return copied


def _stop_at(number: int, frame: Any) -> None:
    raise SystemExit(128 + number)


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python benchmarks/gpu.py", description=(__doc__ or "").split("\n")[0])
    what = parser.add_mutually_exclusive_group(required=True)
    what.add_argument("--call", choices=list(CALLS), help="which items")
    what.add_argument("--publish", nargs="+", type=Path, metavar="FOLDER", help="results -> evidence -> README")
    what.add_argument("--item", nargs="+", metavar="NAME", help="runs one item in this process")
    parser.add_argument("--budget", type=float, metavar="SECONDS", help="by default 390 and 280")
    parser.add_argument("--results", type=Path, default=ROOT / "build" / "gpu-results", metavar="FOLDER")
    parser.add_argument("--only", nargs="+", metavar="ITEM", help="items whose names begin so")
    parser.add_argument("--changed", nargs="+", default=[], choices=OPERATORS, help="operators to judge in the second call")
    parser.add_argument("--dry", action="store_true", help="without a GPU, at tiny sizes")
    parser.add_argument("--from", type=int, default=0, dest="start", metavar="N", help="of --item: begins at case N")
    arguments = parser.parse_args(argv)
    if arguments.item:
        import gpu_items

        return gpu_items.run(arguments.item, arguments.start)
    if arguments.publish:
        import gpu_publish

        return gpu_publish.main(arguments.publish)
    for number in (signal.SIGTERM, signal.SIGINT):
        signal.signal(number, _stop_at)
    if copied := place_extensions():
        print("took", ", ".join(copied), "from", BUILT)
    items = CALLS[arguments.call](arguments.dry, arguments.changed)
    if arguments.only:
        items = [item for item in items if any(f"{item.name} ".startswith(f"{name} ") for name in arguments.only)]
    budget = arguments.budget or {"first": 390.0, "second": 280.0}[arguments.call]
    return Session(arguments.results, budget, dry=arguments.dry).run(items)


if __name__ == "__main__":
    sys.exit(main())
