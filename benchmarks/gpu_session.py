"""How do items run on a machine that is lent for minutes? Each in a process that ends at its limit; every row is kept at once.

Needs the standard library alone.
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
SIDE_BY_SIDE = 8  # processes that share the GPU; each takes half a gigabyte of it, and two cores
LAST_WORDS = 6  # seconds kept for ending what runs, and for the table
LOG_BYTES = 8 << 20  # what comes back from a lent machine is limited
# A group of its own, to be ended as one; in our session, so that who ends that ends the group too.
_GROUP: dict[str, Any] = {"process_group": 0} if sys.version_info >= (3, 11) else {"start_new_session": True}


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
        self._running: list[threading.Thread] = []
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
                self._running.append(thread)
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
            if self._file.closed:
                return
            self._file.write(json.dumps(row) + "\n")
            self._file.flush()

    def _wait(self, most: int, seconds: float = math.inf) -> None:
        """Until at most so many items run. (A signal that comes inside Thread.join makes Python take the thread for ended.)"""
        until = time.monotonic() + seconds
        while len(self._running) > most and time.monotonic() < until:
            time.sleep(0.02)
            self._running = [thread for thread in self._running if thread.is_alive()]

    def _stop(self) -> None:
        """Ends what still runs, and prints the table."""
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
        """Runs an item, again behind each case that ended its process, and adds the row about the item itself."""
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
        """Runs one process until it ends, or `end`. Returns its status ("ok", "failed", "silent" or "timeout"), the row of a
        case that had begun and not ended, if any, and the last lines that were no rows."""
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
                    if process.poll() is not None:  # what it started may still hold the pipe
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
    """The row that a line holds, or None: it is something else that was printed."""
    try:
        row = json.loads(line) if line.startswith("{") else None
    except ValueError:
        return None
    return row if isinstance(row, dict) else None


def _end(process: subprocess.Popen[str]) -> None:
    """Ends a process and all that it started."""
    with contextlib.suppress(ProcessLookupError, PermissionError):
        os.killpg(process.pid, signal.SIGKILL)


# ---- the table ---------------------------------------------------------------------------------------------------------

_LONG = ("item", "at", "line", "tile", "bench", "error", "said")  # too long for a table


def table(rows: Sequence[dict[str, Any]]) -> str:
    """Figures, then what is wrong, then the items, of correctness a line each: the end is what one sees of a long output."""
    figures = [row for row in rows if "status" not in row]
    wrong = [row for row in figures if row.get("ok") is False]
    shown = [row for row in figures if row.get("ok") is not False and "ratio" not in row]
    lines = []
    for title, found in (("figures", shown), ("wrong", wrong)):
        lines += [f"{title}:"] if found else []
        for row in found:
            values = "  ".join(f"{k}={_short(v)}" for k, v in row.items() if k not in _LONG)
            error = str(row.get("error", "")).strip().splitlines()[-1:]
            lines.append("  ".join([row["item"], values, *(e[:200] for e in error)]))
    for row in rows:
        if "status" not in row:
            continue
        text = f"{row['item']:<40} {row['status']:<8} {row['seconds']:>6.1f} s"
        judged = [r for r in figures if r["item"] == row["item"] and "ratio" in r and r["ok"] is not None]
        if judged:
            right = sum(r["ok"] for r in judged)
            worst = max((r["ratio"] for r in judged if r["ratio"] is not None), default=0.0)
            text += f"  {right} of {len(judged)} right, worst {worst:.2f} of what is allowed"
        if row["status"] != "ok" and row.get("said"):
            text += "  " + row["said"].splitlines()[-1][:160]
        lines.append(text)
    return "\n".join(lines)


def _short(value: Any) -> str:
    return f"{value:.4g}" if isinstance(value, float) else str(value)[:120]
