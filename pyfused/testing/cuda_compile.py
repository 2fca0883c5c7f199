"""What does a source of csrc/cuda compile to, on a machine with no GPU? Registers, spills and machine code of every kernel.

If the build of pyfused._cuda left an object file that is newer than its sources and has the architecture, it is read.
Otherwise nvcc makes a cubin per source and architecture, cached under build/cubin by a hash of all inputs. So CI compiles each
source once, and a second run compiles nothing. cuobjdump, from the Triton wheel, reads both.

    for kernel in compile_source("layer_norm", "sm_90a"):
        check_kernel(kernel)
        if kernel.template == "forward_kernel" and kernel.arguments[1] != "1":
            assert "LDG.E.128" in kernel.sass
"""

from __future__ import annotations

import functools
import hashlib
import os
import re
import shutil
import subprocess
from collections import Counter
from dataclasses import dataclass, field
from pathlib import Path

from .triton_compile import SHARED_LIMIT, cuobjdump

ARCHITECTURES = ("sm_80", "sm_90a")
FLAGS = ("-std=c++17", "-O3", "--expt-relaxed-constexpr")

_ROOT = Path(__file__).resolve().parents[2]
_INCLUDES = (_ROOT / "csrc" / "include", _ROOT / "csrc" / "cuda")


@dataclass(frozen=True)
class Kernel:
    """One __global__ function of a source, for one architecture.

    Attributes:
        name: its C++ name without namespaces and parameters: "forward_kernel<__half, 8, 4, true>".
        architecture: "sm_80" or "sm_90a".
        registers: 32-bit registers per thread.
        spills: bytes of stack and local memory per thread, for values that do not fit into registers or are indexed.
        shared: bytes of static shared memory per block.
        sass: its machine code as text.
    """

    name: str
    architecture: str
    registers: int
    spills: int
    shared: int
    sass: str = field(repr=False)

    @property
    def template(self) -> str:
        """The name before the template arguments."""
        return self.name.partition("<")[0]

    @property
    def arguments(self) -> tuple[str, ...]:
        """The template arguments: ("__half", "8", "4", "true")."""
        _, _, inner = self.name.partition("<")
        return tuple(a.strip() for a in inner.removesuffix(">").split(",")) if inner else ()

    def count(self, instruction: str) -> int:
        """The number of instructions that begin with this, such as "LDG.E.128" or "HMMA"."""
        return sum(number for name, number in self._instructions.items() if name.startswith(instruction))

    @functools.cached_property
    def _instructions(self) -> Counter[str]:
        """How often each occurs, from one pass over the text, which has a megabyte."""
        return Counter(re.findall(r"\*/\s+(?:@!?U?P\d+ )?([\w.]+)", self.sass))


def compile_source(name: str | Path, architecture: str) -> tuple[Kernel, ...]:
    """Compiles csrc/cuda/<name>.cu and returns its kernels. A process does this once for each source.

    Args:
        name: an operator, such as "layer_norm", or the path of another source.
        architecture: "sm_80" or "sm_90a".

    Raises:
        ValueError: an unknown architecture, or no such source.
        RuntimeError: nvcc fails; the message has the end of its output.
    """
    if architecture not in ARCHITECTURES:
        raise ValueError(f"architecture={architecture!r} is unknown; it takes {', '.join(ARCHITECTURES)}")
    source = name if isinstance(name, Path) else _ROOT / "csrc" / "cuda" / f"{name}.cu"
    if not source.is_file():
        raise ValueError(f"name={name!r}: there is no {source}")
    return _kernels(_built(source, architecture) or _cubin(source, architecture), architecture)


def check_kernel(kernel: Kernel) -> None:
    """Raises AssertionError if a kernel spills, or declares more than a block's default of 48 KB of shared memory."""
    what = f"{kernel.name} on {kernel.architecture}"
    assert kernel.spills == 0, f"{what}: {kernel.spills} bytes a thread spilled ({kernel.registers} registers)"
    assert kernel.shared <= 48 * 1024, f"{what}: {kernel.shared} bytes of static shared memory; 48 KB are the limit"


def shared_limit(architecture: str) -> int:
    """Bytes of shared memory that one block may ask for."""
    return SHARED_LIMIT[architecture.rstrip("a")]


def _read(path: Path, seen: dict[Path, bytes]) -> dict[Path, bytes]:
    """Path -> content of a source and of all headers that it includes from this repository."""
    if path not in seen:
        seen[path] = path.read_bytes()
        for included in re.findall(rb'^\s*#include "([^"]+)"', seen[path], re.MULTILINE):
            for folder in (path.parent, *_INCLUDES):
                if (folder / included.decode()).is_file():  # otherwise a header of tests/cuda_on_cpu
                    _read(folder / included.decode(), seen)
                    break
    return seen


@functools.cache
def _compiler() -> tuple[str, str]:
    nvcc = shutil.which("nvcc")
    if nvcc is None:
        raise RuntimeError("nvcc is not on the PATH")
    return nvcc, subprocess.run([nvcc, "--version"], capture_output=True, text=True, check=True).stdout


def _built(source: Path, architecture: str) -> Path | None:
    """The object file of this source from the build of pyfused._cuda. None if outdated or without code for the architecture."""
    changed = max(path.stat().st_mtime for path in _read(source, {}))
    objects = sorted(
        (_ROOT / "build").glob(f"temp*/**/csrc/cuda/{source.name}.o"), key=lambda path: path.stat().st_mtime
    )
    if not objects or objects[-1].stat().st_mtime < changed:
        return None
    command = [cuobjdump(), "--list-elf", str(objects[-1])]
    listed = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    return objects[-1] if f".{architecture.rstrip('a')}.cubin" in listed else None


def _cubin(source: Path, architecture: str) -> Path:
    nvcc, version = _compiler()
    command = [*FLAGS, f"-arch={architecture}", "-cubin", *(f"-I{folder}" for folder in _INCLUDES)]
    digest = hashlib.sha256(repr((version, command)).encode())
    for _, text in sorted(_read(source, {}).items()):
        digest.update(text)
    cubin = _ROOT / "build" / "cubin" / f"{source.stem}.{architecture}.{digest.hexdigest()[:16]}.cubin"
    if not cubin.is_file():
        cubin.parent.mkdir(parents=True, exist_ok=True)
        for old in cubin.parent.glob(f"{source.stem}.{architecture}.*.cubin"):
            old.unlink(missing_ok=True)
        fresh = cubin.with_suffix(f".{os.getpid()}")
        done = subprocess.run([nvcc, *command, str(source), "-o", str(fresh)], capture_output=True, text=True)
        if done.returncode:
            raise RuntimeError(
                f"nvcc for {architecture} cannot compile {source.name}:\n{(done.stdout + done.stderr)[-4000:]}"
            )
        fresh.rename(cubin)  # if two processes compiled it, either result will do
    return cubin


@functools.cache
def _kernels(cubin: Path, architecture: str) -> tuple[Kernel, ...]:
    def dump(option: str) -> str:
        command = [cuobjdump(), option, "-arch", architecture, str(cubin)]
        return subprocess.run(command, capture_output=True, text=True, check=True).stdout

    pattern = r"Function (\S+):\s+REG:(\d+) STACK:(\d+) SHARED:(\d+) LOCAL:(\d+)"
    usage = re.findall(pattern, dump("--dump-resource-usage"))
    parts = (part.partition("\n") for part in re.split(r"\n\s+Function : ", dump("-sass"))[1:])
    code = {name.strip(): body for name, _, body in parts}
    mangled = "\n".join(row[0] for row in usage)
    plain = subprocess.run(["c++filt"], input=mangled, capture_output=True, text=True, check=True).stdout.splitlines()
    return tuple(
        Kernel(_short(name), architecture, int(registers), int(stack) + int(local), int(shared), code[symbol])
        for name, (symbol, registers, stack, shared, local) in zip(plain, usage)
    )


def _short(name: str) -> str:
    """ "void a::(anonymous namespace)::f<T, (int)4>(g, h)" -> "f<T, 4>"."""
    name = re.sub(r"\((?:anonymous namespace|int|bool|unsigned int)\)(?:::)?", "", name)
    depth, end = 0, len(name)
    for at, character in enumerate(name):
        depth += (character == "<") - (character == ">")
        if character == "(" and depth == 0:
            end = at
            break
    return re.sub(r"\b(?:\w+::)+", "", name[:end]).removeprefix("void ")
