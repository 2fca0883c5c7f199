"""Does the CUDA layer_norm compile as its tiling assumes: no spills, 16 bytes at a time in vector kernels?"""

import shutil

import pytest

from pyfused.testing.cuda_compile import ARCHITECTURES, check_kernel, compile_source

pytestmark = pytest.mark.skipif(shutil.which("nvcc") is None, reason="needs nvcc")


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_cuda_layer_norm(architecture):
    kernels = compile_source("layer_norm", architecture)
    assert len(kernels) >= 30
    walked = {"forward_kernel", "forward_long_kernel", "backward_kernel", "backward_long_kernel", "column_sums_kernel"}
    assert {k.template for k in kernels} == {*walked, "reduce_kernel"}
    for kernel in kernels:
        check_kernel(kernel)
        if kernel.template in walked:  # the second argument is the number of elements per access
            assert (kernel.count("LDG.E.128") > 0) == (kernel.arguments[1] != "1"), kernel
