"""Does fourier_mix compile for its target GPUs: no spills, products in float32?"""

import pytest

from pyfused import tiles
from pyfused.testing.triton_compile import TARGETS, Case, check_resources, compile_cases

MODULE = "pyfused.kernels.triton.fourier_mix"


def cases(target):
    of_features, of_sequence = (
        dict(tiles.find(f"fourier_mix_{name}", target).options) for name in ("features", "sequence")
    )
    warps = of_features.pop("num_warps"), of_sequence.pop("num_warps")
    for kind in ("fp32", "fp16", "bf16"):
        pointers = {"x_ptr": f"*{kind}:16", "cas_ptr": "*fp32:16", "w_ptr": "*fp32:16"}
        sizes = {"items": "i32", "S": "i32", "N": "i32:16", "stride_batch": "i32:16", "stride_row": "i32:16"}
        yield Case(f"features {kind}", f"{MODULE}:_features_kernel", pointers | sizes, of_features, warps[0])
        pointers = {"w_ptr": "*fp32:16", "cas_ptr": "*fp32:16", "y_ptr": f"*{kind}:16"}
        sizes = {"S": "i32:16", "N": "i32:16"}
        yield Case(f"sequence {kind}", f"{MODULE}:_sequence_kernel", pointers | sizes, of_sequence, warps[1])


@pytest.mark.parametrize("target", TARGETS)
def test_triton_fourier_mix(target):
    for name, compiled in compile_cases(list(cases(target)), target).items():
        check_resources(compiled, name, target)
        if target != "gfx942":
            assert "FFMA" in compiled.asm["sass"], f"{name} on {target}"
            assert "HMMA" not in compiled.asm["sass"], f"{name} on {target}: a tensor core's product"
