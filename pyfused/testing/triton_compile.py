"""What does a Triton or Gluon kernel compile to, on a machine with no GPU? Machine code, registers, spills and shared memory.

`triton.compile` needs no driver: the Triton wheel has ptxas, cuobjdump, nvdisasm and LLVM's AMD back end. But a kernel must be
decorated while TRITON_INTERPRET is not set, and the numeric tests set it. So compile_cases() has a process of its own, which
serves later calls too. Starting takes 2 s, a kernel 1 to 5 s, or no time if Triton's cache has it.

    CASES = [Case("forward", "package.module:kernel", {"x_ptr": "*bf16:16", "n": "i32"}, {"BLOCK": 1024})]
    for name, compiled in compile_cases(CASES, "sm_90").items():
        check_resources(compiled, name, "sm_90")
"""

from __future__ import annotations

import functools
import importlib
import multiprocessing
import os
import re
import subprocess
import sys
import tempfile
import threading
from collections.abc import Mapping, Sequence
from concurrent.futures import ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from dataclasses import dataclass, field
from typing import Any

TARGETS = ("sm_80", "sm_90", "gfx942")

# KB of shared memory that one block may ask for: A100, cards with as little as an RTX 3090, H100, B200, MI300. These are all
# targets; TARGETS are those of every kernel's test.
_KILOBYTES = {"sm_80": 163, "sm_86": 99, "sm_90": 227, "sm_100": 227, "gfx942": 64}
SHARED_LIMIT = {target: 1024 * kilobytes for target, kilobytes in _KILOBYTES.items()}

# A product of float32 tiles in Triton's intermediate code: its kind, the name of the value that it is added to, and its options
_FLOAT32_PRODUCT = re.compile(r"\b(\w+\.\w*dot) %\S+, %\S+, %([\w#]+)(.*?) : (?:!ttg\.)?\w+<[\dx]+xf32\b")


@dataclass(frozen=True)
class Compiled:
    """One kernel for one target.

    Attributes:
        registers: 32-bit vector registers per thread.
        spills: bytes of local memory per thread, for values that do not fit into registers. A good kernel has 0.
        shared: bytes of shared memory per block.
        asm: text by name: "ptx" and "sass" (if asked for) for NVIDIA, "amdgcn" for AMD, "ttgir" for both.
    """

    registers: int
    spills: int
    shared: int
    asm: dict[str, str] = field(repr=False)


@dataclass(frozen=True)
class Case:
    """A kernel for compile_cases() to compile.

    Attributes:
        name: the name in error messages.
        kernel: "module:function" of a @triton.jit function.
        signature: argument name -> type: "i32", "fp32", "*bf16". With ":16" appended ("*bf16:16", "i32:16") the value is a
            multiple of 16. The launcher finds that out for aligned pointers and strides, and vector loads need it. A tensor
            descriptor is "tensordesc<bf16[1, 1, 64, 64],LAYOUT>".
        constexprs: the values of all other arguments; a Triton dtype is written as "tl.bfloat16".
        options: further options that the launcher passes to the compiler, such as enable_fp_fusion.
        sass: whether to disassemble an NVIDIA kernel, which takes up to a second.
    """

    name: str
    kernel: str
    signature: Mapping[str, str]
    constexprs: Mapping[str, Any] = field(default_factory=dict)
    num_warps: int = 4
    num_stages: int = 3
    options: Mapping[str, Any] = field(default_factory=dict)
    sass: bool = True


def _compile_kernel(jit_function: Any, case: Case, target: str) -> Compiled:
    """Compiles a @triton.jit or @gluon.jit function, in a process in which TRITON_INTERPRET was never set. Raises ValueError
    for an unknown target, and for an argument in neither or both of signature and constexprs."""
    import triton
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    if target not in SHARED_LIMIT:
        raise ValueError(f"target={target!r} is unknown; it takes {', '.join(SHARED_LIMIT)}")
    names = getattr(jit_function, "arg_names", None)
    if not isinstance(jit_function, triton.JITFunction) or names is None:
        raise ValueError("jit_function is not a triton.JITFunction: was it decorated while TRITON_INTERPRET was set?")
    signature = case.signature
    given = sorted([*signature, *case.constexprs])
    if given != sorted(names):
        raise ValueError(f"{jit_function.__name__} takes {sorted(names)}; signature and constexprs give {given}")
    types, attributes = {}, {}
    for position, name in enumerate(names):
        kind, _, hint = signature.get(name, "constexpr").partition(":")
        types[name] = kind
        if hint == "16":
            attributes[(position,)] = [["tt.divisibility", 16]]
        elif hint:
            raise ValueError(f"signature[{name!r}]={signature[name]!r}: the only hint is :16")
    gpu = GPUTarget("hip", target, 64) if target.startswith("gfx") else GPUTarget("cuda", int(target[3:]), 32)
    if jit_function.is_gluon():
        from triton.experimental.gluon._runtime import GluonASTSource as ASTSource
    source = ASTSource(jit_function, types, {name: _constant(value) for name, value in case.constexprs.items()}, attributes)
    options = {"num_warps": case.num_warps, "num_stages": case.num_stages, **case.options}
    kernel = triton.compile(source, target=gpu, options=options)
    texts: tuple[str, ...] = ("amdgcn", "ttgir")
    if "cubin" in kernel.asm:
        registers, spills = _nvidia_usage(kernel.asm["cubin"])
        texts = ("ptx", "sass", "ttgir") if case.sass else ("ptx", "ttgir")  # reading "sass" runs the disassembler
    else:
        text = kernel.asm["amdgcn"]
        registers, spills = (
            int(re.search(rf"\.{key}:\s*(\d+)", text).group(1))  # type: ignore[union-attr]
            for key in ("vgpr_count", "private_segment_fixed_size")
        )
    return Compiled(registers, spills, kernel.metadata.shared, {name: kernel.asm[name] for name in texts})


def compile_cases(cases: Sequence[Case], target: str) -> dict[str, Compiled]:
    """Compiles every case for one target in another process. Returns case name -> result.

    Raises:
        RuntimeError: a case does not compile; the message has its name and the compiler's error.
    """
    names = [case.name for case in cases]
    if len(set(names)) != len(names):
        raise ValueError(f"cases: the names {names} are not all different")
    found = {}
    for case in cases:
        try:
            found[case.name] = _compiler().submit(_compile, case, target, [p for p in sys.path if p]).result()
        except Exception as error:
            if isinstance(error, BrokenProcessPool):
                _compiler.cache_clear()
            raise RuntimeError(f"compiling for {target} failed: {case.name}: {str(error)[-6000:]}") from error
    return found


@functools.cache
def _compiler() -> ProcessPoolExecutor:
    """The process that compiles."""
    return ProcessPoolExecutor(1, multiprocessing.get_context("spawn"), initializer=_begin)


def _begin() -> None:
    """The process starts without TRITON_INTERPRET, and ends with its parent, even one that is killed."""
    os.environ.pop("TRITON_INTERPRET", None)
    os.environ["TRITON_DISABLE_LINE_INFO"] = "1"  # nobody reads it, and ptxas and the disassembler take longer with it
    from triton.tools import disasm

    if line := getattr(disasm, "FLINE_RE", None):  # Triton 3.6's stops at an address of five digits, behind 64 KB of code
        disasm.FLINE_RE = re.compile(line.pattern.replace(r"\w{4}", r"\w{4,}", 1))
    threading.Thread(target=_end_with_parent, daemon=True).start()


def _end_with_parent() -> None:
    parent = multiprocessing.parent_process()
    assert parent is not None
    parent.join()
    os._exit(1)


def _compile(case: Case, target: str, path: list[str]) -> Compiled:
    """Runs in that process."""
    sys.path[:] = path
    module, _, function = case.kernel.partition(":")
    importlib.invalidate_caches()
    return _compile_kernel(getattr(importlib.import_module(module), function), case, target)


def check_resources(compiled: Compiled, name: str, target: str) -> None:
    """Raises AssertionError if a kernel spills, needs more shared memory than the chip has, or multiplies float32 as
    kernels/triton/_dot.py does not: in TF32, or with chains of additions that go on from tile to tile."""
    what = f"{name} on {target}"
    for kind, total, options in _FLOAT32_PRODUCT.findall(compiled.asm.get("ttgir", "")):
        in_tf32 = kind != "tt.dot" or "inputPrecision" in options
        assert not in_tf32, f"{what}: a float32 product is in TF32"
        assert total.startswith("cst"), f"{what}: a float32 product does not start at zero, but at %{total}"
    assert compiled.spills == 0, f"{what}: {compiled.spills} bytes a thread spilled ({compiled.registers} registers)"
    limit = SHARED_LIMIT[target]
    assert compiled.shared <= limit, f"{what}: {compiled.shared} bytes of shared memory; the chip has {limit}"


def cuobjdump() -> str:
    """The path of NVIDIA's cuobjdump; the Triton wheel has one."""
    from triton import knobs

    return knobs.nvidia.cuobjdump.path


def _constant(value: Any) -> Any:
    if isinstance(value, str) and value.startswith("tl."):
        import triton.language as tl

        return getattr(tl, value.removeprefix("tl."))
    return value


def _nvidia_usage(cubin: bytes) -> tuple[int, int]:
    """Registers, and bytes of stack and local memory, per thread."""
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(cubin)
        file.flush()
        command = [cuobjdump(), "--dump-resource-usage", file.name]
        text = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    usage = {key: int(value) for key, value in re.findall(r"\b(REG|STACK|LOCAL):(\d+)", text)}
    return usage["REG"], usage["STACK"] + usage["LOCAL"]
