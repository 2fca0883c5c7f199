"""Does fourier_mix compile for the GPUs it is meant for: no spills, products in float32?"""

import pytest

from pyfused.kernels.triton.fourier_mix import tile
from pyfused.testing.triton_compile import TARGETS, Case, check_resources, compile_cases

MODULE = "pyfused.kernels.triton.fourier_mix"
TILE = {name: value for name, value in tile().items() if name != "num_warps"}


def cases():
    for kind in ("fp32", "fp16", "bf16"):
        pointers = {"x_ptr": f"*{kind}:16", "cas_ptr": "*fp32:16", "w_ptr": "*fp32:16"}
        sizes = {"items": "i32", "S": "i32", "N": "i32:16", "stride_batch": "i32:16", "stride_row": "i32:16"}
        yield Case(f"features {kind}", f"{MODULE}:_features_kernel", pointers | sizes, TILE, tile()["num_warps"])
        pointers = {"w_ptr": "*fp32:16", "cas_ptr": "*fp32:16", "y_ptr": f"*{kind}:16"}
        sizes = {"S": "i32:16", "N": "i32:16"}
        yield Case(f"sequence {kind}", f"{MODULE}:_sequence_kernel", pointers | sizes, TILE, tile()["num_warps"])


@pytest.mark.parametrize("target", TARGETS)
def test_triton_fourier_mix(target):
    for name, compiled in compile_cases(list(cases()), target).items():
        check_resources(compiled, name, target)
        if target != "gfx942":
            assert "FFMA" in compiled.asm["sass"], f"{name} on {target}"
            assert "HMMA" not in compiled.asm["sass"], f"{name} on {target}: a tensor core's product"
