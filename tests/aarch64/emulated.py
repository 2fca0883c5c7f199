"""How do the CPU kernels run as on an ARM processor? Cross-compiled for aarch64, in qemu, one call after the other.

install() puts them in the place of pyfused._cpu's. From then on the operators and their tests see a processor with one
instruction set, "aarch64". All else, such as torch and the launchers in Python, runs on this processor.
"""

from __future__ import annotations

import ctypes
import functools
import hashlib
import os
import re
import shutil
import struct
import subprocess
import threading
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import torch

from pyfused import extensions
from pyfused.kernels.shared.attention_layout import AttentionLayout

HERE = Path(__file__).resolve().parent
ROOT = HERE.parents[1]
CSRC = ROOT / "csrc"
COMPILER = "aarch64-linux-gnu-g++"
# As in CMakeLists.txt, but -O2: it compiles in two thirds of the time.
FLAGS = (
    *("-DPYFUSED_ISA=baseline", "-std=c++17", "-O2", "-fno-math-errno", "-fno-trapping-math", "-ffp-contract=fast"),
    *("-fno-exceptions", "-Wall", "-Wextra", "-Wno-maybe-uninitialized", "-Wno-uninitialized"),
)
# Kernels of driver.cpp: types and names of their arguments, as kernels.h would declare them.
OWN = """
void convert(addr x, addr y, int64_t count, int from, int to);
void widen_int8(addr x, addr y, int64_t count);
void linear_int8(addr x, addr weight, addr scale, addr bias, addr y, int64_t rows, int64_t n, int64_t k, int dtype);
"""


@functools.cache
def signatures() -> dict[str, list[tuple[str, str]]]:
    """Kernel -> (type, name) of each argument, in the order of the driver's list."""
    declared = re.sub(r"//.*", "", (CSRC / "cpu" / "kernels.h").read_text()) + OWN
    found = re.findall(r"^(?:void|int64_t) (\w+)\(([^)]*)\);", declared, re.MULTILINE)
    return {name: re.findall(r"(\w+) (\w+)", arguments) for name, arguments in found}


def emulator() -> str:
    found = shutil.which("qemu-aarch64") or shutil.which("qemu-aarch64-static")
    if found is None or shutil.which(COMPILER) is None:
        raise RuntimeError("this needs Debian's packages g++-aarch64-linux-gnu and qemu-user")
    return found


@functools.cache
def build() -> Path:
    """The driver with all kernels, compiled anew if a source or the compiler has changed."""
    version = subprocess.run([COMPILER, "--version"], capture_output=True, text=True, check=True).stdout
    sources = [HERE / "driver.cpp", *sorted((CSRC / "cpu").glob("*.cpp"))]
    headers = sorted([*(CSRC / "cpu").glob("*.h"), *(CSRC / "include").rglob("*.h")])
    digest = hashlib.sha256(repr((version, FLAGS, [*signatures()])).encode())
    for path in (*sources, *headers):
        digest.update(path.read_bytes())
    folder = ROOT / "build" / "aarch64" / digest.hexdigest()[:16]
    if (folder / "driver").exists():
        return folder / "driver"
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "kernel_list.h").write_text("".join(f"KERNEL({name}),\n" for name in signatures()))
    includes = [f"-I{path}" for path in (folder, CSRC / "include", CSRC / "cpu")]

    def run(*command: str) -> None:
        done = subprocess.run([COMPILER, "-fopenmp", *command], capture_output=True, text=True)
        if done.returncode:
            raise RuntimeError(f"{' '.join(command)}:\n{done.stderr[:6000]}")

    def compiled(source: Path) -> str:
        target = str(folder / f"{source.stem}.o")
        run(*FLAGS, *includes, "-c", str(source), "-o", target)
        return target

    with ThreadPoolExecutor(int(os.environ.get("MAX_JOBS", os.cpu_count() or 1))) as pool:
        objects = list(pool.map(compiled, sources))
    run("-static", *objects, "-o", str(folder / "half"))  # static: it runs without an ARM system's libraries
    return (folder / "half").rename(folder / "driver")


class Kernels:
    """Every kernel as a method, like pyfused._cpu.<isa>."""

    def __init__(self) -> None:
        self._process = subprocess.Popen([emulator(), str(build())], stdin=subprocess.PIPE, stdout=subprocess.PIPE)
        self._one_at_a_time = threading.Lock()
        for number, (name, declared) in enumerate(signatures().items()):
            setattr(self, name, functools.partial(self._call, number, declared))

    def _call(self, number: int, declared: list[tuple[str, str]], *given: Any) -> int:
        assert len(given) == len(declared)
        memories: dict[int, Any] = {}  # address -> bytes, once for tensors that share them
        order: list[int] = []
        words: list[int] = []

        def remember(address: int, size: int) -> int:
            if address not in memories:
                memories[address] = (ctypes.c_char * size).from_address(address) if size else b""
                order.append(address)
            return order.index(address)

        for (kind, name), value in zip(declared, given):
            if isinstance(value, torch.Tensor):
                storage = value.untyped_storage()
                memory = remember(storage.data_ptr(), storage.nbytes())
                words += memory, value.storage_offset() * value.element_size()
            elif name == "layout":
                words += remember(value, ctypes.sizeof(AttentionLayout)), 0
            elif kind == "addr":
                assert value is None, f"{name} is {value!r}: only a tensor's memory can be sent"
                words += -1, 0
            else:
                words += -1, struct.unpack("q", struct.pack("d", value))[0] if kind == "double" else int(value)
        sizes = [len(memories[address]) for address in order]
        head = [number, torch.get_num_threads(), len(sizes), len(given), *sizes]
        with self._one_at_a_time:
            to, back = self._process.stdin, self._process.stdout
            assert to
            assert back
            to.write(struct.pack(f"{len(head)}q", *head))
            for address in order:
                to.write(memories[address])
            to.write(struct.pack(f"{len(words)}q", *words))
            to.flush()
            answer = back.read(8)
            if len(answer) < 8:
                raise RuntimeError(f"the emulated kernels ended with code {self._process.wait()}")
            for address, size in zip(order, sizes):
                if size and back.readinto(memories[address]) != size:
                    raise RuntimeError("the emulated kernels' answer ends too early")
        return struct.unpack("q", answer)[0]


class Extension:
    """pyfused._cpu with the emulated kernels as its only instruction set."""

    def __init__(self, real: Any) -> None:
        self._real = real
        self.supported = ["aarch64"]
        self.aarch64 = Kernels()

    def __getattr__(self, name: str) -> Any:
        return getattr(self._real, name)


def install() -> Kernels:
    """From now on every CPU kernel of pyfused runs in the emulator. Call it before any operator runs."""
    load = extensions._load
    real, reason = load("_cpu")
    if real is None:
        raise RuntimeError(reason)
    extension = Extension(real)
    extensions._load = lambda name: (extension, "") if name == "_cpu" else load(name)  # type: ignore[assignment]
    return extension.aarch64
