"""Which files are made from a run on a GPU?

- pyfused/evidence/<kind>.json, by which dispatch decides. A backend gets no evidence for an operator if one of the operator's
  cases was wrong, or if not all were checked.
- benchmarks/results/<kind>.json, the output of `pyfused bench`. The README's table is made from it.
- benchmarks/results/gpu/<kind>.json, the results of the other items.
"""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
Row = dict[str, Any]
_LINE = ("operator", "function", "dtype", "shapes", "threads")
_TILE = ("kernel", "dtype", "case", "up_to")


def read(folders: Sequence[Path]) -> list[Row]:
    """The rows of several runs, oldest first.

    Raises:
        ValueError: no row names the device, or the runs are from several kinds.
    """
    rows = [json.loads(line) for folder in folders for line in (folder / "results.jsonl").read_text().splitlines()]
    kinds = {row["kind"] for row in rows if "kind" in row}
    if len(kinds) != 1:
        raise ValueError(f"results of {sorted(kinds) or 'no device'}; publishing takes results of one kind")
    return rows


def right_backends(rows: Sequence[Row]) -> dict[str, dict[str, int]]:
    """{operator: {backend: number of cases}} of the backends whose cases were all checked and right. The last run counts."""
    counts: dict[tuple[str, str], int] = {}
    pending: dict[str, list[Row]] = {}
    for row in rows:
        if "status" not in row:
            pending.setdefault(row["item"], []).append(row)
            continue
        checked = [r for r in pending.pop(row["item"], []) if "backend" in r and "ok" in r and "operator" in r]
        for key in {(r["operator"], r["backend"]) for r in checked}:
            mine = [r["ok"] for r in checked if (r["operator"], r["backend"]) == key]
            all_right = row["status"] in ("ok", "failed") and False not in mine
            counts[key] = mine.count(True) if all_right else 0
    table: dict[str, dict[str, int]] = {}
    for (operator, backend), count in sorted(counts.items()):
        if count:
            table.setdefault(operator, {})[backend] = count
    return table


def evidence(rows: Sequence[Row], old: Row) -> Row:
    """The evidence file: new lines of the right backends, new tiles, and old ones that were not measured again."""
    checked = right_backends(rows)
    lines = {_key(line, _LINE): line for line in old.get("lines", ())}
    tiles = {_key(tile, _TILE): tile for tile in old.get("tiles", ())}
    for row in rows:
        if "tile" in row:
            tiles[_key(row["tile"], _TILE)] = row["tile"]
        elif "line" in row:
            line = row["line"]
            known = {"reference", *checked.get(line["operator"], ())}
            speed = {backend: sizes for backend, sizes in line["speed"].items() if backend in known}
            if set(speed) - {"reference"}:
                lines[_key(line, _LINE)] = {**line, "speed": speed}
            else:
                lines.pop(_key(line, _LINE), None)
    made = {"kind": _about(rows)["kind"], "checked": {**old.get("checked", {}), **checked}}
    return {**made, "lines": _sorted(lines), **({"tiles": _sorted(tiles)} if tiles else {})}


def _key(row: Row, names: Sequence[str]) -> tuple[Any, ...]:
    return tuple(row.get(name) for name in names)


def _sorted(rows: dict[tuple[Any, ...], Row]) -> list[Row]:
    return [rows[key] for key in sorted(rows, key=str)]


def figures(rows: Sequence[Row], old: Row) -> Row:
    """The results of every item except benchmarks and tuning. If an item ran several times, the last run counts."""
    about = _about(rows)
    ceilings = next((row["ceilings"] for row in reversed(rows) if "ceilings" in row), old.get("ceilings", {}))
    items = dict(old.get("items", {}))
    for name in dict.fromkeys(row["item"] for row in rows if "status" not in row):
        ends = [i for i, row in enumerate(rows) if row["item"] == name and "status" in row]
        start = ends[-2] + 1 if len(ends) > 1 else 0
        mine = [
            row for row in rows[start:] if row["item"] == name and not {"status", "line", "tile", "bench"} & row.keys()
        ]
        if mine and name != "environment":
            items[name] = [{k: v for k, v in row.items() if k not in ("item", "at")} for row in mine]
    return {**{k: about.get(k) for k in ("device", "kind", "commit", "versions")}, "ceilings": ceilings, "items": items}


def benchmarks(rows: Sequence[Row], old: Row) -> Row:
    """The file of `pyfused bench`: the last run's, with the rows of earlier runs that it has not."""
    runs = [old] if old else []
    runs += [row["bench"] for row in rows if "bench" in row]
    found: dict[tuple[Any, ...], Row] = {}
    for run in runs:
        for row in run["rows"]:
            found[_key(row, ("benchmark", "case", "dtype"))] = row
    return {**runs[-1], "left": 0, "rows": list(found.values())}


def _about(rows: Sequence[Row]) -> Row:
    return next(row for row in reversed(rows) if "kind" in row)


def publish(folders: Sequence[Path], root: Path = ROOT) -> list[Path]:
    """Writes the files made from the results under `root` and returns their paths."""
    rows = read(folders)
    kind = _about(rows)["kind"]
    results = root / "benchmarks" / "results"
    made: dict[Path, Callable[[Sequence[Row], Row], Row]] = {
        root / "pyfused" / "evidence" / f"{kind}.json": evidence,
        results / "gpu" / f"{kind}.json": figures,
    }
    if any("bench" in row for row in rows):
        made[results / f"{kind}.json"] = benchmarks
    for path, function in made.items():
        old = json.loads(path.read_text()) if path.exists() else {}
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(json.dumps(function(rows, old), indent=1) + "\n")
    return list(made)


def main(folders: Sequence[Path]) -> int:
    """Writes the files, then updates the README with benchmarks/publish.py if that is there."""
    for path in publish(folders):
        print("wrote", path.relative_to(ROOT))
    renderer = ROOT / "benchmarks" / "publish.py"
    if renderer.exists():
        return subprocess.run([sys.executable, str(renderer)], cwd=ROOT).returncode
    print(f"there is no {renderer.relative_to(ROOT)}: the README's table is unchanged")
    return 0
