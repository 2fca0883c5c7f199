"""Does decode on CUDA compile to what it assumes: no spills, weights copied past the registers, no atomics but barriers?"""

import shutil

import pytest

from pyfused.testing.cuda_compile import ARCHITECTURES, check_kernel, compile_source

pytestmark = pytest.mark.skipif(shutil.which("nvcc") is None, reason="needs nvcc")


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_kernels(architecture):
    kernels = compile_source("decode", architecture)
    forms = {"float": "0", "__half": "012", "__nv_bfloat16": "012"}  # of weights: any, plain by rows, plain by columns
    expected = {(dtype, rows, f"(Form){form}") for dtype in forms for rows in "1248" for form in forms[dtype]}
    assert {k.arguments for k in kernels} == expected
    for kernel in kernels:
        check_kernel(kernel)
        assert kernel.template == "decode_kernel"
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
