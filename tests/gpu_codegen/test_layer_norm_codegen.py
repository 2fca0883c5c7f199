"""Does layer_norm compile for the GPUs it is meant for: no spills, 16-byte accesses?"""

import pytest

from pyfused.kernels.triton._row_norm import backward_tile, forward_tile
from pyfused.testing.triton_compile import TARGETS, Case, check_resources, compile_cases

MODULE = "pyfused.kernels.triton._row_norm"
FLAGS = {"HAS_BIAS": True, "HAS_RESIDUAL": True, "SAVE": True, "CENTRED": True}


def signature(pointers, kind, scalars):
    """Aligned pointers of the tensor's dtype, float32 ones for what ends in *, and scalars that are multiples of 16."""
    types = {f"{p.rstrip('*')}_ptr": "*fp32:16" if p.endswith("*") else f"*{kind}:16" for p in pointers.split()}
    return types | {s: "i32" if s in ("rows", "parts", "steps") else "i32:16" for s in scalars.split()}


def forward(kind, n):
    rows, block, warps = forward_tile(n)
    types = signature("x residual weight bias y total mean* rstd*", kind, "rows n x_stride residual_stride")
    constants = {**FLAGS, "ROWS": rows, "BLOCK": block}
    return Case(f"forward {kind} {n}", f"{MODULE}:forward_kernel", types | {"eps": "fp32"}, constants, warps)


def backward(kind, n):
    rows, block, warps = backward_tile(n)
    types = signature("grad_y grad_total x weight mean* rstd* grad_x partial*", kind, "rows n x_stride steps")
    constants = {"HAS_TOTAL": True, "HAS_BIAS": True, "CENTRED": True, "ROWS": rows, "BLOCK": block}
    options = {"enable_fp_fusion": False}
    return Case(f"backward {kind} {n}", f"{MODULE}:backward_kernel", types, constants, warps, options=options)


def long_rows():
    types = signature("x residual weight bias y total mean* rstd*", "fp32", "n x_stride residual_stride")
    yield Case("forward long", f"{MODULE}:forward_long_kernel", types | {"eps": "fp32"}, {**FLAGS, "BLOCK": 4096}, 8)
    types = signature("grad_y grad_total x weight mean* rstd* grad_x", "fp32", "n x_stride")
    yield Case(
        "backward long", f"{MODULE}:backward_long_kernel", types, {"HAS_TOTAL": True, "CENTRED": True, "BLOCK": 4096}, 8
    )
    types = signature("grad_y x mean* rstd* partial*", "fp32", "rows n x_stride steps")
    yield Case(
        "columns", f"{MODULE}:column_sums_kernel", types, {"HAS_BIAS": True, "CENTRED": True, "ROWS": 16, "BLOCK": 256}
    )


def reduce(kind):
    types = signature("partial* grad_weight grad_bias", kind, "parts n")
    return Case("reduce", f"{MODULE}:reduce_kernel", types, {"HAS_BIAS": True, "PARTS": 128, "BLOCK": 32})


CASES = [
    forward("bf16", 768), forward("bf16", 16384),
    backward("bf16", 768), backward("fp32", 1024), backward("fp16", 8192),
    *long_rows(), reduce("bf16"),
]  # fmt: skip


@pytest.mark.parametrize("target", TARGETS)
def test_triton_layer_norm(target):
    for name, compiled in compile_cases(CASES, target).items():
        check_resources(compiled, name, target)
        if target != "gfx942" and name != "reduce":  # LDG.E.128 or LDG.E.EF.128 and the like
            loads = [line for line in compiled.asm["sass"].splitlines() if "LDG" in line and ".128" in line]
            assert loads, f"{name} on {target}: no 16-byte load"
