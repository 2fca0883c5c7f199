"""How do the tests of benchmarks/gpu.py import its modules and read its results?"""

import json
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT / "benchmarks"))

import gpu  # noqa: E402, F401
import gpu_commands  # noqa: E402, F401
import gpu_publish  # noqa: E402, F401
import gpu_session  # noqa: E402, F401


def rows_of(folder):
    return [json.loads(line) for line in (folder / "results.jsonl").read_text().splitlines()]


def of(rows, item):
    return [{k: v for k, v in row.items() if k not in ("item", "at")} for row in rows if row["item"] == item]


def ends(rows):
    return {row["item"]: row["status"] for row in rows if "status" in row}
