"""Does decode on CUDA compile to what it assumes: no spills, weights copied past the registers, no atomics but barriers?"""

import shutil
from pathlib import Path

import pytest

from pyfused.testing.cuda_compile import check_kernel, compile_source

pytestmark = pytest.mark.skipif(shutil.which("nvcc") is None, reason="needs nvcc")


FORMS = {"float": "0", "__half": "012", "__nv_bfloat16": "012"}  # of weights: any, plain by rows, plain by columns
SOME = Path(__file__).with_name("some_decode_kernels.cu")


@pytest.mark.parametrize("architecture", ["sm_80", "sm_90a"])
def test_kernels(architecture):
    kernels = compile_source("decode" if architecture == "sm_90a" else SOME, architecture)
    draws = [k for k in kernels if k.template == "draw_kernel"]
    kernels = [k for k in kernels if k.template == "decode_kernel"]
    if architecture == "sm_90a":
        assert {k.arguments[0] for k in draws} == {*FORMS}
        expected = {(dtype, rows, f"(Form){form}") for dtype in FORMS for rows in "1248" for form in FORMS[dtype]}
        assert {k.arguments for k in kernels} == expected
    else:
        assert {k.arguments[1] for k in kernels} == {*"1248"}
        assert {k.arguments[2] for k in kernels} == {f"(Form){form}" for form in "012"}
    for kernel in draws:
        check_kernel(kernel)
        assert kernel.count("LDL") == kernel.count("STL") == 0, kernel
    for kernel in kernels:
        check_kernel(kernel)
        assert kernel.shared <= 1024, kernel  # the chip's own; the rest is dynamic, and test_decode_blocks.py counts it
        assert kernel.registers <= 255, kernel  # for one block of 256 threads on a multiprocessor
        # A step copies 16 bytes of four rows; the ring is filled before the operand comes and refilled in the product.
        assert kernel.count("LDGSTS.E.BYPASS.128") >= 8, kernel
        # Four reads of 16 bytes under way at once, of the keys and values, the branch, the operand and the chunks. By rows a
        # branch has one part, so one row of it is one read.
        least = 14 if kernel.arguments[1:] == ("1", "(Form)1") else 16
        assert kernel.count("LDG.E.128.STRONG.GPU") >= least, kernel
        # For the barrier before the choice: an integer. A draw counts in shared memory, with integers too.
        assert kernel.count("ATOMG") + kernel.count("RED") == 1, kernel
        assert kernel.count("ATOMS.F") == 0, kernel
        assert kernel.count("LDL") == kernel.count("STL") == 0, kernel
