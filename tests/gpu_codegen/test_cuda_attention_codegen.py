"""Do attention's CUDA kernels use the tensor cores, copy past the registers, and spill nothing?"""

import shutil
from pathlib import Path

import pytest

from pyfused.testing.cuda_compile import ARCHITECTURES, check_kernel, compile_source, shared_limit

pytestmark = pytest.mark.skipif(shutil.which("nvcc") is None, reason="needs nvcc")

# The number of kernels. For sm_80 they are compiled for this file alone, so some are left out.
SOME = Path(__file__).with_name("some_attention_kernels.cu")
SOURCES = {"attention": 28, "attention_packed": 28, "attention_decode": 15, "attention_float32": 16, SOME: 14}
LEFT_OUT = {"sm_80": {"attention", "attention_packed"}, "sm_90a": {SOME}}
COMPILED = [pytest.param(s, a, id=f"{Path(s).stem}-{a}") for a in ARCHITECTURES for s in SOURCES if s not in LEFT_OUT[a]]


@pytest.mark.parametrize("source, architecture", COMPILED)
def test_kernels(source, architecture):
    kernels = compile_source(source, architecture)
    assert len(kernels) == SOURCES[source]
    for kernel in kernels:
        check_kernel(kernel)
        if kernel.template == "attention_kernel":
            head_size = int(kernel.arguments[1])
            # A tile's two products: the scores, and probabilities times values.
            assert kernel.count("HMMA.16816.F32") >= head_size // 8, kernel.name
            assert kernel.count("LDSM") >= head_size // 16, kernel.name
            assert kernel.count("LDSM.16.MT88") >= head_size // 16, kernel.name
            if kernel.arguments[-1] == "true":
                assert kernel.count("LDGSTS.E.BYPASS.128") >= 4, kernel.name
            else:
                assert kernel.count("LDGSTS") == 0, kernel.name
            assert kernel.count("FFMA") < kernel.count("HMMA") * 4, kernel.name
        elif kernel.template == "float32_kernel":
            assert kernel.count("HMMA") == 0, kernel.name
            assert (kernel.count("LDGSTS.E.BYPASS.128") >= 3) == (kernel.arguments[-1] == "true"), kernel.name
            assert kernel.count("LDS.128") >= 8, kernel.name
            assert kernel.count("FFMA") >= 128, kernel.name
        else:
            assert kernel.template == "combine_kernel"


def tile_bytes(arguments):
    """Bytes of dynamic shared memory of attention_kernel<T, D, MR, WM, WN, BN, STAGES, ...>, without T5's bias."""
    d, mr, wm, _, bn, stages = map(int, arguments[1:7])
    return (wm * mr * 16 + 2 * stages * bn) * d * 2


@pytest.mark.parametrize("source, architecture", COMPILED)
def test_tiles_fit_the_chip(source, architecture):
    """Leaves room for 16 heads' biases by distance, 511 each. Up to D = 128 two blocks share a multiprocessor."""
    for kernel in compile_source(source, architecture):
        if kernel.template == "attention_kernel":
            bytes_ = tile_bytes(kernel.arguments) + kernel.shared
            assert bytes_ + 16 * 511 * 4 <= shared_limit(architecture), kernel.name
            if int(kernel.arguments[1]) <= 128:
                threads = 32 * int(kernel.arguments[3]) * int(kernel.arguments[4])
                assert 2 * threads * kernel.registers <= 65536, kernel.name
                assert 2 * bytes_ <= shared_limit(architecture), kernel.name
