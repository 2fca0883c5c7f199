"""Does the compile harness detect spills, vector loads and a kernel that does not compile?"""

import pytest

from pyfused.testing.triton_compile import TARGETS, Case, check_resources, compile_cases

KERNELS = '''
import triton
import triton.language as tl


@triton.jit
def double(x_ptr, y_ptr, n, BLOCK: tl.constexpr):
    i = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    tl.store(y_ptr + i, tl.load(x_ptr + i, mask=i < n) * 2, mask=i < n)


@triton.jit
def heavy(x_ptr, y_ptr, n, BLOCK: tl.constexpr):
    """One warp holds 128 x 128 accumulators: 512 a thread, where a thread has 255 registers."""
    i, j = tl.arange(0, BLOCK), tl.arange(0, 16)
    total = tl.zeros((BLOCK, BLOCK), tl.float32)
    for k in range(0, n):
        a = tl.load(x_ptr + k * BLOCK * 16 + i[:, None] * 16 + j[None, :])
        total = tl.dot(a, tl.trans(a), total)
    tl.store(y_ptr + i[:, None] * BLOCK + i[None, :], total)


@triton.jit
def product(x_ptr, y_ptr, n, BLOCK: tl.constexpr, PRECISION: tl.constexpr):
    i = tl.arange(0, BLOCK)
    place = i[:, None] * BLOCK + i[None, :]
    total = tl.zeros((BLOCK, BLOCK), tl.float32)
    for k in range(0, n):
        total += tl.dot(tl.load(x_ptr + place), tl.load(x_ptr + k + place), input_precision=PRECISION)
    tl.store(y_ptr + place, total)
'''
POINTERS = {"x_ptr": "*bf16:16", "y_ptr": "*bf16:16", "n": "i32:16"}


@pytest.fixture
def kernels(tmp_path, monkeypatch):
    (tmp_path / "pyfused_harness_kernels.py").write_text(KERNELS)
    monkeypatch.syspath_prepend(str(tmp_path))
    return "pyfused_harness_kernels"


@pytest.mark.parametrize("target", TARGETS)
def test_resources_and_vector_loads(kernels, target):
    case = Case("double", f"{kernels}:double", POINTERS, {"BLOCK": 2048})
    scalar = Case("unaligned", case.kernel, {"x_ptr": "*bf16", "y_ptr": "*bf16", "n": "i32"}, case.constexprs)
    compiled = compile_cases([case, scalar], target)
    for name, result in compiled.items():
        check_resources(result, name, target)
        assert 0 < result.registers < 64
    text, wide = ("amdgcn", "load_dwordx4") if target == "gfx942" else ("sass", "LDG.E.128")
    assert wide in compiled["double"].asm[text]
    assert wide not in compiled["unaligned"].asm[text]


def test_a_spill_is_found(kernels):
    case = Case("heavy", f"{kernels}:heavy", {**POINTERS, "y_ptr": "*fp32:16"}, {"BLOCK": 128}, num_warps=1)
    compiled = compile_cases([case], "sm_80")["heavy"]
    assert compiled.spills > 0
    with pytest.raises(AssertionError, match=r"heavy on sm_80: .* spilled"):
        check_resources(compiled, "heavy", "sm_80")


@pytest.mark.parametrize("target", ["sm_80", "sm_90"])
def test_tf32_and_long_chains_of_float32_are_found(kernels, target):
    """Triton moves the addition of a product that starts at zero into the product."""
    types = {"x_ptr": "*fp32:16", "y_ptr": "*fp32:16", "n": "i32"}
    for precision, error in (("tf32", "is in TF32"), ("ieee", "does not start at zero")):
        case = Case(precision, f"{kernels}:product", types, {"BLOCK": 64, "PRECISION": precision}, sass=False)
        compiled = compile_cases([case], target)[precision]
        with pytest.raises(AssertionError, match=f"{precision} on {target}: a float32 product {error}"):
            check_resources(compiled, precision, target)


def test_a_wrong_case_says_its_name(kernels):
    case = Case("wrong", f"{kernels}:double", POINTERS, {})
    with pytest.raises(RuntimeError, match=r"(?s)wrong:.*double takes \['BLOCK', 'n', 'x_ptr', 'y_ptr'\]"):
        compile_cases([case], "sm_90")
