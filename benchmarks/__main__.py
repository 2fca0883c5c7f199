"""Runs the benchmarks: `python -m benchmarks [--device cpu|cuda] [--threads N] [--only NAME ...] [--save]`.

Each benchmarks/bench_<name>.py has `cases(device)`, a generator of pyfused.bench.Case. --save writes
benchmarks/results/<device>.json, keeping what is there for benchmarks that were not run.
"""

import argparse
import importlib
import json
import platform
from pathlib import Path

import torch

import pyfused
from pyfused.bench import ceilings, measure, render

HERE = Path(__file__).parent


def main() -> None:
    names = sorted(p.stem.removeprefix("bench_") for p in HERE.glob("bench_*.py"))
    parser = argparse.ArgumentParser(prog="python -m benchmarks", description=__doc__.split("\n")[0])
    parser.add_argument("--device", choices=["cpu", "cuda"], default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--threads", type=int, default=1, help="CPU threads (default 1)")
    parser.add_argument("--only", nargs="+", choices=names, default=names, metavar="NAME", help=", ".join(names))
    parser.add_argument("--save", action="store_true", help="write benchmarks/results")
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    torch.manual_seed(0)
    label = device_label(arguments.device, arguments.threads)
    limits = ceilings(arguments.device)
    print(label, ", ".join(f"{k} {v:.1f}" for k, v in limits.items()), flush=True)
    results = {}
    for name in arguments.only:
        module = importlib.import_module(f"benchmarks.bench_{name}")
        rows = []
        print(f"\n{name}", flush=True)
        for case in module.cases(arguments.device):
            rows.append(measure(case, arguments.device))
            print(render(rows[-1:]), flush=True)
        if rows:
            results[name] = rows
    if arguments.save:
        save(label, limits, results)


def device_label(device: str, threads: int) -> str:
    """A file name that says what was measured, such as "cpu_avx2_1thread" or "nvidia_h100_80gb_hbm3"."""
    if device == "cuda":
        return torch.cuda.get_device_name().lower().replace(" ", "_")
    from pyfused import _extensions

    return f"cpu_{_extensions.isa()}_{threads}thread"


def save(label: str, limits: dict, results: dict) -> None:
    path = HERE / "results" / f"{label}.json"
    path.parent.mkdir(exist_ok=True)
    old = json.loads(path.read_text()) if path.exists() else {}
    versions = {"pyfused": pyfused.__version__, "torch": torch.__version__, "python": platform.python_version()}
    content = {
        **old,
        "device": label,
        "versions": versions,
        "ceilings": limits,
        "benchmarks": {**old.get("benchmarks", {}), **results},
    }
    path.write_text(json.dumps(content, indent=1) + "\n")
    print(f"\nwrote {path.relative_to(HERE.parent)}")


if __name__ == "__main__":
    main()
