"""Does the CUDA fourier_mix compile without spills? A radix-8 butterfly and its twiddles must stay in registers."""

import shutil

import pytest

from pyfused.testing.cuda_compile import ARCHITECTURES, check_kernel, compile_source

pytestmark = pytest.mark.skipif(shutil.which("nvcc") is None, reason="needs nvcc")


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_cuda_fourier_mix(architecture):
    kernels = compile_source("fourier_mix", architecture)
    assert len(kernels) == 6
    assert {k.template for k in kernels} == {"features_kernel", "sequence_kernel"}
    for kernel in kernels:
        check_kernel(kernel)
        assert kernel.count("LDS.64") > 0, kernel  # a complex number is one access
