"""How are rows shown? As a table: times, shares of the machine's ceilings, and how many times as fast as each peer."""

from __future__ import annotations

import json
import os
import time
from pathlib import Path
from typing import Any, TextIO

from .measure import share


def head(found: dict[str, Any]) -> str:
    """What was measured on what: machine, threads, versions, ceilings, and peers that are not here."""
    limits = found["ceilings"]
    rates = ", ".join(
        f"{k.removesuffix('_gflop_per_s')} {v:.0f}" for k, v in limits.items() if k.endswith("gflop_per_s")
    )
    lines = [
        f"{found['kind']}, {found['threads']} thread{'s' * (found['threads'] > 1)}, {found['date']}; "
        + ", ".join(f"{name} {version}" for name, version in found["versions"].items()),
        f"ceilings: copy {limits['copy_gb_per_s']:.1f} GB/s, read {limits['read_gb_per_s']:.1f} GB/s; "
        f"products in GFLOP/s: {rates}",
    ]
    lines += [f"without {name}: {why}" for name, why in found["missing"].items()]
    return "\n".join(lines)


COLUMNS = (
    f"{'':<46} {'dtype':<9} {'median':>11} {'spread':>7} {'GB/s':>7} {'GFLOP/s':>8} {'ceiling':>7}  times as fast as"
)


def line(row: dict[str, Any], limits: dict[str, float]) -> str:
    """One row. "spread" is the middle half of the times over their median; "ceiling" the share of the roofline, and more than
    100% where data stays in caches; "~" marks noise, "slow" what is below plain PyTorch."""
    first = f"{row['case'][:46]:<46} {row['dtype']:<9}"
    if "error" in row:
        return f"{first} FAILED  {row['error']}"
    left = "".join(f"  {name}: {why}" for name, why in row.get("left_out", {}).items() if "Error" in why)
    if "values" in row:
        values = row["values"]
        others = "  ".join(f"{name} {ratio:.2f} ({values[name]:.0f})" for name, ratio in row["ratio"].items())
        return f"{first} {values['pyfused']:>8.0f} {row['unit']:<3}{'':<33} {others}"
    seconds, noisy = row["seconds"]["pyfused"], row.get("noisy")
    part = share(row, limits)
    numbers = (
        f"{_time(seconds):>11} {row['spread']['pyfused']:>6.0%}{'~' if noisy else ' '} "
        f"{_rate(row['bytes'], seconds):>7} {_rate(row['flops'], seconds):>8} {f'{part:.0%}' if part else '':>7}"
    )
    peers = "  ".join(f"{name} {ratio:.2f}" for name, ratio in row["ratio"].items())
    return f"{first} {numbers}  {peers}{'  slow' if row.get('slow') else ''}{left}"


def _time(seconds: float) -> str:
    return f"{seconds * 1e6:.2f} us" if seconds < 1e-4 else f"{seconds * 1e3:.3f} ms"


def _rate(amount: float, seconds: float) -> str:
    return f"{amount / seconds / 1e9:.1f}" if amount else ""


def table(found: dict[str, Any]) -> str:
    """Every row, benchmark by benchmark."""
    lines = []
    for before, row in zip([None, *found["rows"]], found["rows"]):
        lines += [*_heading(before, row), line(row, found["ceilings"])]
    return "\n".join(lines)


def _heading(before: dict[str, Any] | None, row: dict[str, Any]) -> list[str]:
    """What stands above the first row of a benchmark."""
    return [] if before and before["benchmark"] == row["benchmark"] else ["", row["benchmark"], COLUMNS]


class Live:
    """Shows a run while it goes on: each row as it comes, on a terminal with a line below that says how far it is; and keeps
    all of it in a file, so that a run that is killed loses nothing.

    Args:
        stream: where the table goes.
        path: a JSON file, or None.
    """

    def __init__(self, stream: TextIO, path: str | Path | None = None):
        self._stream, self._path = stream, Path(path) if path else None
        self._shown, self._headed = 0, False
        self._began = time.monotonic()

    def __call__(self, found: dict[str, Any], now: str, left: int) -> None:
        """What bench() calls before each row."""
        self._rows(found)
        if now and self._stream.isatty():
            done = len(found["rows"])
            passed = time.monotonic() - self._began
            rest = f", {passed / done * left / 60:.0f} min left" if done else ""
            bar = "#" * (24 * done // (done + left))
            print(f"[{bar:<24}] {done}/{done + left}{rest}  {now[:60]}", end="", flush=True, file=self._stream)

    def close(self, found: dict[str, Any], checked: bool) -> None:
        """The last row, and the summary."""
        self._rows(found)
        print(f"\n{summary(found, checked)}", file=self._stream)

    def _rows(self, found: dict[str, Any]) -> None:
        if self._stream.isatty():
            print("\r\033[K", end="", file=self._stream)
        if not self._headed and found["ceilings"]:  # else interrupted before anything was known
            self._headed = True
            print(head(found), file=self._stream)
        rows = found["rows"]
        for place in range(self._shown, len(rows)):
            lines = [*_heading(rows[place - 1] if place else None, rows[place]), line(rows[place], found["ceilings"])]
            print("\n".join(lines), file=self._stream, flush=True)
        self._shown = len(rows)
        if self._path:
            write(found, self._path)


def write(found: dict[str, Any], path: Path) -> None:
    """The run as a JSON file, whole at any moment."""
    path.parent.mkdir(parents=True, exist_ok=True)
    new = path.with_name(f".{path.name}.{os.getpid()}")
    new.write_text(json.dumps(found, indent=1) + "\n")
    new.replace(path)


def summary(found: dict[str, Any], checked: bool = False) -> str:
    """How many rows, and what to know of them."""
    rows = found["rows"]
    failed, noisy = [r for r in rows if "error" in r], [r for r in rows if r.get("noisy")]
    left = f", {found['left']} not measured" if found["left"] else ""
    lines = [f"{len(rows)} rows{', interrupted' if found['interrupted'] else ''}{left}"]
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
        none = "no row that was compared is below 0.97 of plain PyTorch's speed, with 95% confidence"
        lines.append(f"slower than plain PyTorch: {_named(slow)}" if slow else none)
    return "\n".join(lines)


def unknown(row: dict[str, Any]) -> bool:
    """Whether plain PyTorch failed, so that --check has nothing to go by."""
    return "error" not in row and "values" not in row and not row.get("interval")


def _named(rows: list[dict[str, Any]]) -> str:
    return "; ".join(f"{r['benchmark']} {r['case']} {r['dtype']}" for r in rows)
