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
    "avx512_amx": f"{AVX512} -mavx512bf16 -mamx-tile -mamx-bf16 -mamx-int8",
}
# The tile of the gemm, and that of the gemv where the set has it
OUTER = "2, kWeightRows, Nothing>(const lane32*, int64_t, const float*, int64_t, float*, int64_t, bool, Nothing);\n"
GEMM = f"template void outer_tile<Quads, {OUTER}"
PAIRS = f"template void outer_tile<Pairs, {OUTER}"
PAIRS += "template void Sums<bf16, Pairs>::dot_tile<4, 4>(int64_t, int64_t, int64_t, float*) const;\n"

OF_TILES = "(const lane32*, int64_t, const float*, int64_t, float*, int64_t, bool);\n"
AMX = "".join(f"template void multiply_tiles<{kind}, 2>{OF_TILES}" for kind in ("Pairs", "Quads"))


@functools.cache
def loops(name):
    """{"Pairs gemm", "Pairs gemv" or "Quads gemm": the instructions of the tile's inner loop}"""
    tiles = AMX if "amx" in name else GEMM + (PAIRS if "bf16" in name else "")
    includes = '#include "pyfused/gemm_tiles.h"\n#include "pyfused/gemv_tiles.h"\n'
    source = f"{includes}namespace pyfused::PYFUSED_ISA {{\n{tiles}}}"
    flags = f"-std=c++17 -O3 -fno-math-errno -fno-trapping-math -ffp-contract=fast -fno-exceptions -fPIC {FLAGS[name]}"
    include = f"-I{ROOT / 'csrc' / 'include'}"
    command = [shim.compiler(), "-x", "c++", *flags.split(), "-DPYFUSED_ISA=probe", include, "-S", "-o", "-", "-"]
    done = subprocess.run(command, input=source, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[:3000]
    found = {}
    tile = r"^(_ZN\w*(?:outer_tile|dot_tile|multiply_tiles)\w*):\n(.*?)^\t\.cfi_endproc"
    for function, body in re.findall(tile, done.stdout, re.MULTILINE | re.DOTALL):
        kind = "Pairs" if "Pairs" in function else "Quads"
        found[f"{kind} {'gemv' if 'dot_tile' in function else 'gemm'}"] = inner_loop(body)
    return found


def inner_loop(body):
    """The instructions of the loop with the most dot products, of those that hold no other loop."""
    lines = [line.strip() for line in body.splitlines() if re.match(r"\t[a-z{]|\.L\w+:", line)]
    labels = {line[:-1]: i for i, line in enumerate(lines) if line.endswith(":")}
    jumps = [(labels.get(line.split()[-1], len(lines)), i) for i, line in enumerate(lines) if line.startswith("j")]
    back = [jump for jump in jumps if jump[0] < jump[1]]
    inner = [(a, b) for a, b in back if not any(a <= c and d <= b for c, d in back if (c, d) != (a, b))]
    bodies = [[line for line in lines[a : b + 1] if not line.endswith(":")] for a, b in inner]
    return max(bodies, key=lambda loop: sum("dpb" in line for line in loop))


CASES = [
    ("avx2_vnni", "Quads gemm", "vpdpbusd", "ymm", 12),
    ("avx512_vnni", "Quads gemm", "vpdpbusd", "zmm", 24),
    ("avx512_bf16", "Pairs gemm", "vdpbf16ps", "zmm", 24),
    ("avx512_bf16", "Pairs gemv", "vdpbf16ps", "zmm", 16),
    ("avx512_amx", "Pairs gemm", "tdpbf16ps", "tmm", 4),
    ("avx512_amx", "Quads gemm", "tdpbsud", "tmm", 4),
]


@pytest.mark.parametrize("name, kind, instruction, register, sums", CASES)
def test_the_inner_loop(name, kind, instruction, register, sums):
    loop = loops(name)[kind]
    dots = [line for line in loop if instruction in line]
    assert len(dots) in (sums, 8 * sums), loop
    assert all(register in line for line in dots)
    assert len({line.rsplit("%", 1)[1] for line in dots}) == sums, "each sum has a register"
    # An address may be, once in the eight steps of an unrolled loop.
    of_stack = [line for line in loop if "(%rsp" in line or "(%rbp" in line]
    assert not [line for line in of_stack if "mm" in line], "a sum is in memory"
    assert len(of_stack) <= 1
    most = 4.0 if register == "tmm" else 2.8 if kind.endswith("gemv") else 2.0
    assert len(loop) / len(dots) < most, "loads, prefetches, and the loop's own instructions"
