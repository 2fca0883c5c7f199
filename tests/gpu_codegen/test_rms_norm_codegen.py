"""Does rms_norm compile for its target GPUs: no spills, 16-byte accesses?"""

import dataclasses

import pytest
import test_layer_norm_codegen as layer_norm

from pyfused.testing.triton_compile import TARGETS, check_resources, compile_cases


def uncentred(case):
    """The same kernel without a mean and a bias."""
    changed = {name: False for name in ("CENTRED", "HAS_BIAS") if name in case.constexprs}
    return dataclasses.replace(case, constexprs={**case.constexprs, **changed})


@pytest.mark.parametrize("target", TARGETS)
def test_triton_rms_norm(target):
    for name, compiled in compile_cases([uncentred(case) for case in layer_norm.cases(target)], target).items():
        check_resources(compiled, name, target)
        if target != "gfx942" and name != "reduce":
            loads = [line for line in compiled.asm["sass"].splitlines() if "LDG" in line and ".128" in line]
            assert loads, f"{name} on {target}: no 16-byte load"
