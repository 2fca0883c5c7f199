"""How do the CUDA sources become a module that runs on the CPU? Compiles csrc/cuda/*.cu and cuda_bindings.cpp with the host
compiler against include/, into build/cuda_on_cpu/<hash of all sources and flags>/; a second call finds it there.

    python tests/cuda_on_cpu/shim.py            # prints where the module lies
    python tests/cuda_on_cpu/shim.py --sanitize # the same under AddressSanitizer and UBSan, for use with sanitized()
"""

from __future__ import annotations

import fcntl
import functools
import hashlib
import importlib.machinery
import importlib.util
import os
import shutil
import subprocess
import sys
import sysconfig
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from types import ModuleType

HERE = Path(__file__).resolve().parent
ROOT = HERE.parents[1]
INCLUDES = (HERE / "include", ROOT / "csrc" / "include", ROOT / "csrc" / "cuda")
# No contraction: __fmul_rn must round. The kernels' NaN poison must survive, so no fast maths.
FLAGS = (
    "-std=c++17 -fPIC -fvisibility=hidden -march=native -ffp-contract=off -Wall -Wno-unknown-pragmas -Wno-unused-function "
    "-Wno-maybe-uninitialized -Wno-uninitialized -DPYFUSED_CUDA_ON_CPU"
).split()
SANITIZE = (
    "-O1 -g -fsanitize=address,undefined -fsanitize-sections=cuda_shared -fno-sanitize-recover=all -fno-omit-frame-pointer"
).split()


@functools.cache
def compiler() -> str:
    """The host compiler; raises RuntimeError where there is none. GCC: -fsanitize-sections is its own."""
    found = os.environ.get("CXX") or shutil.which("g++")
    if not found:
        raise RuntimeError("the CUDA kernels' tests need g++")
    return found


def sources() -> list[Path]:
    return [HERE / "engine.cpp", ROOT / "csrc" / "cuda_bindings.cpp", *sorted((ROOT / "csrc" / "cuda").glob("*.cu"))]


def _hash(files: Sequence[Path], flags: Sequence[str]) -> str:
    headers = [path for folder in INCLUDES for path in folder.rglob("*") if path.suffix in (".h", ".cuh")]
    digest = hashlib.sha256(repr((flags, sys.version)).encode())
    for path in sorted({*files, *headers}):
        digest.update(path.read_bytes())
    return digest.hexdigest()[:16]


def build(name: str, files: Sequence[Path], *, sanitize: bool = False) -> Path:
    """Compiles `files` into the Python extension `name` and returns its path; safe among processes."""
    import pybind11

    flags = [*FLAGS, *(SANITIZE if sanitize else ["-O2"])]
    folder = ROOT / "build" / "cuda_on_cpu" / _hash(files, flags)
    target = folder / f"{name}{sysconfig.get_config_var('EXT_SUFFIX')}"
    if target.exists():
        return target
    folder.mkdir(parents=True, exist_ok=True)
    with open(folder / "lock", "w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        if target.exists():
            return target
        includes = [f"-I{path}" for path in (*INCLUDES, pybind11.get_include(), sysconfig.get_path("include"))]

        def compiled(source: Path) -> Path:
            out = folder / f"{source.stem}.o"
            command = [compiler(), "-x", "c++", *flags, *includes, "-c", str(source), "-o", str(out)]
            done = subprocess.run(command, capture_output=True, text=True)
            if done.returncode:
                raise RuntimeError(f"{source.name} does not compile for the CPU:\n{done.stderr[:6000]}")
            return out

        with ThreadPoolExecutor(os.cpu_count()) as pool:
            objects = list(pool.map(compiled, files))
        half_made = folder / "linking.so"
        subprocess.run([compiler(), "-shared", *flags, *map(str, objects), "-o", str(half_made)], check=True)
        half_made.rename(target)
    return target


@functools.cache
def load(name: str = "_cuda", files: tuple[Path, ...] = ()) -> ModuleType:
    """The module, built if need be; PYFUSED_SANITIZE=1 takes the one under AddressSanitizer and UBSan."""
    path = build(name, files or sources(), sanitize=os.environ.get("PYFUSED_SANITIZE") == "1")
    loader = importlib.machinery.ExtensionFileLoader(name, str(path))
    spec = importlib.util.spec_from_file_location(name, path, loader=loader)
    assert spec is not None
    module = importlib.util.module_from_spec(spec)
    loader.exec_module(module)
    return module


def sanitized(command: Sequence[str], **options) -> subprocess.CompletedProcess:
    """Runs a Python command with the sanitizers' runtime loaded first, as the sanitized module needs it."""
    runtimes = []
    for library in ("libasan.so", "libubsan.so", "libstdc++.so"):
        found = subprocess.run([compiler(), f"-print-file-name={library}"], capture_output=True, text=True, check=True)
        runtimes.append(found.stdout.strip())
    environment = {
        **os.environ,
        "PYFUSED_SANITIZE": "1",
        "LD_PRELOAD": " ".join(runtimes),
        "ASAN_OPTIONS": "detect_leaks=0",
        "UBSAN_OPTIONS": "print_stacktrace=1",
        "PYTHONMALLOC": "malloc",
    }
    return subprocess.run(command, env=environment, capture_output=True, text=True, **options)


if __name__ == "__main__":
    print(build("_cuda", sources(), sanitize="--sanitize" in sys.argv[1:]))
