"""Does decode on CUDA compile to what it assumes: no spills, weights copied past the registers, no atomics but barriers?"""

import shutil

import pytest

from pyfused.testing.cuda_compile import ARCHITECTURES, check_kernel, compile_source

pytestmark = pytest.mark.skipif(shutil.which("nvcc") is None, reason="needs nvcc")


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_kernels(architecture):
    kernels = compile_source("decode", architecture)
    assert {k.arguments for k in kernels} == {
        (dtype, rows) for dtype in ("float", "__half", "__nv_bfloat16") for rows in "1248"
    }
    for kernel in kernels:
        check_kernel(kernel)
        assert kernel.template == "decode_kernel"
        assert kernel.shared <= 1024, kernel  # the chip's own; the rest is dynamic, and test_decode_blocks.py counts it
        assert kernel.registers <= 255, kernel  # for one block of 256 threads on a multiprocessor
        # A step copies 16 bytes of four rows; the ring is filled before the barrier and refilled in the product.
        assert kernel.count("LDGSTS.E.BYPASS.128") >= 8, kernel
        # Four reads of 16 bytes under way at once, of the keys and values, the branch, the operand and the chunks.
        assert kernel.count("LDG.E.128.STRONG.GPU") >= 16, kernel
        # One for the barriers behind products, behind attention and before the choice: integers. A draw counts in shared memory,
        # with integers too.
        assert kernel.count("ATOMG") + kernel.count("RED") == 3, kernel
        assert kernel.count("ATOMS.F") == 0, kernel
        assert kernel.count("LDL") == kernel.count("STL") == 0, kernel
