"""Do linear, ffn and gated_ffn on CUDA compile to what they assume: no spills, weights 16 bytes at a time, enough warps?"""

import re
import shutil

import pytest

from pyfused.testing.cuda_compile import ARCHITECTURES, check_kernel, compile_source

pytestmark = pytest.mark.skipif(shutil.which("nvcc") is None, reason="needs nvcc")


def under_way(kernel, product):
    """The number of 16-byte weight loads past the L1 that are in flight before the first product waits for one."""
    return len(re.findall(r"LDG\.E\.NA\.\S*128", kernel.sass[: kernel.sass.index(product)]))


@pytest.mark.parametrize("architecture", ARCHITECTURES)
@pytest.mark.parametrize("name", ["linear", "gated_ffn"])
def test_weights_are_streamed(name, architecture):
    kernels = compile_source(name, architecture)
    templates = [k.template for k in kernels]
    assert templates.count("stream_kernel") >= 18
    assert templates.count("tensor_kernel") >= 8
    for kernel in kernels:
        check_kernel(kernel)
        if kernel.template == "stream_kernel":
            vector, rows = map(int, kernel.arguments[3:5])
            ahead = 2 if rows <= 4 else 1
            assert under_way(kernel, "FFMA") == (4 * ahead if vector > 1 else 0), kernel
            assert kernel.count("HMMA") == 0
            # Two blocks of 256 threads share a multiprocessor; the one case that would spill gets one block.
            assert kernel.registers <= (255 if "float, __half, 8, 16" in kernel.name else 128), kernel
        elif kernel.template == "tensor_kernel":
            tiles = int(kernel.arguments[2])
            ahead = 2 if tiles == 4 else 4
            assert under_way(kernel, "HMMA") == tiles * ahead, kernel
            assert kernel.count("HMMA.16816.F32") == 2 * tiles * ahead, kernel
            assert kernel.registers <= 128, kernel


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_weights_by_columns_are_streamed(architecture):
    kernels = [k for k in compile_source("linear", architecture) if k.template == "columns_kernel"]
    pairs = [(str(16 // size), "2", rows) for size in (2, 4) for rows in "148"]
    assert {k.arguments[1:] for k in kernels} == {*pairs, ("1", "32", "8")}
    for kernel in kernels:
        check_kernel(kernel)
        assert under_way(kernel, "FFMA") == (4 if kernel.arguments[1] != "1" else 0), kernel
        assert kernel.registers <= 128, kernel  # for 16 warps, or two blocks of 8


@pytest.mark.parametrize("architecture", ARCHITECTURES)
@pytest.mark.parametrize("name, template, inputs", [("ffn", "activation_kernel", 1), ("gated_ffn", "pass_kernel", 2)])
def test_the_pass_between_products_moves_16_bytes_at_a_time(name, template, inputs, architecture):
    kernels = [k for k in compile_source(name, architecture) if k.template == template]
    assert {k.arguments[1:] for k in kernels} == {(v, g) for v in "148" for g in ("true", "false")}
    for kernel in kernels:
        check_kernel(kernel)
        vector, gradient = kernel.arguments[1] != "1", kernel.arguments[2] == "true"
        assert len(re.findall(r"LDG\.\S*128", kernel.sass)) == (inputs + gradient if vector else 0), kernel
        assert (kernel.count("STG.E.128") > 0) == vector, kernel
