"""How are rows shown? As a table: times, shares of the machine's limits, and how many times as fast as each peer."""

from __future__ import annotations

import json
import os
import time
from pathlib import Path
from typing import Any, TextIO

from .measure import share


def head(result: dict[str, Any]) -> str:
    """The lines above the table: machine, threads, versions, limits and missing peers."""
    limits = result["ceilings"]
    rates = ", ".join(
        f"{k.removesuffix('_gflop_per_s')} {v:.0f}" for k, v in limits.items() if k.endswith("gflop_per_s")
    )
    lines = [
        f"{result['kind']}, {result['threads']} thread{'s' * (result['threads'] > 1)}, {result['date']}; "
        + ", ".join(f"{name} {version}" for name, version in result["versions"].items()),
        f"ceilings: copy {limits['copy_gb_per_s']:.1f} GB/s, read {limits['read_gb_per_s']:.1f} GB/s; "
        f"products in GFLOP/s: {rates}",
    ]
    lines += [f"without {name}: {why}" for name, why in result["missing"].items()]
    return "\n".join(lines)


COLUMNS = (
    f"{'':<46} {'dtype':<9} {'median':>11} {'spread':>7} {'GB/s':>7} {'GFLOP/s':>8} {'ceiling':>7}  times as fast as"
)


def line(row: dict[str, Any], limits: dict[str, float]) -> str:
    """One row. "spread" is the middle half of the times over their median, "one" a single round. "ceiling" is the share of the
    roofline; it can exceed 100% if data stays in caches. "~" marks noise, "slow" a row below plain PyTorch."""
    first = f"{row['case'][:46]:<46} {row['dtype']:<9}"
    if "error" in row:
        return f"{first} FAILED  {row['error']}"
    left = "".join(f"  {name}: {why}" for name, why in row.get("left_out", {}).items() if "Error" in why)
    if "values" in row:
        values = row["values"]
        others = "  ".join(f"{name} {ratio:.2f} ({values[name]:.0f})" for name, ratio in row["ratio"].items())
        return f"{first} {values['pyfused']:>8.0f} {row['unit']:<3}{'':<33} {others}"
    seconds, noisy, spread = row["seconds"]["pyfused"], row.get("noisy"), row["spread"].get("pyfused")
    part = share(row, limits)
    numbers = (
        f"{_time(seconds):>11} {'one' if spread is None else f'{spread:.0%}':>6}{'~' if noisy else ' '} "
        f"{_rate(row['bytes'], seconds):>7} {_rate(row['flops'], seconds):>8} {f'{part:.0%}' if part else '':>7}"
    )
    peers = "  ".join(f"{name} {ratio:.2f}" for name, ratio in row["ratio"].items())
    return f"{first} {numbers}  {peers}{'  slow' if row.get('slow') else ''}{left}"


def _time(seconds: float) -> str:
    return f"{seconds * 1e6:.2f} us" if seconds < 1e-4 else f"{seconds * 1e3:.3f} ms"


def _rate(amount: float, seconds: float) -> str:
    return f"{amount / seconds / 1e9:.1f}" if amount else ""


def table(result: dict[str, Any]) -> str:
    """All rows, grouped by benchmark."""
    lines = []
    for before, row in zip([None, *result["rows"]], result["rows"]):
        lines += [*_heading(before, row), line(row, result["ceilings"])]
    return "\n".join(lines)


def _heading(before: dict[str, Any] | None, row: dict[str, Any]) -> list[str]:
    """The lines above the first row of a benchmark."""
    return [] if before and before["benchmark"] == row["benchmark"] else ["", row["benchmark"], COLUMNS]


class Live:
    """Shows a run while it goes on: prints each row as it comes and, on a terminal, a progress line below. Writes the rows to a
    file as well, so that a killed run loses nothing.

    Args:
        stream: where to print.
        path: a JSON file, or None.
    """

    def __init__(self, stream: TextIO, path: str | Path | None = None):
        self._stream, self._path = stream, Path(path) if path else None
        self._shown, self._headed = 0, False
        self._began = time.monotonic()

    def __call__(self, result: dict[str, Any], now: str, left: int) -> None:
        """bench() calls this before each row."""
        self._rows(result)
        if now and self._stream.isatty():
            done = len(result["rows"])
            passed = time.monotonic() - self._began
            rest = f", {passed / done * left / 60:.0f} min left" if done else ""
            bar = "#" * (24 * done // (done + left))
            print(f"[{bar:<24}] {done}/{done + left}{rest}  {now[:60]}", end="", flush=True, file=self._stream)

    def close(self, result: dict[str, Any], checked: bool) -> None:
        """Prints the last row and the summary."""
        self._rows(result)
        print(f"\n{summary(result, checked)}", file=self._stream)

    def _rows(self, result: dict[str, Any]) -> None:
        if self._stream.isatty():
            print("\r\033[K", end="", file=self._stream)
        if not self._headed and result["ceilings"]:  # empty if interrupted at the very start
            self._headed = True
            print(head(result), file=self._stream)
        rows = result["rows"]
        for place in range(self._shown, len(rows)):
            lines = [*_heading(rows[place - 1] if place else None, rows[place]), line(rows[place], result["ceilings"])]
            print("\n".join(lines), file=self._stream, flush=True)
        self._shown = len(rows)
        if self._path:
            write(result, self._path)


def write(result: dict[str, Any], path: Path) -> None:
    """Writes the run as a JSON file. Readers never see a part of it."""
    path.parent.mkdir(parents=True, exist_ok=True)
    new = path.with_name(f".{path.name}.{os.getpid()}")
    new.write_text(json.dumps(result, indent=1) + "\n")
    new.replace(path)


def summary(result: dict[str, Any], checked: bool = False) -> str:
    """The number of rows, and which failed, are noisy or, with --check, slow."""
    rows = result["rows"]
    failed, noisy = [r for r in rows if "error" in r], [r for r in rows if r.get("noisy")]
    left = f", {result['left']} not measured" if result["left"] else ""
    lines = [f"{len(rows)} rows{', interrupted' if result['interrupted'] else ''}{left}"]
    if failed:
        lines.append(f"{len(failed)} failed: {_named(failed)}")
    if noisy:
        lines.append(
            f"{len(noisy)} rows are noisy (~): something else ran on this machine; measure again when it is quiet"
        )
    if checked:
        slow = [r for r in rows if r.get("slow")]
        unchecked = [r for r in rows if unknown(r)]
        if unchecked:
            lines.append(f"{len(unchecked)} could not be compared with plain PyTorch: {_named(unchecked)}")
        none = "no compared row is below 0.97 of plain PyTorch's speed, with 95% confidence"
        lines.append(f"slower than plain PyTorch: {_named(slow)}" if slow else none)
    return "\n".join(lines)


def unknown(row: dict[str, Any]) -> bool:
    """Whether plain PyTorch failed, so that --check cannot compare the row."""
    return "error" not in row and "values" not in row and not row.get("interval")


def _named(rows: list[dict[str, Any]]) -> str:
    return "; ".join(f"{r['benchmark']} {r['case']} {r['dtype']}" for r in rows)
