"""Do the inner loops of csrc/cpu have the processor's dot products, and all sums in registers? No machine of the tests may have
the instructions, so the compiler's output is read."""

import functools
import re
import subprocess

import pytest
import shim

ROOT = shim.ROOT
AVX512 = "-mavx512f -mavx512bw -mavx512dq -mavx512vl -mfma -mf16c -mprefer-vector-width=512 -mavx512vnni"
FLAGS = {
    "avx2_vnni": "-mavx2 -mfma -mf16c -mavxvnni",
    "avx512_vnni": AVX512,
    "avx512_bf16": f"{AVX512} -mavx512bf16",
}
# The tile of the gemm, and that of the gemv where the set has it
GEMM = "template void Product<float, float, int8_t, Quads>::outer_tile<2>(const lane32* const*, const float*, int64_t, float*, int64_t, bool);"
PAIRS = """
template void Product<bf16>::outer_tile<2>(const lane32* const*, const float*, int64_t, float*, int64_t, bool);
template void Product<bf16>::dot_tile<4, 3>(int64_t, int64_t, int64_t, float*) const;
"""


@functools.cache
def loops(name):
    """{"outer_tile" or "dot_tile" of Pairs or Quads: the instructions of its loop with the most dot products}"""
    source = '#include "pyfused/gemm.h"\nnamespace pyfused::PYFUSED_ISA {\n' + GEMM + (PAIRS if "bf16" in name else "") + "}"
    flags = "-std=c++17 -O3 -fno-math-errno -fno-trapping-math -ffp-contract=fast -fno-exceptions -fPIC -DPYFUSED_ISA=probe"
    command = [shim.compiler(), "-x", "c++", *flags.split(), *FLAGS[name].split(), f"-I{ROOT / 'csrc' / 'include'}"]
    done = subprocess.run([*command, "-S", "-o", "-", "-"], input=source, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[:3000]
    found = {}
    for function, body in re.findall(r"^(_ZN\w*(?:outer|dot)_tile\w*):\n(.*?)^\t\.cfi_endproc", done.stdout, re.M | re.S):
        kind = ("Pairs" if "Pairs" in function else "Quads") + (" gemm" if "outer_tile" in function else " gemv")
        lines = [line.strip() for line in body.splitlines() if re.match(r"\t[a-z]|\.L\w+:", line)]
        labels = {line[:-1]: i for i, line in enumerate(lines) if line.endswith(":")}
        ranges = [(labels[line.split()[-1]], i) for i, line in enumerate(lines) if line.startswith("j") and line.split()[-1] in labels]
        bodies = [[line for line in lines[a:b] if not line.endswith(":")] for a, b in ranges if a < b]
        found[kind] = max(bodies, key=lambda loop: (sum("vpdpb" in i or "vdpb" in i for i in loop), -len(loop)))
    return found


CASES = [
    ("avx2_vnni", "Quads gemm", "vpdpbusd", "ymm"),
    ("avx512_vnni", "Quads gemm", "vpdpbusd", "zmm"),
    ("avx512_bf16", "Pairs gemm", "vdpbf16ps", "zmm"),
    ("avx512_bf16", "Pairs gemv", "vdpbf16ps", "zmm"),
]


@pytest.mark.parametrize("name, kind, instruction, register", CASES)
def test_the_inner_loop(name, kind, instruction, register):
    loop = loops(name)[kind]
    dots = [line for line in loop if line.startswith(instruction)]
    assert len(dots) in (12, 48), loop
    assert all(register in line for line in dots)
    assert len({line.rsplit("%", 1)[1] for line in dots}) == 12, "each of 12 sums has a register"
    assert not [line for line in loop if "(%rsp" in line or "(%rbp" in line], "a sum is in memory"
    assert len(loop) / len(dots) < 1.8, loop  # loads, and the loop's own
