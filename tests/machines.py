"""Are the results right on older and newer processors? `python tests/machines.py` runs `pyfused verify` and the operators'
tests with fewer instructions for torch and its libraries, several numbers of threads, and each of pyfused's instruction sets.

Only the CPU kernels run: Triton's interpreter and the CUDA sources do not depend on the processor.
"""

import itertools
import os
import subprocess
import sys
from pathlib import Path

from pyfused import extensions

ROOT = Path(__file__).resolve().parents[1]
PRESETS = "gpt2_tiny_en", "t5_tiny_en", "albert_tiny_en", "fnet_tiny_en"

# Limits for torch, oneDNN and MKL. oneDNN's AVX512_CORE lacks the half-precision products of newer processors.
LIBRARIES = {
    "default": {"ATEN_CPU_CAPABILITY": "default", "ONEDNN_MAX_CPU_ISA": "SSE41", "MKL_ENABLE_INSTRUCTIONS": "SSE4_2"},
    "avx2": {"ATEN_CPU_CAPABILITY": "avx2", "ONEDNN_MAX_CPU_ISA": "AVX2", "MKL_ENABLE_INSTRUCTIONS": "AVX2"},
    "avx512": {
        "ATEN_CPU_CAPABILITY": "avx512",
        "ONEDNN_MAX_CPU_ISA": "AVX512_CORE",
        "MKL_ENABLE_INSTRUCTIONS": "AVX512",
    },
    "everything": {},
}
LACKED = {"default": "avx", "avx2": "avx512"}  # how the instruction sets begin that such a processor has not
THREADS = 1, 2

VERIFY = """
import sys, torch
from pyfused.verify import render, verify
torch.set_num_threads(int(sys.argv[1]))
reports = [verify(name) for name in sys.argv[2:]]
print(*map(render, reports), sep="\\n")
sys.exit(not all(report["passed"] for report in reports))
"""


def libraries():
    """The names in LIBRARIES that this processor supports and that differ on it."""
    return [*LIBRARIES] if "avx512" in extensions.cpu_supported() else ["default", "avx2"]


def machines():
    """(library, threads, instruction set of pyfused) to run: all combinations of the first two, then each instruction set
    once. Every operator's test varies the instruction set by itself."""
    isas = extensions.cpu_supported() or [""]
    found = [(*pair, isas[-1]) for pair in itertools.product(libraries(), THREADS)]
    return found + [(libraries()[-1], 1, isa) for isa in isas[:-1]]


def environment(library, threads, isa):
    """Environment variables that imitate such a machine. The processor would choose between library and kernel for each
    product; here one thread always takes the kernels, two threads the library."""
    chosen = {name for names in LIBRARIES.values() for name in names} | {"PYFUSED_BACKEND", "TRITON_INTERPRET"}
    kept = {name: value for name, value in os.environ.items() if name not in chosen}
    named = {"PYFUSED_ISA": isa, "PYFUSED_TEST_THREADS": str(threads)}
    named["PYFUSED_TEST_PRODUCTS"] = "kernels" if threads == 1 else "library"
    # Passive: threads that spin while they wait take minutes on shared cores.
    named |= {"OMP_NUM_THREADS": str(threads), "OMP_WAIT_POLICY": "passive"}
    return kept | LIBRARIES[library] | named


def verified(machine):
    """Runs `pyfused verify` on the bundled presets as on this machine; returns the finished process."""
    command = [sys.executable, "-c", VERIFY, str(machine[1]), *PRESETS]
    return subprocess.run(command, cwd=ROOT, env=environment(*machine), capture_output=True, text=True)


def tested(machine, tests):
    """Runs tests as on this machine, with the CPU kernels that it can have; returns the finished process."""
    left_out = " and ".join(f"not {name}" for name in ("triton", "cuda", *filter(None, [LACKED.get(machine[0])])))
    command = [sys.executable, "-m", "pytest", "-p", "no:cacheprovider", "-k", left_out, *tests]
    return subprocess.run(command, cwd=ROOT, env=environment(*machine), capture_output=True, text=True)


def main():
    failed = []
    for machine in machines():
        for what in ("verify", "operators"):
            done = verified(machine) if what == "verify" else tested(machine, ["tests/ops"])
            name = f"{', '.join(map(str, machine))}: {what}"
            print(f"{name:<60} {'ok' if done.returncode == 0 else 'FAILED'}", flush=True)
            if done.returncode:
                failed.append(name)
                print(done.stdout[-6000:], done.stderr[-3000:], sep="\n", flush=True)
    sys.exit(bool(failed))


if __name__ == "__main__":
    main()
