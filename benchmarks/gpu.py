"""Everything a GPU must show, in parts: `python -m benchmarks.gpu --part tests|sanitize|bench|all`.

tests: `pytest -m gpu`, every operator on every backend, models, generation, streams and CUDA graphs. sanitize:
compute-sanitizer's memcheck and racecheck on small calls of every CUDA kernel. bench: every operator beside its peers, into
benchmarks/results/<device>.json. A summary comes last; exit status 1 if a part failed.
"""

import argparse
import importlib.util
import os
import shutil
import subprocess
import sys
import time
from pathlib import Path

import torch

ROOT = Path(__file__).resolve().parents[1]
CUDA_CALLS = [sys.executable, str(ROOT / "tests" / "gpu" / "cuda_calls.py")]
# torch hands out pieces of one large allocation: what runs over into the next piece is no error to the sanitizer.
SANITIZER_ENVIRONMENT = {"PYTORCH_NO_CUDA_MEMORY_CACHING": "1"}
PYTEST = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", "--maxfail=30"]


def tests() -> list[list[str]]:
    workers = ["-n", "8"] if importlib.util.find_spec("xdist") else []  # Triton compiles a kernel per variant
    return [[*PYTEST, *workers, "-m", "gpu", "tests"]]


def sanitize() -> list[list[str]]:
    tool = shutil.which("compute-sanitizer")
    if tool is None:
        raise RuntimeError("compute-sanitizer is not on the PATH")
    # A script: pytest's own allocations would be looked at too, and one failing call would hide behind its report.
    return [[tool, "--tool", kind, "--error-exitcode", "9", *CUDA_CALLS] for kind in ("memcheck", "racecheck")]


def bench() -> list[list[str]]:
    names = ["layer_norm", "rms_norm", "attention", "ffn", "gated_ffn", "linear", "fourier_mix"]
    return [[sys.executable, "-m", "benchmarks", "--device", "cuda", "--save", "--only", *names]]


def main() -> int:
    parts = {"tests": tests, "sanitize": sanitize, "bench": bench}
    parser = argparse.ArgumentParser(prog="python -m benchmarks.gpu", description=__doc__.split("\n")[0])
    parser.add_argument("--part", choices=[*parts, "all"], default="all")
    arguments = parser.parse_args()
    if not torch.cuda.is_available():
        print("make gpu: no CUDA device here", file=sys.stderr)
        return 2
    summary, failed = [], False
    for name in parts if arguments.part == "all" else [arguments.part]:
        for command in parts[name]():
            began = time.perf_counter()
            added = {"PYTHONPATH": str(ROOT), **(SANITIZER_ENVIRONMENT if name == "sanitize" else {})}
            code = subprocess.run(command, cwd=ROOT, env=os.environ | added).returncode
            failed = failed or code != 0
            summary.append(
                f"{name:<9} {'ok' if code == 0 else f'FAILED ({code})':<12} {time.perf_counter() - began:6.0f} s"
            )
    print("\n" + torch.cuda.get_device_name() + "\n" + "\n".join(summary))
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main())
