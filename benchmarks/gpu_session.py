"""How do items run on a machine that is lent for minutes? Each in a process with a time limit; every row is saved at once.

Needs only the standard library.
"""

from __future__ import annotations

import contextlib
import json
import math
import os
import queue
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, TextIO

ROOT = Path(__file__).resolve().parents[1]
SIDE_BY_SIDE = 8  # processes that share the GPU; each takes half a gigabyte of its memory, and two cores
LAST_WORDS = 6  # seconds reserved for ending processes and printing the table
LOG_BYTES = 8 << 20  # a lent machine limits the size of the files that come back
# Each item is a process group, to be killed as one. It stays in this session: whoever ends the session ends the groups too.
_GROUP: dict[str, Any] = {"process_group": 0} if sys.version_info >= (3, 11) else {"start_new_session": True}


@dataclass(frozen=True)
class Item:
    """One process.

    Args:
        name: its name in the results.
        command: the command line.
        seconds: its time limit.
        least: skip it if less time is left.
        alone: run nothing else beside it, since it measures time.
        patience: end it after so many seconds without a line of output.
        resumes: if a case ends the process, count the case as wrong and start again after it, with --from N.
        environment: additional environment variables.
    """

    name: str
    command: tuple[str, ...]
    seconds: float
    least: float = 12.0
    alone: bool = False
    patience: float = 1e9
    resumes: bool = False
    environment: dict[str, str] = field(default_factory=dict)


class Session:
    """One run of items, until the budget is spent.

    Args:
        results: the folder for the results; each run appends to its results.jsonl.
        budget: seconds from now.
        clock: returns seconds; tests use a faster one.
        dry: run without a GPU.
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
        self._running: list[threading.Thread] = []
        self._processes: set[subprocess.Popen[str]] = set()
        self._stopped = False

    def run(self, items: Sequence[Item]) -> int:
        """Runs the items. Returns 1 if one failed, else 0; items skipped for lack of time do not count."""
        try:
            for item in items:
                self._wait(0 if item.alone else (1 if self._dry else SIDE_BY_SIDE) - 1)
                left = self._deadline - self._clock()
                if left < item.least:
                    why = f"{max(left, 0):.0f} s were left, and it takes {item.least:.0f}"
                    self.add({"item": item.name, "status": "skipped", "seconds": 0.0, "said": why})
                    continue
                thread = threading.Thread(target=self._execute, args=(item,), daemon=True)
                self._running.append(thread)
                thread.start()
                if item.alone:
                    self._wait(0)
            self._wait(0)
        finally:
            self._stop()
        return int(any(row.get("status") in ("failed", "timeout", "stopped") for row in self.rows))

    def add(self, row: dict[str, Any]) -> None:
        """Appends a row to the file at once."""
        with self._lock:
            row["at"] = round(self._clock() - self._began, 1)
            self.rows.append(row)
            if self._file.closed:
                return
            self._file.write(json.dumps(row) + "\n")
            self._file.flush()

    def _wait(self, most: int, seconds: float = math.inf) -> None:
        """Waits until at most so many items run. It does not use Thread.join: if a signal interrupts join, Python takes the
        thread for ended."""
        until = time.monotonic() + seconds
        while len(self._running) > most and time.monotonic() < until:
            time.sleep(0.02)
            self._running = [thread for thread in self._running if thread.is_alive()]

    def _stop(self) -> None:
        """Ends the running items and prints the table."""
        with self._lock:
            self._stopped = True
            for process in self._processes:
                _end(process)
        self._wait(0, seconds=3)
        text = table(self.rows)
        self._table.write_text(text + "\n")
        print(text, flush=True)
        self._file.close()
        self._log.close()

    def _execute(self, item: Item) -> None:
        """Runs an item, restarts it after each case that ended its process, and adds the row about the item itself."""
        began = self._clock()
        end, command, rows_before = min(began + item.seconds, self._deadline), item.command, len(self.rows)
        faults = 0
        while True:
            status, case, said = self._process(item, command, end)
            if case is None or status == "timeout" or self._stopped:
                break
            number = case.pop("begun")
            self.add({"item": item.name, **case, "ok": False, "error": f"{status}: {said}"})
            faults += 1
            if not item.resumes or end - self._clock() < 5:
                break
            command = (*item.command, "--from", str(number + 1))
        with self._lock:
            mine = [r for r in self.rows[rows_before:] if r["item"] == item.name]
            if status in ("ok", "silent") and (status == "silent" or any(row.get("ok") is False for row in mine)):
                status = "failed"
            if self._stopped:
                status = "stopped"
            seconds = round(self._clock() - began, 1)
            row = {"item": item.name, "status": status, "seconds": seconds, "rows": len(mine), "said": said}
            self.add({**row, "restarts": faults} if faults else row)

    def _process(self, item: Item, command: Sequence[str], end: float) -> tuple[str, dict[str, Any] | None, str]:
        """Runs one process until it ends, or until `end`. Returns its status ("ok", "failed", "silent" or "timeout"), the row
        of the unfinished case, if any, and its last lines of other output."""
        path = os.pathsep.join(filter(None, (str(ROOT), os.environ.get("PYTHONPATH"))))
        environment = {**os.environ, "PYTHONPATH": path, "PYTHONUNBUFFERED": "1", "HF_HUB_OFFLINE": "1"}
        environment["PYFUSED_GPU_SECONDS"] = str(round(max(end - self._clock(), 1), 1))
        if not item.alone:
            environment["OMP_NUM_THREADS"] = "2"
        if self._dry:
            environment |= {"PYFUSED_GPU_DRY": "1", "TRITON_INTERPRET": "1"}
        with self._lock:
            if self._stopped:
                return "failed", None, "the session ended"
            try:
                process = subprocess.Popen(
                    command, cwd=ROOT, env=environment | item.environment, stdout=subprocess.PIPE,
                    stderr=subprocess.STDOUT, text=True, errors="replace", **_GROUP,
                )  # fmt: skip
            except OSError as error:
                return "failed", None, str(error)
            self._processes.add(process)
        lines: queue.Queue[str | None] = queue.Queue()
        threading.Thread(target=_read, args=(process.stdout, lines), daemon=True).start()
        case, last, heard, status = None, [], self._clock(), ""
        try:
            while not status:
                now = self._clock()
                status = "timeout" if now > end else "silent" if now - heard > item.patience else ""
                try:
                    line = lines.get(timeout=0.05)
                except queue.Empty:
                    if process.poll() is not None:  # its children may still hold the pipe
                        _end(process)
                    continue
                if line is None:
                    break
                heard = now
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
    """The row in a line of output, or None if the line is something else."""
    try:
        row = json.loads(line) if line.startswith("{") else None
    except ValueError:
        return None
    return row if isinstance(row, dict) else None


def _end(process: subprocess.Popen[str]) -> None:
    """Kills a process and all its children."""
    with contextlib.suppress(ProcessLookupError, PermissionError):
        os.killpg(process.pid, signal.SIGKILL)


# ---- the table ---------------------------------------------------------------------------------------------------------

_LONG = ("item", "at", "line", "tile", "bench", "error", "said")  # too long for a table


def table(rows: Sequence[dict[str, Any]]) -> str:
    """Numbers, then errors, then a line for each item. The items come last: of a long output one sees the end."""
    figures = [row for row in rows if "status" not in row]
    wrong = [row for row in figures if row.get("ok") is False]
    shown = [row for row in figures if row.get("ok") is not False and "ratio" not in row]
    lines = []
    for title, listed in (("figures", shown), ("wrong", wrong)):
        lines += [f"{title}:"] if listed else []
        for row in listed:
            values = "  ".join(f"{k}={_short(v)}" for k, v in row.items() if k not in _LONG)
            error = str(row.get("error", "")).strip().splitlines()[-1:]
            lines.append("  ".join([row["item"], values, *(e[:200] for e in error)]))
    for row in rows:
        if "status" not in row:
            continue
        text = f"{row['item']:<40} {row['status']:<8} {row['seconds']:>6.1f} s"
        checked = [r for r in figures if r["item"] == row["item"] and "ratio" in r and r["ok"] is not None]
        if checked:
            right = sum(r["ok"] for r in checked)
            worst = max((r["ratio"] for r in checked if r["ratio"] is not None), default=0.0)
            text += f"  {right} of {len(checked)} right, worst {worst:.2f} of the allowed error"
        if row["status"] != "ok" and row.get("said"):
            text += "  " + row["said"].splitlines()[-1][:160]
        lines.append(text)
    return "\n".join(lines)


def _short(value: Any) -> str:
    return f"{value:.4g}" if isinstance(value, float) else str(value)[:120]
