"""Does the CUDA fourier_mix compile without spills, and do FNet's own lengths need no division and 16-byte accesses?"""

import shutil

import pytest

from pyfused.testing.cuda_compile import ARCHITECTURES, check_kernel, compile_source

pytestmark = pytest.mark.skipif(shutil.which("nvcc") is None, reason="needs nvcc")

# The radices of a length's stages, each with one store for each of its outputs
RADICES = {"128": 8 + 8 + 2, "256": 8 + 8 + 4, "512": 8 + 8 + 8, "768": 8 + 8 + 4 + 3, "1024": 8 + 8 + 8 + 2}
# The radix-8 butterflies of a thread along the sequence
BUTTERFLIES = {"128": 1, "256": 1, "512": 2, "1024": 2}


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_cuda_fourier_mix(architecture):
    kernels = compile_source("fourier_mix", architecture)
    assert len(kernels) == 30
    assert {k.template for k in kernels} == {"features_kernel", "sequence_kernel"}
    for kernel in kernels:
        check_kernel(kernel)
        assert kernel.registers <= 85, kernel  # three blocks of 256 threads share a multiprocessor
        assert kernel.count("LDS.64") > 0, kernel  # a complex number is one access
        kind, length = kernel.arguments
        if length == "0":
            continue
        if kernel.template == "features_kernel":
            loads = 8 if kind == "float" else 4  # two rows and their mirrors, the first to leave the L2
            assert kernel.count("LDG.E.EF.128") == loads, kernel
            assert kernel.count("STG.E.128") == 4, kernel
        else:
            assert kernel.count("LDG.E.64") >= 8 * BUTTERFLIES[length], kernel  # a complex number of w is one access
            assert kernel.count("CCTL") > 0, kernel  # w is discarded
        # A butterfly's strides are constants: no reciprocal but those of the loop over work, as in every kernel.
        general = next(k for k in kernels if k.arguments == (kind, "0") and k.template == kernel.template)
        assert kernel.count("MUFU.RCP") <= 4 < general.count("MUFU.RCP"), kernel
        assert kernel.count("STS") >= RADICES[length], kernel
