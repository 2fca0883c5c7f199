"""How do the CPU kernels run as on an ARM processor? Cross-compiled for aarch64, in qemu, one call after the other.

install() puts them in the place of pyfused._cpu's. From then on the operators and their tests see a processor with one
instruction set, "aarch64". All else, such as torch and the launchers in Python, runs on this processor.
"""

from __future__ import annotations

import ctypes
import functools
import gc
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
        sent, words = Memories(), []
        for (kind, name), value in zip(declared, given):
            if isinstance(value, torch.Tensor):
                words += sent.tensor(value), value.storage_offset() * value.element_size()
            elif name == "layout":
                words += sent.structure(value, ctypes.sizeof(AttentionLayout)), 0
            elif kind == "addr" and value is not None:
                words += sent.structure(value), 0
            elif kind == "double":
                words += -1, struct.unpack("q", struct.pack("d", value))[0]
            else:
                words += -1, int(value or 0)
        sizes, pointers = [len(memory) for memory in sent.bytes], sent.pointers
        head = [number, torch.get_num_threads(), len(sizes), len(given), len(pointers) // 4, *sizes]
        with self._one_at_a_time:
            to, back = self._process.stdin, self._process.stdout
            assert to
            assert back
            to.write(struct.pack(f"{len(head)}q", *head))
            for memory in sent.bytes:
                to.write(memory)
            to.write(struct.pack(f"{len(words) + len(pointers)}q", *words, *pointers))
            to.flush()
            answer = back.read(8)
            if len(answer) < 8:
                raise RuntimeError(f"the emulated kernels ended with code {self._process.wait()}")
            for memory in sent.bytes:
                if len(memory) and back.readinto(memory) != len(memory):
                    raise RuntimeError("the emulated kernels' answer ends too early")
        return struct.unpack("q", answer)[0]


class Memories:
    """The memory that a call uses: tensors, and structs with what they point to."""

    def __init__(self) -> None:
        self.bytes: list[Any] = []
        self.pointers: list[int] = []  # memory and offset of each, then memory and offset of what it points to
        self._numbers: dict[int, int] = {}  # by address: tensors may share memory
        self._found: tuple[dict[int, int], dict[int, torch.Tensor]] | None = None

    def tensor(self, tensor: torch.Tensor) -> int:
        """The number of its memory."""
        storage = tensor.untyped_storage()
        address, size = storage.data_ptr(), storage.nbytes()
        if address not in self._numbers:
            self._add(address, (ctypes.c_char * size).from_address(address) if size else bytearray())
        return self._numbers[address]

    def structure(self, address: int, size: int = 0) -> int:
        """The number of a ctypes struct's or array's memory. Without its size, it is one of Python's, and so is what it points
        to, or a tensor. A copy is sent, because its pointers change."""
        if address in self._numbers:
            return self._numbers[address]
        memory = bytearray(ctypes.string_at(address, size or self._known()[0][address]))
        number = self._add(address, memory)
        for i, word in enumerate([] if size else struct.unpack_from(f"{len(memory) // 8}q", memory)):
            structures, tensors = self._known()
            if word in structures:
                self.pointers += number, 8 * i, self.structure(word), 0
                continue
            for start, tensor in tensors.items():
                if start <= word < start + tensor.untyped_storage().nbytes():
                    self.pointers += number, 8 * i, self.tensor(tensor), word - start
        return number

    def _known(self) -> tuple[dict[int, int], dict[int, torch.Tensor]]:
        """The sizes of all structs and arrays of ctypes, and all tensors with different memory, by address."""
        if self._found is None:
            structures: dict[int, int] = {}
            tensors = {}
            for found in gc.get_objects():
                if issubclass(type(found), (ctypes.Structure, ctypes.Array)):
                    address = ctypes.addressof(found)
                    structures[address] = max(ctypes.sizeof(found), structures.get(address, 0))
                elif type(found) in (torch.Tensor, torch.nn.Parameter) and found.device.type == "cpu":
                    tensors[found.untyped_storage().data_ptr()] = found
            tensors.pop(0, None)
            self._found = structures, tensors
        return self._found

    def _add(self, address: int, memory: Any) -> int:
        self._numbers[address] = len(self.bytes)
        self.bytes.append(memory)
        return self._numbers[address]


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
