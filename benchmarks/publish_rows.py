"""What do the files in benchmarks/results say? The parts that several documents of publish.py share."""

import json
from pathlib import Path

RESULTS = Path(__file__).parent / "results"
DTYPES = "float32", "bfloat16", "float16"
LEAST = 0.97  # of plain PyTorch's speed, as pyfused.bench.run judges it


def results() -> list[dict]:
    """Every run, by the name of its file."""
    return [json.loads(path.read_text()) | {"file": path.name} for path in sorted(RESULTS.glob("*.json"))]


def rows_of(found: dict, benchmark: str) -> dict[tuple[str, str], dict]:
    """By case and dtype."""
    return {(r["case"], r["dtype"]): r for r in found["rows"] if r["benchmark"] == benchmark}


def ratio(row: dict | None) -> str:
    if row is None or row.get("baseline") not in row.get("ratio", {}):
        return "-"
    return f"{row['ratio'][row['baseline']]:.2f}{'~' if row['noisy'] else ''}"


def front(runs: list[dict]) -> dict:
    """The run that the README shows: on a CPU, with the fewest threads, and of those the one with most rows."""
    return min(runs, key=lambda found: (found["device"] != "cpu", found["threads"], -len(found["rows"])))


def verdict(found: dict) -> str:
    """Which rows are below plain PyTorch, and which may be."""

    def named(rows: list[dict]) -> str:
        ratios = [f"{r['ratio'][r['baseline']]:.3f}{'~' if r['noisy'] else ''}" for r in rows]
        return ", ".join(f"{r['benchmark']} {r['case']} {r['dtype']} ({n})" for r, n in zip(rows, ratios, strict=True))

    checked = [r for r in found["rows"] if r.get("interval")]
    slow = [r for r in checked if r["slow"]]
    unsure = [r for r in checked if not r["slow"] and r["ratio"][r["baseline"]] < LEAST]
    cut = f" ({found['left']} more were not measured: the run ended before them)" if found["left"] else ""
    text = f"{len(checked)} rows{cut} compare with plain PyTorch in the same dtype. "
    text += (
        f"These are slower (below {LEAST} with 95% confidence): {named(slow)}."
        if slow
        else f"None is slower (below {LEAST} with 95% confidence)."
    )
    return text + (f" Below {LEAST}, but not with that confidence: {named(unsure)}." if unsure else "")


def threads_of(found: dict) -> str:
    if found["device"] != "cpu":
        return "a GPU"
    return f"{found['threads']} thread{'s' * (found['threads'] > 1)}"


def about_bfloat16(found: dict) -> str:
    """What one must know of a machine that multiplies bfloat16 by way of float32: plain PyTorch is slow there."""
    rates = [found["ceilings"].get(f"{dtype}_gflop_per_s", 0.0) for dtype in DTYPES[:2]]
    if not 0 < rates[1] < rates[0] / 4:
        return ""
    return (
        f" torch multiplies bfloat16 at {rates[1]:.0f} GFLOP/s here, float32 at {rates[0]:.0f}: where a processor has "
        "instructions for bfloat16, expect smaller ratios in that column."
    )
