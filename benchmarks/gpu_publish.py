"""What follows from a run on a GPU? Its results become pyfused/evidence/<kind>.json, by which dispatch decides, and
benchmarks/results/<device>.json, from which the README's table is made.

A backend that was wrong in one case of an operator, or not judged to the end, gets no line of evidence of that operator.
"""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
Row = dict[str, Any]
_KEY = ("operator", "function", "dtype", "shapes", "threads")


def read(folders: Sequence[Path]) -> list[Row]:
    """The rows of several runs, oldest first.

    Raises:
        ValueError: no row says which device it was, or the runs are of several.
    """
    rows = [json.loads(line) for folder in folders for line in (folder / "results.jsonl").read_text().splitlines()]
    kinds = {row["kind"] for row in rows if "kind" in row}
    if len(kinds) != 1:
        raise ValueError(f"results of {sorted(kinds) or 'no device'}; publishing takes those of one kind")
    return rows


def right(rows: Sequence[Row]) -> dict[str, dict[str, int]]:
    """{operator: {backend: cases}} of the backends of which each case was judged, and none was wrong. The last run counts."""
    found: dict[tuple[str, str], int] = {}
    pending: dict[str, list[Row]] = {}
    for row in rows:
        if "status" not in row:
            pending.setdefault(row["item"], []).append(row)
            continue
        judged = [r for r in pending.pop(row["item"], []) if "backend" in r and "ok" in r and "operator" in r]
        for key in {(r["operator"], r["backend"]) for r in judged}:
            mine = [r["ok"] for r in judged if (r["operator"], r["backend"]) == key]
            complete = row["status"] in ("ok", "failed") and False not in mine
            found[key] = mine.count(True) if complete else 0
    table: dict[str, dict[str, int]] = {}
    for (operator, backend), count in sorted(found.items()):
        if count:
            table.setdefault(operator, {})[backend] = count
    return table


def evidence(rows: Sequence[Row], old: Row) -> Row:
    """The evidence file: new lines of backends that are right, and the old ones that were not measured again."""
    about, judged = _about(rows), right(rows)
    lines = {tuple(line.get(k) for k in _KEY): line for line in old.get("lines", ())}
    for row in rows:
        if "line" not in row:
            continue
        line = row["line"]
        known = judged.get(line["operator"], {})
        speed = {backend: sizes for backend, sizes in line.get("speed", {}).items() if backend in known}
        key = tuple(line.get(k) for k in _KEY)
        if speed:
            lines[key] = {**line, "speed": speed}
        else:
            lines.pop(key, None)
    checked = {**old.get("checked", {}), **judged}
    return {"kind": about["kind"], "checked": checked, "lines": [lines[key] for key in sorted(lines, key=str)]}


def results(rows: Sequence[Row], old: Row) -> Row:
    """The result file: `benchmarks` as `pyfused bench` gave them, and under `gpu` the figures of every other item."""
    about = _about(rows)
    ceilings = next((row["ceilings"] for row in reversed(rows) if "ceilings" in row), old.get("ceilings", {}))
    benchmarks, figures = dict(old.get("benchmarks", {})), dict(old.get("gpu", {}))
    for name in dict.fromkeys(row["item"] for row in rows if "status" not in row):
        # Of an item that ran several times, the last.
        ends = [i for i, row in enumerate(rows) if row["item"] == name and "status" in row]
        start = ends[-2] if len(ends) > 1 else -1
        mine = [row for row in rows[start + 1 :] if row["item"] == name and "status" not in row]
        for row in mine:
            if "benchmark" in row:
                benchmarks[row["benchmark"]] = [r["row"] for r in mine if r.get("benchmark") == row["benchmark"]]
        kept = [
            {k: v for k, v in row.items() if k not in ("item", "at")}
            for row in mine
            if not {"line", "row"} & row.keys()
        ]
        if kept and name != "environment":
            figures[name] = kept
    label = about["device"].lower().replace(" ", "_")
    about_run = {"device": label, "versions": about["versions"], "commit": about.get("commit"), "ceilings": ceilings}
    return {**about_run, "benchmarks": benchmarks, "gpu": figures}


def _about(rows: Sequence[Row]) -> Row:
    return next(row for row in reversed(rows) if "kind" in row)


def publish(folders: Sequence[Path], root: Path = ROOT) -> list[Path]:
    """Writes both files under `root` and returns their paths."""
    rows = read(folders)
    about = _about(rows)
    written = []
    for path, made in (
        (root / "pyfused" / "evidence" / f"{about['kind']}.json", evidence),
        (root / "benchmarks" / "results" / f"{about['device'].lower().replace(' ', '_')}.json", results),
    ):
        old = json.loads(path.read_text()) if path.exists() else {}
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(json.dumps(made(rows, old), indent=1) + "\n")
        written.append(path)
    return written


def main(folders: Sequence[Path]) -> int:
    """Publishes, then renders the README where there is a renderer."""
    for path in publish(folders):
        print("wrote", path.relative_to(ROOT))
    if (ROOT / "benchmarks" / "publish.py").exists():
        return subprocess.run([sys.executable, "-m", "benchmarks.publish"], cwd=ROOT).returncode
    print("there is no benchmarks/publish.py: the README's table is as it was")
    return 0
