"""Does linear with int8 weights compile for its target GPUs: no spills, tensor cores of integers, 16-byte loads of weights?"""

import pytest
import torch

from pyfused import tiles
from pyfused.kernels.triton._product import stream_options
from pyfused.testing.triton_compile import Case, check_resources, compile_cases

MODULE = "pyfused.kernels.triton._product"
DTYPES = {"bf16": torch.bfloat16, "fp16": torch.float16, "fp32": torch.float32}
FLAGS = {"ACTIVATION": "none", "HAS_BIAS": True, "HAS_RESIDUAL": True, "SAVE": False, "HAS_SCALE": True}


def product(name, kernel, kind, tile, scalars, pointers, x=None, **constants):
    """A case of a product kernel; a weight's rows are contiguous, so w_stride_k is 1. x: its type, if that is not `kind`."""
    types = {f"{p}_ptr": f"*{kind}:16" for p in ("bias", "residual", "y", "pre")}
    types |= {"x_ptr": f"*{x or kind}:16", "w_ptr": "*i8:16"} | {f"{p}_ptr": "*fp32:16" for p in pointers.split()}
    types |= dict.fromkeys(("n", "k", "x_stride", "w_stride_n", "residual_stride", *scalars), "i32:16") | {
        "rows": "i32"
    }
    warps, stages = tile.pop("num_warps"), tile.pop("num_stages")
    constants |= {**FLAGS, **tile, "w_stride_k": 1}
    return Case(name, f"{MODULE}:{kernel}", types, constants, warps, stages)


def linear(kind, target, of_integers=False):
    cases = ("integers", "int8", "")[0 if of_integers else 1 :]
    tile = dict(tiles.find("ffn_linear", target, DTYPES[kind], cases=cases).options)
    name = f"linear {kind}{' integers' * of_integers}"
    x = "i8" if of_integers else None
    return product(name, "_linear_kernel", kind, tile, (), "scale step", x, EVEN_K=True)


def stream(kind, rows, split, target):
    tile = stream_options(rows, tiles.find("ffn_stream", target, DTYPES[kind], rows, ("int8", "")))
    return product(f"stream {kind} {rows}", "_stream_kernel", kind, tile, ("share",), "scale partial", SPLIT=split)


def rounding(target):
    tile = dict(tiles.find("linear_rows", target).options)
    types = {"x_ptr": "*bf16:16", "integers_ptr": "*i8:16", "step_ptr": "*fp32:16", "k": "i32:16", "x_stride": "i32:16"}
    return Case("round", "pyfused.kernels.triton.linear:_round_kernel", types, tile, tile.pop("num_warps"))


KERNELS = {
    "integers": lambda chip: linear("bf16", chip, True),
    "many": lambda chip: linear("bf16", chip),
    "few": lambda chip: stream("fp16", 16, True, chip),
    "one": lambda chip: stream("bf16", 1, False, chip),
    "round": rounding,
}


@pytest.mark.parametrize(
    "target, names",
    [("sm_90", "integers many round"), ("sm_80", "few"), ("sm_100", "integers"), ("gfx942", "integers one")],
)
def test_triton_linear(target, names):
    """Every kernel on one target at least. sm_100 has no rows of its own and takes sm_80's."""
    cases = {name: KERNELS[name]("sm_80" if target == "sm_100" else target) for name in names.split()}
    found = compile_cases(list(cases.values()), target)
    compiled = {name: found[case.name] for name, case in cases.items()}
    for name, result in compiled.items():
        check_resources(result, name, target)
    if target == "gfx942":
        assert "v_mfma_i32" in compiled["integers"].asm["amdgcn"]
    elif "integers" in compiled:
        assert {"sm_90": "IGMMA", "sm_100": "MMA"}[target] in compiled["integers"].asm["sass"]
    else:
        text = compiled["few"].asm["sass"]
        assert "HMMA" in text
        assert any("LDG" in line and ".128" in line for line in text.splitlines()), "no 16-byte load"
