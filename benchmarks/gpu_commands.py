"""Which items of gpu.py run other commands? `pyfused tune`, `pyfused bench` and Nsight Compute. Nothing here imports torch: a
process that only waits for another should start at once.
"""

from __future__ import annotations

import csv
import json
import os
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from functools import partial
from pathlib import Path
from typing import Any

from gpu_session import ROOT

BEGAN = time.monotonic()
Row = dict[str, Any]


def show(rows: Iterable[Row]) -> int:
    """Prints rows for gpu_session to read. Each is one write and a line of its own, even if a library prints meanwhile."""
    for row in rows:
        sys.stdout.write(f"\n{json.dumps(row)}\n")
        sys.stdout.flush()
    return 0


def left() -> float:
    """Seconds that this process still has. It had PYFUSED_GPU_SECONDS at its start."""
    return float(os.environ.get("PYFUSED_GPU_SECONDS", "1e9")) - (time.monotonic() - BEGAN)


def tune_command(operators: Sequence[str], seconds: float, file: str) -> list[str]:
    return ["tune", "--device", "cuda", "--limit", str(int(seconds)), "--save", file, *operators]


def bench_command(group: str, seconds: float, file: str) -> list[str]:
    names, peers = BENCHMARKS[group]
    limits = ["--limit", str(int(seconds)), "--seconds", "0.3"]
    return ["bench", *names, "--device", "cuda", "--dtype", "bfloat16", "--json", file, *limits, "--peers", ",".join(peers)]


def tune(start: int, operators: str) -> Iterator[Row]:
    """`pyfused tune` on some operators: a row for each line of evidence, for each tile and for each refused call."""
    for content in _from_command(partial(tune_command, operators.split(","))):
        for line in content.get("lines", ()):
            yield {"operator": line.get("operator"), "dtype": line.get("dtype"), "line": line}
        for tile in content.get("tiles", ()):
            yield {"kernel": tile.get("kernel"), "dtype": tile.get("dtype"), "tile": tile}
        for refused in content.get("refused", ()):
            yield {"refused": refused, "ok": False}


# Groups of benchmarks, and the peers beside plain PyTorch: torch.compile takes seconds for each case.
_OURS = ("triton", "cuda")
BENCHMARKS = {
    "operators": (("layer_norm", "rms_norm", "fourier_mix", "linear"), _OURS),
    "networks": (("gated_ffn", "ffn"), (*_OURS, "compile")),
    "models": (("gpt2", "t5"), _OURS),
    "attention": (("attention",), (*_OURS, "cudnn", "flash", "flex")),
}


def bench(start: int, group: str) -> Iterator[Row]:
    """`pyfused bench` on a group: its whole file in one row."""
    for content in _from_command(partial(bench_command, group)):
        yield {"cases": len(content.get("rows", ())), "bench": content}


def warm(start: int, group: str) -> Iterator[Row]:
    """Runs a group of benchmarks beside other items, so that its kernels are compiled when it is measured."""
    for content in _from_command(lambda seconds, file: [*bench_command(group, seconds, file), "--seconds", "0"]):
        yield {"cases": len(content.get("rows", ()))}


def _from_command(command: Callable[[float, str], list[str]]) -> Iterator[Row]:
    """Runs a pyfused command and yields the content of the file that it saves. Raises RuntimeError if the command fails or runs
    out of time, after yielding what it saved."""
    seconds = max(left() - 6, 1)
    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder) / "saved.json"
        arguments = [sys.executable, "-m", "pyfused", *command(max(seconds - 5, 1), str(file))]
        try:
            done = subprocess.run(arguments, cwd=ROOT, timeout=seconds)
            failed = f"exit status {done.returncode}" if done.returncode else ""
        except subprocess.TimeoutExpired:
            failed = f"not done in {seconds:.0f} s"
        if file.exists():
            yield json.loads(file.read_text())
        if failed:
            raise RuntimeError(f"{' '.join(arguments[1:])}: {failed}")


KEPT = ("Duration", "Compute (SM) Throughput", "Memory Throughput", "DRAM Throughput", "L2 Cache Throughput")
KEPT += ("Registers Per Thread", "Theoretical Occupancy", "Achieved Occupancy", "Grid Size", "Block Size")


def profile(start: int) -> Iterator[Row]:
    """Nsight Compute's metrics of six calls, a row for each kernel, and what it advises. The GPU's clocks stay as they are."""
    tool = shutil.which("ncu")
    if tool is None:
        raise RuntimeError("ncu is not on the PATH")
    sections = [f"--section={name}" for name in ("SpeedOfLight", "Occupancy", "LaunchStats", "WarpStateStats")]
    options = ["--csv", "--page=details", "--clock-control=none", "--profile-from-start=off", "--launch-count=40"]
    command = [tool, *sections, *options, sys.executable, str(ROOT / "benchmarks" / "gpu.py"), "--item", "kernels"]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=max(left() - 5, 5))
    yield from profiled(done.stdout)
    if done.returncode:
        raise RuntimeError(f"ncu: exit status {done.returncode}\n{done.stdout[-800:]}{done.stderr[-800:]}")


def profiled(text: str) -> list[Row]:
    """The rows of ncu's CSV: {"kernel", "metrics": {name: "value unit"}}."""
    lines = text.splitlines()
    header = next((i for i, line in enumerate(lines) if line.startswith('"ID"')), len(lines))
    rows: dict[str, Row] = {}
    for metric in csv.DictReader(line for line in lines[header:] if line.startswith('"')):
        row = rows.setdefault(metric["ID"], {"kernel": metric["Kernel Name"][:120], "metrics": {}})
        if metric["Metric Name"] in KEPT:
            row["metrics"][metric["Metric Name"]] = f"{metric['Metric Value']} {metric['Metric Unit']}".strip()
        if metric.get("Rule Description"):
            row.setdefault("advice", {})[metric["Rule Name"]] = metric["Rule Description"][:300]
    return list(rows.values())


ITEMS: dict[str, Callable[..., Iterator[Row]]] = {"tune": tune, "bench": bench, "warm": warm, "profile": profile}
