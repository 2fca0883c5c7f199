"""Does rms_norm compile for its target GPUs: no spills, 16-byte accesses?

Its kernels are layer_norm's with less in them. So these are the widest rows, which need the most registers, and a model's.
"""

import dataclasses

import pytest
import test_layer_norm_codegen as layer_norm

from pyfused.testing.triton_compile import TARGETS, check_resources, compile_cases

CASES = ("forward bf16 768", "forward bf16 16384", "backward bf16 768", "backward fp16 8192", "forward long", "columns")


def uncentred(case):
    """The same kernel without a mean and a bias."""
    changed = {name: False for name in ("CENTRED", "HAS_BIAS") if name in case.constexprs}
    return dataclasses.replace(case, constexprs={**case.constexprs, **changed})


@pytest.mark.parametrize("target", TARGETS)
def test_triton_rms_norm(target):
    cases = [uncentred(case) for case in layer_norm.cases(target) if case.name in CASES]
    for name, compiled in compile_cases(cases, target).items():
        check_resources(compiled, name, target)
        if target != "gfx942":
            loads = [line for line in compiled.asm["sass"].splitlines() if "LDG" in line and ".128" in line]
            assert loads, f"{name} on {target}: no 16-byte load"
