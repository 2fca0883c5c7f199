"""How do the products run that need a processor's dot products, on one that lacks them? With the instructions' documented
arithmetic in plain C++ (csrc/include/pyfused/multiply.h, and of AMX tests/dot_on_cpu/tiles.h), compiled here from the same
sources, for vectors of WIDTH lanes.

processor() makes dispatch see a processor that has them. All other kernels are this processor's.
"""

from __future__ import annotations

import ctypes
import functools
import hashlib
import os
import re
import subprocess
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import shim
import torch

from pyfused import dispatch, extensions

ROOT = Path(__file__).resolve().parents[1]
DRIVER = ROOT / "tests" / "dot_on_cpu" / "driver.cpp"
INCLUDES = ROOT / "csrc" / "include", ROOT / "csrc" / "cpu"
WIDTH = 16  # lanes of a vector
# As in CMakeLists.txt, but -O1: it compiles in less time.
FLAGS = (
    *("-std=c++17", "-O1", "-mfma", "-fopenmp", "-fno-math-errno", "-fno-trapping-math", "-ffp-contract=fast", "-fPIC"),
    *("-shared", "-fno-exceptions", "-Wno-psabi", "-DPYFUSED_EMULATED_DOT"),
    *("-DPYFUSED_ISA=emulated", f"-DPYFUSED_WIDTH={WIDTH}"),
)
TILES = "-DPYFUSED_EMULATED_TILES"  # for AMX beside FLAGS
OF_INTEGERS = ("linear_dynamic_forward",)
OF_BFLOAT16 = ("linear_forward", "ffn_forward", "gated_ffn_forward")
_C_TYPES = {"addr": ctypes.c_void_p, "int64_t": ctypes.c_int64, "bool": ctypes.c_bool, "int": ctypes.c_int}


@functools.cache
def build(tiles: bool = False) -> Path:
    """The library with the kernels, those for AMX or the others, compiled anew if a source has changed."""
    flags = (*FLAGS, TILES) if tiles else FLAGS
    digest = hashlib.sha256(repr((flags, shim.compiler())).encode())
    for path in (
        *sorted(DRIVER.parent.iterdir()),
        *sorted((ROOT / "csrc").glob("cpu/**/*.[ch]*")),
        *sorted((ROOT / "csrc" / "include").rglob("*.h")),
    ):
        digest.update(path.read_bytes())
    target = ROOT / "build" / "dot_on_cpu" / f"{digest.hexdigest()[:16]}.so"
    if not target.exists():
        target.parent.mkdir(parents=True, exist_ok=True)
        half_made = target.with_suffix(f".{os.getpid()}")
        command = [shim.compiler(), *flags, *(f"-I{path}" for path in INCLUDES), str(DRIVER), "-o", str(half_made)]
        done = subprocess.run(command, capture_output=True, text=True)
        if done.returncode:
            raise RuntimeError(f"{DRIVER.name} does not compile:\n{done.stderr[:6000]}")
        half_made.rename(target)
    return target


@functools.cache
def declared() -> dict[str, list[str]]:
    """Kernel -> the types of its arguments."""
    text = "".join((ROOT / "csrc" / "cpu" / path).read_text() for path in ("kernels.h", "dot/kernels.h"))
    found = re.findall(r"^void (\w+)\(([^)]*)\);", re.sub(r"//.*", "", text), re.MULTILINE)
    return {name: [argument.split()[0] for argument in arguments.split(",")] for name, arguments in found}


def function(name: str, tiles: bool = False) -> Any:
    """A function of the library. It takes tensors for addresses, as pyfused._cpu's do."""
    types = declared().get(name, ["addr"] * 3)
    address = ctypes.c_void_p.in_dll(ctypes.CDLL(str(build(tiles))), f"pyfused_{name}").value
    pointed = ctypes.CFUNCTYPE(None, *(_C_TYPES[kind] for kind in types))(address)

    def call(*given: Any) -> None:
        pointed(*(value.data_ptr() if isinstance(value, torch.Tensor) else value for value in given))

    return call


class Kernels:
    """pyfused._cpu.<a set for dot products>. `ran` has the names of the kernels that ran."""

    def __init__(self, name: str) -> None:
        self.ran: list[str] = []
        for kernel in (*OF_INTEGERS, *(OF_BFLOAT16 if not name.endswith("vnni") else ())):
            setattr(self, kernel, self._noted(kernel, function(kernel, name.endswith("amx"))))

    def _noted(self, kernel: str, run: Any) -> Any:
        def noted(*given: Any) -> None:
            self.ran.append(kernel)
            run(*given)

        return noted


class Extension:
    """pyfused._cpu on a processor with a set for dot products. The kernels of its base are this processor's."""

    def __init__(self, real: Any, name: str) -> None:
        base = extensions.DOT_PRODUCTS[name]
        self._real = real
        self.supported = ["baseline", base, name]
        self.kernels = Kernels(name)
        setattr(
            self, base, getattr(real, [known for known in real.supported if known not in extensions.DOT_PRODUCTS][-1])
        )
        setattr(self, name, self.kernels)

    def ask_for_tiles(self) -> bool:
        return True

    def __getattr__(self, name: str) -> Any:
        return getattr(self._real, name)


@contextmanager
def processor(name: str) -> Iterator[Kernels]:
    """Inside the block this processor has the set `name`, and the one that it extends."""
    load = extensions._load
    real, reason = load("_cpu")
    if real is None:
        raise RuntimeError(reason)
    extension = Extension(real, name)

    def forget() -> None:
        extensions._default_isa.cache_clear()
        extensions._forced_isa.cache_clear()
        dispatch.forget()

    extensions._load = lambda wanted: (extension, "") if wanted == "_cpu" else load(wanted)  # type: ignore[assignment]
    forget()
    try:
        yield extension.kernels
    finally:
        extensions._load = load
        forget()
