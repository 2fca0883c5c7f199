"""Import time of pyfused over torch's: at most 150 ms is the target."""

import statistics
import subprocess
import sys


def import_seconds(rounds: int = 7) -> dict[str, float]:
    """Median wall time inside a fresh interpreter: torch alone, and pyfused once torch is there."""
    code = (
        "import time; a = time.perf_counter(); import torch; b = time.perf_counter(); import pyfused;"
        "c = time.perf_counter(); print(b - a, c - b)"
    )
    rows = []
    for _ in range(rounds):
        out = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout
        rows.append([float(x) for x in out.split()])
    return {"torch": statistics.median(r[0] for r in rows), "pyfused": statistics.median(r[1] for r in rows)}


def cases(device):
    """No case of the usual kind: the measurement needs fresh processes. Prints its own line."""
    seconds = import_seconds()
    print(f"import torch {seconds['torch'] * 1e3:.0f} ms, then import pyfused {seconds['pyfused'] * 1e3:.0f} ms")
    return iter(())
