"""How do the CUDA sources become a module that runs on the CPU? Compiles csrc/cuda/*.cu and cuda_bindings.cpp with the host
compiler against include/, into build/cuda_on_cpu/. File names contain a hash of the inputs, so each file is built once.

    python tests/cuda_on_cpu/shim.py            # prints the module's path
    python tests/cuda_on_cpu/shim.py --sanitize # the same under AddressSanitizer and UBSan, for use with sanitized()
"""

from __future__ import annotations

import ctypes
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
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from types import ModuleType

from pyfused import extensions

HERE = Path(__file__).resolve().parent
ROOT = HERE.parents[1]
CACHE = ROOT / "build" / "cuda_on_cpu"
ENGINE = (HERE / "engine.cpp", HERE / "launch.cpp")
INCLUDES = (HERE / "include", ROOT / "csrc" / "include", ROOT / "csrc" / "cuda")
# No contraction: __fmul_rn must round. No fast maths: the kernels' NaN poison must survive.
FLAGS = [
    "-std=c++17",
    "-fPIC",
    "-fvisibility=hidden",
    "-march=native",
    "-ffp-contract=off",
    "-Wall",
    "-Wno-unknown-pragmas",
    "-Wno-unused-function",
    "-Wno-maybe-uninitialized",
    "-Wno-uninitialized",
    "-DPYFUSED_CUDA_ON_CPU",
]
SANITIZE = [
    "-O0",  # -O1 takes 22 seconds longer to compile, and the calls under the sanitizers 6 seconds less
    "-g1",
    "-fsanitize=address,undefined",
    # AddressSanitizer finds the same faults, and these checks take a third of the compile time.
    "-fno-sanitize=null,object-size,pointer-overflow,return,vptr",
    "-fno-sanitize-recover=all",
    "-fno-omit-frame-pointer",
    # A check is a call of the runtime, not code of its own: a third less to compile.
    "--param=asan-instrumentation-with-call-threshold=0",
    # bfloat16 takes float16's addresses, so its kernels would take a third of the time to show the same faults.
    "-DPYFUSED_BFLOAT16=__half",
]


@functools.cache
def compiler() -> str:
    """The host compiler; raises RuntimeError if there is none."""
    found = os.environ.get("CXX") or shutil.which("g++")
    if not found:
        raise RuntimeError("the CUDA kernels' tests need g++")
    return found


def sources() -> list[Path]:
    return [*ENGINE, ROOT / "csrc" / "cuda_bindings.cpp", *sorted((ROOT / "csrc" / "cuda").glob("*.cu"))]


@contextmanager
def _only_here(target: Path) -> Iterator[bool]:
    """Holds a file's lock among processes; yields whether the file must still be made."""
    target.parent.mkdir(parents=True, exist_ok=True)
    with open(f"{target}.lock", "w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        yield not target.exists()


def _digest(*parts: object) -> str:
    return hashlib.sha256(repr((parts, sys.version)).encode()).hexdigest()[:16]


def _compile(source: Path, flags: Sequence[str], headers: str) -> Path:
    target = CACHE / f"{source.stem}-{_digest(source.read_bytes(), flags, headers)}.o"
    with _only_here(target) as missing:
        if missing:
            import pybind11

            includes = [f"-I{path}" for path in (*INCLUDES, pybind11.get_include(), sysconfig.get_path("include"))]
            half_made = target.with_suffix(".half.o")
            command = [compiler(), "-x", "c++", *flags, *includes, "-c", str(source), "-o", str(half_made)]
            done = subprocess.run(command, capture_output=True, text=True)
            if done.returncode:
                raise RuntimeError(f"{source.name} does not compile for the CPU:\n{done.stderr[:6000]}")
            if source.suffix == ".cu":  # its statics are the kernels' shared memory: the engine needs their addresses
                section = ".bss=cuda_shared,alloc,load,data,contents"
                subprocess.run(["objcopy", "--rename-section", section, str(half_made)], check=True)
            half_made.rename(target)
    return target


def build(name: str, files: Sequence[Path], *, sanitize: bool = False) -> Path:
    """Compiles `files` into the Python extension `name` and returns its path; safe among processes."""
    headers = _digest([path.read_bytes() for folder in (HERE, *INCLUDES) for path in sorted(folder.rglob("*.*h"))])

    def compiled(source: Path) -> Path:
        checks = sanitize and not source.stem.endswith("_bindings")  # bindings need no checks
        # For the kernels -O1 would take 19 seconds longer to compile and save the tests 8. The engine is small and always runs.
        fast = ["-Og" if source.suffix == ".cu" else "-O1"] if not checks or source in ENGINE else []
        return _compile(source, [*FLAGS, *(SANITIZE if checks else []), *fast], headers)

    with ThreadPoolExecutor(os.cpu_count()) as pool:
        objects = list(pool.map(compiled, files))
    target = CACHE / _digest([o.name for o in objects]) / f"{name}{sysconfig.get_config_var('EXT_SUFFIX')}"
    with _only_here(target) as missing:
        if missing:
            half_made = target.with_suffix(".half")
            runtimes = SANITIZE if sanitize else []
            subprocess.run([compiler(), "-shared", *runtimes, *map(str, objects), "-o", str(half_made)], check=True)
            half_made.rename(target)
    return target


@functools.cache
def load(name: str = "_cuda", files: tuple[Path, ...] = ()) -> ModuleType:
    """The module, built if necessary; PYFUSED_SANITIZE=1 takes the AddressSanitizer and UBSan build."""
    path = build(name, files or sources(), sanitize=os.environ.get("PYFUSED_SANITIZE") == "1")
    loader = importlib.machinery.ExtensionFileLoader(name, str(path))
    spec = importlib.util.spec_from_file_location(name, path, loader=loader)
    assert spec is not None
    module = importlib.util.module_from_spec(spec)
    loader.exec_module(module)
    if hasattr(module, "use_tensors"):
        extensions.use_tensors(module)
    return module


@contextmanager
def order(module: ModuleType, which: int) -> Iterator[None]:
    """Sets the order of threads and blocks inside the with block: 0 in turn, 1 backwards and far at once, else a seed."""
    assert module.__file__
    set_order = ctypes.CDLL(module.__file__).cuda_on_cpu_set_order
    set_order(ctypes.c_uint64(which))
    try:
        yield
    finally:
        set_order(ctypes.c_uint64(0))


def grid_barriers(module: ModuleType) -> list[str]:
    """The names of the grid barriers of the last cooperative launch."""
    assert module.__file__
    library = ctypes.CDLL(module.__file__)
    library.cuda_on_cpu_grid_barriers.restype = ctypes.c_char_p
    return library.cuda_on_cpu_grid_barriers().decode().splitlines()  # type: ignore[no-any-return]


@dataclass
class Seen:
    """A launch that did not run: kernel expression, grid, threads per block, bytes of dynamic shared memory."""

    kernel: str
    grid: tuple[int, int, int]
    threads: int
    shared: int


@contextmanager
def looking(module: ModuleType) -> Iterator[list[Seen]]:
    """Checks launches inside the with block against a GPU's limits and records them. No kernel runs: any address will do."""
    assert module.__file__
    library, launches = ctypes.CDLL(module.__file__), []
    library.cuda_on_cpu_seen.restype = ctypes.c_char_p
    library.cuda_on_cpu_look(ctypes.c_bool(True))
    try:
        yield launches
    finally:
        for line in library.cuda_on_cpu_seen().decode().splitlines():
            kernel, *numbers = line.rsplit(" ", 5)
            x, y, z, threads, shared = map(int, numbers)
            launches.append(Seen(kernel, (x, y, z), threads, shared))
        library.cuda_on_cpu_look(ctypes.c_bool(False))


def sanitized(command: Sequence[str], **options) -> subprocess.CompletedProcess:
    """Runs a Python command with the sanitizers' runtime loaded first, which the sanitized module needs."""
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
